"""CycleMLP (Chen et al. 2021, arXiv 2107.10224): a pyramid whose maps look aside.

The state X is a map of h by w positions with c channels. A block mixes along rows,
along columns and at each position, weighs the three, then mixes the channels:

    U = X + Mix(LayerNorm(X))
    Y = U + W2 gelu(W1 LayerNorm(U) + b1) + b2           W1 (c, αc), W2 (αc, c)

    Mix(Z) = (a_w ⊙ V_w + a_h ⊙ V_h + a_c ⊙ V_c) Wp + bp
    V_w = cycle_w(Z) Ww + bw    V_h = cycle_h(Z) Wh + bh    V_c = Z Wc
    [a_w, a_h, a_c] = softmax₃(R2 gelu(R1 m + r1) + r2)  R1 (c, c/4), R2 (c/4, 3c)

cycle_w takes a third of the channels from the same position, a third from the next one
of the row, a third from the one before (`moves.cycle`); cycle_h does so in columns. m
(c) is the mean of V_w + V_h + V_c over positions, so each image weighs its branches
channel by channel: see `pyramid.Fusion`. Four stages see the image at 1/4, 1/8, 1/16
and 1/32: a 7x7 convolution begins the first, a 3x3 one each of the others. After the
last: LayerNorm, the mean over positions, a linear head. Nothing is tied to the
resolution.

Details and initial values are those of the authors' code (cycle_mlp.py of
ShoufaChen/CycleMLP): LayerNorm's epsilon is 1e-5, Wc has no bias, and linear maps begin
as N(0, 0.02), convolutions as torch's. It computes cycle_w by a deformable convolution
and calls it sfc_h, and cycle_h sfc_w. For detection and segmentation it puts a norm on
the map of each stage; here `out["stage_1"]`, … are the maps before any norm, for a head
that has its own.

Unknown: what CycleMLP-T, -S and -B are, of which the authors list accuracies alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from mlp_mixer.models import layers, pyramid
from mlp_mixer.models.derivatives import Dense, LayerNorm
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, axes, sizes
from mlp_mixer.models.moves import cycle, cycle_offsets


class CycleBlock(nn.Module):
    """One block of any stage.

    Attributes:
      mlp_ratio: number of hidden units of the MLP per channel, α.
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
        """Returns the next state; `noise` is that of both branches."""
        c = x.shape[-1]
        linear = functools.partial(Dense, c, run=self.run, kernel_init=layers.NORMAL)
        channel_mixing = pyramid.channel_mixing(self.mlp_ratio * c, self.gelu, self.run)
        norm = functools.partial(LayerNorm, epsilon=1e-5)
        first, second = noise.branches(2)
        z = norm(name="LayerNorm_0")(x)
        branches = [
            linear(name="cycle_w")(cycle(z, axis=2)),
            linear(name="cycle_h")(cycle(z, axis=1)),
            linear(use_bias=False, name="linear_c")(z),
        ]
        y = pyramid.Fusion(self.run, self.gelu, name="fusion")(branches)
        x = x + layers.scale_images(y, first.keep, axis=0)
        return x + channel_mixing(norm(name="LayerNorm_1")(x), second)


class CycleMlp(Model, kw_only=True):
    """CycleMLP, of any resolution.

    Attributes:
      patch_size: (4, 4), pixels from one position of the first stage to the next.
      hidden_dim: number of channels of each stage.
      num_blocks: number of blocks of each stage.
      mlp_ratio: number of hidden units of an MLP per channel, α, in each stage.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: the last block's rate; it rises linearly from 0 over all
        stages. A branch that is kept is divided by 1 − rate.
      mean, std: what levels from 0 to 1 are normalised by, red, green and blue. The
        stem sees zeros around the image, so that they are a part of the model.
    """

    in_parts = False

    patch_size: tuple[int, int] = (4, 4)
    hidden_dim: tuple[int, int, int, int]
    num_blocks: tuple[int, int, int, int]
    mlp_ratio: tuple[int, int, int, int]
    gelu: str = "exact"
    stochastic_depth: float = 0.0
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless the last stage's positions tile the image."""
        pyramid.check_stages(self, image_size, stem=(4, 4))

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits, out).

        Args:
          image: (n, h, w, 3), values in [−1, 1]; h, w multiples of eight patches'.
          train: whether stochastic depth is on (random stream "dropout").

        Returns:
          logits: (n, k) float32, or the pre-logits if `num_classes` is None.
          out: the intermediate outputs `stem`, `block_0`, … (n, h, w, c) of all stages,
            `stage_1`, …, the map after each stage, and `pre_logits` (n, c).

        Raises:
          ValueError: the image does not fit the strides.
        """
        self.check_image(image)
        convolution = functools.partial(
            pyramid.Convolution, run=self.run, torch_init=True
        )

        def begin(i: int) -> nn.Module:
            c, stride, stem = self.hidden_dim[i], (2, 2), self.patch_size
            if i:
                return convolution(c, (3, 3), stride, padding=1, name=f"down{i}")
            return convolution(c, (7, 7), stem, padding=2, name="stem")

        def rows(i: int) -> list[pyramid.Row]:
            ratio = self.mlp_ratio[i]
            block = functools.partial(CycleBlock, ratio, self.gelu, self.run)
            return [pyramid.Row(block, self.num_blocks[i])]

        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            rows,
            noise=pyramid.linear_noise(self, image, train),
            train=train,
        )
        y = LayerNorm(epsilon=1e-5, name="norm")(x)
        return pyramid.pooled(y, out, self.num_classes, kernel_init=layers.NORMAL)


MODEL = CycleMlp
# The paper's variants: patch, channels, blocks, α.
_ROWS: dict[str, tuple[Any, ...]] = {
    "cyclemlp_b1": ((4, 4), (64, 128, 320, 512), (2, 2, 4, 2), (4, 4, 4, 4)),
    "cyclemlp_b2": ((4, 4), (64, 128, 320, 512), (2, 3, 10, 3), (4, 4, 4, 4)),
    "cyclemlp_b3": ((4, 4), (64, 128, 320, 512), (3, 4, 18, 3), (8, 8, 4, 4)),
    "cyclemlp_b4": ((4, 4), (64, 128, 320, 512), (3, 8, 27, 3), (8, 8, 4, 4)),
    "cyclemlp_b5": ((4, 4), (96, 192, 384, 768), (3, 4, 24, 3), (4, 4, 4, 4)),
}
SIZES = {name: sizes(CycleMlp, row) for name, row in _ROWS.items()}
TOP_1 = {
    "cyclemlp_b1": 78.9,
    "cyclemlp_b2": 81.6,
    "cyclemlp_b3": 82.4,
    "cyclemlp_b4": 83.0,
    "cyclemlp_b5": 83.2,
}
CHECKED = "counts; logits of the authors' code"
_BLOCK = axes(
    {
        "LayerNorm_0": "c",
        "cycle_w": "c c",
        "cycle_h": "c c",
        "fusion/Dense_0": "c dr",
        "fusion/Dense_1": "dr 3c",
        "fusion/proj": "c c",
        "LayerNorm_1": "c",
        "channel_mixing/Dense_0": "c dc",
        "channel_mixing/Dense_1": "dc c",
    }
) | {"linear_c/kernel": "c c"}
AXES = {
    **axes({"stem": "7 7 rgb c0"}),
    **pyramid.stage_axes(0, _BLOCK),
    **axes({"down1": "3 3 c0 c1"}),
    **pyramid.stage_axes(1, _BLOCK),
    **axes({"down2": "3 3 c1 c2"}),
    **pyramid.stage_axes(2, _BLOCK),
    **axes({"down3": "3 3 c2 c3"}),
    **pyramid.stage_axes(3, _BLOCK),
    **axes({"norm": "c3", "head": "c3 k"}),
}


def _offset(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what makes the buffer of a deformable convolution of theirs.

    It is (1, 2c, 1, 1): of each channel, how many rows and columns further to read.

    Args:
      axis: 0 if the channels move from row to row, 1 from column to column.
    """

    def make(kernel: np.ndarray) -> np.ndarray:
        offset = np.zeros((len(kernel), 2), np.float32)
        offset[:, axis] = cycle_offsets(len(kernel))
        return offset.reshape(1, -1, 1, 1)

    return make


# A linear map of theirs that is a convolution of one position.
_POINT = "o i 1 1 -> i o"


def _authors(stage: int) -> list[tuple[Any, ...]]:
    theirs, ours = f"network.{2 * stage}.{{}}", f"stage{stage}_block_{{}}"
    return [
        (f"{theirs}.norm1", f"{ours}/LayerNorm_0"),
        (f"{theirs}.attn.sfc_h", f"{ours}/cycle_w", _POINT),
        (f"{theirs}.attn.sfc_h.offset", f"{ours}/cycle_w/kernel", _offset(1)),
        (f"{theirs}.attn.sfc_w", f"{ours}/cycle_h", _POINT),
        (f"{theirs}.attn.sfc_w.offset", f"{ours}/cycle_h/kernel", _offset(0)),
        (f"{theirs}.attn.mlp_c", f"{ours}/linear_c"),
        (f"{theirs}.attn.reweight.fc1", f"{ours}/fusion/Dense_0"),
        (f"{theirs}.attn.reweight.fc2", f"{ours}/fusion/Dense_1"),
        (f"{theirs}.attn.proj", f"{ours}/fusion/proj"),
        (f"{theirs}.norm2", f"{ours}/LayerNorm_1"),
        (f"{theirs}.mlp.fc1", f"{ours}/channel_mixing/Dense_0"),
        (f"{theirs}.mlp.fc2", f"{ours}/channel_mixing/Dense_1"),
    ]


# What the authors' state dicts call what: their layer or array, ours, and how.
AUTHORS = (
    ("patch_embed.proj", "stem"),
    *_authors(0),
    ("network.1.proj", "down1"),
    *_authors(1),
    ("network.3.proj", "down2"),
    *_authors(2),
    ("network.5.proj", "down3"),
    *_authors(3),
    ("norm", "norm"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
