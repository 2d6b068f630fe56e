"""From a recipe and a mesh to what is trained: a model, its optimiser and its steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from mlp_mixer import models, optim, steps


class Experiment(NamedTuple):
    """What training, the benchmark and the tests share."""

    model: models.Model
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    target: steps.TrainState  # shapes with shardings
    train_step: Callable[..., tuple[steps.TrainState, steps.Metrics]]
    predict: Callable[[Any, Any], dict[str, jax.Array]]


def build(
    config: Any,
    mesh: Mesh,
    example: Mapping[str, Any],
    total_steps: int,
    *,
    model: Any = None,
) -> Experiment:
    """Returns what a recipe is on a mesh; each step is compiled at its first call.

    Args:
      config: the recipe, with `dataset.num_classes`.
      mesh: mesh of `sharding.make_mesh`.
      example: the shapes and dtypes of a batch, of `pipeline.example`.
      total_steps: updates of the whole run.
      model: a module to take instead of the recipe's.

    Raises:
      ValueError: there is no such model, optimiser or loss, or they do not fit.
    """
    if model is None:
        model = create_model(config, mesh, num_classes=config.dataset.num_classes)
    tx, schedule = optim.create(
        **config.optim, total_steps=total_steps, axes=model.axes_of_form()
    )
    target = steps.state_shapes(model, tx, mesh, example, strategy=config.sharding)
    train_step = steps.make_train_step(
        model,
        tx,
        mesh,
        target,
        loss=config.loss,
        seed=config.seed,
        mixup=config.mixup,
        accumulate=config.accumulate,
        cutmix=config.cutmix,
        erasing=config.erasing,
        label_smoothing=config.label_smoothing,
    )
    predict = steps.make_predict(model, mesh)
    return Experiment(model, tx, schedule, target, train_step, predict)


def create_model(
    config: Any, mesh: Mesh, num_classes: int | None = None
) -> models.Model:
    """Returns the recipe's model, computed as `config.run` says, else as is fastest
    on these devices."""
    model = models.create(**config.model, num_classes=num_classes)
    size = config.model["image_size"]
    return model.clone(run=models.Run.choose(model, size, mesh, **config.run))
