"""Hire-MLP (Guo et al. 2021, arXiv 2108.13341): a pyramid that folds regions of a map.

The state X is a map of H by W positions with C channels. A block mixes positions, then
channels, and normalises each channel before:

    U = X + Hire(BN(X))
    Y = U + W4 gelu(W3 BN(U) + b3) + b4                    W3 (αC, C), W4 (C, αC)

    Hire(Z) = fuse(F_H(Z), F_W(Z), W Z + b)                W (C, C)
    F(Z)    = unroll unfold(W2 relu(BN(W1 fold(roll Z))) + b2)

F_H rolls the rows of a map by s, gathers p neighbouring rows at one position (the map
is continued from its beginning where p does not divide H), and maps their pC channels
together: W1 (C/2, pC) has no bias, W2 (pC, C/2). Then each row goes back to its place:
see `moves.fold`. F_W does the same with columns, and weights of its own. So positions
are mixed within regions, whose borders lie elsewhere in the next block:

    stage              1               2               3               4
    p                  4               3               3               2
    s of blocks 0, …   0, 2, 0, 2, …   0, 2, 0, 2, …   0, 1, 2, 0, …   0, 1, 0, 1, …

Stages see the image at 1/4, 1/8, 1/16 and 1/32: a 7x7 convolution of stride 4 begins
the first, one of 3x3 and stride 2 each of the others, both with BN and ReLU behind.
After the last: BN, the mean over positions, a linear head. Nothing is tied to the
resolution. Maps move with the image, away from borders, where it moves by 192 pixels,
which are whole regions of every stage.

All this is the authors' code (mlp_based/hire_mlp.py in ggjy/Hire-Wave-MLP.pytorch), for
which the released weights are. The paper has LayerNorm for BN, and sums the branches;
the code fuses them as CycleMLP does (`pyramid.Fusion`). All kernels begin normal with a
deviation of 0.02, all biases at 0. In training, the authors' BN normalises by the
statistics of each device's images, ours by those of the whole batch.

Unknown: the stochastic depth that small and large were trained with.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer.models import layers, moves, pyramid
from mlp_mixer.models.derivatives import Dense, linear
from mlp_mixer.models.model import (
    IMAGENET,
    Model,
    Noise,
    Outputs,
    Run,
    axes,
    sizes,
)
from mlp_mixer.models.pyramid import BatchNorm


class RegionDense(nn.Module):
    """A linear map between a few channels and all those of a region.

    A region is p positions of C channels each. Channel c of position r is entry c·p + r
    of `kernel`, (pC, features) or (features, pC), and of `bias`, as in the authors'
    weights; in the states it is entry r·C + c, which needs fewer transpositions.

    Attributes:
      features: number of channels afterwards, of all positions together.
      pixel: number of positions p.
      of_region: whether it maps the region's channels, and has no bias; otherwise they
        are what it makes, with a bias.
      run: the product's dtype and form.
    """

    features: int
    pixel: int
    of_region: bool
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w x"]) -> Float[Array, "n h w y"]:
        """Returns the mapped channels at each position."""
        shape = (x.shape[-1], self.features)
        kernel: Any = self.param("kernel", layers.NORMAL, shape, jnp.float32)
        bias: Any = None
        if self.of_region:
            kernel = rearrange(kernel, "(c p) d -> (p c) d", p=self.pixel)
        else:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
            kernel = rearrange(kernel, "d (c p) -> d (p c)", p=self.pixel)
            bias = rearrange(bias, "(c p) -> (p c)", p=self.pixel)
        return linear(x, kernel, bias, -1, self.run)


class RegionMlp(nn.Module):
    """F, the branch that mixes the positions of regions along one axis.

    Attributes:
      axis: axis of the map, 1 for rows one below the other, 2 for columns.
      pixel: number of positions of a region, p.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    axis: int
    pixel: int
    train: bool
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], step: Any) -> Array:
        """Returns the mixed map; `step` is what it is rolled by, s."""
        c, size = x.shape[-1], x.shape[self.axis]
        dense = functools.partial(RegionDense, pixel=self.pixel, run=self.run)
        y = moves.fold(x, self.axis, self.pixel, step)
        y = y.reshape(*y.shape[:-2], -1)
        y = dense(c // 2, of_region=True, name="Dense_0")(y)
        y = checkpoint_name(y, layers.PRE_GELU)
        y = nn.relu(BatchNorm(self.train, name="BatchNorm_0")(y))
        y = dense(self.pixel * c, of_region=False, name="Dense_1")(y)
        y = y.reshape(*y.shape[:-1], self.pixel, c)
        return moves.unfold(y, self.axis, size, step)


class HireBlock(nn.Module):
    """One block of any stage.

    Attributes:
      pixel: number of positions of a region, p.
      mlp_ratio: number of hidden units of the MLP per channel, α.
      gelu: "exact" or "tanh".
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    pixel: int
    mlp_ratio: int
    gelu: str
    train: bool
    run: Run

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], noise: Noise, step: Any
    ) -> Float[Array, "n h w c"]:
        """Returns the next state.

        Args:
          x: the state.
          noise: noise of both branches.
          step: number of positions that rows and columns are rolled by, s.
        """
        c = x.shape[-1]
        along = functools.partial(
            RegionMlp, pixel=self.pixel, train=self.train, run=self.run
        )
        channel_mixing = pyramid.channel_mixing(self.mlp_ratio * c, self.gelu, self.run)
        first, second = noise.branches(2)
        z = BatchNorm(self.train, name="BatchNorm_0")(x)
        branches = [
            along(1, name="mlp_h")(z, step),
            along(2, name="mlp_w")(z, step),
            Dense(c, run=self.run, kernel_init=layers.NORMAL, name="mlp_c")(z),
        ]
        y = pyramid.Fusion(self.run, self.gelu, name="fusion")(branches)
        x = x + layers.scale_images(y, first.keep, axis=0)
        return x + channel_mixing(BatchNorm(self.train, name="BatchNorm_1")(x), second)


class Beginning(nn.Module):
    """What begins a stage: a convolution, BatchNorm and ReLU.

    Attributes:
      features: number of channels afterwards.
      size: height and width of the filter.
      stride: positions from one to the next.
      padding: zeros on each side.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    features: int
    size: int
    stride: int
    padding: int
    train: bool
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n y x c"]:
        """Returns the first state of the stage."""
        x = pyramid.Convolution(
            self.features,
            (self.size, self.size),
            self.stride,
            self.padding,
            self.run,
            kernel_init=layers.NORMAL,
        )(x)
        return nn.relu(BatchNorm(self.train)(x))


class HireMlp(Model, kw_only=True):
    """Hire-MLP, for images of any size that is a multiple of the last stage's stride.

    Attributes:
      patch_size: (4, 4), pixels from one position of the first stage to the next.
      hidden_dim: number of channels of each stage.
      num_blocks: number of blocks of each stage.
      mlp_ratio: number of hidden units of an MLP per channel, α.
      pixel: number of positions of a region in each stage, p.
      step_stride: number of blocks of each stage after which steps begin again from 0.
      step_dilation: what the step rises by from block to block of each stage.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: the last block's rate; it rises linearly from 0 over all
        stages. A branch that is kept is divided by 1 − rate.
      mean, std: what levels from 0 to 1 are normalised by, red, green and blue. The
        stem sees zeros around the image, so that they are a part of the model.
    """

    patch_size: tuple[int, int] = (4, 4)
    hidden_dim: tuple[int, ...]
    num_blocks: tuple[int, ...]
    mlp_ratio: int
    pixel: tuple[int, ...] = (4, 3, 3, 2)
    step_stride: tuple[int, ...] = (2, 2, 3, 2)
    step_dilation: tuple[int, ...] = (2, 2, 1, 1)
    gelu: str = "exact"
    stochastic_depth: float = 0.0
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless images, and the fields of stages, fit together."""
        for field in ("hidden_dim", "pixel", "step_stride", "step_dilation"):
            value, count = getattr(self, field), len(self.num_blocks)
            if len(value) != count:
                raise ValueError(
                    f"{field} is {value}, but num_blocks has {count} stages; give one "
                    "number for each."
                )
        pyramid.check_stages(self, image_size, stem=(4, 4))

    def steps(self, stage: int) -> np.ndarray:
        """Returns what each block of a stage, counted from 0, rolls its map by."""
        blocks = np.arange(self.num_blocks[stage])
        return blocks % self.step_stride[stage] * self.step_dilation[stage]

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits, out).

        Args:
          image: (n, h, w, 3), values in [−1, 1]; h, w multiples of 32.
          train: whether BatchNorm takes and records the batch's statistics (collection
            "batch_stats") and stochastic depth is on (random stream "dropout").

        Returns:
          logits: (n, k) float32, or the pre-logits if `num_classes` is None.
          out: the intermediate outputs `stem`, `block_0`, … and `stage_1`, …
            (n, h, w, c), and `pre_logits` (n, c).
        """
        self.check_image(image)
        how: dict[str, Any] = {"train": train, "run": self.run}

        def begin(i: int) -> nn.Module:
            size, stride, padding = (3, 2, 1) if i else (7, 4, 2)
            name = f"down{i}" if i else "stem"
            return Beginning(
                self.hidden_dim[i], size, stride, padding, name=name, **how
            )

        def rows(i: int) -> list[pyramid.Row]:
            block = functools.partial(
                HireBlock, self.pixel[i], self.mlp_ratio, self.gelu, **how
            )
            return [pyramid.Row(block, self.num_blocks[i], constants=self.steps(i))]

        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            rows,
            noise=pyramid.linear_noise(self, image, train),
            train=train,
        )
        y = BatchNorm(train, name="norm")(x)
        return pyramid.pooled(y, out, self.num_classes, kernel_init=layers.NORMAL)


MODEL = HireMlp
# The authors' models: patch, C, blocks, α.
_ROWS = {
    "hiremlp_tiny": ((4, 4), (64, 128, 320, 512), (2, 2, 4, 2), 4),
    "hiremlp_small": ((4, 4), (64, 128, 320, 512), (3, 4, 10, 3), 4),
    "hiremlp_base": ((4, 4), (64, 128, 320, 512), (4, 6, 24, 3), 4),
    "hiremlp_large": ((4, 4), (96, 192, 384, 768), (4, 6, 24, 3), 4),
}
SIZES = {name: sizes(HireMlp, row) for name, row in _ROWS.items()}
# The repository's. The paper's first version, which sums the branches, has 78.9, 81.8,
# 83.1 and 83.4.
TOP_1 = {
    "hiremlp_tiny": 79.7,
    "hiremlp_small": 82.1,
    "hiremlp_base": 83.2,
    "hiremlp_large": 83.8,
}
CHECKED = "counts; logits and statistics of the authors' code"


def _branch(name: str) -> dict[str, str]:
    """One branch along an axis, whose hidden layer has d units."""
    return {
        f"{name}/Dense_0/kernel": "pc d",
        **axes({f"{name}/BatchNorm_0": "d", f"{name}/Dense_1": "d pc"}),
    }


_BLOCK = {
    **axes({"BatchNorm_0": "c"}),
    **_branch("mlp_h"),
    **_branch("mlp_w"),
    **axes(
        {
            "mlp_c": "c c",
            "fusion/Dense_0": "c df",
            "fusion/Dense_1": "df 3c",
            "fusion/proj": "c c",
            "BatchNorm_1": "c",
            "channel_mixing/Dense_0": "c dc",
            "channel_mixing/Dense_1": "dc c",
        }
    ),
}
_STAGES = range(4)
AXES = {
    **axes({"stem/Convolution_0": "7 7 rgb c0", "stem/BatchNorm_0": "c0"}),
    **pyramid.stage_axes(0, _BLOCK),
    **{
        path: letters
        for i in _STAGES[1:]
        for path, letters in {
            **axes({f"down{i}/Convolution_0": f"3 3 c{i - 1} c{i}"}),
            **axes({f"down{i}/BatchNorm_0": f"c{i}"}),
            **pyramid.stage_axes(i, _BLOCK),
        }.items()
    },
    **axes({"norm": "c3", "head": "c3 k"}),
}
# What is a convolution of one position there.
_DENSE = "o i 1 1 -> i o"


def _authors(stage: int) -> tuple[tuple[str, ...], ...]:
    """What the authors' state dicts call the arrays of a stage."""
    theirs, ours = f"network.{2 * stage}.{{}}", f"stage{stage}_block_{{}}"
    begun = ("patch_embed", "stem")
    if stage:
        begun = (f"network.{2 * stage - 1}", f"down{stage}")
    return (
        (f"{begun[0]}.proj", f"{begun[1]}/Convolution_0"),
        (f"{begun[0]}.norm", f"{begun[1]}/BatchNorm_0"),
        (f"{theirs}.norm1", f"{ours}/BatchNorm_0"),
        (f"{theirs}.attn.mlp_h1", f"{ours}/mlp_h/Dense_0", _DENSE),
        (f"{theirs}.attn.mlp_h1_norm", f"{ours}/mlp_h/BatchNorm_0"),
        (f"{theirs}.attn.mlp_h2", f"{ours}/mlp_h/Dense_1", _DENSE),
        (f"{theirs}.attn.mlp_w1", f"{ours}/mlp_w/Dense_0", _DENSE),
        (f"{theirs}.attn.mlp_w1_norm", f"{ours}/mlp_w/BatchNorm_0"),
        (f"{theirs}.attn.mlp_w2", f"{ours}/mlp_w/Dense_1", _DENSE),
        (f"{theirs}.attn.mlp_c", f"{ours}/mlp_c", _DENSE),
        (f"{theirs}.attn.reweight.fc1", f"{ours}/fusion/Dense_0", _DENSE),
        (f"{theirs}.attn.reweight.fc2", f"{ours}/fusion/Dense_1", _DENSE),
        (f"{theirs}.attn.proj", f"{ours}/fusion/proj", _DENSE),
        (f"{theirs}.norm2", f"{ours}/BatchNorm_1"),
        (f"{theirs}.mlp.fc1", f"{ours}/channel_mixing/Dense_0", _DENSE),
        (f"{theirs}.mlp.fc2", f"{ours}/channel_mixing/Dense_1", _DENSE),
    )


AUTHORS = (
    *(row for stage in _STAGES for row in _authors(stage)),
    ("norm", "norm"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
