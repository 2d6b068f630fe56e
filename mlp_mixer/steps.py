"""What one step is: pure functions of a TrainState, compiled for a mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from mlp_mixer import augment, known, losses, optim, sharding
from mlp_mixer.fingerprints import PyTree
from mlp_mixer.models import trunk
from mlp_mixer.models.model import Model

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
# What has the shapes and dtypes of a batch of one: {"image": (1, h, w, 3), …}.
Example = Mapping[str, Any]


class TrainState(NamedTuple):
    """Everything that changes during training, and all that a checkpoint holds.

    `stats` are the model's other variables by collection, e.g. BatchNorm's running
    statistics; most models have none.
    """

    step: Int[Array, ""]
    params: Any
    stats: Mapping[str, Any]
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model and `predict` take."""
        return {"params": self.params, **self.stats}

    @property
    def averaged(self) -> dict[str, Any]:
        """`variables` with averaged parameters, if the optimiser averages them."""
        average = optim.average_of(self.opt_state)
        if average is None:
            return self.variables
        return {"params": average.params, **average.stats}


def value_range(image: Shaped[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """Maps 0 … 255 to [−1, 1]; there is no other normalisation (big_vision, vit_jax).

    On the device: batches travel as uint8, a quarter of the bytes. In this order black
    and white stay exactly ±1, though the compiler multiplies by a rounded 1/127.5.
    """
    return (image.astype(jnp.float32) - 127.5) / 127.5


def state_shapes(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    example: Example,
    *,
    strategy: str,
) -> TrainState:
    """The state as shapes with shardings: the target of init, restore and compile.

    Args:
      model: the model with its head.
      tx: optimiser of `optim.create`.
      mesh: mesh of `sharding.make_mesh`.
      example: the shapes and dtypes of a batch, of `pipeline.example`.
      strategy: a key of `sharding.STRATEGIES`.
    """
    shapes = jax.eval_shape(lambda: _init(model, tx, jax.random.key(0), example))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.shardings(shapes, mesh, strategy, model.declared_axes()),
    )


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    target: TrainState,
    example: Example,
    *,
    seed: int,
    params: Any = None,
    stats: Mapping[str, Any] | None = None,
) -> TrainState:
    """Creates the state of step 0, born in the shardings of `target`.

    Args:
      model: model that `target` was made of.
      tx: optimiser that `target` was made of.
      target: state of `state_shapes`.
      example: the shapes and dtypes of a batch, as in `state_shapes`.
      seed: seed of the run.
      params: host arrays to start from, whole on every process; None: random ones.
      stats: the statistics that belong to `params`; None: a fresh model's.
    """
    shardings = jax.tree.map(lambda a: a.sharding, target)
    given = {
        name: sharding.place(
            jax.tree.map(lambda x, a: np.asarray(x, a.dtype), value, shapes), where
        )
        for name, value, shapes, where in (
            ("params", params, target.params, shardings.params),
            ("stats", stats, target.stats, shardings.stats),
        )
        if value is not None
    }
    devices: Any = target.step.sharding.device_set
    init = jax.jit(
        lambda rng, given: _init(model, tx, rng, example, **given),
        out_shardings=shardings,
        compiler_options=INIT_OPTIONS.get(next(iter(devices)).platform),
    )
    return init(_stream(seed, INIT), given)


def _init(
    model: Model,
    tx: optax.GradientTransformation,
    rng: Array,
    example: Example,
    params: PyTree = None,
    stats: PyTree = None,
) -> TrainState:
    variables = model.init(rng, jnp.zeros(example["image"].shape))
    fresh = variables.pop("params")
    params = fresh if params is None else params
    stats = variables if stats is None else stats
    opt_state = optim.with_stats(tx.init(params), stats)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state)


# Independent random streams of one seed.
INIT, TRAIN = range(2)

# Of the compiler, for initialisation alone: it runs once, and with fewer optimisations
# a CPU compiles it in half the time, to the same bits.
INIT_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}}


def _stream(seed: int, name: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), name)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    target: TrainState,
    *,
    loss: str,
    seed: int,
    mixup: float,
    accumulate: int,
    cutmix: float = 0.0,
    erasing: float = 0.0,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, donating the state.

    Everything random is a function of (seed, step): a run of any number of devices,
    stopped and resumed at any step, draws the same. The model's statistics are those of
    the global batch.

    Args:
      model: the model with its head. Where its `run.mesh` is None, parameters that are
        cut are gathered all at once.
      tx: optimiser of `optim.create`.
      mesh: mesh of `sharding.make_mesh`.
      target: state of `state_shapes`, whose shardings the state keeps.
      loss: a key of `losses.LOSSES`.
      seed: seed of the run.
      mixup: p of Beta(p, p); 0 does not mix.
      accumulate: micro-batches per step, each of them as many of the model's
        `run.images_at_once`. Their gradients are averaged, so the result is the big
        batch's, with 1/accumulate of its activations. (Dropout and
        stochastic depth draw anew in each micro-batch; BatchNorm normalises each by
        itself, and its running statistics take one after the other.)
      cutmix: p of Beta(p, p); 0 does not cut. With mixup, each step draws one of them.
      erasing: probability with which a box of an image is filled with noise, before
        images are mixed.
      label_smoothing: share of a label that goes to all classes alike.

    To the loss is added what the model itself gives as `out["penalty"]`.

    The batch holds `image` (n, h, w, 3), 0 … 255, and `label` (n,) class numbers or
    (n, k) bools, both of `sharding.place_rows`; metrics are `loss` (nats) and
    `grad_norm` (before clipping).

    Raises:
      ValueError: unknown loss.
    """
    loss_fn = known.pick("loss", loss, losses.LOSSES)
    num_classes: Any = model.num_classes
    update = optax.with_extra_args_support(tx).update
    shardings = jax.tree.map(lambda a: a.sharding, target)
    parts = [part for s in jax.tree.leaves(shardings.params) for part in s.spec]
    whole = not any(part in sharding.ROWS for part in parts)

    def objective(
        params: PyTree, stats: PyTree, batch: Batch, rng: Array
    ) -> tuple[Array, PyTree]:
        variables = {"params": params} if whole else _gathered(model, mesh, params)
        (logits, out), stats = model.apply(
            {**variables, **stats},
            batch["image"],
            train=True,
            rngs={"dropout": rng},
            mutable=list(stats),
        )
        value = loss_fn(logits, out, batch).mean()
        return (value + out["penalty"] if "penalty" in out else value), stats

    differentiated = jax.value_and_grad(objective, has_aux=True)

    def gradients(
        params: PyTree, stats: PyTree, batch: Batch, rng: Array, count: int
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        """(loss, statistics), gradient, of `count` micro-batches."""
        if count == 1:
            return differentiated(params, stats, batch, rng)

        def add(carry: PyTree, micro: PyTree) -> tuple[PyTree, None]:
            total, stats = carry
            (value, stats), grads = differentiated(params, stats, *micro)
            return (jax.tree.map(jnp.add, total, (value, grads)), stats), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        micro = (_micro_batches(batch, count, mesh), jax.random.split(rng, count))
        (total, stats), _ = lax.scan(add, (zero, stats), micro)
        value, grads = jax.tree.map(lambda x: x / count, total)
        return (value, stats), grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sharding.check_batch(mesh, len(batch["image"]), accumulate)
        count = accumulate
        if not (model.draws_noise or state.stats):  # else a part is not as in the whole
            count *= model.run.parts(
                len(batch["image"]) // sharding.rows(mesh) // accumulate
            )
        rng = jax.random.fold_in(_stream(seed, TRAIN), state.step)
        mixing_rng, model_rng = jax.random.split(rng)
        image = value_range(batch["image"])
        label = losses.targets(batch["label"], num_classes)
        if label_smoothing:
            label = losses.smoothed(label, label_smoothing)
        if erasing:
            # A third key, so that those two stay what they were.
            image = augment.erase(jax.random.fold_in(rng, 2), image, erasing)
        if mixup or cutmix:
            image, label = augment.mix(
                mixing_rng, image, label, mixup=mixup, cutmix=cutmix
            )
        if erasing or mixup or cutmix:
            cut = sharding.batch(mesh)
            image, label = sharding.constrained((image, label), cut)
        batch = {**batch, "image": image, "label": label}
        (value, stats), grads = gradients(
            state.params, state.stats, batch, model_rng, count
        )
        grads = sharding.constrained(grads, shardings.params)
        updates, opt_state = update(grads, state.opt_state, state.params, stats=stats)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _micro_batches(batch: PyTree, count: int, mesh: Mesh) -> PyTree:
    """Returns (n, …) arrays as (count, n / count, …).

    Micro-batch i is rows i, i + count, …: every device cuts its own rows, so nothing
    travels.
    """
    cut = jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
    )
    return sharding.constrained(cut, sharding.batch(mesh, axis=1))


def _gathered(model: Model, mesh: Mesh, params: PyTree) -> dict[str, PyTree]:
    """Returns variables of a model whose parameters may be cut: whole, and as they are.

    Blocks gather theirs from the latter, one at a time. Of the former, only what lies
    outside of blocks is computed.
    """
    whole = sharding.gathered(mesh, params, model.declared_axes())
    return {"params": whole, trunk.CUT: params}


def make_predict(
    model: Model, mesh: Mesh, *, also: Sequence[str] = ()
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Array]]:
    """Returns `predict(variables, batch) -> {"logits": (n, k), "pre_logits": (n, c)}`.

    `variables` are {"params": …, **stats}, and the batch holds `image` (n, h, w, 3),
    0 … 255, uint8 or float, of `sharding.place_rows`. The results are cut over the
    devices as the images are.

    Args:
      model: the model.
      mesh: mesh of `sharding.make_mesh`.
      also: names of what else is returned of the model's `out`.
    """

    def predict(variables: PyTree, batch: Mapping[str, Any]) -> dict[str, Array]:
        variables = {**variables, **_gathered(model, mesh, variables["params"])}

        def forward(image: Array) -> dict[str, Array]:
            logits, out = model.apply(variables, value_range(image))
            return {"logits": logits} | {k: out[k] for k in ("pre_logits", *also)}

        image = batch["image"]
        count = model.run.parts(len(image) // sharding.rows(mesh))
        if count == 1:
            return forward(image)
        parts = lax.map(forward, _micro_batches(image, count, mesh))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

    return jax.jit(predict, out_shardings=sharding.batch(mesh))
