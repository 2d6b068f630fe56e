"""Augmentation of a batch on the device: random erasing, mixup and CutMix.

Each is a pure function of a key and of the whole batch, so that results do not depend
on the number of devices. Images are (n, h, w, 3) in [−1, 1].
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# --- Random erasing -------------------------------------------------------------------

# Share of the image's area and ratio of height to width of an erased box; attempts to
# find one that is smaller than the image: timm's RandomErasing.
AREA, ASPECT, ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
# ImageNet's, of levels from 0 to 1: timm draws N(0, 1) after this normalisation.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def erase(
    rng: jax.Array, image: Float[Array, "n h w 3"], probability: float
) -> Float[Array, "n h w 3"]:
    """Fills one box of each image with noise, with a probability (arXiv 1708.04896).

    The box has a uniform share of the image's area in `AREA` and a log-uniform ratio of
    height to width in `ASPECT`; of `ATTEMPTS` draws the first one counts that is
    smaller than the image. The noise is drawn for each pixel and channel (timm's mode
    "pixel"). A level in [0, 1] is MEAN + STD · N(0, 1), here 2 · level − 1.
    """
    box_rng, noise_rng = jax.random.split(rng)
    n, h, w, _ = image.shape
    inside = erased_boxes(box_rng, n, h, w, probability)
    mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (MEAN, STD))
    level = mean + std * jax.random.normal(noise_rng, image.shape)
    return jnp.where(inside[..., None], 2.0 * level - 1.0, image)


def erased_boxes(
    rng: jax.Array, n: int, h: int, w: int, probability: float
) -> Bool[Array, "n h w"]:
    """Returns where each of n images of h x w pixels is erased."""
    on_rng, area_rng, aspect_rng, top_rng, left_rng = jax.random.split(rng, 5)
    low, high = map(math.log, ASPECT)
    draws = (n, ATTEMPTS)
    area = jax.random.uniform(area_rng, draws, minval=AREA[0], maxval=AREA[1]) * h * w
    aspect = jnp.exp(jax.random.uniform(aspect_rng, draws, minval=low, maxval=high))
    heights = jnp.round(jnp.sqrt(area * aspect))
    widths = jnp.round(jnp.sqrt(area / aspect))
    fits = (heights < h) & (widths < w)
    first = fits.argmax(-1, keepdims=True)
    height = jnp.take_along_axis(heights, first, axis=-1)
    width = jnp.take_along_axis(widths, first, axis=-1)
    on = jax.random.bernoulli(on_rng, probability, (n, 1))
    on &= fits.any(-1, keepdims=True)
    # Whole numbers from 0 to the last place at which the box is inside.
    top = jnp.floor(jax.random.uniform(top_rng, (n, 1)) * (h - height + 1))
    left = jnp.floor(jax.random.uniform(left_rng, (n, 1)) * (w - width + 1))
    y, x = jnp.arange(h)[None], jnp.arange(w)[None]
    rows = on & (y >= top) & (y < top + height)
    columns = (x >= left) & (x < left + width)
    return rows[:, :, None] & columns[:, None, :]


# --- Mixup and CutMix -----------------------------------------------------------------


def mix(
    rng: jax.Array,
    image: Float[Array, "n h w 3"],
    labels: Float[Array, "n k"],
    *,
    mixup: float,
    cutmix: float,
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n k"]]:
    """Mixes every example with the one before it in the global batch.

    With mixup alone all pixels are mixed, with CutMix alone a box of each image is the
    other's; with both, one of the two, each with probability 1/2. The share of the
    labels is that of the pixels. The references pair examples inside each device's
    slice (big_vision rolls, timm reverses it); rolling over the whole batch makes the
    result independent of the number of devices.

    Args:
      rng: key of the step.
      image: images of the whole batch.
      labels: rows of class probabilities.
      mixup: p of Beta(p, p), for one λ for all; λ ← max(λ, 1 − λ) (big_vision
        utils.py; timm leaves it).
      cutmix: p of Beta(p, p), for one λ, the share that CutMix's box leaves, for all.
    """
    if not cutmix:
        kept = of_pixels = _mixup_share(rng, mixup)
    else:
        switch_rng, mixup_rng, share_rng, box_rng = jax.random.split(rng, 4)
        _, h, w, _ = image.shape
        share = jax.random.beta(share_rng, cutmix, cutmix)
        inside = cut_box(box_rng, h, w, share).astype(jnp.float32)
        of_pixels, kept = 1.0 - inside.reshape(1, h, w, 1), 1.0 - inside.mean()
        if mixup:
            cut = jax.random.bernoulli(switch_rng)
            share = _mixup_share(mixup_rng, mixup)
            of_pixels = jnp.where(cut, of_pixels, share)
            kept = jnp.where(cut, kept, share)

    def blend(x: jax.Array, share: jax.Array) -> jax.Array:
        return share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)

    return blend(image, of_pixels), blend(labels, kept)


def _mixup_share(rng: jax.Array, p: float) -> Float[Array, ""]:
    mix = jax.random.beta(rng, p, p)
    return jnp.maximum(mix, 1.0 - mix)


def cut_box(
    rng: jax.Array, h: int, w: int, share: Float[Array, ""]
) -> Bool[Array, "h w"]:
    """Returns where CutMix's box is (arXiv 1905.04899, section 3.1).

    Its sides are √(1 − share) of the image's, rounded down; its centre is a uniform
    pixel; what lies outside of the image is cut off.
    """
    y_rng, x_rng = jax.random.split(rng)

    def inside(rng: jax.Array, side: int) -> jax.Array:
        size = jnp.floor(side * jnp.sqrt(1.0 - share))
        place = jnp.arange(side) - jax.random.randint(rng, (), 0, side)
        return (place >= -(size // 2)) & (place < (size + 1) // 2)

    return inside(y_rng, h)[:, None] & inside(x_rng, w)[None]
