"""Losses, in nats per example. All of it runs on the device.

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


def smoothed(label: Float[Array, "n k"], share: float) -> Float[Array, "n k"]:
    """Returns (1 − share) · label + share / k (arXiv 1512.00567, section 7)."""
    return (1.0 - share) * label + share / label.shape[-1]


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
