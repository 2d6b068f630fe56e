"""Optimiser and learning-rate schedule: section 3 of arXiv 2105.01601 and Table 4.

The order of an update is that of big_vision's: clip by global norm → direction (Adam
or momentum) → + decay · param → × learning rate → × −1. Decay is decoupled and
follows the schedule, so `weight_decay` 0.1 at learning rate 0.001 is big_vision's 1e-4.

Other recipes give each parameter a rate of its own, a factor of the schedule's, and
keep a moving average of the parameters.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlp_mixer import known
from mlp_mixer.fingerprints import PyTree

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Fraction of the peak learning rate, as a function of progress in [0, 1]: after the
# warm-up, and over the whole run.
DECAYS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "linear": lambda after, _: 1.0 - after,
    "cosine": lambda after, _: 0.5 * (1.0 + jnp.cos(jnp.pi * after)),
    # BiT-HyperRule's: a tenth at 30, 60 and 90 % of the run, warm-up included. A hair
    # earlier, as a compiled division may round down.
    "staircase": lambda _, whole: jnp.power(
        0.1, sum((whole > at - 1e-6).astype(jnp.float32) for at in (0.3, 0.6, 0.9))
    ),
}
# Whether decay concerns a parameter, by its path and itself.
DECAYED: dict[str, Callable[[Sequence[str], Any], bool]] = {
    "kernels": lambda path, _: path[-1] == "kernel",
    # AdamW's parameters in timm: matrices, kernels of convolutions, norms over several
    # axes; neither vectors nor biases.
    "matrices": lambda path, leaf: leaf.ndim > 1 and path[-1] != "bias",
    "all": lambda *_: True,
}


def make_schedule(
    *,
    total_steps: int,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    end_learning_rate: float | None,
    end_factor: float | None,
    warmup_learning_rate: float = 0.0,
    cooldown_steps: int = 0,
) -> Schedule:
    """Returns the learning rate by step: a linear warm-up times a decay.

    lr(t) = [end + (base − end)·decay(p)] · min(1, t/warmup), with
    p = clip((t − warmup)/(total − warmup), 0, 1) and t counted from 0, so the very
    first update has learning rate 0 (vit_jax and big_vision utils.py). The staircase
    goes by t/total instead of p. A warm-up that begins at another rate is linear from
    there to the value in brackets. With a cool-down, total is the step at which it
    begins; from there on the rate is the last one.

    timm's rate is constant within an epoch, and its cosine counts the epochs of the
    warm-up: it goes by ⌊epoch⌋/epochs, so that after the warm-up it is a little below
    the peak.

    Args:
      total_steps: number of updates T.
      learning_rate: base, the peak.
      warmup_steps: steps of linear warm-up.
      decay: a key of `DECAYS`: "linear", "cosine" or "staircase".
      end_learning_rate: the value at T.
      end_factor: instead of `end_learning_rate`, the value at T as a fraction of
        `learning_rate` (what `linear_end` means in big_vision).
      warmup_learning_rate: the value at step 0 of a warm-up.
      cooldown_steps: number of updates, the last of all, at the last learning rate.

    Raises:
      ValueError: unknown decay, or not exactly one of the two ends.
    """
    known.require("decay", decay, DECAYS)
    if (end_learning_rate is None) == (end_factor is None):
        raise ValueError(
            f"end_learning_rate is {end_learning_rate} and end_factor is {end_factor}; "
            "set exactly one of them and the other to None."
        )
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} is not below total_steps {total_steps}; a "
            f"shorter run needs a shorter warm-up, e.g. {total_steps // 10}."
        )
    if not 0 <= cooldown_steps < total_steps - warmup_steps:
        raise ValueError(
            f"cooldown_steps is {cooldown_steps}; expected 0 or more, and fewer than "
            f"the {total_steps - warmup_steps} steps after the warm-up."
        )
    total_steps -= cooldown_steps
    end = end_learning_rate
    if end is None:
        end = (end_factor or 0.0) * learning_rate

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decayed = DECAYS[decay](after, jnp.clip(step / total_steps, 0.0, 1.0))
        warm = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
        rate = end + (learning_rate - end) * decayed
        if not warmup_learning_rate:
            return rate * warm
        return warmup_learning_rate + (rate - warmup_learning_rate) * warm

    return schedule


def create(
    *,
    total_steps: int,
    name: str,
    weight_decay: float,
    decayed: str,
    clip_norm: float | None,
    b1: float,
    b2: float,
    eps: float,
    momentum: float,
    momentum_dtype: str,
    layer_decay: float = 1.0,
    rates: Sequence[str] = (),
    ema: float = 0.0,
    axes: Mapping[str, str] | None = None,
    **schedule_fields: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Returns (optimiser, schedule).

    Args:
      total_steps: updates of the whole run.
      name: "adam" (pretraining), "momentum" (SGD, not Nesterov: fine-tuning) or "lamb"
        (arXiv 1904.00962): Adam's direction, with its decay, gets the norm of the
        array. Arrays without decay are Adam's, as in Apex and timm.
      weight_decay: decoupled, times the learning rate of the moment.
      decayed: "kernels" (the run that is known to reach 76.3 %), "matrices" or "all"
        parameters: a key of `DECAYED`.
      clip_norm: global norm of the gradient; None does not clip.
      b1, b2, eps: decay rates of Adam's two moments, and the constant in its
        denominator.
      momentum: decay rate of the accumulator of "momentum".
      momentum_dtype: dtype of that accumulator; the authors fine-tune with "bfloat16".
      layer_decay: factor of the learning rate for each layer between a parameter and
        the head, as `layer_of` counts them.
      rates: "PATTERN=FACTOR": further factors of the learning rate, of the parameters
        whose path fits, where `*` stands for anything. If several fit, all count.
      ema: decay of `moving_average`; 0 keeps none.
      axes: the model's `AXES`, which tells its layers.
      **schedule_fields: the other arguments of `make_schedule`.

    Raises:
      ValueError: unknown optimiser, `decayed` or schedule. Also later, of the
        optimiser's `init`: a pattern of `rates` fits no parameter.
    """
    directions = {
        "adam": lambda: optax.scale_by_adam(b1, b2, eps),
        "momentum": lambda: optax.trace(momentum, accumulator_dtype=momentum_dtype),
        "lamb": lambda: optax.scale_by_adam(b1, b2, eps),
    }
    known.require("optimiser", name, directions)
    is_decayed = known.pick("decayed", decayed, DECAYED)
    schedule = make_schedule(total_steps=total_steps, **schedule_fields)
    parts = [directions[name](), optax.scale_by_learning_rate(schedule)]
    if clip_norm is not None:
        parts.insert(0, _clip_by_global_norm(clip_norm))
    if weight_decay:
        mask = None if decayed == "all" else lambda params: _mapped(is_decayed, params)
        parts.insert(-1, optax.add_decayed_weights(weight_decay, mask))
        if name == "lamb":
            by_norm = optax.scale_by_trust_ratio()
            parts.insert(-1, optax.masked(by_norm, mask) if mask else by_norm)
    if layer_decay != 1.0 or rates:
        parts.insert(-1, _scale_rates(layer_decay, rates, axes or {}))
    if ema:
        parts.append(moving_average(ema))
    return optax.chain(*parts), schedule


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, limit / norm).

    Optax's own chooses leaf by leaf between two arrays, a kernel more for each of
    hundreds: a quarter of the time to compile Mixer-H/14's step.
    """

    def clip(updates: PyTree, params: PyTree) -> PyTree:
        del params
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def _mapped(f: Callable[[Sequence[str], Any], Any], params: PyTree) -> PyTree:
    """The tree of f(path, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f([key.key for key in path], leaf), params
    )


# --- Rates of parameters --------------------------------------------------------------


def _scale_rates(
    layer_decay: float, rates: Sequence[str], axes: Mapping[str, str]
) -> optax.GradientTransformation:
    """Scales the update of each parameter, its decay included, by its own factor."""
    factors = [(pattern, float(x)) for pattern, x in (r.split("=") for r in rates)]

    def init(params: PyTree) -> optax.EmptyState:
        paths = _paths(params)
        for pattern, _ in factors:
            if not any(_fits(pattern, path) for path in paths):
                tries = known.nearest(pattern, paths, 3)
                raise ValueError(
                    f"config.optim.rates has the pattern {pattern!r}, which no "
                    f"parameter's path fits; try {tries}, with * for any part of it."
                )
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        layers = layers_of(_paths(updates), axes) if layer_decay != 1.0 else {}
        head = max(layers.values(), default=0)

        def scale(path: Sequence[str], update: jax.Array) -> jax.Array:
            name = "/".join(path)
            factor = layer_decay ** (head - layers.get(name, head))
            factor *= math.prod(x for pattern, x in factors if _fits(pattern, name))
            return update * factor if factor != 1.0 else update

        return _mapped(scale, updates), state

    return optax.GradientTransformation(init, update)


def _paths(params: PyTree) -> list[str]:
    return jax.tree.leaves(_mapped(lambda path, _: "/".join(path), params))


def _fits(pattern: str, path: str) -> bool:
    return bool(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), path))


def layers_of(paths: Sequence[str], axes: Mapping[str, str]) -> dict[str, int]:
    """Returns the number of the layer that each parameter belongs to, as BEiT's.

    0 is what is called stem…, i the i-th block, depth + 1 the head and all others (timm
    has the last norm in the last block). What stands between two stages in `axes` is of
    the block after it.

    Args:
      paths: paths of the parameters.
      axes: the model's `AXES`, its stages in their order; `*` is a block's number.

    Raises:
      ValueError: a path that is not in `axes`.
    """
    starts = [pattern.partition("*")[0] for pattern in axes]
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    for path in paths:
        for i, pattern in enumerate(axes):
            numbered = re.escape(pattern).replace(r"\*", r"(\d+)")
            if match := re.fullmatch(numbered, path):
                # The paths of a stage's blocks begin alike.
                first = starts.index(starts[i]) if match.groups() else i
                places[path] = first, tuple(map(int, match.groups()))
        if path not in places:
            raise ValueError(
                f"config.optim.layer_decay needs to know the layer of {path}, which "
                "the model's AXES do not name."
            )
    blocks = sorted({place for place in places.values() if place[1]})

    def layer(path: str) -> int:
        if path.startswith("stem"):
            return 0
        before = sum(block < places[path] for block in blocks)
        if not before and places[path] not in blocks:
            before = len(blocks)
        return before + 1

    return {path: layer(path) for path in places}


# --- The average of the parameters ----------------------------------------------------


class Average(NamedTuple):
    """The moving average in an optimiser's state.

    `stats` are averaged as the parameters are; `with_stats` puts the first ones here.
    """

    step: jax.Array
    params: PyTree
    stats: Mapping[str, Any]


def moving_average(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters after each update.

    average ← d·average + (1 − d)·parameters, with d = min(decay, (1 + t)/(10 + t)) for
    the t-th update, counted from 0: the warm-up of TensorFlow's
    tf.train.ExponentialMovingAverage, so that the start is soon forgotten. Statistics
    of a model (BatchNorm's) are averaged likewise, as in timm.

    It stands at the end of a chain, where an update is what will be added. `update`
    takes the statistics after this step as `stats`.

    Args:
      decay: the largest d.
    """

    def init(params: PyTree) -> Average:
        return Average(jnp.zeros((), jnp.int32), params, {})

    def update(
        updates: PyTree,
        state: Average,
        params: PyTree = None,
        *,
        stats: PyTree = None,
        **_: Any,
    ) -> tuple[PyTree, Average]:
        t = state.step.astype(jnp.float32)
        weight = jnp.maximum(1.0 - decay, 9.0 / (10.0 + t))  # 1 − d

        def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
            floats = jnp.issubdtype(new.dtype, jnp.floating)
            return old + weight.astype(old.dtype) * (new - old) if floats else new

        now = optax.apply_updates(params, updates), stats or {}
        average = jax.tree.map(averaged, (state.params, state.stats), now)
        return updates, Average(state.step + 1, *average)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(opt_state: PyTree) -> Average | None:
    """Returns the moving average in an optimiser's state; None if it keeps none."""
    return next((s for s in opt_state if isinstance(s, Average)), None)


def with_stats(opt_state: PyTree, stats: PyTree) -> PyTree:
    """Returns an optimiser's first state with a model's first statistics."""
    return tuple(
        s._replace(stats=stats) if isinstance(s, Average) else s for s in opt_state
    )
