"""Runs a recipe's evaluators on a checkpoint, and draws the run.

    python -m mlp_mixer.evaluate --workdir=runs/digits

Prints one table; writes evaluate.json and report.png to the run's folder.
"""

import json
import logging
from typing import Any

import jax
from absl import flags
from etils import epath

from mlp_mixer import evaluators, metrics, program, recipe, runs, visualize

logger = logging.getLogger(__name__)

SHEET = 40  # images of the report's sheet


def evaluate(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    best: str | None = None,
    data_dir: str | None = None,
) -> dict[str, dict[str, float]]:
    """Returns {evaluator: {metric: value}} of one checkpoint.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; the newest by default.
      best: a metric that chooses it instead, e.g. "val/top1".
      data_dir: where data sets are; TFDS's own folder by default.

    Raises:
      FileNotFoundError: no run, no checkpoint or no data there.
      ValueError: the recipe has no evaluators.
    """
    run = runs.open_run(workdir, step, best)
    if not run.config.evals:
        raise ValueError(f"The recipe of {workdir} has no evaluators (config.evals).")
    evals = evaluators.create(
        recipe.evaluations(run.config),
        predict=run.predict,
        mesh=run.mesh,
        loss=run.config.loss,
        image_size=run.config.model.image_size,
        data_dir=data_dir,
    )
    results: dict[str, dict[str, float]] = {}
    report: dict[str, Any] = {}
    for name, evaluator in evals.items():
        examples = evaluator.examples(run.params, track=metrics.progress(name))
        results[name] = evaluator.summary(examples)
        if not report:
            shown = visualize.mistakes_first(examples, SHEET)
            report = {
                "name": name,
                "examples": examples,
                "shown": shown,
                "images": [evaluator.image(int(examples.index[i])) for i in shown],
            }
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        said = {"workdir": str(workdir), "step": run.step, "results": results}
        (folder / "evaluate.json").write_text(json.dumps(said, indent=2) + "\n")
        figure = visualize.report(
            metrics.read(workdir), class_names=run.class_names, **report
        )
        (folder / "report.png").write_bytes(visualize.png(figure))
        columns = list(dict.fromkeys(key for r in results.values() for key in r))
        metrics.table(
            f"{workdir} at step {run.step}",
            ["", *columns],
            [[k, *(_said(c, r.get(c)) for c in columns)] for k, r in results.items()],
        )
        logger.info("Wrote %s.", folder / "report.png")
    return results


def _said(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric.startswith("top"):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def main(arguments: list[str]) -> None:
    """The command line."""
    del arguments
    evaluate(
        flags.FLAGS.workdir,
        step=flags.FLAGS.step,
        best=flags.FLAGS.best,
        data_dir=flags.FLAGS.data_dir,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Of the checkpoint; the newest if not set.")
    flags.DEFINE_string("best", None, "Instead: the best by this metric (val/top1).")
    flags.DEFINE_string("data_dir", None, "Folder of data sets; TFDS's own if not set.")
    program.run(main, distributed=True)
