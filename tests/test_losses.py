"""Laws of the losses and of mixup."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mlp_mixer import losses, sharding


def exact(name, logits, labels):
    """Per class and row in float64, in another arrangement than the package's."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    if name == "softmax_xent":
        return (y * (np.logaddexp.reduce(z, -1, keepdims=True) - z)).sum(-1)
    return (np.logaddexp(0, z) - y * z).sum(-1)


def mixed_labels(n, k, rng):
    """What mixup makes of class numbers: at most two classes per row."""
    first, second = np.eye(k)[rng.integers(0, k, (2, n))]
    share = rng.uniform(0.5, 1, (n, 1))
    return (share * first + (1 - share) * second).astype(np.float32)


def test_targets_are_one_for_every_true_class():
    numbers = losses.targets(jnp.array([2, 0]), 3)
    np.testing.assert_array_equal(numbers, [[0, 0, 1], [1, 0, 0]])
    several = losses.targets(jnp.array([[True, False, True], [False] * 3]), 3)
    np.testing.assert_array_equal(several, [[1, 0, 1], [0, 0, 0]])
    assert numbers.dtype == several.dtype == jnp.float32


@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_is_its_formula_per_example_and_summed_over_classes(name, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(64, 11))).astype(np.float32)
    labels = mixed_labels(64, 11, rng)
    loss = losses.LOSSES[name](jnp.asarray(logits), {}, {"label": jnp.asarray(labels)})
    assert loss.shape == (64,)
    np.testing.assert_allclose(loss, exact(name, logits, labels), rtol=2e-6, atol=1e-5)


def test_the_losses_have_the_papers_sizes_at_the_start():
    """Logits 0: ln 2 per class for the sigmoid's sum, ln k for the softmax."""
    logits, batch = jnp.zeros((2, 1000)), {"label": jnp.eye(1000)[:2]}
    sigmoid = losses.sigmoid_xent(logits, {}, batch)
    np.testing.assert_allclose(sigmoid, 1000 * np.log(2), rtol=1e-6)
    softmax = losses.softmax_xent(logits, {}, batch)
    np.testing.assert_allclose(softmax, np.log(1000), rtol=1e-6)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_extreme_logits_give_finite_right_losses_and_gradients(name):
    """The naive log(sigmoid(-100)) and log(softmax) are −inf in float32."""
    rng = np.random.default_rng(1)
    logits = rng.choice([-100.0, 100.0], (32, 6)).astype(np.float32)
    labels = mixed_labels(32, 6, rng)

    def total(logits):
        loss = losses.LOSSES[name](logits, {}, {"label": jnp.asarray(labels)})
        return loss.sum(), loss

    grads, loss = jax.grad(total, has_aux=True)(jnp.asarray(logits))
    assert loss.max() > 50
    np.testing.assert_allclose(loss, exact(name, logits, labels), rtol=1e-6, atol=1e-5)
    probabilities = {
        "sigmoid_xent": scipy.special.expit,
        "softmax_xent": functools.partial(scipy.special.softmax, axis=-1),
    }[name]
    expected = probabilities(logits.astype(np.float64)) - labels
    np.testing.assert_allclose(grads, expected, atol=1e-6)


mixup = jax.jit(losses.mixup, static_argnums=3)


def examples(n=16):
    """Labels are the unit matrix: the mixed ones then say who was mixed with whom."""
    image = jax.random.uniform(jax.random.key(3), (n, 4, 6, 3), minval=-1)
    return image, jnp.eye(n)


def test_mixup_mixes_every_example_with_the_one_before_it():
    image, labels = examples()
    seen = []
    for seed in range(5):
        mixed, mixed_labels = mixup(jax.random.key(seed), image, labels, 0.5)
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
        return losses.mixup(rng, image, labels, p)[1][0, 0]

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
    expected = mixup(rng, image, labels, 0.5)
    assert expected[1][0, 15] > 0
    mesh = sharding.make_mesh(devices)
    cut = sharding.place_rows((np.asarray(image), np.asarray(labels)), mesh)
    mixed = mixup(rng, *cut, 0.5)
    for x, y in zip(mixed, expected, strict=True):
        assert len(x.sharding.device_set) == devices
        assert len(y.sharding.device_set) == 1
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
