"""CycleMLP is its equations, in NumPy and float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models
from mlp_mixer.models import Run
from mlp_mixer.models.cyclemlp import CycleBlock
from mlp_mixer.models.model import Noise

SHAPE = (2, 4, 5, 8)
KEPT = np.ones((2, 2))  # factor of a branch, of an image
# dtype, error relative to the largest value.
DTYPES = pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-9), ("float32", 1e-4)]
)


def drawn(*shape, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_params(module, *inputs, dtype="float64", seed=1):
    """All random, so that nothing hides behind a zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def draw(path, leaf):
        fan_in = math.prod(leaf.shape[:-1])
        noise = rng.normal(size=leaf.shape) / (fan_in if leaf.ndim > 1 else 2) ** 0.5
        return (noise + (path[-1].key == "scale")).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_close(found, expected, error):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=error * np.abs(expected).max()
    )


# --- The equations --------------------------------------------------------------------


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def mlp(x, p):
    return dense(gelu(dense(x, p["Dense_0"])), p["Dense_1"])


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def looked_aside(x, axis):
    """Of one image (h, w, c): each channel of each position from its own place."""
    y = np.zeros_like(x)
    for i, j, k in np.ndindex(x.shape):
        at = [i, j]
        at[axis] += (k + 1) % 3 - 1
        if 0 <= at[axis] < x.shape[axis]:
            y[i, j, k] = x[*at, k]
    return y


def fusion(branches, p):
    """Of one image: every channel has three weights, which sum to 1."""
    r = mlp(sum(branches).mean((0, 1)), p).reshape(-1, 3)
    weights = np.exp(r) / np.exp(r).sum(1, keepdims=True)
    y = sum(weights[:, i] * x for i, x in enumerate(branches))
    return dense(y, p["proj"])


def equations(x, p):
    """The block of one image (h, w, c)."""
    z = layer_norm(x, p["LayerNorm_0"])
    branches = [
        dense(looked_aside(z, 1), p["cycle_w"]),
        dense(looked_aside(z, 0), p["cycle_h"]),
        dense(z, p["linear_c"]),
    ]
    u = x + fusion(branches, p["fusion"])
    return u + mlp(layer_norm(u, p["LayerNorm_1"]), p["channel_mixing"])


@functools.cache
def compiled(dtype="float64"):
    """A block: (params, maps, factors) → (the next maps, the branches that move)."""
    block = CycleBlock(3, "exact", Run(dtype))

    @jax.jit
    def apply(params, x, keep):
        noise = Noise(keep=jnp.asarray(keep))
        y, kept = block.apply({"params": params}, x, noise, capture_intermediates=True)
        parts = kept["intermediates"]
        return y, {name: parts[name]["__call__"][0] for name in ("cycle_w", "cycle_h")}

    return lambda params, x, keep=KEPT: apply(params, x, keep)


def block_params(dtype="float64"):
    block = CycleBlock(3, "exact", Run(dtype))
    return random_params(block, jnp.zeros(SHAPE, dtype), dtype=dtype)


@DTYPES
def test_a_block_is_the_papers(dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x, params = drawn(*SHAPE, dtype=dtype), block_params(dtype)
        assert "bias" not in params["linear_c"]
        found, _ = compiled(dtype)(params, x)
        assert found.dtype == dtype
        exact = jax.tree.map(np.float64, params)
        expected = [equations(image, exact) for image in np.asarray(x, np.float64)]
        assert_close(found, np.stack(expected), error)


def test_stochastic_depth_leaves_out_each_branch_of_each_image():
    with jax.enable_x64():
        x, params = drawn(*SHAPE), block_params()
        y, _ = compiled()(params, x, np.array([[0.0, 2.0], [0.0, 0.0]]))
        np.testing.assert_array_equal(y[0], x[0])
        z = np.asarray(x)[1]
        p = without(params, "channel_mixing")
        assert_close(y[1] - z, 2 * (equations(z, p) - z), 1e-9)


def without(params, part):
    return params | {part: jax.tree.map(np.zeros_like, params[part])}


# --- What it is made of ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["cycle_w", "cycle_h"])
def test_a_branch_commutes_with_a_shift_of_the_image(name):
    """Along the other axis; and along its own, away from the borders."""
    own, other = (2, 1) if name == "cycle_w" else (1, 2)
    with jax.enable_x64():
        x, params = drawn(*SHAPE), block_params()

        def branch(x):
            return compiled()(params, x)[1][name]

        y = branch(x)
        assert_close(branch(jnp.roll(x, 1, other)), jnp.roll(y, 1, other), 1e-12)
        found, expected = (
            np.moveaxis(np.asarray(z), own, 0)
            for z in (branch(jnp.roll(x, 1, own)), jnp.roll(y, 1, own))
        )
        assert_close(found[2:-1], expected[2:-1], 1e-12)
        assert np.abs(found - expected).max() > 0.1  # at the borders


def test_a_transposed_image_sees_rows_as_columns():
    with jax.enable_x64():
        x, params = drawn(*SHAPE), block_params()
        order = [1, 0, 2]  # of the branches, in the softmax
        last = {
            k: v.reshape(-1, 8, 3)[..., order].reshape(v.shape)
            for k, v in params["fusion"]["Dense_1"].items()
        }
        turned = params | {
            "cycle_w": params["cycle_h"],
            "cycle_h": params["cycle_w"],
            "fusion": params["fusion"] | {"Dense_1": last},
        }
        expected, _ = compiled()(params, x)
        found, _ = compiled()(turned, x.swapaxes(1, 2))
        assert_close(found, expected.swapaxes(1, 2), 1e-12)


# --- What it takes --------------------------------------------------------------------


def test_an_image_that_the_last_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image_size 40 is not divisible"):
        models.create("cyclemlp_b1", image_size=(40, 64))


def test_another_stride_of_the_stem_is_refused():
    with pytest.raises(ValueError, match=r"patch_size is \(2, 2\), but the conv"):
        models.create("cyclemlp_b1", image_size=(32, 32), patch_size=(2, 2))


def test_an_unknown_gelu_is_refused():
    model = models.create("cyclemlp_b1", gelu="erf")
    with pytest.raises(ValueError, match="gelu 'erf' is unknown; try"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
