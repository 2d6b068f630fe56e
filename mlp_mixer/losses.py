"""Losses, in nats per example, and mixup. All of it runs on the device.

A loss gets what the model returned, (logits, out), and the batch that it was given, and
takes what it needs. There `label` are rows of class probabilities, not class numbers:
mixup makes mixtures.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def targets(
    label: Int[Array, " n"] | Bool[Array, "n k"], num_classes: int
) -> Float[Array, "n k"]:
    """The rows that losses take: 1 for the class of a number, or for all true ones."""
    if label.ndim == 1:
        return jax.nn.one_hot(label, num_classes)
    return label.astype(jnp.float32)


def sigmoid_xent(
    logits: Float[Array, "n k"], out: Mapping[str, Any], batch: Mapping[str, Any]
) -> Float[Array, " n"]:
    """Sigmoid cross-entropy, summed over classes: the pretraining loss.

    −Σₖ [y·log σ(z) + (1 − y)·log σ(−z)] (big_vision configs/mlp_mixer_i1k.py).
    """
    del out
    labels = batch["label"]
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(labels * yes + (1.0 - labels) * no, axis=-1)


def softmax_xent(
    logits: Float[Array, "n k"], out: Mapping[str, Any], batch: Mapping[str, Any]
) -> Float[Array, " n"]:
    """Softmax cross-entropy: the fine-tuning loss."""
    del out
    return -jnp.sum(batch["label"] * jax.nn.log_softmax(logits), axis=-1)


LOSSES = {"sigmoid_xent": sigmoid_xent, "softmax_xent": softmax_xent}


def mixup(
    rng: jax.Array,
    image: Float[Array, "n h w 3"],
    labels: Float[Array, "n k"],
    p: float,
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n k"]]:
    """Mixes every example with the one before it in the global batch.

    One λ ~ Beta(p, p) for all, then λ ← max(λ, 1 − λ) (big_vision utils.py). The
    reference rolls inside each device's slice; rolling over the whole batch makes the
    result independent of the number of devices.
    """
    mix = jax.random.beta(rng, p, p)
    mix = jnp.maximum(mix, 1.0 - mix)

    def blend(x: jax.Array) -> jax.Array:
        return mix * x + (1.0 - mix) * jnp.roll(x, 1, axis=0)

    return blend(image), blend(labels)
