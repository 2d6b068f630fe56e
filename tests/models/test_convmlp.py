"""ConvMLP is its equations, in NumPy and float64; its tokeniser's pool is torch's."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models
from mlp_mixer.models import Run, layers
from mlp_mixer.models.convmlp import (
    ConvBlock,
    ConvMlp,
    ConvMlpBlock,
    Tokeniser,
    max_pool,
)
from mlp_mixer.models.model import IMAGENET, Noise

SMALL: dict[str, Any] = {
    "hidden_dim": (4, 6, 8, 10),
    "num_blocks": (2, 1, 2, 1),
    "mlp_ratio": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": 5,
}
# dtype, error relative to the largest value.
DTYPES = pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-9), ("float32", 1e-4)]
)
RNGS = {"dropout": jax.random.key(7)}


def maps(*shape, dtype="float64"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def random_variables(module, x):
    """All random, statistics too, so that nothing hides behind a zero."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            value = noise / np.prod(leaf.shape[:-1]) ** 0.5
        elif path[-1].key == "var":
            value = np.exp(0.3 * noise)
        else:
            value = 0.3 * noise + (path[-1].key == "scale")
        return jnp.asarray(value, x.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def applied(module, variables, x, *more, **given):
    """(output, statistics), compiled."""

    @jax.jit
    def apply(variables, x):
        return module.apply(variables, x, *more, mutable=["batch_stats"], **given)

    return apply(variables, x)


def assert_close(found, expected, error):
    """Relative to the largest entry of each array."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=error * np.abs(b).max())

    jax.tree.map(close, found, expected)


# --- The equations, in NumPy ----------------------------------------------------------


class Numpy:
    """ConvMLP in float64, from the paper's text and torch's documentation."""

    def __init__(self, variables, train=False):
        to64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
        self.params = jax.tree.map(to64, variables["params"])
        self.stats = jax.tree.map(to64, variables.get("batch_stats", {}))
        self.train = train

    def __call__(self, image, num_blocks):
        """Returns (logits, states); `stats` are then those after this batch."""
        x, states = np.asarray(image, np.float64), dict[str, Any]()
        blocks = 0
        for stage, depth in enumerate(num_blocks):
            p = self.params[f"down{stage}" if stage else "stem"]
            if stage:
                x = self.convolution(x, p["kernel"], 2) + p["bias"]
            else:
                x = states["stem"] = self.tokeniser(x, p, self.stats["stem"])
            for i in range(depth):
                name = f"stage{stage}_block_{i}"
                if stage:
                    x = self.block(x, self.params[name])
                else:
                    x = self.conv_block(x, self.params[name], self.stats[name])
                states[f"block_{blocks}"] = x
                blocks += 1
            states[f"stage_{stage + 1}"] = x
        x = self.layer_norm(x, self.params["norm"]).mean((1, 2))
        states["pre_logits"] = x
        head = self.params["head"]
        return x @ head["kernel"] + head["bias"], states

    def tokeniser(self, x, p, stats):
        for i, stride in enumerate((2, 1, 1)):
            x = self.convolution(x, p[f"Convolution_{i}"]["kernel"], stride)
            x = self.activated(x, i, p, stats)
        return self.pool(x)

    def conv_block(self, x, p, stats):
        y = self.activated(x @ p["Dense_0"]["kernel"], 0, p, stats)
        y = self.convolution(y, p["Convolution_0"]["kernel"])
        y = self.activated(y, 1, p, stats)
        return x + self.activated(y @ p["Dense_1"]["kernel"], 2, p, stats)

    def block(self, x, p):
        x = x + self.mlp(self.layer_norm(x, p["LayerNorm_0"]), p["channel_mixing_0"])
        x = self.layer_norm(x, p["LayerNorm_1"])
        # A filter of each channel is a convolution whose matrices are diagonal.
        filters = p["depthwise"]["kernel"] * np.eye(x.shape[-1])
        x = self.convolution(x, filters)
        return x + self.mlp(self.layer_norm(x, p["LayerNorm_2"]), p["channel_mixing_1"])

    def activated(self, x, i, p, stats):
        """ReLU of the i-th BatchNorm."""
        p, stats = p[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]
        mean, variance = stats["mean"], stats["var"]
        if self.train:
            values = x.reshape(-1, x.shape[-1])
            mean, variance = values.mean(0), values.var(0)
            stats["mean"] = 0.9 * stats["mean"] + 0.1 * mean
            stats["var"] = 0.9 * stats["var"] + 0.1 * values.var(0, ddof=1)
        y = (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]
        return np.maximum(y, 0)

    @staticmethod
    def windows(x, outside, stride):
        """The 3x3 positions around each one, (n, h, w, c, 3, 3)."""
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=outside)
        found = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        return found[:, ::stride, ::stride]

    def convolution(self, x, kernel, stride=1):
        return np.einsum("nhwcyx,yxcd->nhwd", self.windows(x, 0, stride), kernel)

    def pool(self, x):
        return self.windows(x, -np.inf, 2).max((-2, -1))

    @staticmethod
    def layer_norm(x, p):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]

    @staticmethod
    def mlp(x, p):
        h = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        return h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def block(dtype="float64"):
    return ConvMlpBlock(mlp_ratio=2, gelu="exact", run=Run(dtype))


@DTYPES
def test_a_block_is_its_equations(dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x = maps(2, 4, 5, 6, dtype=dtype)
        variables = random_variables(block(dtype), x)
        found, _ = applied(block(dtype), variables, x)
    reference = Numpy(variables)
    assert_close(found, reference.block(np.float64(x), reference.params), error)


@DTYPES
@pytest.mark.parametrize("train", [False, True])
def test_a_block_of_convolutions_is_its_equation(train, dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x = maps(2, 4, 5, 4, dtype=dtype)
        module = ConvBlock(6, train, Run(dtype))
        variables = random_variables(module, x)
        found, stats = applied(module, variables, x)
    reference = Numpy(variables, train)
    expected = reference.conv_block(np.float64(x), reference.params, reference.stats)
    assert_close(found, expected, error)
    assert_close(stats["batch_stats"], reference.stats, error)


@DTYPES
@pytest.mark.parametrize("train", [False, True])
def test_the_tokeniser_is_its_equation(train, dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x = maps(2, 8, 12, 3, dtype=dtype)
        module = Tokeniser(4, train, Run(dtype))
        variables = random_variables(module, x)
        found, stats = applied(module, variables, x)
    assert found.shape == (2, 2, 3, 4)
    reference = Numpy(variables, train)
    expected = reference.tokeniser(np.float64(x), reference.params, reference.stats)
    assert_close(found, expected, error)
    assert_close(stats["batch_stats"], reference.stats, error)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("train", [False, True])
def test_the_forward_is_the_papers(train, dtype, error):
    with jax.enable_x64(dtype == "float64"):
        image = maps(3, 32, 64, 3, dtype=dtype)
        model = ConvMlp(**SMALL, run=Run(dtype))
        variables = random_variables(model, image)
        (logits, out), stats = applied(model, variables, image, train=train)
    reference = Numpy(variables, train)
    expected, states = reference(image, SMALL["num_blocks"])
    assert_close(logits, expected, error)
    assert_close(dict(out), states, error)
    assert_close(stats["batch_stats"], reference.stats, error)


# --- Laws -----------------------------------------------------------------------------


def test_the_pool_is_torchs_and_so_is_its_gradient():
    """The largest of 3x3, none of it outside, where everything is below zero too."""
    x = maps(2, 6, 8, 3, dtype="float32") - 5
    weights = maps(2, 3, 4, 3, dtype="float32")

    def plain(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def with_gradient(pool):
        y, backward = jax.vjp(pool, x)
        return y, *backward(weights)

    (y, found), (_, expected) = jax.jit(
        lambda: [*map(with_gradient, (max_pool, plain))]
    )()
    np.testing.assert_array_equal(y, Numpy({"params": {}}).pool(x))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_value_that_is_no_number_passes_the_pool():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    assert np.isnan(jax.jit(max_pool)(x)).sum() == 2


def with_filters(variables, kernel):
    """The variables of a block, with one filter for all channels."""
    params = variables["params"]
    filters = jnp.broadcast_to(kernel, params["depthwise"]["kernel"].shape)
    return {"params": params | {"depthwise": {"kernel": filters}}}


def test_nothing_passes_the_filter_by():
    """Filters of zeros leave nothing of the state."""
    x = maps(2, 4, 5, 6, dtype="float32")
    variables = with_filters(random_variables(block("float32"), x), 0.0)
    y, _ = applied(block("float32"), variables, x)
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:1, :1, :1], y.shape))


def test_a_block_with_filters_of_a_single_one_mixes_no_positions():
    x = maps(2, 4, 5, 6, dtype="float32")
    one = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    variables = with_filters(random_variables(block("float32"), x), one)
    order = np.random.default_rng(0).permutation(20)

    def shuffled(x):
        return x.reshape(2, 20, 6)[:, order].reshape(x.shape)

    both = jnp.concatenate([x, shuffled(x)])
    y, _ = applied(block("float32"), variables, both)
    np.testing.assert_allclose(y[2:], shuffled(y[:2]), rtol=1e-5, atol=1e-5)


def test_stochastic_depth_leaves_out_each_mlp_by_itself():
    x = maps(2, 4, 5, 6, dtype="float32")
    variables = random_variables(block("float32"), x)
    keep = jnp.array([[0.0, 2.0], [2.0, 0.0]])  # branches, images
    y, _ = applied(block("float32"), variables, x, Noise(keep))
    reference = Numpy(variables)
    p, z = reference.params, np.float64(x)
    first, second = (np.float64(x).reshape(2, 1, 1, 1) for x in keep)
    z = z + first * reference.mlp(
        reference.layer_norm(z, p["LayerNorm_0"]), p["channel_mixing_0"]
    )
    filters = p["depthwise"]["kernel"] * np.eye(6)
    z = reference.convolution(reference.layer_norm(z, p["LayerNorm_1"]), filters)
    z = z + second * reference.mlp(
        reference.layer_norm(z, p["LayerNorm_2"]), p["channel_mixing_1"]
    )
    assert_close(y, z, 1e-4)


def test_the_rate_of_stochastic_depth_restarts_in_each_stage_of_mlps():
    model = ConvMlp(**SMALL | {"num_blocks": (2, 3, 1, 2)}, stochastic_depth=0.6)
    image = jnp.zeros((64, 32, 32, 3))
    draw: Any = ConvMlp._noise
    noise: Any = model.apply({}, image, True, method=draw, rngs=RNGS)
    for of_stage, rates in zip(noise, [(0, 0.3, 0.6), (0,), (0, 0.6)], strict=True):
        assert of_stage.keep.shape == (len(rates), 2, 64)
        for keep, rate in zip(of_stage.keep, rates, strict=True):
            values = [1] if rate == 0 else [0, 1 / (1 - rate)]
            np.testing.assert_allclose(np.unique(keep), values, rtol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (224, 160)])
def test_every_stage_ends_with_its_dense_features(size):
    model = ConvMlp(**SMALL)
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    _, out = jax.eval_shape(model.apply, variables, image)
    for stage, channels in enumerate(SMALL["hidden_dim"]):
        h, w = (side // (4 * 2**stage) for side in size)
        assert out[f"stage_{stage + 1}"].shape == (2, h, w, channels)
    assert out["stem"].shape == out["stage_1"].shape


def test_images_are_normalised_before_they_are_padded():
    """As levels from 0 to 1 less the mean, by the deviation."""
    levels = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    expected = (levels - IMAGENET[0]) / IMAGENET[1]
    found = layers.normalised(jnp.asarray(2 * levels - 1), *IMAGENET)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    fields = models.fields("convmlp_s")
    assert (fields["mean"], fields["std"]) == IMAGENET


def test_a_normalisation_has_a_number_for_each_channel():
    with pytest.raises(ValueError, match="expected 3 numbers each, one for each chan"):
        layers.normalised(jnp.zeros((1, 2, 2, 3)), (0.5,), (0.5,))


def test_a_stem_of_another_stride_is_refused():
    model = ConvMlp(**SMALL, patch_size=(2, 2))
    with pytest.raises(ValueError, match=r"is \(2, 2\), .*leave it out"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
