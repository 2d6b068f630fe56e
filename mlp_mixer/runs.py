"""A run's folder explains itself: its recipe, its classes, its checkpoints."""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlp_mixer import (
    checkpoint,
    evaluators,
    files,
    history,
    models,
    ownership,
    paper,
    pretrained,
    processes,
    recipe,
    sharding,
    steps,
)
from mlp_mixer.data import class_names as naming
from mlp_mixer.data import sources
from mlp_mixer.fingerprints import describe, fingerprint
from mlp_mixer.fingerprints import differences as differences_of_arrays
from mlp_mixer.text import listed

logger = logging.getLogger(__name__)


# Fields that may change between two starts of one run: they move no result (beyond
# the order of float additions), or only what is looked at and kept.
MAY_CHANGE = (
    "mesh",
    "sharding",
    "accumulate",
    "input.workers",
    "model.scan",
    "model.remat",
    "log_every_steps",
    "evals",
    "checkpoint",
)


class Run(NamedTuple):
    """The recipe and a checkpoint of a run, on all devices."""

    config: ConfigDict
    mesh: Mesh
    predict: Callable[[Any, Any], dict[str, jax.Array]]  # steps.make_predict
    variables: dict[str, Any]  # what predict takes
    step: int
    class_names: list[str]


def open_run(
    workdir: epath.PathLike, step: int | None = None, best: str | None = None
) -> Run:
    """Opens the run in `workdir` with its newest intact checkpoint.

    Args:
      workdir: a folder that `train` has written.
      step: another checkpoint, by its step.
      best: another checkpoint, the best by this metric, e.g. "val/top1".

    Raises:
      FileNotFoundError: no run or no checkpoint there.
      ValueError: the processes see different runs or checkpoints; or `best` is no
        score of an evaluator that runs in training.
    """
    workdir = epath.Path(workdir).expanduser()
    with processes.together():
        config = load(workdir)
        more = best is None or evaluators.more_is_better(config.evals.to_dict(), best)
        mesh = sharding.make_mesh()
        model = models.create(
            **config.model,
            num_classes=config.dataset.num_classes,
            flat=sharding.is_one_cpu(mesh),
        )
        image = jnp.zeros((1, *config.model.image_size, 3))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
        count = config.dataset.num_classes
        named = load_class_names(workdir, count) if count else None
        names = list(naming.choose(named, count)) if count else []
    several = jax.process_count() > 1  # each reads for itself
    if several:
        has = bool(history.checkpoints(workdir))
        said = {"recipe": to_json(config), "class_names": names, "checkpoints": has}
        processes.compare(**said, step=step, best=best)
    step, params = checkpoint.restore_params(
        f"{workdir}/checkpoints", step=step, best=best, more_is_better=more
    )
    params = pretrained.cast(params, "float32")
    if different := differences_of_arrays(describe(params), describe(shapes)):
        raise ValueError(
            f"Step {step} of {workdir} is not of its recipe's model; these arrays "
            f"differ:\n{different}"
        )
    if several:
        processes.compare(step=step, weights=sum(fingerprint(params).values()))
    params = sharding.place(params, sharding.shardings(params, mesh, config.sharding))
    logger.info("%s: %s at step %d", workdir, config.model.name, step)
    variables = {"params": params}
    return Run(config, mesh, steps.make_predict(model, mesh), variables, step, names)


class Opened(NamedTuple):
    """Weights from anywhere as a model that predicts, on all devices."""

    said: str  # where they come from, for people
    mesh: Mesh
    predict: Callable[[Any, Any], dict[str, jax.Array]]  # steps.make_predict
    variables: dict[str, Any]  # what predict takes
    image_size: tuple[int, int]  # height and width in pixels
    preprocess: str  # a key of data.image_ops.PROTOCOLS
    class_names: tuple[str, ...]  # none without a head


def open_model(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    preprocess: str | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> Opened:
    """Opens weights for prediction, in float32, and says what they are in the log.

    Args:
      source: of `pretrained.read`: a run's folder, a file or a published name.
      step: of a run's checkpoint; the newest by default.
      preprocess: a key of `data.image_ops.PROTOCOLS`; by default the one that the run
        was evaluated with, else "big_vision".
      labels: a text file with the names of the classes, one a line.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: they are no weights of an MLP-Mixer, do not say their image size, or
        have another number of classes than `labels`.
    """
    weights = pretrained.read(source, step=step)
    size = pretrained.check(weights)
    count = pretrained.geometry(weights.params)["num_classes"]
    if count is None and labels is not None:
        raise ValueError(f"{source} has no head, so no classes for {labels} to name.")
    names = naming.choose(weights.class_names, count, labels=labels) if count else ()
    mesh = sharding.make_mesh()
    model = pretrained.create_model(weights, flat=sharding.is_one_cpu(mesh))
    protocol = preprocess or weights.preprocess or "big_vision"
    height, width = size
    said = weights.called
    logger.info("%s: %dx%d px, preprocessed by %s", said, height, width, protocol)
    return Opened(
        said,
        mesh,
        steps.make_predict(model, mesh),
        {
            "params": sharding.place(
                weights.params, sharding.shardings(weights.params, mesh, "replicated")
            )
        },
        (height, width),
        protocol,
        names,
    )


def check_agreement(
    config: ConfigDict, data: dict[str, Any], evals: Mapping[str, Any]
) -> None:
    """Passes if all processes of this run have the same recipe, data and JAX.

    Args:
      config: with every field resolved.
      data: `sources.fingerprint` of the training data.
      evals: of `evaluators.create`.

    Raises:
      ValueError: they differ; names each difference, its values and the processes.
    """
    if jax.process_count() == 1:
        return
    processes.compare(
        recipe=to_json(config),
        data=data,
        evals=fingerprints(evals),
        jax=jax.__version__,
        devices=jax.local_device_count(),
    )


def fingerprints(evals: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{evaluator: `sources.fingerprint` of what it reads}, or an error for all."""
    with processes.together():
        return {
            name: [sources.fingerprint(source) for source in evaluator.sources]
            for name, evaluator in evals.items()
        }


@contextlib.contextmanager
def claimed(
    config: ConfigDict,
    workdir: epath.PathLike,
    class_names: Sequence[str] | None = None,
    data: dict[str, Any] | None = None,
    *,
    accept_changed_data: bool = False,
) -> Iterator[tuple[Callable[[int | None], None], Callable[[], None]]]:
    """Owns the folder of a run until the end of the block, and claims it, see `claim`.

    Yields:
      `note_saved(step)`, to be called with the newest step that is saved; and
      `check_owned()`, to be called before a save, see `ownership.owned`.

    Raises:
      OwnedError: another process trains there.
      FileNotFoundError: a part of the run there is missing.
      ValueError: another recipe's run, or the processes see different folders.
    """
    with ownership.owned(workdir) as check_owned:
        saved = None
        with processes.together():
            if jax.process_index() == 0:
                saved = claim(
                    config,
                    workdir,
                    class_names,
                    data,
                    accept_changed_data=accept_changed_data,
                )
        yield saved.note if saved else lambda _: None, check_owned


def claim(
    config: ConfigDict,
    workdir: epath.PathLike,
    class_names: Sequence[str] | None = None,
    data: dict[str, Any] | None = None,
    *,
    accept_changed_data: bool = False,
) -> history.Saved:
    """Writes what a run is to `workdir`, or checks that it is the one there.

    That is the resolved recipe; the names of its classes, which stay as they are once
    the run has begun; and what its training data is.

    Args:
      config: with every field resolved.
      workdir: folder of the run.
      class_names: of the training data, by label.
      data: `sources.fingerprint` of the training data; None: it is not recorded.
      accept_changed_data: see `check`.

    Returns:
      What notes the saved steps there.

    Raises:
      FileNotFoundError: as `check`.
      ValueError: as `check`; or the run has other classes.
    """
    check(config, workdir, data, accept_changed_data=accept_changed_data)
    folder = epath.Path(workdir)
    begun = history.has_begun(workdir)
    naming.places(class_names, trained_classes(workdir), **_sides(config, workdir))
    folder.mkdir(parents=True, exist_ok=True)
    new: dict[str, Any] = {"config": to_json(config)}
    if not begun or not (folder / "class_names.json").exists():
        new["class_names"] = class_names
    if data is not None:
        new["data"] = data
        if begun:
            _say_what_is_recorded(workdir, _recorded_data(folder), data)
    for name, content in new.items():
        # Whole or not at all, also if the process is killed here.
        # Processes of several hosts may have equal numbers.
        written = folder / f"{name}.json.{uuid.uuid4().hex}"
        written.write_text(json.dumps(content, indent=2) + "\n")
        written.replace(folder / f"{name}.json")
    return history.Saved(workdir)


def check(
    config: ConfigDict,
    workdir: epath.PathLike,
    data: dict[str, Any] | None = None,
    *,
    accept_changed_data: bool = False,
) -> None:
    """Passes if `workdir` holds no result, or a run of this recipe and data.

    Args:
      config: with every field resolved.
      workdir: folder of the run.
      data: `sources.fingerprint` of the training data; None: it is not compared.
      accept_changed_data: whether other examples of the same classes are no error.

    Raises:
      FileNotFoundError: a part of the run is missing.
      ValueError: another recipe's run, lists the fields that differ; or its training
        data has changed, says how.
    """
    _check_recipe(config, workdir, data, accept_changed_data)
    folder = epath.Path(workdir)
    recorded = _recorded_data(folder) if history.has_begun(workdir) else None
    if recorded is None or data is None or accept_changed_data:
        return
    if changed := sources.changes(recorded, data):
        raise ValueError(
            f"The training data of {workdir} has changed:\n  "
            + "\n  ".join(changed)
            + "\nBring the old data back, choose another --workdir, or go on with the "
            "new data: --accept_changed_data."
        )


def training_data(
    source: sources.Source,
    config: ConfigDict,
    workdir: epath.PathLike,
    data: dict[str, Any],
    *,
    accept_changed_data: bool = False,
) -> sources.Source:
    """The training data with the classes of the run in `workdir`, if it has begun.

    Args:
      source: its labels are mapped to the run's by name.
      config: with every field resolved.
      workdir: folder of the run.
      data: `sources.fingerprint(source)`.
      accept_changed_data: see `check`.

    Raises:
      ValueError: as `check`; or the run has other classes.
    """
    names = trained_classes(workdir)
    # Where both have names, those say better than their number which classes differ.
    named = ("dataset.num_classes",) if names and source.class_names else ()
    _check_recipe(config, workdir, data, accept_changed_data, may_change=named)
    if names is not None:
        sides = _sides(config, workdir)
        source = sources.with_classes(source, names, len(names), **sides)
    check(config, workdir, data, accept_changed_data=accept_changed_data)
    return source


def _check_recipe(
    config: ConfigDict,
    workdir: epath.PathLike,
    data: dict[str, Any] | None,
    accept_changed_data: bool,
    may_change: Sequence[str] = (),
) -> None:
    folder = epath.Path(workdir)
    path = folder / "config.json"
    if not history.has_begun(workdir):
        return
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds a run, but its config.json is missing, which says of "
            "which recipe. Bring it back, or choose another --workdir."
        )
    history.check(workdir, load(workdir).checkpoint.every_steps)
    may_change = (*MAY_CHANGE, *may_change)
    if accept_changed_data or (data is not None and _recorded_data(folder)):
        # The fingerprints say it better: of each class, or each shard.
        may_change = (*may_change, "dataset.num_examples")
    if differing := differences(
        to_json(recipe.read(path)), to_json(config), may_change
    ):
        raise ValueError(
            f"{workdir} holds a run of another recipe:\n"
            + listed([line.strip() for line in differing], 17)
            + "\nChoose another --workdir, or give the fields their old values."
        )


def _say_what_is_recorded(
    workdir: epath.PathLike, recorded: dict[str, Any] | None, data: dict[str, Any]
) -> None:
    if recorded is None:
        logger.info(
            "%s does not say what its training data was, so that cannot be compared; "
            "from now on it does.",
            workdir,
        )
    elif changed := sources.changes(recorded, data):
        said = "\n  ".join(changed)
        logger.warning("%s goes on with changed data:\n  %s", workdir, said)


def trained_classes(workdir: epath.PathLike) -> list[str] | None:
    """The names of the classes of a run that has begun, if they have names."""
    folder = epath.Path(workdir)
    if not (folder / "class_names.json").exists() or not history.has_begun(workdir):
        return None
    return load_class_names(workdir)


def _sides(config: ConfigDict, workdir: epath.PathLike) -> dict[str, str]:
    """What to call the training data and the run where their classes differ."""
    return {
        "of": f"{config.dataset.name} {config.dataset.split}",
        "to": f"the run in {workdir}",
        "hint": "Give the classes their old names, or choose another --workdir.",
    }


def _recorded_data(folder: epath.Path) -> dict[str, Any] | None:
    """The fingerprint of a run's training data; None of a run of an older version."""
    path = folder / "data.json"
    if not path.exists():
        return None
    return files.read_json(path)


def differences(
    there: Any, here: Any, may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Lines for people: the fields of two recipes' `to_json` that differ."""
    before, now = _flat(there), _flat(here)
    return [
        f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
        and not any(key == m or key.startswith(f"{m}.") for m in may_change)
    ]


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The recipe in what JSON has."""
    return json.loads(config.to_json_best_effort())


def write(weights: pretrained.Weights, workdir: epath.PathLike) -> None:
    """Writes weights as a run at step 0, for every program that takes a run.

    With 1,000 or 21,843 classes its recipe has the evaluators of ImageNet's or
    ImageNet-21k's pretraining, and otherwise none.

    Raises:
      FileExistsError: there is a run, or something else.
      OwnedError: another process writes there.
      ValueError: they are not finite; a run's checkpoints are.
    """
    _check_empty(epath.Path(workdir))
    if broken := pretrained.not_finite(weights.params):
        raise ValueError(
            f"{weights.called} cannot become a run, whose checkpoints are finite; "
            f"these arrays are not:\n{listed(list(broken))}"
        )
    size = pretrained.check(weights)
    fields = pretrained.geometry(weights.params)
    config = recipe.base()
    config.batch_size = 256
    config.dataset.num_classes = fields.pop("num_classes")
    config.model.name = pretrained.variant(fields) or config.model.name
    config.model.update(fields, gelu=weights.gelu, image_size=size)
    for name, data in paper.PRETRAINING.items():
        if data["num_classes"] == config.dataset.num_classes:
            config.dataset.name = name
            paper.evaluate_on(config, name)
    if weights.preprocess is not None:
        for section in config.evals.values():
            section.preprocess = weights.preprocess
    params = jax.tree.map(jnp.asarray, weights.params)
    with ownership.owned(workdir):
        _check_empty(epath.Path(workdir))  # once more: nobody else can write now
        saved = claim(config, workdir, weights.class_names)
        with checkpoint.Checkpointer(f"{workdir}/checkpoints", every_steps=1) as saver:
            saver.save(0, {"params": params}, force=True)
            saver.wait()
            saved.note(saver.complete_step())


def _check_empty(folder: epath.Path) -> None:
    if folder.exists() and (
        not folder.is_dir()
        or {path.name for path in folder.iterdir()} - {ownership.FILE}
    ):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")


def load(workdir: epath.PathLike) -> ConfigDict:
    """The recipe of the run in `workdir`.

    Raises:
      FileNotFoundError: no run there.
    """
    path = epath.Path(workdir).expanduser() / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json). Name a folder that "
            "`python -m mlp_mixer.train` has written, e.g. --workdir=runs/digits."
        )
    return recipe.read(path)


def load_class_names(
    workdir: epath.PathLike, count: int | None = None
) -> list[str] | None:
    """The names of the classes of the run in `workdir`, if its data set has names.

    Raises:
      FileNotFoundError: class_names.json is not there.
      ValueError: it is damaged, or has other than `count` names.
    """
    return naming.of_run(epath.Path(workdir) / "class_names.json", count)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = ((f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items())
    return {k: v for key, value in pairs for k, v in _flat(value, key).items()}
