"""Laws of what pyramids share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer.models import Model, Run, layers, trunk
from mlp_mixer.models.model import Noise
from mlp_mixer.models.pyramid import BatchNorm, Convolution, Fusion

RNG = np.random.default_rng(0)


def initial(layer, *given) -> dict[str, Any]:
    return dict(layer.init(jax.random.key(0), *given)["params"])


def maps(*shape) -> jax.Array:
    return jnp.float32(RNG.normal(size=shape))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [((7, 7), 4, 2), ((3, 3), 2, 1), ((2, 3), (2, 3), 0)]
)
def test_a_convolution_is_its_sum(size, stride, padding):
    """Position by position, with zeros around the map."""
    layer = Convolution(5, size, stride, padding, torch_init=True)
    x = maps(2, 12, 18, 3)
    variables = layer.init(jax.random.key(0), x)
    y: Any = layer.apply(variables, x)
    kernel, bias = (np.float64(variables["params"][k]) for k in ("kernel", "bias"))
    padded = np.pad(np.float64(x), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    down, across = np.broadcast_to(stride, 2)
    for i, j in np.ndindex(*y.shape[1:3]):
        part = padded[:, i * down :, j * across :][:, : size[0], : size[1]]
        expected = np.einsum("nyxc,yxcd->nd", part, kernel) + bias
        np.testing.assert_allclose(y[:, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_torchs_initial_values_are_uniform_up_to_its_bound(name):
    x = jnp.zeros((1, 9, 9, 7))
    for layer, fan_in in (
        (Convolution(300, (3, 5), torch_init=True), 105),
        (layers.Depthwise(size=(3, 5), torch_init=True), 15),
    ):
        found = initial(layer, x)[name]
        assert 0.6 < np.abs(found).max() * fan_in**0.5 <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 7)])
def test_a_filter_is_the_same_over_maps_and_over_tokens(size):
    x = maps(2, 6, 5, 4)
    on_maps = layers.Depthwise(size=size, torch_init=True)
    variables = on_maps.init(jax.random.key(0), x)
    on_tokens = layers.Depthwise((6, 5), size=size)
    tokens = jnp.moveaxis(x, 0, 2)
    y: Any = on_tokens.apply(variables, tokens.reshape(30, 2, 4))
    y = y.reshape(tokens.shape)
    expected = on_maps.apply(variables, x)
    np.testing.assert_allclose(jnp.moveaxis(y, 2, 0), expected, rtol=1e-6, atol=1e-6)

    def loss(x, first):
        kernel = variables["params"]["kernel"]
        return (layers.filter_channels(x, kernel, first) ** 3).sum()

    found, given = jax.grad(loss)(tokens, 0), jax.grad(loss)(x, 1)
    np.testing.assert_allclose(jnp.moveaxis(found, 2, 0), given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(9, 6), (2, 3)])
def test_a_large_filter_and_its_gradients_are_those_of_a_convolution(grid):
    """Also on a map that is smaller than the filter; in float64."""
    with jax.enable_x64(True):
        x, dy = (jnp.asarray(RNG.normal(size=(2, *grid, 4))) for _ in range(2))
        kernel = jnp.asarray(RNG.normal(size=(7, 5, 1, 4)))

        def convolution(x, kernel):
            return jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=4,
            )

        def over_tokens(x, kernel):
            y = layers.filter_channels(jnp.moveaxis(x, 0, 2), kernel)
            return jnp.moveaxis(y, 2, 0)

        @functools.partial(jax.jit, static_argnums=0)
        def with_gradients(function):
            y, gradients = jax.vjp(function, x, kernel)
            return y, *gradients(dy)

        over_maps = functools.partial(layers.filter_channels, first=1)
        expected = with_gradients(convolution)
        for function in (over_maps, over_tokens):
            found = with_gradients(function)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_the_fusion_of_equal_branches_is_its_last_map_of_one():
    """For the weights of a channel sum to one."""
    x, layer = maps(2, 3, 4, 8), Fusion(Run())
    params = jax.tree.map(lambda z: z + maps(*z.shape), initial(layer, [x] * 3))
    y: Any = layer.apply({"params": params}, [x] * 3)
    kernel, bias = (np.asarray(params["proj"][k]) for k in ("kernel", "bias"))
    expected = np.asarray(x) @ kernel + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_fusions_weights_are_a_softmax_over_branches():
    x, layer = [maps(2, 3, 4, 8) for _ in range(3)], Fusion(Run())
    params = initial(layer, x)
    # What only the third branch of channel 5 sees: its column is 3 · 5 + 2.
    params["Dense_1"]["bias"] = params["Dense_1"]["bias"].at[17].set(100.0)
    params["proj"]["kernel"] = jnp.eye(8)
    y: Any = layer.apply({"params": params}, x)
    np.testing.assert_allclose(y[..., 5], x[2][..., 5], rtol=1e-5)
    assert np.abs(y[..., 4] - x[2][..., 4]).max() > 0.1


def test_one_value_has_no_variance():
    norm, x = BatchNorm(train=True), jnp.zeros((1, 1, 1, 3))
    with pytest.raises(ValueError, match="got 1 image of 1x1 positions"):
        norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])


class Scaled(nn.Module):
    """A block that multiplies by its constant, and by its parameter."""

    @nn.compact
    def __call__(self, x, noise, constant):
        kernel = self.param("kernel", nn.initializers.ones, (1, 1), jnp.float32)
        return x * constant * kernel.reshape(1, 1, 1, 1)


class Row(Model):
    """Three such blocks."""

    patch_size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, image, *, train=False):
        x, states = trunk.blocks(
            self,
            functools.partial(Scaled),
            image,
            name="Scaled",
            count=3,
            train=train,
            noise=Noise(),
            constants=np.array([2, 3, 5]),
        )
        return x.mean((1, 2)), {"states": states}


@pytest.mark.parametrize("run", [Run(), Run(scan=True), Run(remat="full")])
def test_each_block_gets_its_constant(run):
    image, model = maps(1, 2, 2, 3), Row(run=run)
    variables = model.init(jax.random.key(0), image)
    _, out = jax.jit(functools.partial(model.apply, train=True))(variables, image)
    for state, factor in zip(out["states"], (2, 6, 30), strict=True):
        np.testing.assert_allclose(state, factor * image, rtol=1e-6)
