"""Laws of the losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mlp_mixer import losses


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


def test_a_smoothed_label_is_a_mixture_with_all_classes_alike():
    """ε = 0.1 of 4 classes: 0.925 for the own one and 0.025 for each other."""
    label = losses.smoothed(jnp.eye(4)[:2], 0.1)
    np.testing.assert_allclose(label[1], [0.025, 0.925, 0.025, 0.025], rtol=1e-6)
    np.testing.assert_allclose(label.sum(-1), 1, rtol=1e-6)


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
