"""ConvMLP (Li et al. 2021, arXiv 2109.04454): convolutions, then MLPs with a filter.

The state X is a map of h by w positions with c channels. A block mixes the channels,
then 3x3 positions in each channel, then the channels again:

    U = X + W2 gelu(W1 LayerNorm(X) + b1) + b2           W1 (c, αc), W2 (αc, c)
    V = DW(LayerNorm(U))                                 DW a 3x3 filter of each channel
    Y = V + W4 gelu(W3 LayerNorm(V) + b3) + b4           W3, W4 as W1, W2

Nothing passes DW by. Before the three stages of such blocks are two parts of
convolutions, each followed by BatchNorm and ReLU, act(X) = relu(BatchNorm(X)):

    tokeniser      three of 3x3, the first with stride 2; the largest of 3x3 positions,
                   every other one
    first stage    X + act(C3 act(C2 act(C1 X)))         C1 and C3 1x1, C2 3x3

C1 widens the c channels of the first stage to those of the second. The four stages see
the image at 1/4, 1/8, 1/16 and 1/32; a 3x3 convolution with stride 2 begins each of the
last three. After the last: LayerNorm, the mean over positions, a linear head. DW and
the convolutions of tokeniser and first stage have no bias. Nothing is tied to the
resolution.

Details and initial values are those of the authors' code (SHI-Labs/Convolutional-MLPs).
Its drop-path concerns the two MLPs of a block, each by itself; the rate rises from 0
anew in each of the three MLP stages, and the first stage has none. BatchNorm's
statistics are of each device's own images there, and of the global batch here.

For detection and segmentation the authors take the maps with which stages begin: the
tokeniser's (`out["stem"]`), those of the down-sampling convolutions before the second
and the third stage, and the last stage's end. Here `out["stage_1"]`, … are the ends of
all stages, at the same strides and with as many channels. Heads of theirs do not fit.

Published after fine-tuning at 224 px: 98.0 %, 98.6 % and 98.6 % (S, M, L) on CIFAR-10;
87.4 %, 89.1 % and 88.6 % on CIFAR-100; 99.5 % each on Flowers-102.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mlp_mixer.models import layers, pyramid, trunk
from mlp_mixer.models.derivatives import Dense, LayerNorm
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, axes, sizes


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n y x c"]:
    """Returns the largest of 3x3 positions around every other one, in each channel.

    torch's MaxPool2d(3, 2, 1): positions outside of the map do not count. By itself, on
    one CPU, it takes a tenth of the time of XLA's window, and with its gradient a
    quarter.

    Args:
      x: maps of an even height and width.
    """
    return _largest_of_three(_largest_of_three(x, 1), 2)


def _largest_of_three(x: Array, axis: int) -> Array:
    """The largest of each even position of an axis and its two neighbours."""
    n = x.shape[axis] // 2
    pairs = x.reshape(*x.shape[:axis], n, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    one_further = [(0, 0, 0)] * x.ndim
    one_further[axis] = (1, -1, 0)
    before = lax.pad(odd, jnp.array(-jnp.inf, x.dtype), one_further)
    return jnp.maximum(jnp.maximum(before, even), odd)


class Tokeniser(nn.Module):
    """What begins the first stage: three convolutions, then the largest of 3x3.

    Attributes:
      features: number of channels afterwards; the first two have half as many.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    features: int
    train: bool
    run: Run

    @nn.compact
    def __call__(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n y x c"]:
        """Returns a map of a quarter of the image's height and width."""
        half = self.features // 2
        x = image
        for features, stride in ((half, 2), (half, 1), (self.features, 1)):
            x = _convolution(features, self.run, stride)(x)
            x = nn.relu(pyramid.BatchNorm(self.train)(x))
        return max_pool(x)


class ConvBlock(nn.Module):
    """One block of the first stage.

    Attributes:
      hidden_dim: number of channels of its 3x3 convolution.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    hidden_dim: int
    train: bool
    run: Run

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], noise: Noise = Noise()
    ) -> Float[Array, "n h w c"]:
        """Returns the next state; it draws no noise."""
        pointwise = functools.partial(
            Dense, run=self.run, use_bias=False, kernel_init=layers.KAIMING
        )
        y = x
        for convolution in (
            pointwise(self.hidden_dim),
            _convolution(self.hidden_dim, self.run),
            pointwise(x.shape[-1]),
        ):
            y = nn.relu(pyramid.BatchNorm(self.train)(convolution(y)))
        return x + y


class ConvMlpBlock(nn.Module):
    """One block of the other stages.

    Attributes:
      mlp_ratio: number of hidden units of an MLP per channel, α.
      gelu: "exact" or "tanh".
      run: how it is computed.
    """

    mlp_ratio: int
    gelu: str
    run: Run

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], noise: Noise = Noise()
    ) -> Float[Array, "n h w c"]:
        """Returns the next state; `noise` is that of both MLPs."""
        norm = functools.partial(LayerNorm, epsilon=1e-5)
        mlp = functools.partial(
            pyramid.channel_mixing,
            self.mlp_ratio * x.shape[-1],
            self.gelu,
            self.run,
        )
        depthwise = layers.Depthwise(
            run=self.run,
            use_bias=False,
            kernel_init=layers.KAIMING,
            name="depthwise",
        )
        first, second = noise.branches(2)
        x = x + mlp(name="channel_mixing_0")(norm(name="LayerNorm_0")(x), first)
        x = depthwise(norm(name="LayerNorm_1")(x))
        return x + mlp(name="channel_mixing_1")(norm(name="LayerNorm_2")(x), second)


class ConvMlp(Model, kw_only=True):
    """ConvMLP, for images of any size that the last stage's stride divides.

    Attributes:
      patch_size: (height, width) in pixels of a position of the first stage, which is
        always (4, 4).
      hidden_dim: number of channels of each stage.
      num_blocks: number of blocks of each stage, the first one's of convolutions.
      mlp_ratio: number of hidden units of an MLP per channel, α.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: rate of the last block of each stage but the first; within a
        stage it rises linearly from 0. A branch that is kept is divided by 1 − rate.
      mean, std: what levels from 0 to 1 are normalised by, red, green and blue. The
        tokeniser sees zeros around the image, so that they are a part of the model.
    """

    patch_size: tuple[int, int] = (4, 4)
    hidden_dim: tuple[int, int, int, int]
    num_blocks: tuple[int, int, int, int]
    mlp_ratio: int
    gelu: str = "exact"
    stochastic_depth: float = 0.0
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless the last stage's positions tile the image."""
        pyramid.check_stages(self, image_size, stem=(4, 4))

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … of all stages, `stage_1`, … with which stages
        end, all (n, h, w, c), and `pre_logits` (n, c). Training records BatchNorm's
        statistics (collection "batch_stats").
        """
        self.check_image(image)

        def begin(i: int) -> nn.Module:
            c = self.hidden_dim[i]
            if not i:
                return Tokeniser(c, train, self.run, name="stem")
            limit = (9 * self.hidden_dim[i - 1]) ** -0.5
            return _convolution(
                c,
                self.run,
                stride=2,
                use_bias=True,
                bias_init=layers.uniform(limit),
                name=f"down{i}",
            )

        first = functools.partial(ConvBlock, self.hidden_dim[1], train, self.run)
        others = functools.partial(ConvMlpBlock, self.mlp_ratio, self.gelu, self.run)
        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            lambda i: [pyramid.Row(others if i else first, self.num_blocks[i])],
            noise=[Noise(), *self._noise(image, train)],
            train=train,
        )
        x = LayerNorm(epsilon=1e-5, name="norm")(x)
        return pyramid.pooled(x, out, self.num_classes, kernel_init=layers.NORMAL)

    def _noise(self, image: Array, train: bool) -> list[Noise]:
        return [
            trunk.draw(
                self,
                depth,
                image.shape[0],
                train=train,
                rates=(0.0, self.stochastic_depth),
                rescale=True,
            )
            for depth in self.num_blocks[1:]
        ]


def _convolution(
    features: int, run: Run, stride: int = 1, use_bias: bool = False, **fields: Any
) -> pyramid.Convolution:
    """One of 3x3."""
    return pyramid.Convolution(
        features,
        stride=stride,
        padding=1,
        run=run,
        use_bias=use_bias,
        kernel_init=layers.KAIMING,
        **fields,
    )


MODEL = ConvMlp
# The authors' models: patch, channels, blocks, α, exact GELU, rate.
_ROWS = {
    "convmlp_s": ((4, 4), (64, 128, 256, 512), (2, 2, 4, 2), 2, "exact", 0.1),
    "convmlp_m": ((4, 4), (64, 128, 256, 512), (3, 3, 6, 3), 3, "exact", 0.1),
    "convmlp_l": ((4, 4), (96, 192, 384, 768), (3, 4, 8, 3), 3, "exact", 0.1),
}
SIZES = {name: sizes(ConvMlp, row) for name, row in _ROWS.items()}
TOP_1 = {"convmlp_s": 76.8, "convmlp_m": 79.0, "convmlp_l": 80.2}
CHECKED = "counts; logits and three training steps of the authors' code"
_CONV_BLOCK = {
    "Dense_0/kernel": "c c1",
    "Convolution_0/kernel": "3 3 c1 c1",
    "Dense_1/kernel": "c1 c",
    **{
        f"BatchNorm_{i}/{leaf}": letter
        for i, letter in enumerate(("c1", "c1", "c"))
        for leaf in ("scale", "bias")
    },
}
_BLOCK = {
    **axes({f"LayerNorm_{i}": "c" for i in range(3)}),
    **axes({f"channel_mixing_{i}/Dense_0": "c dc" for i in (0, 1)}),
    **axes({f"channel_mixing_{i}/Dense_1": "dc c" for i in (0, 1)}),
    "depthwise/kernel": "3 3 1 c",
}
# Letter e0: half as many channels as the first stage has.
AXES = {
    "stem/Convolution_0/kernel": "3 3 rgb e0",
    "stem/Convolution_1/kernel": "3 3 e0 e0",
    "stem/Convolution_2/kernel": "3 3 e0 c0",
    **axes({"stem/BatchNorm_0": "e0", "stem/BatchNorm_1": "e0"}),
    **axes({"stem/BatchNorm_2": "c0"}),
    **pyramid.stage_axes(0, _CONV_BLOCK),
    **axes({"down1": "3 3 c0 c1"}),
    **pyramid.stage_axes(1, _BLOCK),
    **axes({"down2": "3 3 c1 c2"}),
    **pyramid.stage_axes(2, _BLOCK),
    **axes({"down3": "3 3 c2 c3"}),
    **pyramid.stage_axes(3, _BLOCK),
    **axes({"norm": "c3", "head": "c3 k"}),
}
_AUTHORS_BLOCK = {
    "norm1": "LayerNorm_0",
    "channel_mlp1.fc1": "channel_mixing_0/Dense_0",
    "channel_mlp1.fc2": "channel_mixing_0/Dense_1",
    "connect_norm": "LayerNorm_1",
    "connect": "depthwise",
    "norm2": "LayerNorm_2",
    "channel_mlp2.fc1": "channel_mixing_1/Dense_0",
    "channel_mlp2.fc2": "channel_mixing_1/Dense_1",
}
_POINTWISE = "o i 1 1 -> i o"
# What the authors' state dicts call what; {} is the number of a block.
AUTHORS = (
    *((f"tokenizer.block.{3 * i}", f"stem/Convolution_{i}") for i in range(3)),
    *((f"tokenizer.block.{3 * i + 1}", f"stem/BatchNorm_{i}") for i in range(3)),
    ("conv_stages.conv_blocks.{}.0", "stage0_block_{}/Dense_0", _POINTWISE),
    ("conv_stages.conv_blocks.{}.3", "stage0_block_{}/Convolution_0"),
    ("conv_stages.conv_blocks.{}.6", "stage0_block_{}/Dense_1", _POINTWISE),
    *(
        (
            f"conv_stages.conv_blocks.{{}}.{3 * i + 1}",
            f"stage0_block_{{}}/BatchNorm_{i}",
        )
        for i in range(3)
    ),
    ("conv_stages.downsample", "down1"),
    ("stages.0.downsample_mlp.downsample", "down2"),
    ("stages.1.downsample_mlp.downsample", "down3"),
    *(
        (f"stages.{i}.blocks.{{}}.{theirs}", f"stage{i + 1}_block_{{}}/{ours}")
        for i in range(3)
        for theirs, ours in _AUTHORS_BLOCK.items()
    ),
    ("norm", "norm"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
