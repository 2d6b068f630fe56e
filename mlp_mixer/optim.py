"""Optimiser and learning-rate schedule: section 3 of arXiv 2105.01601 and Table 4.

The order of an update is that of big_vision's: clip by global norm → direction (Adam
or momentum) → + decay · param → × learning rate → × −1. Decay is decoupled and
follows the schedule, so `weight_decay` 0.1 at learning rate 0.001 is big_vision's 1e-4.
"""

from collections.abc import Callable
from typing import Any

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
DECAYED = ("kernels", "all")


def make_schedule(
    *,
    total_steps: int,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    end_learning_rate: float | None,
    end_factor: float | None,
) -> Schedule:
    """Returns the learning rate by step: a linear warm-up times a decay.

    lr(t) = [end + (base − end)·decay(p)] · min(1, t/warmup), with
    p = clip((t − warmup)/(total − warmup), 0, 1) and t counted from 0, so the very
    first update has learning rate 0 (vit_jax and big_vision utils.py). The staircase
    goes by t/total instead of p.

    Args:
      total_steps: number of updates T.
      learning_rate: base, the peak.
      warmup_steps: steps of linear warm-up.
      decay: a key of `DECAYS`: "linear", "cosine" or "staircase".
      end_learning_rate: the value at T.
      end_factor: instead of `end_learning_rate`, the value at T as a fraction of
        `learning_rate` (what `linear_end` means in big_vision).

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
    end = end_learning_rate
    if end is None:
        end = (end_factor or 0.0) * learning_rate

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decayed = DECAYS[decay](after, jnp.clip(step / total_steps, 0.0, 1.0))
        warm = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
        return (end + (learning_rate - end) * decayed) * warm

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
    **schedule_fields: Any,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Returns (optimiser, schedule).

    Args:
      total_steps: updates of the whole run.
      name: "adam" (pretraining) or "momentum" (SGD, not Nesterov: fine-tuning).
      weight_decay: decoupled, times the learning rate of the moment.
      decayed: "kernels" (the run that is known to reach 76.3 %) or "all" parameters.
      clip_norm: global norm of the gradient; None does not clip.
      b1, b2, eps: decay rates of Adam's two moments, and the constant in its
        denominator.
      momentum: decay rate of the accumulator of "momentum".
      momentum_dtype: dtype of that accumulator; the authors fine-tune with "bfloat16".
      **schedule_fields: the other arguments of `make_schedule`.

    Raises:
      ValueError: unknown optimiser, `decayed` or schedule.
    """
    directions = {
        "adam": lambda: optax.scale_by_adam(b1, b2, eps),
        "momentum": lambda: optax.trace(momentum, accumulator_dtype=momentum_dtype),
    }
    known.require("optimiser", name, directions)
    known.require("decayed", decayed, DECAYED)
    schedule = make_schedule(total_steps=total_steps, **schedule_fields)
    parts = [directions[name](), optax.scale_by_learning_rate(schedule)]
    if clip_norm is not None:
        parts.insert(0, _clip_by_global_norm(clip_norm))
    if weight_decay:
        mask = _is_kernel if decayed == "kernels" else None
        parts.insert(-1, optax.add_decayed_weights(weight_decay, mask))
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


def _is_kernel(params: PyTree) -> PyTree:
    """True where a parameter is the kernel of a product or of the stem."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
