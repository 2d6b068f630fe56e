"""Opens weights from anywhere, and what the processes of a run agree on."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlp_mixer import (
    checkpoint,
    history,
    known,
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
from mlp_mixer.fingerprints import fingerprint
from mlp_mixer.text import listed
from mlp_mixer.workdir import (
    check_recipe,
    check_run,
    claim,
    load,
    load_class_names,
    sides,
    trained_classes,
)

logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """Weights from anywhere as a model that predicts, on all devices."""

    origin: str  # where they come from, for people
    model: models.Model
    mesh: Mesh
    predict: Callable[[Any, Any], dict[str, jax.Array]]  # steps.make_predict
    variables: dict[str, Any]  # what predict takes
    image_size: tuple[int, int]  # height and width in pixels
    preprocess: str  # a key of data.image_ops.PROTOCOLS
    class_names: tuple[str, ...]  # none without a head
    config: Any  # the recipe of a run; None of other sources
    step: int | None  # of a run's checkpoint


def open_model(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    best: str | None = None,
    ema: bool | None = None,
    preprocess: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> Opened:
    """Opens weights as a model that predicts, and says what they are in the log.

    Args:
      source: a run's folder, a file or a published name.
      step: step of a run's checkpoint; the newest intact one by default.
      best: another checkpoint of a run, the best by this metric, e.g. "val/top1".
      ema: whether a run's averaged parameters are opened, or its last ones; None: the
        averaged ones, if it keeps them.
      preprocess: a key of `data.image_ops.PROTOCOLS`; by default the one that the run
        was evaluated with, else "big_vision".
      labels: a text file with the names of the classes, one a line.
      dtype: dtype of activations and products; by default that of the run's recipe,
        else float32.
      image_size: (height, width) in pixels, of a model that takes images of any size;
        by default that of the weights.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: they are no weights of a model, do not say their image size, or have
        another number of classes than `labels`; `best` is no score of an evaluator that
        runs in training; or the processes have opened different weights.
    """
    if dtype is not None:
        known.require("dtype", dtype, pretrained.DTYPES)
    config, run_files = None, dict[str, Any]()
    with processes.together():
        if epath.Path(source).expanduser().is_dir():
            config = load(source)
            run_files = {
                "recipe": recipe.to_json(config),
                "class_names": load_class_names(source, config.dataset.num_classes),
                "checkpoints": bool(history.checkpoints(source)),
            }
    # Before any of them reads a checkpoint, in which Orbax waits for all.
    processes.compare(**run_files, step=step, best=best, ema=ema)
    with processes.together():
        weights = pretrained.read(source, step=step, best=best, ema=ema)
        if image_size is not None:
            weights = dataclasses.replace(weights, image_size=image_size)
        size, count = pretrained.checked_image_size(weights), weights.num_classes
        if count is None and labels is not None:
            raise ValueError(
                f"{source} has no head, so no classes for {labels} to name."
            )
        named = weights.class_names
        classes = naming.choose(named, count, labels=labels) if count else ()
    protocol = preprocess or weights.preprocess or "big_vision"
    mesh = sharding.make_mesh()
    model = pretrained.create_model(weights)
    run = models.Run.choose(model, size, mesh, dtype=dtype or weights.dtype)
    model = model.clone(run=run)
    if jax.process_count() > 1:  # each has read for itself, perhaps another file
        processes.compare(
            step=weights.step,
            model=weights.model,
            image_size=size,
            class_names=classes,
            preprocess=protocol,
            dtype=run.dtype,
            arrays=fingerprint(weights.variables),
        )
    strategy = "replicated" if config is None else config.sharding
    logger.info(
        "%s: %s, %dx%d px, preprocessed by %s, computed in %s",
        *(weights, pretrained.describe(weights.model), *size),
        *(protocol, run.dtype),
    )
    return Opened(
        str(weights),
        model,
        mesh,
        steps.make_predict(model, mesh),
        sharding.place(
            weights.variables,
            sharding.shardings(
                weights.variables, mesh, strategy, model.declared_axes()
            ),
        ),
        size,
        protocol,
        classes,
        config,
        weights.step,
    )


def check_agreement(
    config: ConfigDict, data: dict[str, Any], evals: Mapping[str, Any]
) -> None:
    """Passes if all processes of this run have the same recipe, data and JAX.

    Args:
      config: with every field resolved.
      data: `sources.fingerprint` of the training data.
      evals: evaluators by name.

    Raises:
      ValueError: they differ; names each difference, its values and the processes.
    """
    if jax.process_count() == 1:
        return
    processes.compare(
        recipe=recipe.to_json(config),
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
      accept_changed_data: whether other examples of the same classes are no error.

    Raises:
      ValueError: the run there has another recipe, other classes or other data.
    """
    names = trained_classes(workdir)
    # Where both have names, those say better than their number which classes differ.
    named = ("dataset.num_classes",) if names and source.class_names else ()
    check_recipe(config, workdir, data, accept_changed_data, may_change=named)
    if names is not None:
        both = sides(config, workdir)
        source = sources.with_classes(source, names, len(names), **both)
    check_run(config, workdir, data, accept_changed_data=accept_changed_data)
    return source


def write_run(weights: pretrained.Weights, workdir: epath.PathLike) -> None:
    """Writes weights as a run at step 0, for every program that takes a run.

    With 1,000 or 21,843 classes its recipe has the evaluators of ImageNet's or
    ImageNet-21k's pretraining, and otherwise none.

    Raises:
      FileExistsError: there is a run, or something else.
      OwnedError: another process writes there.
      ValueError: they are not finite; a run's checkpoints are.
    """
    _check_empty(epath.Path(workdir))
    if broken := pretrained.not_finite(weights.params | weights.stats):
        raise ValueError(
            f"{weights} cannot become a run, whose checkpoints are finite; "
            f"these arrays are not:\n{listed(list(broken))}"
        )
    size = pretrained.checked_image_size(weights)
    config = recipe.base()
    config.batch_size = 256
    config.dataset.num_classes = weights.num_classes
    config.model.update(weights.model, image_size=size)
    config.run.dtype = weights.dtype
    for name, data in paper.PRETRAINING.items():
        if data["num_classes"] == config.dataset.num_classes:
            config.dataset.name = name
            paper.evaluate_on(config, name)
    if weights.preprocess is not None:
        for section in config.evals.values():
            section.preprocess = weights.preprocess
    variables = {"params": weights.params}
    if weights.stats:
        variables["stats"] = weights.stats
    variables = jax.tree.map(jnp.asarray, variables)
    with ownership.owned(workdir):
        _check_empty(epath.Path(workdir))  # once more: nobody else can write now
        saved = claim(config, workdir, weights.class_names)
        with checkpoint.Checkpointer(f"{workdir}/checkpoints", every_steps=1) as saver:
            saver.save(0, variables, force=True)
            saver.wait()
            saved.note(saver.complete_step())


def _check_empty(folder: epath.Path) -> None:
    if folder.exists() and (
        not folder.is_dir()
        or {path.name for path in folder.iterdir()} - {ownership.FILE}
    ):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")
