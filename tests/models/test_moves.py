"""Each move's law, in float64, and what it is in NumPy, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mlp_mixer.models import moves

shift4, circulant = jax.jit(moves.shift4), jax.jit(moves.circulant)
cycle = jax.jit(moves.cycle, static_argnames="axis")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(found, expected):
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


# --- The spatial shift ----------------------------------------------------------------


def test_a_shift_moves_each_quarter_one_way_and_keeps_the_border_left_behind():
    """Eq. 3, position by position."""
    x = drawn(4, 5, 2, 8)
    y, x = np.asarray(shift4(x)), np.asarray(x)
    for i in range(4):
        for j in range(5):
            close(y[i, j, :, 0:2], x[max(i - 1, 0), j, :, 0:2])
            close(y[i, j, :, 2:4], x[min(i + 1, 3), j, :, 2:4])
            close(y[i, j, :, 4:6], x[i, max(j - 1, 0), :, 4:6])
            close(y[i, j, :, 6:8], x[i, min(j + 1, 4), :, 6:8])


def test_a_shifted_ramp_is_no_border_smeared_over_it():
    """What the paper's listing makes of it: its slices overlap while it writes."""
    ramp = np.broadcast_to(np.arange(5.0).reshape(5, 1, 1), (5, 1, 4))
    shifted = shift4(jnp.asarray(ramp))
    np.testing.assert_array_equal(shifted[:, 0, 0], [0, 0, 1, 2, 3])
    listing = ramp.copy()
    for i in range(1, 5):
        listing[i, ..., :1] = listing[i - 1, ..., :1]
    np.testing.assert_array_equal(listing[:, 0, 0], [0, 0, 0, 0, 0])


def test_away_from_the_borders_a_shift_is_a_depthwise_convolution_with_one_weight():
    x = drawn(6, 7, 3, 12)
    kernel = np.zeros((3, 3, 1, 12))
    for quarter, at in enumerate([(0, 1), (2, 1), (1, 0), (1, 2)]):
        kernel[*at, 0, 3 * quarter : 3 * quarter + 3] = 1
    convolved = lax.conv_general_dilated(
        x.transpose(2, 0, 1, 3),
        jnp.asarray(kernel),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=12,
    )
    shifted = np.asarray(shift4(x))[1:-1, 1:-1]
    close(shifted.transpose(2, 0, 1, 3), convolved)


def test_a_constant_map_is_its_own_shift_and_a_border_keeps_its_values():
    constant = jnp.broadcast_to(drawn(8), (3, 4, 1, 8))
    close(shift4(constant), constant)
    x = drawn(3, 4, 1, 8)
    # Not zeros, which would conserve the sum of what stays inside.
    y, x = np.asarray(shift4(x)), np.asarray(x)
    assert abs((y[0] - x[0]).sum()) > 0.1
    close(y[0, ..., :2], x[0, ..., :2])


# --- The cycle of channels ------------------------------------------------------------

AXES = pytest.mark.parametrize("axis", [1, 2])


def deformable(x, offset):
    """The authors' form: each value read between four others, zeros outside of a map.

    Args:
      x: maps (n, h, w, c).
      offset: (c, 2), rows and columns further to read.
    """
    _, h, w, c = x.shape
    y = np.zeros(x.shape)
    for i, j, k in np.ndindex(h, w, c):
        row, column = i + offset[k, 0], j + offset[k, 1]
        top, left = int(np.floor(row)), int(np.floor(column))
        for a, b in np.ndindex(2, 2):
            weight = (1 - abs(row - top - a)) * (1 - abs(column - left - b))
            if 0 <= top + a < h and 0 <= left + b < w:
                y[:, i, j, k] += weight * x[:, top + a, left + b, k]
    return y


@AXES
@pytest.mark.parametrize("channels", [6, 7, 8])
def test_a_cycle_is_the_authors_deformable_reading(axis, channels):
    """Channel i by ((i + 1) mod 3) − 1, also where three does not divide channels."""
    x, offset = drawn(2, 4, 5, channels), np.zeros((channels, 2))
    for i in range(channels):
        offset[i, axis - 1] = (i + 1) % 3 - 1
    np.testing.assert_array_equal(offset[:3, axis - 1], [0, 1, -1])
    close(cycle(x, axis=axis), deformable(np.asarray(x), offset))


@AXES
def test_a_cycle_is_a_depthwise_convolution_with_one_weight(axis):
    x, kernel = drawn(2, 4, 5, 8), np.zeros((3, 8))
    for i, at in enumerate([1, 2, 0]):
        kernel[at, i::3] = 1
    shape = (3, 1, 1, 8) if axis == 1 else (1, 3, 1, 8)
    convolved = lax.conv_general_dilated(
        x,
        jnp.asarray(kernel.reshape(shape)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )
    close(cycle(x, axis=axis), convolved)


def test_cycles_along_rows_and_along_columns_commute():
    """Also at the borders, where each reads zeros of its own."""
    x = drawn(2, 4, 5, 7)
    close(cycle(cycle(x, axis=1), axis=2), cycle(cycle(x, axis=2), axis=1))


@AXES
def test_a_map_of_one_position_keeps_a_third_of_its_channels(axis):
    x = drawn(1, 1, 1, 6)
    expected = np.asarray(x) * np.array([1.0, 0, 0, 1, 0, 0]).reshape(1, 1, 1, 6)
    close(cycle(x, axis=axis), expected)


# --- The circulant product ------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "channels", "groups"),
    [(12, 16, 2), (7, 8, 1), (7, 6, 2), (12, 6, 6)],
)
def test_a_circulant_product_is_the_sum_the_matrix_and_the_fft(
    tokens, channels, groups
):
    """With 8 channels to a group and more it is a product, else an FFT."""
    x, w = drawn(tokens, 2, channels), drawn(groups, tokens, seed=1)
    product, expected = circulant(x, w), np.zeros(x.shape)
    x, w = np.asarray(x), np.asarray(w)
    for i in range(tokens):
        for j in range(tokens):
            for c in range(channels):
                expected[i, :, c] += w[c % groups, j] * x[(i + j) % tokens, :, c]
    close(product, expected)
    group = np.arange(channels) % groups
    matrices = np.asarray(moves.circulant_matrices(jnp.asarray(w)))[group]
    close(np.einsum("cik,knc->inc", matrices, x), expected)
    factors = np.conj(np.fft.rfft(w[group], axis=1)).T
    spectrum = np.fft.rfft(x, axis=0) * factors[:, None]
    close(np.fft.irfft(spectrum, n=tokens, axis=0), expected)


def test_a_circulant_product_commutes_with_turning_the_sequence():
    x, w = drawn(9, 2, 8), drawn(1, 9, seed=1)
    turned = circulant(jnp.asarray(np.roll(x, 4, axis=0)), w)
    close(turned, np.roll(circulant(x, w), 4, axis=0))


def test_both_forms_of_the_product_are_within_float32s_rounding():
    x, w = drawn(196, 2, 16), drawn(2, 196, seed=1)
    exact = np.asarray(circulant(x, w))
    for form in (circulant, jax.jit(moves._circulant_by_fft)):
        found = form(x.astype(jnp.float32), w.astype(jnp.float32))
        assert found.dtype == jnp.float32
        assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


# --- Regions --------------------------------------------------------------------------

# Positions of a side, of a region, and a step: Hire-MLP's at 224 px; odd ones; regions
# larger than the map.
REGIONS = [
    *((56, 4, 0), (56, 4, 2), (28, 3, 2), (14, 3, 1), (14, 3, 2), (7, 2, 1)),
    *((5, 4, 7), (6, 1, 3), (2, 5, 1), (1, 3, 2)),
]


def maps_of(size):
    """Maps (n, h, w, c), of so many positions on a side, by axis of that side."""
    return {1: drawn(2, size, 3, 4), 2: drawn(2, 3, size, 4)}


@functools.cache
def folded():
    """{(axis, size, pixel, step): (x, its fold, that unfolded)}, all compiled at once.

    Steps are traced in every second one.
    """
    cases = [(axis, *region) for axis in (1, 2) for region in REGIONS]
    traced = cases[1::2]

    @jax.jit
    def all_cases(steps):
        given = dict(zip(traced, steps, strict=True))
        found = []
        for axis, size, pixel, step in cases:
            x = maps_of(size)[axis]
            step = given.get((axis, size, pixel, step), step)
            y = moves.fold(x, axis, pixel, step)
            found.append((x, y, moves.unfold(y, axis, size, step)))
        return found

    found = all_cases([step for _, _, _, step in traced])
    return dict(zip(cases, jax.tree.map(np.asarray, found), strict=True))


def test_to_unfold_undoes_a_fold_of_any_size_region_and_step():
    for x, _, unfolded in folded().values():
        np.testing.assert_array_equal(unfolded, x)


def test_a_fold_is_the_authors_roll_circular_padding_and_reshape():
    """On (n, c, h, w), with channel c of a region's position r at c·p + r."""
    for (axis, size, pixel, step), (x, y, _) in folded().items():
        z = np.roll(x.transpose(0, 3, 1, 2), step, axis + 1)
        extra = (pixel - size % pixel) % pixel
        n, c = z.shape[:2]
        if axis == 1:
            z = np.pad(z, ((0, 0), (0, 0), (0, extra), (0, 0)), "wrap")
            z = z.reshape(n, c, -1, pixel, 3).transpose(0, 1, 3, 2, 4)
        else:
            z = np.pad(z, ((0, 0), (0, 0), (0, 0), (0, extra)), "wrap")
            z = z.reshape(n, c, 3, -1, pixel).transpose(0, 1, 4, 2, 3)
        regions = (size + extra) // pixel
        sides = (regions, 3) if axis == 1 else (3, regions)
        expected = z.reshape(n, c * pixel, *sides).transpose(0, 2, 3, 1)
        close(y.swapaxes(-1, -2).reshape(n, *sides, c * pixel), expected)


def test_a_fold_after_a_roll_by_a_region_is_the_fold_one_region_further():
    x = drawn(2, 12, 3, 4)
    for step in (0, 1):
        y = moves.fold(x, 1, 4, step)
        np.testing.assert_array_equal(
            moves.fold(x, 1, 4, step + 4), np.roll(y, 1, axis=1)
        )


# --- The chunked roll -----------------------------------------------------------------

SHIFTS = (-2, -1, 0, 1, 2)
roll_chunks = jax.jit(moves.roll_chunks, static_argnums=(1, 2))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_chunked_roll_is_the_authors(axis):
    """Which is of channels first, in torch's chunks: 3, 3, 3, 3 and 2 of 14."""
    x = drawn(2, 6, 5, 14)
    first, rolled = np.asarray(x).transpose(0, 3, 1, 2), []
    for q, d in enumerate(SHIFTS):
        rolled.append(np.roll(first[:, 3 * q : 3 * q + 3], d, axis + 1))
    expected = np.concatenate(rolled, axis=1).transpose(0, 2, 3, 1)
    close(roll_chunks(x, SHIFTS, axis), expected)


def test_a_chunked_roll_commutes_with_shifts_and_goes_back():
    x = drawn(2, 6, 5, 14)
    shifted = roll_chunks(jnp.asarray(np.roll(x, (1, 3), (1, 2))), SHIFTS, 2)
    rolled = roll_chunks(x, SHIFTS, 2)
    close(shifted, np.roll(rolled, (1, 3), (1, 2)))
    close(roll_chunks(rolled, SHIFTS[::-1], 2), x)


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [(96, [20] * 4 + [16]), (128, [26] * 4 + [24]), (768, [154] * 4 + [152])],
)
def test_chunks_are_torchs(channels, sizes):
    np.testing.assert_array_equal(np.diff(moves.chunk_ends(channels, SHIFTS)), sizes)


def test_channels_for_fewer_chunks_are_refused():
    """torch.chunk returns four of them, and the authors' code stops."""
    with pytest.raises(ValueError, match="try 20 channels"):
        moves.chunk_ends(16, SHIFTS)
