"""Runs a recipe's evaluators on a checkpoint, and draws the run.

    python -m mlp_mixer.evaluate --workdir=runs/digits
    python -m mlp_mixer.evaluate --workdir=runs/mixer_b16 --only=val,real,v2
    python -m mlp_mixer.evaluate --workdir=runs/mixer_b16 --only=all --preprocess=timm

Prints a table, which says what each evaluator looked at and under which protocol, and
one of where the run's time went; writes evaluate.json, evaluate.md and report.png to
the run's folder. evaluate.json holds every name exactly; the other ones are for people,
and there characters that cannot be shown are escaped.
"""

from mlp_mixer import supervisor

if __name__ == "__main__":  # before the imports that take seconds
    supervisor.supervise(saves=False)

import logging
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from mlp_mixer import (
    console,
    evaluators,
    files,
    goodput,
    metrics,
    processes,
    program,
    runs,
    visualize,
)
from mlp_mixer.evaluators import accuracy
from mlp_mixer.workdir import load, load_class_names

logger = logging.getLogger(__name__)

SHEET = 40  # images of the report's sheet


def evaluate(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    best: str | None = None,
    ema: bool | None = None,
    only: Sequence[str] | None = None,
    preprocess: str | None = None,
    dtype: str | None = None,
    data_dir: str | None = None,
) -> dict[str, dict[str, float]]:
    """Returns {evaluator: {metric: value}} of one checkpoint.

    Args:
      workdir: folder of the run.
      step: step of the checkpoint; the newest by default.
      best: a metric that chooses it instead, e.g. "val/top1".
      ema: whether all of them look at the averaged parameters, or at the last ones,
        instead of each one's own.
      only: names of the recipe's evaluators, or "all"; by default those that ran in
        training.
      preprocess: a key of `data.image_ops.PROTOCOLS` for all of them, instead of each
        one's own.
      dtype: dtype of activations and products, instead of the recipe's.
      data_dir: where data sets are; TFDS's own folder by default.

    Raises:
      FileNotFoundError: no run or no checkpoint there; or no data for an evaluator:
        raised at the end, when the others have run and their results are written (at
        once in a run of several processes).
      ValueError: the recipe has no such evaluators.
    """
    workdir = epath.Path(workdir).expanduser()
    with processes.together():
        load(workdir)  # is a run, or the message says what is none
    run = runs.open_model(workdir, step=step, best=best, ema=ema, dtype=dtype)
    last = run.variables
    evals: dict[str, evaluators.Evaluator] = {}
    missing = {}
    with processes.together():
        names = load_class_names(workdir)
        sections = evaluators.sections(run.config, only, names)
        if not run.config.evals:
            raise ValueError(
                f"The recipe of {workdir} has no evaluators, so nothing says which "
                "data to evaluate on; `evals` in its config.json would."
            )
        if not sections:
            raise ValueError(
                f"No evaluator of the recipe of {workdir} runs by itself; name some "
                f"with --only ({', '.join(run.config.evals)})."
            )
        if left := [name for name in run.config.evals if name not in sections]:
            logger.info("Left out: %s (--only=all runs everything).", ", ".join(left))
        for name, section in sections.items():
            if preprocess is not None:
                section["preprocess"] = preprocess
            if ema is not None:
                section["ema"] = ema
            try:
                evals |= evaluators.create(
                    {name: section},
                    predict=run.predict,
                    mesh=run.mesh,
                    image_size=run.config.model.image_size,
                    data_dir=data_dir,
                )
            except FileNotFoundError as error:
                if jax.process_count() > 1:  # the others may have the data
                    raise
                missing[name] = str(error)
                logger.warning("%s is left out: its data is not here.", name)
    both = ema is None and run.config.optim.ema
    if both and not all(evaluator.ema for evaluator in evals.values()):
        other = runs.open_model(workdir, step=run.step, ema=False, dtype=dtype)
        last = other.variables
    if jax.process_count() > 1:
        processes.compare(evaluators=sections, data=runs.fingerprints(evals))
    results: dict[str, dict[str, float]] = {}
    drawn: tuple[str, accuracy.Examples] | None = None
    for name, evaluator in evals.items():
        variables = run.variables if evaluator.ema else last
        result = evaluator.run(variables, track=console.progress(name))
        if result is None:  # nothing asks it to stop
            continue
        results[name] = result.metrics
        if drawn is None and result.examples is not None:
            drawn = name, result.examples
    results = evaluators.across(evals, results)
    if evals and jax.process_index() == 0:
        records = _records(workdir)
        tables = [_results_table(workdir, run, evals, results)]
        if rows := goodput.rows(records):
            title = f"{workdir}: where the time went"
            tables.append(console.Table(title, ["", "time", "share"], rows))
        try:
            _write_results(workdir, run, evals, results, records, tables)
            if drawn:
                _write_report(workdir, run, records, *drawn)
        finally:
            # Also where the folder cannot be written; last, since stdout may fail.
            for table in tables:
                table.show()
    if missing:
        raise FileNotFoundError(
            "\n".join(f"{name} was not evaluated: {m}" for name, m in missing.items())
        )
    return results


def _records(folder: epath.Path) -> list[dict[str, Any]]:
    """The run's records; none if they cannot be read, and the log says why."""
    try:
        return metrics.read(folder)
    except (OSError, ValueError) as error:
        # What was measured is no worse for it.
        logger.warning("Neither curves nor times are shown: %s", error)
        return []


def _write_report(
    folder: epath.Path,
    run: runs.Opened,
    records: visualize.Records,
    name: str,
    examples: accuracy.Examples,
) -> None:
    """Draws report.png; where it cannot be drawn, the log says why."""
    path = folder / "report.png"
    try:
        shown = visualize.mistakes_first(examples, SHEET)
        figure = visualize.report(
            records,
            name=name,
            examples=examples,
            shown=shown,
            images=[examples.image(int(i)) for i in shown],
            truths=[examples.labels(int(i)) for i in shown],
            class_names=run.class_names,
        )
        path.write_bytes(visualize.png(figure))
    except (OSError, RuntimeError, ValueError) as error:
        # The results are written; a picture of them is no reason to fail.
        logger.warning("%s is not drawn: %s", path, error)
    else:
        logger.info("Wrote %s.", path)


def _results_table(
    folder: epath.Path,
    run: runs.Opened,
    evals: dict[str, evaluators.Evaluator],
    results: dict[str, dict],
) -> console.Table:
    """The results for people, evaluators side by side: few of them, many metrics."""
    shown = {name: evals[name].shown(result) for name, result in results.items()}
    parameters = ["averaged" if evals[name].ema else "last" for name in results]
    found = dict.fromkeys(metric for texts in shown.values() for metric in texts)
    rows = [
        ["data", *(evals[name].data for name in results)],
        ["preprocess", *(evals[name].preprocess for name in results)],
        *([["parameters", *parameters]] if run.config.optim.ema else []),
        *([m, *(texts.get(m, "") for texts in shown.values())] for m in found),
    ]
    size = " × ".join(map(str, run.config.model.image_size))
    title = f"{folder} at step {run.step}: {run.config.model.name}, {size}"
    return console.Table(title, ["", *results], rows)


def _write_results(
    folder: epath.Path,
    run: runs.Opened,
    evals: dict[str, evaluators.Evaluator],
    results: dict[str, dict],
    records: visualize.Records,
    tables: Sequence[console.Table],
) -> None:
    """Writes evaluate.json and evaluate.md."""
    content = {
        "workdir": str(folder),
        "step": run.step,
        "model": run.config.model.name,
        "image_size": list(run.config.model.image_size),
        "evaluators": {
            k: {"data": e.data, "preprocess": e.preprocess}
            | ({"averaged": e.ema} if run.config.optim.ema else {})
            for k, e in evals.items()
        },
        "results": results,
        "seconds": goodput.sums(records),
    }
    files.write_json(folder / "evaluate.json", content)
    markdown = "\n".join(table.markdown() for table in tables)
    files.write_text(folder / "evaluate.md", markdown)
    logger.info("Wrote evaluate.json and evaluate.md to %s.", folder)


def main(arguments: list[str]) -> None:
    """The command line."""
    program.check_no_words(arguments)
    options = ("step", "best", "ema", "only", "preprocess", "dtype", "data_dir")
    values = flags.FLAGS.flag_values_dict()
    evaluate(values["workdir"], **{name: values[name] for name in options})


if __name__ == "__main__":
    program.define_path("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer(
        "step", None, "Of the checkpoint; the newest if not set.", lower_bound=0
    )
    flags.DEFINE_string("best", None, "Instead: the best by this metric (val/top1).")
    program.define_ema()
    flags.DEFINE_list(
        "only", None, "Evaluators by name, or all; if not set, those of training."
    )
    flags.DEFINE_string("preprocess", None, "One protocol for all, e.g. timm.")
    program.define_dtype()
    program.define_path("data_dir", None, "Folder of data sets; TFDS's own if not set.")
    program.run(main, distributed=True)
