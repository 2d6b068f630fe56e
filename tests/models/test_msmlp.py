"""MS-MLP is its equations, in NumPy and float64."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models
from mlp_mixer.models import Run, msmlp
from mlp_mixer.models.model import Noise

CHUNKS = (0, 3, 6, 9, 12, 13)  # of 13 channels
FILTERS = (1, 3, 5, 7, 7)
ERF = np.vectorize(math.erf)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def random_params(module, *given):
    """All random, so that nothing hides behind a zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    found, tree = jax.tree.flatten(shapes)
    arrays = [drawn(*x.shape, seed=i) for i, x in enumerate(found)]
    return jax.tree.unflatten(tree, arrays)


def mixed(x, params):
    """U, position by position, with zeros around the rolled map."""
    y = np.zeros(x.shape)
    for axis, name in ((2, "w"), (1, "h")):
        for q, (i, j) in enumerate(itertools.pairwise(CHUNKS)):
            filters = params[f"{name}_{q}"]
            side = len(filters["kernel"])
            rolled = np.roll(x[..., i:j], q - 2, axis)
            padded = np.pad(rolled, ((0, 0), *[(side // 2,) * 2] * 2, (0, 0)))
            for row, column in np.ndindex(x.shape[1:3]):
                seen = padded[:, row : row + side, column : column + side]
                total = (seen * filters["kernel"][:, :, 0]).sum((1, 2))
                y[:, row, column, i:j] += total + filters["bias"]
    return y


def block(x, params, keep):
    y = mixed(x, params["mix_shift"])
    mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    norm, mlp = params["LayerNorm_0"], params["channel_mixing"]
    y = (y - mean) / np.sqrt(variance + 1e-6) * norm["scale"] + norm["bias"]
    y = y @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"]
    y = y / 2 * (1 + ERF(y / math.sqrt(2)))
    y = y @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
    return x + keep[:, None, None, None] * params["scale"] * y


@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-11), ("float32", 1e-4)])
def test_a_block_is_its_equations(dtype, error):
    """On a map with fewer columns than some filters have; an image keeps its state."""
    x, keep = drawn(3, 8, 5, 13), np.array([1.25, 0, 1.25])
    with jax.enable_x64(dtype == "float64"):
        module = msmlp.MixShiftBlock(FILTERS, 2, 1e-6, "exact", Run(dtype))
        params = random_params(module, jnp.zeros(x.shape))
        noise = Noise(jnp.asarray(keep[None], dtype))
        given = jax.tree.map(lambda z: jnp.asarray(z, dtype), params)
        found: Any = jax.jit(module.apply)(
            {"params": given}, jnp.asarray(x, dtype), noise
        )
    assert found.dtype == dtype
    np.testing.assert_allclose(found, block(x, params, keep), rtol=error, atol=error)
    np.testing.assert_array_equal(found[1], np.asarray(x[1], dtype))


def test_with_filters_of_one_the_map_is_rolled_along_the_width_and_the_height():
    x, module = drawn(2, 6, 7, 13), msmlp.MixShift((1,) * 5, Run("float64"))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        one = {"kernel": jnp.ones, "bias": jnp.zeros}
        params = {
            name: {kind: one[kind](leaf.shape) for kind, leaf in layer.items()}
            for name, layer in shapes.items()
        }
        found = np.asarray(jax.jit(module.apply)({"params": params}, x))
    for (i, j), d in zip(itertools.pairwise(CHUNKS), (-2, -1, 0, 1, 2), strict=True):
        z = x[..., i:j]
        expected = np.roll(z, d, axis=2) + np.roll(z, d, axis=1)
        np.testing.assert_allclose(found[..., i:j], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[..., 6:9], 2 * x[..., 6:9], rtol=0, atol=1e-12)


def test_channels_that_make_no_five_chunks_are_refused():
    with pytest.raises(
        ValueError, match="16 channels are 4 chunks of 4, not 5; try 20"
    ):
        models.create("msmlp_t", hidden_dim=16, image_size=(32, 32))
