"""What one step is: pure functions of a TrainState, compiled for a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from mlp_mixer import known, losses, sharding

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that changes during training, and all that a checkpoint holds."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def value_range(image: Shaped[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """Maps 0 … 255 to [−1, 1]; there is no other normalisation (big_vision, vit_jax).

    On the device: batches travel as uint8, a quarter of the bytes. In this order black
    and white stay exactly ±1, though the compiler multiplies by a rounded 1/127.5.
    """
    return (image.astype(jnp.float32) - 127.5) / 127.5


def state_shapes(
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    image_size: tuple[int, int],
    strategy: str = "replicated",
) -> TrainState:
    """The state as shapes with shardings: the target of init, restore and compile."""

    def init():
        return _init(model, tx, jax.random.key(0), image_size)

    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes, mesh, strategy),
    )


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    target: TrainState,
    *,
    seed: int,
    image_size: tuple[int, int],
    params: Any = None,
) -> TrainState:
    """Creates the state of step 0, born in the shardings of `target`.

    Args:
      model: as in `make_train_step`, like tx.
      tx: see model.
      target: of `state_shapes`.
      seed: of the run.
      image_size: height and width in pixels.
      params: host arrays to start from, whole on every process; None: random ones.
    """
    shardings = jax.tree.map(lambda a: a.sharding, target)
    if params is None:
        init = jax.jit(
            lambda rng: _init(model, tx, rng, image_size), out_shardings=shardings
        )
        return init(_stream(seed, "init"))

    params = jax.tree.map(lambda x, a: np.asarray(x, a.dtype), params, target.params)
    begin = jax.jit(lambda params: _begin(tx, params), out_shardings=shardings)
    return begin(sharding.place(params, shardings.params))


def _init(model, tx, rng, image_size):
    return _begin(tx, model.init(rng, jnp.zeros((1, *image_size, 3)))["params"])


def _begin(tx, params):
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _stream(seed, name):
    """Independent random streams of one seed."""
    return jax.random.fold_in(jax.random.key(seed), ("init", "train").index(name))


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    target: TrainState,
    *,
    loss: str,
    seed: int,
    mixup: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, donating the state.

    Everything random is a function of (seed, step): a run of any number of devices,
    stopped and resumed at any step, draws the same.

    Args:
      model: with a head.
      tx: of `optim.create`.
      mesh: of `sharding.make_mesh`.
      target: of `state_shapes`; the state keeps its shardings.
      loss: a key of `losses.LOSSES`.
      seed: of the run.
      mixup: p of Beta(p, p); 0 does not mix.
      accumulate: micro-batches per step. Their gradients are averaged, so the result
        is the big batch's, with 1/accumulate of its activations. (Dropout and
        stochastic depth draw anew in each micro-batch.)

    The batch holds `image` (n, h, w, 3), 0 … 255, and `label` (n,) class numbers or
    (n, k) bools, both of `sharding.put`; metrics are `loss` (nats) and `grad_norm`
    (before clipping).

    Raises:
      ValueError: unknown loss.
    """
    loss_fn = known.pick("loss", loss, losses.LOSSES)
    shardings = jax.tree.map(lambda a: a.sharding, target)

    def objective(params, image, labels, rng):
        logits, _ = model.apply(
            {"params": params}, image, train=True, rngs={"dropout": rng}
        )
        return loss_fn(logits, labels).mean()

    def gradients(params, image, labels, rng):
        if accumulate == 1:
            return jax.value_and_grad(objective)(params, image, labels, rng)
        # Micro-batch i is rows i, i + accumulate, …: every device cuts its own rows,
        # so nothing travels.
        image, labels = (
            lax.with_sharding_constraint(
                x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1),
                NamedSharding(mesh, P(None, "data")),
            )
            for x in (image, labels)
        )

        def add(total, micro):
            image, labels, rng = micro
            one = jax.value_and_grad(objective)(params, image, labels, rng)
            return jax.tree.map(jnp.add, total, one), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        rngs = jax.random.split(rng, accumulate)
        total, _ = lax.scan(add, zero, (image, labels, rngs))
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state, batch):
        sharding.check_batch(mesh, len(batch["label"]), accumulate)
        rng = jax.random.fold_in(_stream(seed, "train"), state.step)
        mixup_rng, model_rng = jax.random.split(rng)
        image = value_range(batch["image"])
        labels = losses.targets(batch["label"], model.num_classes)
        if mixup:
            image, labels = losses.mixup(mixup_rng, image, labels, mixup)
        # Cut parameters are gathered whole for the products: left to itself, the
        # compiler may move activations instead.
        params = lax.with_sharding_constraint(state.params, sharding.replicated(mesh))
        value, grads = gradients(params, image, labels, model_rng)
        grads = lax.with_sharding_constraint(grads, shardings.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def make_predict(
    model: nn.Module, mesh: Mesh
) -> Callable[[Any, Any], tuple[Array, Array]]:
    """Returns `predict(params, image) -> (logits, features)`.

    `image` (n, h, w, 3), 0 … 255, uint8 or float, of `sharding.put`; logits (n, k) and
    features (n, c) are cut over the devices as the images are.
    """

    def predict(params, image):
        params = lax.with_sharding_constraint(params, sharding.replicated(mesh))
        logits, out = model.apply({"params": params}, value_range(image))
        return logits, out["pre_logits"]

    return jax.jit(predict, out_shardings=sharding.batch(mesh))
