"""Laws of random erasing, mixup and CutMix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mlp_mixer import augment, sharding

# Kolmogorov and Smirnov's bound, times √draws, that 99 % of seeds pass; ours are fixed.
BOUND = 1.63


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.fixture
def uniform_shares(monkeypatch):
    """λ from a uniform distribution, where any does: Beta compiles for seconds."""
    monkeypatch.setattr(jax.random, "beta", lambda rng, *_: jax.random.uniform(rng))


def examples(n=16, h=4, w=6):
    """Labels are the unit matrix: the mixed ones then say who was mixed with whom."""
    image = jax.random.uniform(jax.random.key(3), (n, h, w, 3), minval=-1)
    return image, jnp.eye(n)


# --- Mixup ----------------------------------------------------------------------------


@jax.jit
def mixup(rng, image, labels):
    return augment.mix(rng, image, labels, mixup=0.5, cutmix=0.0)


def test_mixup_mixes_every_example_with_the_one_before_it():
    image, labels = examples()
    seen = []
    for seed in range(5):
        mixed, mixed_labels = mixup(jax.random.key(seed), image, labels)
        mix = float(mixed_labels[0, 0])
        assert 0.5 <= mix <= 1
        # Row 0 with the last row; one λ for all rows, images and labels.
        for x, y in ((image, mixed), (labels, mixed_labels)):
            expected = mix * x + (1 - mix) * x[jnp.arange(-1, 15)]
            np.testing.assert_allclose(y, expected, atol=1e-6)
        seen.append(mix)
    assert len(set(seen)) == 5


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_share_of_mixup_is_a_folded_beta(p):
    """λ = max(b, 1 − b), b ~ Beta(p, p): P(λ ≤ x) = 2·I_x(p, p) − 1 on [1/2, 1]."""
    draws, image = 4000, jnp.zeros((2, 1, 1, 3))
    labels = jnp.eye(2)

    @jax.jit
    @jax.vmap
    def share(rng):
        return augment.mix(rng, image, labels, mixup=p, cutmix=0.0)[1][0, 0]

    mix = np.asarray(share(keys(draws)))
    assert mix.min() >= 0.5
    # Not up to 1: 4 % of Beta(0.2, 0.2) lie so near that float32 has only 1 for them.
    x = np.linspace(0.5, 0.999, 500)
    distance = (mix <= x[:, None]).mean(1) - (2 * scipy.special.betainc(p, p, x) - 1)
    assert abs(distance).max() < BOUND / np.sqrt(draws)


# --- CutMix ---------------------------------------------------------------------------


@pytest.mark.usefixtures("uniform_shares")
@pytest.mark.parametrize("p", [0.0, 0.8], ids=["CutMix alone", "one of the two"])
def test_the_share_of_a_label_is_that_of_the_pixels(p):
    """Image 0 is white and all others are black: its mean is what is left of it."""
    h, w, draws = 12, 20, 500
    image = jnp.zeros((3, h, w, 3)).at[0].set(1.0)

    @jax.jit
    @jax.vmap
    def mixed(rng):
        pixels, labels = augment.mix(rng, image, jnp.eye(3), mixup=p, cutmix=1.0)
        return pixels[0], labels[0]

    pixels, labels = jax.tree.map(np.asarray, mixed(keys(draws)))
    np.testing.assert_allclose(pixels.mean((1, 2, 3)), labels[:, 0], atol=2e-6)
    np.testing.assert_allclose(labels[:, 0] + labels[:, 2], 1, atol=1e-6)
    cut = ((pixels == 0) | (pixels == 1)).all((1, 2, 3))
    if not p:
        assert cut.all()
    else:  # each in half of the steps, within four standard deviations
        assert abs(cut.mean() - 0.5) < 4 * 0.5 / np.sqrt(draws)
        blended = pixels[~cut].reshape((~cut).sum(), -1)
        assert (blended == blended[:, :1]).all()
        assert blended.min() >= 0.5
    box = pixels[cut][..., 0] == 0
    assert len({*map(bytes, box)}) > 0.5 * len(box)
    for inside in box:  # a rectangle
        rows, columns = inside.any(1), inside.any(0)
        assert (inside == np.outer(rows, columns)).all()
        for line in (rows, columns):
            assert abs(np.diff(line.astype(int))).sum() <= 2


def test_cutmix_cuts_the_papers_box():
    """λ uniform: a side of n is ⌊n·√(1 − λ)⌋ = k with probability (2k + 1)/n²; of its
    rows those count that are inside, the centre being any of n pixels."""
    n, draws = 16, 4000
    share = jnp.asarray(np.random.default_rng(0).random(draws), jnp.float32)
    boxes = jax.jit(jax.vmap(lambda *drawn: augment.cut_box(drawn[0], n, n, drawn[1])))
    box: Any = np.asarray(boxes(keys(draws), share))
    expected = np.zeros(n + 1)
    for k in range(n):
        for centre in range(n):
            first, last = max(centre - k // 2, 0), min(centre + (k + 1) // 2, n)
            expected[last - first] += (2 * k + 1) / n**2 / n
    for axis in (1, 2):
        found = np.bincount(box.any(axis).sum(1), minlength=n + 1) / draws
        distance = found.cumsum() - expected.cumsum()
        assert abs(distance).max() < BOUND / np.sqrt(draws)
    # Where the box is cut off nowhere, it is a square: one λ for both sides.
    whole = [b for b in box if not (b[[0, -1]].any() or b[:, [0, -1]].any())]
    assert len(whole) > 500
    assert all(b.any(0).sum() == b.any(1).sum() for b in whole)


# --- Random erasing -------------------------------------------------------------------

SIDE, DRAWS = 100, 4000


@functools.cache
def erased():
    """Of each image whether, and the box (top, left, height, width)."""
    boxes = jax.jit(augment.erased_boxes, static_argnums=(1, 2, 3, 4))
    inside: Any = np.asarray(boxes(jax.random.key(0), DRAWS, SIDE, SIDE, 0.75))
    rows, columns = inside.any(2), inside.any(1)
    on = rows.any(1)
    assert (inside == rows[:, :, None] & columns[:, None, :]).all()
    box = np.stack(
        [rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], axis=-1
    )
    for line, top, size in ((rows, 0, 2), (columns, 1, 3)):  # in one piece
        last = box[:, top] + box[:, size] - 1
        assert (line[np.arange(DRAWS), last] == on).all()
    return on, box[on]


def test_an_image_is_erased_with_the_probability():
    on, _ = erased()
    assert abs(on.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / DRAWS)


def test_the_area_of_a_box_is_uniform_among_those_that_are_inside():
    """Share a of the area, ratio r: the sides are √(a·r) and √(a/r), so it is inside if
    |ln r| < −ln a; |ln r| is uniform up to L = ln(1/0.3). Hence the density of a is
    that of a uniform number times min(1, −ln a / L)."""
    _, box = erased()
    area = box[:, 2] * box[:, 3] / SIDE**2
    a = np.linspace(0.02, 1 / 3, 2001)
    density = np.minimum(1.0, -np.log(a) / np.log(1 / 0.3))
    expected = np.append(0.0, ((density[1:] + density[:-1]) / 2).cumsum())
    found = (area <= a[:, None]).mean(1)
    # The sides are whole pixels: a hundredth of the smallest's and largest's area.
    assert abs(found - expected / expected[-1]).max() < BOUND / np.sqrt(len(box)) + 0.01
    assert 0.018 < area.min() < 0.025
    assert 0.32 < area.max() < 0.34


def test_the_ratio_of_a_box_is_log_uniform():
    _, box = erased()
    small = box[box[:, 2] * box[:, 3] < 0.25 * SIDE**2]  # of which all are inside
    ratio = np.log(small[:, 2] / small[:, 3]) / np.log(1 / 0.3)
    x = np.linspace(-0.99, 0.99, 199)
    distance = (ratio <= x[:, None]).mean(1) - (x + 1) / 2
    assert abs(distance).max() < BOUND / np.sqrt(len(small)) + 0.01


def test_a_box_is_anywhere_inside_of_the_image():
    _, box = erased()
    for side in (0, 1):
        place = (box[:, side] + 0.5) / (SIDE - box[:, side + 2] + 1)
        x = np.linspace(0.05, 0.95, 91)
        distance = (place <= x[:, None]).mean(1) - x
        assert abs(distance).max() < BOUND / np.sqrt(len(box)) + 0.01


def test_erased_pixels_are_noise_of_imagenets_levels_and_all_others_stay():
    image = jax.random.uniform(jax.random.key(1), (64, 32, 40, 3), minval=-1)
    erase = jax.jit(augment.erase, static_argnums=2)
    out = np.asarray(erase(jax.random.key(2), image, 1.0))
    changed = (out != np.asarray(image)).any(-1)
    assert 0.1 < changed.mean() < 0.25
    level = (out[changed] + 1) / 2
    noise = (level - augment.MEAN) / augment.STD
    bound = 5 / np.sqrt(len(noise))
    assert abs(noise.mean(0)).max() < bound
    np.testing.assert_allclose(np.corrcoef(noise, rowvar=False), np.eye(3), atol=bound)
    x = np.linspace(-3, 3, 121)
    distance = (noise.ravel() <= x[:, None]).mean(1) - scipy.special.ndtr(x)
    assert abs(distance).max() < BOUND / np.sqrt(noise.size)
    np.testing.assert_array_equal(erase(jax.random.key(2), image, 0.0), image)


# --- Devices --------------------------------------------------------------------------


@pytest.mark.usefixtures("uniform_shares")
def test_augmentation_does_not_depend_on_the_number_of_devices():
    """The roll crosses the devices' borders."""

    @jax.jit
    def augmented(rng, image, labels):
        image = augment.erase(rng, image, 0.5)
        return augment.mix(rng, image, labels, mixup=0.5, cutmix=1.0)

    image, labels = examples()
    rng = jax.random.key(5)
    expected = augmented(rng, image, labels)
    assert expected[1][0, 15] > 0
    cut = sharding.place_rows(
        (np.asarray(image), np.asarray(labels)), sharding.make_mesh(8)
    )
    found = augmented(rng, *cut)
    for x, y in zip(found, expected, strict=True):
        assert len(x.sharding.device_set) == 8
        assert len(y.sharding.device_set) == 1
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
