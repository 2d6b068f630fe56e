"""Laws of random erasing, mixup and CutMix."""

import functools

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


def examples(n=16, h=4, w=6):
    """Labels are the unit matrix: the mixed ones then say who was mixed with whom."""
    image = jax.random.uniform(jax.random.key(3), (n, h, w, 3), minval=-1)
    return image, jnp.eye(n)


# --- Mixup ----------------------------------------------------------------------------

mix = jax.jit(augment.mix, static_argnames=("mixup", "cutmix"))
mixup = functools.partial(mix, cutmix=0.0)


def test_mixup_mixes_every_example_with_the_one_before_it():
    image, labels = examples()
    seen = []
    for seed in range(5):
        mixed, mixed_labels = mixup(jax.random.key(seed), image, labels, mixup=0.5)
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

    mix = np.asarray(share(jax.random.split(jax.random.key(0), draws)))
    assert mix.min() >= 0.5
    # Not up to 1: 4 % of Beta(0.2, 0.2) lie so near that float32 has only 1 for them.
    x = np.linspace(0.5, 0.999, 500)
    distance = (mix <= x[:, None]).mean(1) - (2 * scipy.special.betainc(p, p, x) - 1)
    # Kolmogorov and Smirnov's bound that 99 % of seeds pass; this one is fixed.
    assert abs(distance).max() < 1.63 / np.sqrt(draws)


@pytest.mark.parametrize("devices", [4, 8])
def test_mixup_does_not_depend_on_the_number_of_devices(devices):
    """The roll crosses the devices' borders."""
    image, labels = examples()
    rng = jax.random.key(5)
    expected = mixup(rng, image, labels, mixup=0.5)
    assert expected[1][0, 15] > 0
    mesh = sharding.make_mesh(devices)
    cut = sharding.place_rows((np.asarray(image), np.asarray(labels)), mesh)
    mixed = mixup(rng, *cut, mixup=0.5)
    for x, y in zip(mixed, expected, strict=True):
        assert len(x.sharding.device_set) == devices
        assert len(y.sharding.device_set) == 1
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
