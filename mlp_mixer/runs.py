"""A trained run, opened for use: its folder explains itself."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlp_mixer import checkpoint, models, recipe, sharding, steps

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """The recipe and a checkpoint of a run, on all devices."""

    config: ConfigDict
    mesh: Mesh
    predict: Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # steps.make_predict
    params: Any
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
    """
    config = recipe.load(workdir)
    mesh = sharding.make_mesh()
    model = models.create(
        **config.model,
        num_classes=config.dataset.num_classes,
        flat=sharding.is_one_cpu(mesh),
    )
    image = jnp.zeros((1, *config.model.image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes, mesh, config.sharding),
    )
    step, params = checkpoint.restore_params(
        f"{workdir}/checkpoints", target, step=step, best=best
    )
    names = recipe.load_class_names(workdir)
    if names is None:
        names = [f"class {i}" for i in range(config.dataset.num_classes)]
    logger.info("%s: %s at step %d", workdir, config.model.name, step)
    return Run(config, mesh, steps.make_predict(model, mesh), params, step, names)
