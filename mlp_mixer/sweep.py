"""Fine-tunes as the paper does: chooses the learning rate, then trains several times.

For each recipe, its grid of learning rates on the part of training that the word
`select` leaves, the best by top-1 on the rest; then all of training with that rate, a
run for each seed, evaluated on the test split. Each run is an ordinary run in a folder
of its own; what is finished is not repeated.
"""

import dataclasses
import logging
import math
import pathlib
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mlp_mixer import (
    console,
    evaluators,
    files,
    metrics,
    models,
    program,
    recipe,
    shipped,
    train,
    visualize,
)
from mlp_mixer.data import preparation, sources
from mlp_mixer.workdir import MAY_CHANGE, check_same, load

logger = logging.getLogger(__name__)

# "Avg 5" of Tables 2 and 3.
FIVE = {
    "imagenet2012": "ImageNet",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "oxford_iiit_pet": "Pets",
    "oxford_flowers102": "Flowers",
}
RESULT = "result.json"  # of a finished run: its recipe and its top-1


class StoppedError(RuntimeError):
    """A run was asked to stop before its end."""


# --- What is to be done ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A recipe, and how it chooses its learning rate.

    Attributes:
      name: name of its folder.
      select: trains on a part and evaluates on the rest of the training split.
      final: trains on all of it and evaluates on the test split.
      learning_rates: to choose from.
    """

    name: str
    select: ConfigDict
    final: ConfigDict
    learning_rates: tuple[float, ...]


def open_task(
    value: str, overrides: Sequence[str] = (), rates: Sequence[float] | None = None
) -> Task:
    """Returns the task of `--config=value`.

    Args:
      value: a recipe's path, its words behind a colon. It has the word `select`, and
        LEARNING_RATES beside its `get_config`.
      overrides: `--config.field=value`.
      rates: learning rates, instead of the recipe's.

    Raises:
      FileNotFoundError: there is no such recipe.
      ValueError: it has no learning rates, or holds out images itself.
    """
    path, words = shipped.find(value)
    if "select" in shipped.split(words or ""):
        raise ValueError(
            f"{value} has the word select, which a sweep adds itself; leave it out."
        )
    rates = rates or recipe.run_file(path).get("LEARNING_RATES")
    if not rates:
        raise ValueError(
            f"{path} has no LEARNING_RATES; give some: --learning_rates=0.01,0.03."
        )

    def config(words: str) -> ConfigDict:
        # As training's own command line reads it.
        config = program.override(recipe.load(f"{path}:{words}"), overrides)
        recipe.check_fields(config)
        models.create(**config.model)  # refuses sizes that do not fit
        return config

    select, final = config(f"{words or ''},select"), config(words or "")
    return Task(shipped.run_name(value), select, final, tuple(sorted(set(rates))))


def watched(config: ConfigDict) -> str:
    """Returns the name of the evaluator that decides: the one that runs in training.

    Raises:
      ValueError: there is not exactly one, or it has no top-1.
    """
    names = list(evaluators.sections(config))
    if len(names) != 1:
        raise ValueError(
            f"The recipe evaluates {', '.join(names) or 'nothing'} in training, and "
            "one accuracy has to decide; set every_steps of the others to 0."
        )
    evaluators.more_is_better(config.evals.to_dict(), f"{names[0]}/top1")
    return names[0]


def check_data(tasks: Iterable[Task], data_dir: str | None) -> None:
    """Passes if what the tasks train and are evaluated on is prepared.

    Raises:
      FileNotFoundError: names what is not, and how to prepare it.
    """
    folder = data_dir or preparation.default_data_dir()
    names: dict[str, None] = {}
    for config in (c for task in tasks for c in (task.select, task.final)):
        evaluation = evaluators.sections(config)[watched(config)]
        names |= dict.fromkeys((config.dataset.name, evaluation["dataset"]["name"]))
    absent = [
        name
        for name in names
        if name.partition(":")[0] not in sources.DATASETS
        and not preparation.find(name, folder)
    ]
    if absent:
        steps = "\n".join(preparation.instructions(name, folder) for name in absent)
        raise FileNotFoundError(
            f"Not prepared in {folder}: {', '.join(absent)}. Prepare them once:\n"
            + "\n".join(dict.fromkeys(steps.splitlines()))
        )


# --- One run --------------------------------------------------------------------------


def finished(config: ConfigDict, workdir: pathlib.Path) -> float | None:
    """Returns top-1 in [0, 1] of a finished run, NaN if it diverged, None if it is not.

    Raises:
      ValueError: the run is of another recipe, or was evaluated otherwise.
    """
    path = workdir / RESULT
    if not path.exists():
        return None
    content = files.read_json(path)
    top1 = content.get("top1", math.inf)
    if not isinstance(content.get("config"), dict) or not (
        top1 is None or (type(top1) in (int, float) and 0 <= top1 <= 1)
    ):
        raise ValueError(f"{path} is no result of a run: remove it to train again.")
    may_change = [field for field in MAY_CHANGE if field != "evals"]
    there = recipe.from_json(content["config"], str(path))
    check_same(there, config, workdir, may_change)
    return math.nan if top1 is None else top1


def complete(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    data_dir: str | None = None,
    trial: bool = False,
) -> float:
    """Trains `config` to its end, unless that is done; returns its top-1 in [0, 1].

    Args:
      config: the recipe.
      workdir: folder of the run; what it holds is resumed.
      data_dir: folder of data sets; None is TFDS's own.
      trial: whether a loss that is not finite is a result, NaN.

    Raises:
      StoppedError: the process was asked to stop.
    """
    top1 = finished(config, workdir)
    if top1 is not None:
        logger.info("%s is finished: top-1 %s", workdir, _percent(top1))
        return top1
    try:
        train.train(config, str(workdir), data_dir=data_dir)
        top1 = _last_top1(config, workdir)
    except FloatingPointError as error:
        if not trial:
            raise
        # The same again would diverge again.
        logger.warning("%s", error)
        top1 = math.nan
    result = {"config": recipe.to_json(config), "top1": _finite(top1)}
    files.write_json(workdir / RESULT, result)
    return top1


def _last_top1(config: ConfigDict, workdir: pathlib.Path) -> float:
    last, key = recipe.total_steps(load(workdir)), f"{watched(config)}/top1"
    scores = [r[key] for r in metrics.read(workdir) if r["step"] == last and key in r]
    if not scores:
        raise StoppedError(f"{workdir} was stopped before its end.")
    return scores[-1]


# --- One task -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task came to; accuracies are top-1 in [0, 1].

    Attributes:
      name: name of the task.
      model: what was fine-tuned, and at which resolution.
      dataset: what was fine-tuned on.
      data: what was evaluated.
      preprocess: its protocol.
      grid: learning rate → accuracy on the held-out part; NaN: diverged. Empty where
        there was one rate only.
      learning_rate: the chosen one.
      seeds: seed → accuracy on the test split.
    """

    name: str
    model: str
    dataset: str
    data: str
    preprocess: str
    grid: Mapping[float, float]
    learning_rate: float
    seeds: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.seeds.values())

    @property
    def std(self) -> float | None:
        """Of the sample; None of a single run."""
        few = len(self.seeds) < 2
        return None if few else statistics.stdev(self.seeds.values())


def choose(grid: Mapping[float, float]) -> float:
    """Returns the learning rate of the highest accuracy; of equals, the lowest.

    Raises:
      ValueError: all diverged.
    """
    finite = [rate for rate, accuracy in grid.items() if not math.isnan(accuracy)]
    if not finite:
        rates = ", ".join(f"{rate:g}" for rate in grid)
        raise ValueError(
            f"All learning rates diverged ({rates}); try lower ones: --learning_rates."
        )
    return max(sorted(finite), key=lambda rate: grid[rate])


def run(
    task: Task,
    folder: pathlib.Path,
    *,
    seeds: int,
    data_dir: str | None = None,
    drop_checkpoints: bool = False,
) -> Result:
    """Chooses the learning rate, trains with it, and returns what came out.

    Args:
      task: what to run.
      folder: the runs are below it, in `<task>/`.
      seeds: number of final runs.
      data_dir: folder of data sets; None is TFDS's own.
      drop_checkpoints: whether to delete those of a finished run of the grid.
    """
    rates = task.learning_rates if len(task.learning_rates) > 1 else ()
    here, count = folder / task.name, len(rates) + seeds
    grid = {}
    for i, rate in enumerate(rates):
        config = task.select.copy_and_resolve_references()
        config.optim.learning_rate = rate
        workdir = here / f"select-{rate:g}"
        logger.info("%s, run %d of %d", workdir, i + 1, count)
        grid[rate] = complete(config, workdir, data_dir=data_dir, trial=True)
        if drop_checkpoints and (workdir / "checkpoints").exists():
            shutil.rmtree(workdir / "checkpoints")
    best = choose(grid) if grid else task.learning_rates[0]
    scores = {}
    for seed in range(seeds):
        config = task.final.copy_and_resolve_references()
        config.optim.learning_rate, config.seed = best, seed
        workdir = here / f"final-{best:g}-seed-{seed}"
        logger.info("%s, run %d of %d", workdir, len(rates) + seed + 1, count)
        scores[seed] = complete(config, workdir, data_dir=data_dir)
    evaluation = evaluators.sections(task.final)[watched(task.final)]
    height, width = task.final.model.image_size
    start = task.final.init_from or "nothing"
    return Result(
        name=task.name,
        model=f"{task.final.model.name} from {start}, {height}x{width}",
        dataset=task.final.dataset.name,
        data="{name} {split}".format(**evaluation["dataset"]),
        preprocess=evaluation["preprocess"],
        grid=grid,
        learning_rate=best,
        seeds=scores,
    )


# --- What is written ------------------------------------------------------------------

Means = Callable[[Sequence[Result]], dict[str, float]]


def average_5(results: Sequence[Result]) -> dict[str, float]:
    """The paper's "Avg 5" of each model, resolution and protocol with all five sets."""
    return {
        f"Avg 5 of {of}": statistics.fmean(found.values())
        for of, found in _of_five(results).items()
        if len(found) == len(FIVE)
    }


def _of_five(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """{model, resolution and protocol: {data set: accuracy}} of the five sets."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        if result.dataset in FIVE:
            of = f"{result.model}, {result.preprocess}"
            found.setdefault(of, {})[result.dataset] = result.mean
    return found


def table_of_five(results: Sequence[Result]) -> list[list[str]]:
    """Rows like the paper's Table 3, a model each, with what is known so far."""
    means = average_5(results)
    return [
        [
            of,
            *(
                _percent(x)
                for x in (*map(found.get, FIVE), means.get(f"Avg 5 of {of}"))
            ),
        ]
        for of, found in _of_five(results).items()
    ]


COLUMNS = ["", "top-1", "±", "runs", "learning rate", "tried on held-out images", "of"]


def table(
    folder: pathlib.Path, results: Sequence[Result], means: Mapping[str, float]
) -> console.Table:
    """The table, in per cent; ± is the standard deviation over seeds."""
    rows = [
        [
            result.name,
            _percent(result.mean),
            "" if result.std is None else f"{100 * result.std:.2f}",
            str(len(result.seeds)),
            f"{result.learning_rate:g}",
            ", ".join(f"{r:g}: {_percent(a)}" for r, a in result.grid.items()),
            f"{result.data} ({result.preprocess})",
        ]
        for result in results
    ]
    blank = [""] * (len(COLUMNS) - 2)
    rows += [[name, _percent(mean), *blank] for name, mean in means.items()]
    return console.Table(str(folder), COLUMNS, rows)


def _percent(accuracy: float | None) -> str:
    if accuracy is None:
        return ""
    return "diverged" if math.isnan(accuracy) else f"{100 * accuracy:.2f} %"


def write_results(
    folder: pathlib.Path, results: Sequence[Result], means: Mapping[str, float]
) -> None:
    """Writes sweep.json, sweep.md and sweep.png to `folder`."""
    grids = {r.name: {x: _finite(a) for x, a in r.grid.items()} for r in results}
    fields = [
        dataclasses.asdict(r) | {"grid": grids[r.name], "mean": r.mean, "std": r.std}
        for r in results
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "sweep.json", {"results": fields, "means": dict(means)})
    tables = [table(folder, results, means)]
    if five := table_of_five(results):
        tables.append(console.Table("", ["", *FIVE.values(), "Avg 5"], five))
    files.write_text(folder / "sweep.md", "\n".join(t.markdown() for t in tables))
    if curves := {name: grid for name, grid in grids.items() if grid}:
        chosen = {result.name: result.learning_rate for result in results}
        picture = visualize.png(visualize.learning_rates(curves, chosen))
        (folder / "sweep.png").write_bytes(picture)


def _finite(accuracy: float) -> float | None:
    return None if math.isnan(accuracy) else accuracy


# --- All of it ------------------------------------------------------------------------


def run_all(
    tasks: Sequence[Task],
    folder: pathlib.Path,
    *,
    data_dir: str | None = None,
    means: Means = average_5,
    **options: Any,
) -> None:
    """Runs the tasks one after the other and writes what is known after each.

    Args:
      tasks: tasks of different names.
      folder: the runs are below it, and sweep.md, sweep.json and sweep.png in it.
      data_dir: where data sets are; TFDS's own folder by default.
      means: results so far → {name: mean}.
      **options: seeds and drop_checkpoints, as in `run`.

    Raises:
      FileNotFoundError: data is missing, all of it named before anything is run.
      ValueError: two tasks of one name.
    """
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} would share a folder; name each once.")
    check_data(tasks, data_dir)
    results: list[Result] = []
    for i, task in enumerate(tasks):
        logger.info("%s (%d of %d)", task.name, i + 1, len(tasks))
        try:
            results.append(run(task, folder, data_dir=data_dir, **options))
        except (Exception, KeyboardInterrupt):
            command = shlex.join(["python", *sys.argv])
            logger.error("Not finished. What is done is kept; go on with\n%s", command)
            raise
        write_results(folder, results, means(results))
    logger.info("Wrote sweep.md, sweep.json and sweep.png to %s.", folder)
    table(folder, results, means(results)).show()
