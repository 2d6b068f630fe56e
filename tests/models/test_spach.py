"""SPACH is its equations, in NumPy and float64, and other models with parts off."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spach_equations as equations

from mlp_mixer import models, pretrained
from mlp_mixer.models import Run, layers, mixer, spach, trunk
from mlp_mixer.models.model import Noise

GRID, C = (3, 4), 6
FORMS = pytest.mark.parametrize("mixing", spach.MIXINGS)
# dtype, error relative to the largest value.
DTYPES = pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-9), ("float32", 1e-4)]
)


def block(mixing, dtype="float64"):
    """One of the model below."""
    return spach.layer(
        mixing,
        GRID,
        channels_mlp_dim=8,
        tokens_mlp_dim=5,
        num_heads=3,
        gelu="exact",
        run=Run(dtype=dtype),
    )()


def state(dtype="float64", n=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(math.prod(GRID), n, C)), dtype)


def random_params(module, *inputs, seed=1):
    """All random, so that nothing hides behind a zero."""
    rng, x = np.random.default_rng(seed), inputs[0]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def draw(path, leaf):
        noise = (
            rng.normal(size=leaf.shape) / (leaf.shape[0] if leaf.ndim > 1 else 2) ** 0.5
        )
        return jnp.asarray(noise + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_close(found, expected, error):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=error * np.abs(expected).max()
    )


# --- The equations --------------------------------------------------------------------


@FORMS
@DTYPES
def test_a_block_is_the_papers(mixing, dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x, module = state(dtype), block(mixing, dtype)
        params = random_params(module, x, Noise())
        found = jax.jit(module.apply)({"params": params}, x, Noise())
        assert found.dtype == dtype
        exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        for image, y in zip(
            np.swapaxes(x, 0, 1), np.swapaxes(found, 0, 1), strict=True
        ):
            expected = equations.layer(np.float64(image), exact, mixing, GRID, 3)
            assert_close(y, expected, error)


def test_stochastic_depth_leaves_the_convolution_of_the_input_itself():
    with jax.enable_x64():
        x, module = state(), block("attn")
        params = random_params(module, x, Noise())
        dropped = Noise(keep=jnp.zeros((2, 2)))
        found = jax.jit(module.apply)({"params": params}, x, dropped)
        p = jax.tree.map(np.asarray, params["depthwise"])
        expected = [
            image + equations.depthwise(image, p, GRID)
            for image in np.swapaxes(x, 0, 1)
        ]
        assert_close(np.swapaxes(found, 0, 1), np.stack(expected), 1e-12)


# --- What it is where parts are off ---------------------------------------------------


def without(params, *parts):
    """The parameters with zeros for these parts of a block."""
    zeros = {part: jax.tree.map(jnp.zeros_like, params[part]) for part in parts}
    return params | zeros


def outputs(module, params, x):
    return jax.jit(module.apply)({"params": params}, x, Noise())


def test_without_convolution_and_scale_the_form_mlp_is_a_mixer_block():
    with jax.enable_x64():
        x, module = state(), block("mlp")
        params = without(random_params(module, x, Noise()), "depthwise")
        params["scale"] = jnp.ones_like(params["scale"])
        mlp = functools.partial(layers.MlpBlock, gelu="exact", run=Run(dtype="float64"))
        other = mixer.MixerBlock(
            functools.partial(mlp, 5, axis=0), functools.partial(mlp, 8)
        )
        same = {k: v for k, v in params.items() if k not in ("depthwise", "scale")}
        assert_close(outputs(module, params, x), outputs(other, same, x), 1e-12)


@pytest.mark.parametrize("mixing", ["mlp", "attn"])
def test_with_a_scale_of_zero_every_form_is_the_form_conv(mixing):
    with jax.enable_x64():
        x, module, conv = state(), block(mixing), block("conv")
        params = without(random_params(module, x, Noise()), "scale")
        same = {k: params[k] for k in ("depthwise", "LayerNorm_1", "channel_mixing")}
        assert_close(outputs(module, params, x), outputs(conv, same, x), 1e-12)


def test_attention_without_the_convolution_knows_no_order_of_tokens():
    with jax.enable_x64():
        x, module = state(), block("attn")
        params = without(random_params(module, x, Noise()), "depthwise")
        order = np.random.default_rng(3).permutation(len(x))
        found = outputs(module, params, x[order])
        assert_close(found, outputs(module, params, x)[order], 1e-12)


def test_the_filter_of_channels_is_xlas_convolution_and_so_are_its_gradients():
    with jax.enable_x64():
        rng = np.random.default_rng(4)
        x, kernel, dy = (
            jnp.asarray(rng.normal(size=size))
            for size in ((3, 5, 2, 4), (3, 3, 1, 4), (3, 5, 2, 4))
        )
        axes = ("HWNC", "HWIO", "HWNC")

        def convolution(x, kernel):
            return jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"),
                dimension_numbers=axes,
                feature_group_count=4,
            )

        def with_gradients(function):
            y, gradients = jax.vjp(function, x, kernel)
            return y, gradients(dy)

        found = jax.jit(with_gradients, static_argnums=0)(layers.filter_channels)
        expected = jax.jit(with_gradients, static_argnums=0)(convolution)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), found, expected)


# --- The model ------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "patch_size": (2, 2),
    "num_blocks": 2,
    "hidden_dim": 6,
    "channels_mlp_dim": 8,
    "num_classes": 3,
}


def test_the_forms_conv_and_attn_take_any_resolution():
    for fields in ({"mixing": "conv"}, {"mixing": "attn", "num_heads": 2}):
        model = models.create("spach", **SMALL, **fields)
        square, wide = (jnp.zeros((1, h, w, 3)) for h, w in ((8, 8), (4, 12)))
        variables = jax.eval_shape(model.init, jax.random.key(0), square)
        logits, _ = jax.eval_shape(model.apply, variables, wide)
        assert logits.shape == (1, 3)


def test_weights_of_the_form_conv_change_their_resolution_as_they_are():
    model = models.create("spach", **SMALL, mixing="conv")
    params = random_params(model, jnp.zeros((1, 8, 8, 3)))
    weights = pretrained.Weights(params, "made here", image_size=(8, 8))
    assert weights.model["mixing"] == "conv"
    wide = pretrained.resized(weights, (4, 12), "interpolate")
    assert wide.image_size == (4, 12)
    jax.tree.map(np.testing.assert_array_equal, wide.params, params)


def test_every_block_has_the_same_rate_and_what_is_kept_is_rescaled(monkeypatch):
    asked = {}
    monkeypatch.setattr(trunk, "draw", lambda *_, **how: asked.update(how) or Noise())
    model = models.create("spach", **SMALL, mixing="conv", stochastic_depth=0.3)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    assert asked["rates"] == (0.3, 0.3)
    assert asked["rescale"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixing": "mlp"}, "tokens_mlp_dim is None, but .* 'mlp' need it"),
        ({"mixing": "attn"}, "num_heads is None"),
        ({"mixing": "attn", "num_heads": 4}, "4, which does not divide hidden_dim, 6"),
        ({"mixing": "pool"}, "mixing 'pool' is unknown; try mlp"),
    ],
)
def test_a_form_without_its_sizes_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        models.create("spach", **SMALL, **fields, image_size=(8, 8))
