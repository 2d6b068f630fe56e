"""Pyramids: stages of blocks on maps (n, h, w, c), each with fewer positions.

What the papers share: how a stage begins and its blocks follow, convolutions with
torch's padding, BatchNorm, and the fusion of three branches. The letters are those of
`layers`, with the stage's number behind: `c0` channels of the first stage.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax import lax
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import (
    GELUS,
    TORCH_KERNEL,
    Dense,
    add_bias,
    at_least_float32,
)
from mlp_mixer.models.model import Model, Noise, Outputs, Run, check_divisible


class Row(NamedTuple):
    """Blocks in a row, all of them or some of them of a stage.

    Attributes:
      block: makes one, of `name` and `parent`, as in `trunk.blocks`.
      depth: number of blocks; 0 is no row.
      name: their name behind that of their stage.
      constants: what the blocks differ by, as in `trunk.blocks`.
    """

    block: Callable[..., nn.Module]
    depth: int
    name: str = "block"
    constants: Any = None


def stages(
    model: Model,
    image: Float[Array, "n h w 3"],
    begin: Callable[[int], Callable[[Array], Array]],
    rows: Callable[[int], Sequence[Row]],
    *,
    noise: Sequence[Noise],
    train: bool,
    as_map: Callable[[int, Array], Array] = lambda _, x: x,
) -> tuple[Array, dict[str, Array]]:
    """Returns the last map, and what `out` has of all of them.

    These are `stem`, `block_0`, … of all stages, and `stage_1`, …: the map that a stage
    ends with, its dense features. Called in the compact method of `model`, whose parts
    `stage0_block_0`, … the blocks become.

    Args:
      model: the module whose stages they are.
      image: the images.
      begin: makes what begins a stage, of its number from 0: it maps the image, or the
        map before, to a map of fewer positions.
      rows: the rows of a stage, of its number from 0.
      noise: noise of all blocks of each stage, as `linear_noise` returns it.
      train: whether this is training.
      as_map: makes a map of what the blocks of a stage, given its number, have in its
        place. It is for `out` alone.
    """
    x, states, out = image, list[Array](), dict[str, Array]()
    for i, of_stage in enumerate(noise):
        x = begin(i)(x)
        out |= {} if i else {"stem": as_map(i, x)}
        done = 0
        for row in rows(i):
            if not row.depth:
                continue
            part = slice(done, done + row.depth)
            x, after = trunk.blocks(
                model,
                row.block,
                x,
                name=f"stage{i}_{row.name}",
                count=row.depth,
                train=train,
                noise=jax.tree.map(lambda z, at=part: z[at], of_stage),
                constants=row.constants,
            )
            states += [as_map(i, state) for state in after]
            done += row.depth
        out[f"stage_{i + 1}"] = as_map(i, x)
    return x, out | {f"block_{j}": state for j, state in enumerate(states)}


def linear_noise(
    model: Model,
    image: Array,
    train: bool,
    branches: int = 2,
    counts: Sequence[int] | None = None,
) -> list[Noise]:
    """Returns the noise of each stage; the rate rises linearly over all blocks.

    The model's field `stochastic_depth` is the last one's rate. A branch that is kept
    is divided by 1 − rate.

    Args:
      model: the module whose random stream it is.
      image: the images, for their number.
      train: whether this is training; otherwise there is no noise.
      branches: number of branches of a block.
      counts: number of blocks of each stage; None: the model's field `num_blocks`.
    """
    fields: Any = model
    counts = fields.num_blocks if counts is None else counts
    noise = trunk.draw(
        model,
        sum(counts),
        image.shape[0],
        train=train,
        rates=(0.0, fields.stochastic_depth),
        rescale=True,
        branches=branches,
    )
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [
        jax.tree.map(lambda z, at=slice(*both): z[at], noise)
        for both in itertools.pairwise(ends)
    ]


def check_stages(
    model: Model, image_size: tuple[int, int], stem: tuple[int, int] | None = None
) -> None:
    """Raises ValueError unless the last stage's positions tile the image.

    Args:
      model: a model whose stages, one for each entry of its field `num_blocks`, have
        half as many positions on a side as the stage before.
      image_size: (height, width) in pixels.
      stem: the only `patch_size` that the model's stem has; None: it takes any.
    """
    if stem not in (None, model.patch_size):
        raise ValueError(
            f"patch_size is {model.patch_size}, but the convolutions of the stem move "
            f"by {stem} pixels; leave it out, and enlarge small images instead."
        )
    fields: Any = model
    height, width = (
        side * 2 ** (len(fields.num_blocks) - 1) for side in model.patch_size
    )
    check_divisible(image_size, (height, width), "the last stage's stride")


def stage_axes(
    stage: int, block: Mapping[str, str], row: str = "block"
) -> dict[str, str]:
    """Returns the entries of `AXES` of a row of one stage.

    Args:
      stage: its number from 0, which its letters carry.
      block: path in a block → letters. Numbers, and letters that have one, stay as
        they are.
      row: name of the row.
    """

    def numbered(letters: str) -> str:
        return " ".join(
            x if x[-1].isdigit() else f"{x}{stage}" for x in letters.split()
        )

    return {
        f"stage{stage}_{row}_*/{path}": numbered(letters)
        for path, letters in block.items()
    }


def pooled(
    y: Float[Array, "n h w c"],
    out: Mapping[str, Array],
    num_classes: int | None,
    norm: Callable[[Array], Array] | None = None,
    **head_fields: Any,
) -> Outputs:
    """Returns (logits, out) of a model that averages positions before its head.

    Args:
      y: the last map, normalised unless its mean is.
      out: the other outputs.
      num_classes: None leaves the head out; the first result are the features.
      norm: what normalises the mean; None: nothing.
      **head_fields: fields of the `Dense` that is the head, its initial values.
    """
    pre_logits = y.mean((1, 2), dtype=at_least_float32(y.dtype))
    if norm is not None:
        pre_logits = norm(pre_logits)
    out = {**out, "pre_logits": pre_logits}
    if num_classes is None:
        return pre_logits, out
    head = Dense(num_classes, run=Run(pre_logits.dtype), **head_fields, name="head")
    return head(pre_logits), out


def channel_mixing(
    hidden: int, gelu: str, run: Run, name: str = "channel_mixing"
) -> layers.MlpBlock:
    """Returns the MLP of a map's channels, with the initial values of most papers.

    Args:
      hidden: number of hidden units.
      gelu: "exact" or "tanh".
      run: the products' dtype and form.
      name: its name in the block.
    """
    return layers.MlpBlock(
        hidden,
        gelu=gelu,
        run=run,
        kernel_init=layers.NORMAL,
        image_axis=0,
        name=name,
    )


class Convolution(nn.Module):
    """torch's Conv2d: zeros around the map, as many on each side.

    Parameters are those of Flax's Conv: `kernel` (kh, kw, in, out) and `bias` (out,).

    Attributes:
      features: number of channels afterwards.
      size: (height, width) of the filter.
      stride: positions from one to the next, or those down and across.
      padding: zeros on each side.
      run: the dtype.
      use_bias: whether a bias is added.
      kernel_init, bias_init: initial values.
      torch_init: whether both begin as torch's instead, uniform in ±1/√fan_in.
    """

    features: int
    size: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int = 0
    run: Run = Run()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n y x c"]:
        """Returns the map, in the dtype of `run`."""
        shape = (*self.size, x.shape[-1], self.features)
        kernel_init, bias_init = self.kernel_init, self.bias_init
        if self.torch_init:
            fan_in = shape[0] * shape[1] * shape[2]
            kernel_init, bias_init = TORCH_KERNEL, layers.uniform(fan_in**-0.5)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", bias_init, shape[-1:], jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.run.dtype)
        strides = self.stride if isinstance(self.stride, tuple) else (self.stride,) * 2
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            [(self.padding,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return add_bias(y, bias)


class BatchNorm(nn.Module):
    """torch's BatchNorm2d: each channel normalised over images and positions.

    Training normalises with the mean and the (biased) variance of the batch, and moves
    the running ones, the collection `batch_stats`, a tenth of the way to them. As in
    torch, and unlike Flax's BatchNorm, the running variance is the unbiased one. The
    batch is the global one, on any number of devices: a compiled step cuts its arrays,
    not its meaning. (torch's is each device's own unless it is told otherwise.)

    Attributes:
      train: whether the batch's statistics are used, and recorded.
    """

    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Returns `x` normalised, in its dtype; computed in float32 or float64."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        means = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        z = x.astype(at_least_float32(x.dtype))
        mean, variance = means.value, variances.value
        if self.train:
            mean = z.mean((0, 1, 2))
            variance = jnp.square(z - _of_channels(mean)).mean((0, 1, 2))
            if not self.is_initializing():
                count = _count(x)
                unbiased = variance * (count / (count - 1))
                means.value += 0.1 * (mean - means.value)
                variances.value += 0.1 * (unbiased - variances.value)
        factor = lax.rsqrt(variance + 1e-5) * scale
        y = (z - _of_channels(mean)) * _of_channels(factor) + _of_channels(bias)
        return y.astype(x.dtype)


def _of_channels(x: Any) -> Any:
    return x.reshape(1, 1, 1, -1)


def _count(x: Float[Array, "n h w c"]) -> int:
    """The number of values of a channel."""
    n, h, w, _ = x.shape
    if n * h * w < 2:
        raise ValueError(
            f"BatchNorm in training got {n} image of {h}x{w} positions, which have no "
            "variance; try a larger batch or larger images."
        )
    return n * h * w


class Fusion(nn.Module):
    """Three branches, weighted for each image and channel, then a linear map.

    CycleMLP's and Hire-MLP's, with their initial values:

        a = softmax₃(W₂ gelu(W₁ m + b₁) + b₂)     m (c) the mean over positions of the
        Y = (Σ_i a_i ⊙ X_i) W + b                 sum of the branches X_i, a_i (c)

    W₁ (c, c/4), W₂ (c/4, 3c); its column 3j + i is of channel j and branch i.

    Attributes:
      run: the products' dtype and form.
      gelu: "tanh" or "exact".
    """

    run: Run
    gelu: str = "exact"

    @nn.compact
    def __call__(
        self, branches: Sequence[Float[Array, "n h w c"]]
    ) -> Float[Array, "n h w c"]:
        """Returns the fused map."""
        first = branches[0]
        c, wide = first.shape[-1], at_least_float32(first.dtype)
        dense = functools.partial(Dense, run=self.run, kernel_init=layers.NORMAL)
        mean = functools.reduce(jnp.add, branches).mean((1, 2), dtype=wide)
        gelu = known.pick("gelu", self.gelu, GELUS)
        weights = gelu(dense(c // 4, name="Dense_0")(mean.astype(first.dtype)))
        weights = dense(3 * c, name="Dense_1")(weights)
        weights = weights.reshape(-1, 1, 1, c, 3).astype(wide)
        weights = jax.nn.softmax(weights).astype(first.dtype)
        y = functools.reduce(
            jnp.add, (x * weights[..., i] for i, x in enumerate(branches))
        )
        return dense(c, name="proj")(y)
