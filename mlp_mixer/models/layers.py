"""Layers that two or more all-MLP papers share, with activations **tokens first**.

The state of the network is one array (s, n, c). Read as (s, n·c) it is what token
mixing multiplies, read as (s·n, c) it is what channel mixing multiplies: both mixers
are plain matrix products and no transpose is left but the one that cuts the patches.

The letters are the same everywhere: `n` images (batch), `h w` image height and width,
`s` tokens (patches, in raster order), `c` channels, `d` hidden units, `k` classes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.typing import Initializer
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models.derivatives import (
    GELUS,
    TORCH_KERNEL,
    Dense,
    add_bias,
    at_least_float32,
)
from mlp_mixer.models.model import Noise, Outputs, Run

# The name of what rematerialisation keeps: a hidden layer before its GELU.
PRE_GELU = "pre_gelu"
# The scope of the products of a filter that is computed as a sum of shifted maps, by
# which `planning.counts` knows them.
FILTER = "filter_channels"
# What torch's truncated normal with a deviation of 0.02 is: it is cut at ±2.
NORMAL = nn.initializers.normal(0.02)
# Kaiming's normal over the fan-out, in which torch counts all channels of a depthwise
# convolution too.
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def patches(
    image: Float[Array, "n h w x"], patch_size: tuple[int, int]
) -> Float[Array, "s n p"]:
    """Returns the pixels of each patch, in raster order, as all its channels are."""
    ph, pw = patch_size
    # One axis at a time: with explicit axis types JAX splits or merges no more.
    image = rearrange(image, "n (gh ph) w x -> n gh ph w x", ph=ph)
    image = rearrange(image, "n gh ph (gw pw) x -> gh gw n ph pw x", pw=pw)
    image = rearrange(image, "gh gw n ph pw x -> (gh gw) n ph pw x")
    return rearrange(image, "s n ph pw x -> s n (ph pw x)")


def normalised(
    image: Float[Array, "n h w x"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "n h w x"]:
    """Returns images in [−1, 1] as levels from 0 to 1, less `mean`, by `std`.

    What a stem that pads its images needs to be the authors': the zeros around them are
    of the mean colour, which no change of the stem's weights makes of other zeros.

    Args:
      image: the images.
      mean, std: a number for each channel; 0.5 and 0.5 leave the images as they are.
    """
    if not len(mean) == len(std) == image.shape[-1]:
        raise ValueError(
            f"mean is {mean} and std {std}; expected {image.shape[-1]} numbers each, "
            "one for each channel of the image."
        )
    if {*mean, *std} == {0.5}:
        return image
    less, by = (jnp.array([[[levels]]], image.dtype) for levels in (mean, std))
    return ((image + 1) / 2 - less) / by


class PatchEmbed(nn.Module):
    """The stem: one linear map shared by all patches, straight to tokens first.

    `kernel` (ph, pw, 3, c) and its initial values are those of Flax's Conv.

    Attributes:
      features: number of channels c.
      patch_size: (height, width) of a patch in pixels.
      run: the product's dtype.
      use_bias: whether a bias is added.
      kernel_init, bias_init: other initial values.
    """

    features: int
    patch_size: tuple[int, int]
    run: Run = Run()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, image: Float[Array, "n h w x"]) -> Float[Array, "s n c"]:
        """Returns the tokens in raster order, rows first."""
        ph, pw = self.patch_size
        shape = (ph, pw, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[-1:], jnp.float32)
        image, kernel, bias = nn.dtypes.promote_dtype(
            image, kernel, bias, dtype=self.run.dtype
        )
        y = patches(image, self.patch_size) @ kernel.reshape(-1, self.features)
        return add_bias(y, bias)


class MlpBlock(nn.Module):
    """Dense, GELU, Dense along one axis: the MLP of token and of channel mixing.

    Attributes:
      mlp_dim: number of hidden units d.
      axis: 0 mixes tokens, -1 mixes channels.
      gelu: "tanh" or "exact".
      dropout: rate after the GELU and after the second Dense (Figure 1 names dropout
        as a component without placing it; this is where ViT's MLP block has it).
      run: the products' dtype and form.
      use_bias: whether both Denses add a bias.
      kernel_init: initial values of both kernels.
      torch_init: whether kernels and biases begin as torch's instead.
      image_axis: the axis that counts images.
    """

    mlp_dim: int
    axis: int = -1
    gelu: str = "tanh"
    dropout: float = 0.0
    run: Run = Run()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    torch_init: bool = False
    image_axis: int = 1

    @nn.compact
    def __call__(
        self, y: Float[Array, "*rows c"], noise: Noise = Noise()
    ) -> Float[Array, "*rows c"]:
        """Returns the output of the branch, with `noise` applied."""
        dense = functools.partial(
            Dense,
            axis=self.axis,
            run=self.run,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            torch_init=self.torch_init,
        )
        gelu = known.pick("gelu", self.gelu, GELUS)
        rngs: Any = (None, None)
        if noise.rng is not None:
            rngs = jax.random.split(noise.rng)[::-1]  # as runs of old drew
        shape = y.shape
        if self.run.flat:  # so that the GELU can overwrite its input
            y = y.reshape((shape[0], -1) if self.axis == 0 else (-1, shape[-1]))
        h = dense(self.mlp_dim, name="Dense_0")(y)
        h = _dropout(rngs[0], self.dropout, gelu(checkpoint_name(h, PRE_GELU)))
        y = dense(shape[self.axis], name="Dense_1")(h).reshape(shape)
        y = _dropout(rngs[1], self.dropout, y)
        return scale_images(y, noise.keep, self.image_axis)


class TokenChannelNorm(nn.Module):
    """LayerNorm over the tokens and the channels of each image together.

    `scale` and `bias` are float32, as the statistics are.

    Attributes:
      epsilon: what is added to the variance.
      by_token: whether `scale` and `bias` are (s, c) or, as in torch's GroupNorm with
        one group, (c,).
    """

    epsilon: float = 1e-6
    by_token: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        """Returns `x` normalised, in the dtype of `x`."""
        shape = x.shape[::2] if self.by_token else x.shape[2:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        z = x.astype(at_least_float32(x.dtype))
        z = z - z.mean((0, 2), keepdims=True)
        z = z * lax.rsqrt((z * z).mean((0, 2), keepdims=True) + self.epsilon)
        row = (-1, 1, x.shape[2])
        return (z * scale.reshape(row) + bias.reshape(row)).astype(x.dtype)


def depthwise(run: Run) -> Callable[..., Array]:
    """Returns what a `nn.Conv` of one odd-sized filter per channel computes with.

    Where devices share rows, as along the mesh's `model`, XLA's partitioner sums the
    gradient of such a filter over them too, and so multiplies it by their number (seen
    with jax 0.10.2 and 0.12.0). There the filter is a sum of shifted images.
    """
    alone = run.mesh is None or run.mesh.shape.get("model", 1) == 1
    return lax.conv_general_dilated if alone else _sum_of_shifted


def _sum_of_shifted(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 c"], *_: Any, **__: Any
) -> Float[Array, "n h w c"]:
    return _filtered(x, kernel, first=1)


def _filtered(x: Array, kernel: Float[Array, "kh kw 1 c"], first: int) -> Array:
    """Filters each channel of maps, whose height is the axis `first` of `x`."""
    with jax.named_scope(FILTER):
        terms = [
            shifted * kernel[i, j].reshape(1, 1, 1, -1)
            for (i, j), shifted in _shifted(x, kernel.shape, first).items()
        ]
    return functools.reduce(jnp.add, terms)


def _shifted(x: Array, size: Sequence[int], first: int) -> dict[tuple[int, int], Array]:
    """What each weight of a filter is multiplied by; zeros around a map."""
    (h, w), (kh, kw) = x.shape[first : first + 2], size[:2]
    before, pads = (slice(None),) * first, [(0, 0)] * x.ndim
    pads[first : first + 2] = (kh // 2,) * 2, (kw // 2,) * 2
    padded = jnp.pad(x, pads)
    return {
        (i, j): padded[(*before, slice(i, i + h), slice(j, j + w))]
        for i in range(kh)
        for j in range(kw)
    }


def filter_channels(
    x: Float[Array, "..."], kernel: Float[Array, "kh kw 1 c"], first: int = 0
) -> Float[Array, "..."]:
    """Returns maps, each channel filtered by its own odd-sized filter, in float32.

    Outside of a map are zeros. As a sum of shifted maps, which is what XLA is fast at:
    on one CPU 3 to 30 times as fast as its convolution, gradient included.

    Args:
      x: maps (h, w, n, c), or (n, h, w, c).
      kernel: the filters.
      first: the axis of `x` that is the height, 0 or 1.
    """
    (h, w), (kh, kw) = x.shape[first : first + 2], kernel.shape[:2]
    # Of a filter larger than the map, the outer weights only meet zeros.
    down, right = max(0, kh // 2 - h + 1), max(0, kw // 2 - w + 1)
    kernel = kernel[down : kh - down, right : kw - right]
    return _filter_channels(x, kernel, first)


# Traced once for all maps and filters of the same shapes.
_filtered_again = jax.jit(_filtered, static_argnums=2)

# Automatic differentiation would keep each of the shifted maps.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _filter_channels(x: Array, kernel: Array, first: int) -> Array:
    return _filter_channels_fwd(x, kernel, first)[0]


def _filter_channels_fwd(
    x: Array, kernel: Array, first: int
) -> tuple[Array, tuple[Any, ...]]:
    wide = at_least_float32(x.dtype)
    y = _filtered_again(x.astype(wide), kernel.astype(wide), first)
    return y.astype(x.dtype), (x, kernel)


def _filter_channels_bwd(
    first: int, kept: tuple[Any, ...], dy: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    wide = at_least_float32(x.dtype)
    gradient = _by_products if kernel.size > 9 * kernel.shape[-1] else _by_sums
    dkernel = gradient(x.astype(wide), dy.astype(wide), kernel.shape, first)
    return _filter_channels(dy, kernel[::-1, ::-1], first), dkernel.astype(kernel.dtype)


def _by_sums(x: Array, dy: Array, shape: Sequence[int], first: int) -> Array:
    """The gradient of filters: for each weight the sum of a shifted map times `dy`."""
    with jax.named_scope(FILTER):
        sums = [(y * dy).sum((0, 1, 2)) for y in _shifted(x, shape, first).values()]
    return jnp.stack(sums).reshape(shape)


def _by_products(x: Array, dy: Array, shape: Sequence[int], first: int) -> Array:
    """The same as one product of matrices (kh, positions) (positions, kw) per channel.

    For 5x5 weights and more: on one CPU up to ten times as fast as the sums, each of
    which is one chain of additions.
    """
    kh, kw = shape[:2]
    down, right = kh // 2, kw // 2
    order = 3, 2 if first == 0 else 0, first, first + 1
    x, dy = x.transpose(order), dy.transpose(order)  # (c, n, h, w)
    h, w = x.shape[2:]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (right, right)))
    dy = jnp.pad(dy, ((0, 0), (0, 0), (down, down), (0, 0)))
    columns = jnp.stack([x[..., j : j + w] for j in range(kw)])
    rows = jnp.stack([dy[:, :, i : i + h] for i in reversed(range(kh))])
    return jnp.einsum("icnhw,jcnhw->ijc", rows, columns)[:, :, None]


_filter_channels.defvjp(_filter_channels_fwd, _filter_channels_bwd)


class Depthwise(nn.Module):
    """A filter for each channel, over maps, or over the map that tokens are.

    Parameters and names are those of Flax's Conv: `kernel` (kh, kw, 1, c), `bias` (c,).

    Attributes:
      grid: (height, width) of the map that tokens are; None: it takes maps.
      run: the dtype.
      size: (height, width) of the filters, odd numbers.
      use_bias: whether a bias is added.
      kernel_init: initial values of the filters.
      torch_init: whether filters and biases begin as torch's instead.
    """

    grid: tuple[int, int] | None = None
    run: Run = Run()
    size: tuple[int, int] = (3, 3)
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns maps (n, h, w, c), or tokens (s, n, c); outside are zeros."""
        shape = (*self.size, 1, x.shape[-1])
        kernel_init, bias_init = self.kernel_init, nn.initializers.zeros
        if self.torch_init:
            kernel_init, bias_init = TORCH_KERNEL, uniform(math.prod(self.size) ** -0.5)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", bias_init, shape[-1:], jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.run.dtype)
        if self.grid is None:
            return add_bias(filter_channels(x, kernel, 1), bias)
        y = filter_channels(x.reshape(*self.grid, *x.shape[1:]), kernel)
        return add_bias(y.reshape(x.shape), bias)


def uniform(limit: float) -> Initializer:
    """Returns the initialiser that draws from ±limit, as torch's layers begin."""

    def init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def _dropout(rng: Array | None, rate: float, x: Array) -> Array:
    if rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def scale_images(
    x: Float[Array, "..."], factors: Float[Array, " n"] | None, axis: int = 1
) -> Float[Array, "..."]:
    """Returns `x` times each image's factor: the mask of stochastic depth.

    Args:
      x: the output of a branch.
      factors: a factor for each image; None: 1.
      axis: the axis of `x` that counts images.
    """
    if factors is None:
        return x
    factors = factors.astype(x.dtype)
    return x * lax.broadcast_in_dim(factors, x.shape, (axis,))


def head(
    pre_logits: Float[Array, "n c"],
    num_classes: int,
    kernel_init: Initializer = nn.initializers.zeros,
    bias_init: Initializer = nn.initializers.zeros,
) -> Float[Array, "n k"]:
    """Returns logits: a linear map that starts at zero, unless it is said how.

    Called in a module's compact method, of which it becomes the part `head`.
    """
    dense = nn.Dense(
        num_classes,
        kernel_init=kernel_init,
        bias_init=bias_init,
        name="head",
    )
    return dense(pre_logits)


def readout(
    y: Float[Array, "s n c"],
    states: list[Float[Array, "s n c"]],
    num_classes: int | None,
    **head_fields: Any,
) -> Outputs:
    """Returns (logits, out) of a model that averages tokens before its `head`.

    Args:
      y: the last state, normalised.
      states: the states after the stem and after each block, for `out`.
      num_classes: None leaves the head out; the first result are the features.
      **head_fields: arguments of `head`.
    """
    pre_logits = y.mean(0, dtype=at_least_float32(y.dtype))
    out = {**named_states(states), "pre_logits": pre_logits}
    if num_classes is None:
        return pre_logits, out
    return head(pre_logits, num_classes, **head_fields), out


def named_states(states: list[Float[Array, "s n c"]]) -> dict[str, Array]:
    """Returns {"stem", "block_0", …: (n, s, c)} of the states, for `out`."""
    names = ["stem", *(f"block_{i}" for i in range(len(states) - 1))]
    return {k: jnp.swapaxes(x, 0, 1) for k, x in zip(names, states, strict=True)}
