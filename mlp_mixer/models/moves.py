"""Moves of tokens in the plane and along their sequence: pure functions on arrays.

Here a map is (h, w, …, c), the state of `layers` with its tokens s = (h w) as rows and
columns of the image; a sequence is (s, n, c), tokens in raster order. A pyramid's maps
are (n, h, w, c), and their moves are told the axis. Each function is linear in `x`, and
its docstring states the law that its test holds it to.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Channels of a group from which on `circulant` is a product of matrices. Measured on a
# CPU with 196 tokens: with 96 and more it takes as long as the FFT, with one channel 60
# times as long. Accelerators are made for products; and XLA cuts no FFT over devices,
# so that each of them computes the whole batch's.
CHANNELS_OF_PRODUCT = 8


def shift4(x: Float[Array, "h w *n c"]) -> Float[Array, "h w *n c"]:
    """Returns a map with the quarters of its channels moved down, up, right and left.

    S2-MLP's spatial shift (arXiv 2106.07477, Eq. 3): the first quarter moves one row
    down, the second one row up, the third one column to the right, the fourth one to
    the left. Where nothing moves in, at one border, the old value stays. (The paper's
    listing overwrites what it still has to read, and smears a border over the map.)

    Law: away from the borders it is a depthwise 3x3 convolution with a single 1.
    """
    c = x.shape[-1]
    ends = [c * i // 4 for i in range(5)]
    quarters = [x[..., i:j] for i, j in itertools.pairwise(ends)]
    moves = [(0, 1), (0, -1), (1, 1), (1, -1)]
    moved = [_moved(q, *move) for q, move in zip(quarters, moves, strict=True)]
    return jnp.concatenate(moved, axis=-1)


def _moved(x: Float[Array, "..."], axis: int, by: int) -> Float[Array, "..."]:
    """`x` one position further along an axis; the border left behind keeps its own."""
    if by > 0:
        return jnp.concatenate([_part(x, axis, 0, 1), _part(x, axis, 0, -1)], axis)
    return jnp.concatenate([_part(x, axis, 1, None), _part(x, axis, -1, None)], axis)


def _part(x: Array, axis: int, start: int | None, stop: int | None) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop),)]


def cycle(x: Float[Array, "n h w c"], axis: int) -> Float[Array, "n h w c"]:
    """Returns a map whose channels come by turns from here, the next, the last place.

    CycleMLP's, with its step of three (arXiv 2107.10224; offsets of the authors' code):
    channel i of position p is read from p + `cycle_offsets`[i] along `axis`; outside of
    the map are zeros.

    Law: it is a depthwise convolution of three weights, of which one is 1.

    Args:
      x: the map.
      axis: 1 moves along columns, from row to row; 2 along rows.
    """
    size, pads = x.shape[axis], [(0, 0)] * x.ndim
    pads[axis] = (1, 1)
    padded = jnp.pad(x, pads)
    before, here, after = (_part(padded, axis, i, i + size) for i in range(3))
    offsets = cycle_offsets(x.shape[-1]).reshape(1, 1, 1, -1)
    return jnp.where(offsets == 0, here, jnp.where(offsets == 1, after, before))


def cycle_offsets(channels: int) -> np.ndarray:
    """Returns how many places further `cycle` reads each channel: 0, 1, −1, 0, …"""
    return (np.arange(channels) + 1) % 3 - 1


def fold(
    x: Float[Array, "*map c"], axis: int, pixel: int, step: Any = 0
) -> Float[Array, "*folded p c"]:
    """Returns a map with `pixel` neighbours along an axis gathered at one position.

    Hire-MLP's (arXiv 2108.13341, as in the authors' code): the axis is rolled by
    `step`, continued from its beginning to a multiple of `pixel`, and cut into regions
    of `pixel` positions. Entry i of the axis is then region i, whose positions are an
    axis of their own before the channels.

    Laws: `unfold` undoes it, for all sizes, regions and steps; a fold after a roll by
    one region more is the fold, one region further, where regions tile the axis.

    Args:
      x: the map.
      axis: the axis that is cut, counted from 0; not that of the channels.
      pixel: number of positions of a region, p.
      step: number of positions that the axis is rolled by, perhaps traced.
    """
    x = jnp.roll(x, step, axis)
    before, (size, *after) = x.shape[:axis], x.shape[axis:]
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -size % pixel)
    x = jnp.pad(x, pads, mode="wrap").reshape(*before, -1, pixel, *after)
    return jnp.moveaxis(x, axis + 1, -2)


def unfold(
    y: Float[Array, "*folded p c"], axis: int, size: int, step: Any = 0
) -> Float[Array, "*map c"]:
    """Returns the map, of `size` positions along `axis`, of which `y` is a `fold`.

    What continued the axis is left out: only the first value of a position counts.

    Args:
      y: regions, each of its positions with its channels.
      axis: the axis that was cut.
      size: number of positions along it.
      step: number of positions that it was rolled by, perhaps traced.
    """
    y = jnp.moveaxis(y, -2, axis + 1)
    y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return jnp.roll(lax.slice_in_dim(y, 0, size, axis=axis), -step, axis)


def circulant(
    x: Float[Array, "s n c"], w: Float[Array, "g s"]
) -> Float[Array, "s n c"]:
    """Returns each channel of a sequence times the circulant matrix of its group.

    CCS (arXiv 2106.14882): y[i, :, c] = Σⱼ w[c mod g, j] x[(i + j) mod s, :, c], so the
    channels of a group are g apart, and the sequence wraps in raster order.

    Law: it is `irfft(rfft(x) · conj(rfft(w)))` over tokens, and `circulant_matrices`.

    Args:
      x: the sequence.
      w: first row of each group's matrix; g divides c.
    """
    s, n, c = x.shape
    groups = w.shape[0]
    if c // groups < CHANNELS_OF_PRODUCT:
        return _circulant_by_fft(x, w)
    grouped = x.reshape(s, n, c // groups, groups).transpose(3, 0, 1, 2)
    y = jnp.einsum("gik,gknr->ginr", circulant_matrices(w), grouped)
    return y.transpose(1, 2, 3, 0).reshape(s, n, c)


def circulant_matrices(w: Float[Array, "g s"]) -> Float[Array, "g s s"]:
    """Returns the matrices whose row i is `w` moved i to the right, around the end."""
    i, k = np.indices((w.shape[-1],) * 2)
    return w[:, (k - i) % w.shape[-1]]


def _circulant_by_fft(
    x: Float[Array, "s n c"], w: Float[Array, "g s"]
) -> Float[Array, "s n c"]:
    """`circulant` in no lower precision than float32, which is what FFTs have."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    factors = jnp.conj(jnp.fft.rfft(w.astype(dtype), axis=1)).T  # (frequencies, g)
    factors = jnp.tile(
        factors, x.shape[-1] // w.shape[0]
    )  # channel c has group c mod g
    spectrum = jnp.fft.rfft(x.astype(dtype), axis=0) * factors[:, None]
    return jnp.fft.irfft(spectrum, n=len(x), axis=0).astype(x.dtype)


def roll_chunks(
    x: Float[Array, "..."], by: Sequence[int], axis: int
) -> Float[Array, "..."]:
    """Returns a map with each chunk of its channels rolled along an axis.

    MS-MLP's shift, as its authors' code has it: chunk i moves `by[i]` positions on, and
    what leaves at one end comes in at the other.

    Law: it commutes with rolling the whole map, and rolled by 0 a map is itself.

    Args:
      x: the map, in any layout whose last axis is the channels.
      by: positions that each of the chunks moves; as many numbers as chunks.
      axis: the axis of `x` that is the height or the width.
    """
    chunks = (x[..., i:j] for i, j in itertools.pairwise(chunk_ends(x.shape[-1], by)))
    rolled = [jnp.roll(z, d, axis) for z, d in zip(chunks, by, strict=True)]
    return jnp.concatenate(rolled, axis=-1)


def chunk_ends(channels: int, chunks: Sequence[object]) -> list[int]:
    """Returns where the chunks of channels begin and end: 0, …, `channels`.

    As torch.chunk cuts: each has the quotient, rounded up, of which the last one gets
    what is left.

    Raises:
      ValueError: nothing is left for the last one.
    """
    count = len(chunks)
    size = -(-channels // count)
    if size * (count - 1) >= channels:
        raise ValueError(
            f"{channels} channels are {-(-channels // size)} chunks of {size}, not "
            f"{count}; try {count * size} channels."
        )
    return [*range(0, channels, size), channels]
