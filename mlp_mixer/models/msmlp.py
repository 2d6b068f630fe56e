"""MS-MLP (Zheng et al. 2022, arXiv 2202.06510): a pyramid that shifts and filters.

The state X is a map of h by w positions with c channels, in five chunks of ⌈c/5⌉, the
last of what is left. A block rolls each chunk along the width and filters it, does the
same along the height with other filters, and mixes the channels of the sum:

    U_q = F_q(roll_w(X_q, d_q)) + G_q(roll_h(X_q, d_q))       d = (−2, −1, 0, 1, 2)
    Y   = X + γ ⊙ (W2 gelu(W1 LayerNorm(U) + b1) + b2)        W1 (c, 4c), W2 (4c, c)

F_q and G_q filter each channel, with k_q by k_q weights, a bias, and zeros around the
map; a roll brings in at one border what it takes out at the other. Four stages see the
image at 1/4, 1/8, 1/16 and 1/32 with c, 2c, 4c and 8c channels; a linear map of 4x4
pixels, or of 2x2 positions, and LayerNorm begin each. After the last: the mean over
positions, LayerNorm, a linear head.

This is the authors' code (JegZheng/MS-MLP, models/ms_mlp.py, and the k of its
configs), from which their published models are. The paper prints another block: d from
0 to 4, filters before shifts, and a residual around each of the two halves. Initial
values are the code's: torch's for convolutions, N(0, 0.02) for the other kernels, γ
1e-6.

Nothing is tied to the resolution: any image whose sides are multiples of 32 pixels. On
a map with fewer positions than filters have weights, most of them see zeros.

Filters are sums of shifted maps (`layers.filter_channels`), on every device. On one
CPU a model of five blocks at 224 px is 2.3 times as fast forward, and 1.4 times in
training, as with XLA's convolution; on GPUs and TPUs neither was measured.
"""

import functools
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlp_mixer.models import layers, moves, pyramid
from mlp_mixer.models.derivatives import LayerNorm
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, axes, sizes

# Positions by which the chunks are rolled, d, and the sides of their filters, k, in
# each stage.
SHIFTS = (-2, -1, 0, 1, 2)
FILTERS = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7))


class Embedding(nn.Module):
    """What begins a stage: a linear map of each patch, and LayerNorm.

    Attributes:
      features: number of channels afterwards.
      size: (height, width) of a patch in pixels or positions.
      run: the dtype.
    """

    features: int
    size: tuple[int, int]
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n y x c"]:
        """Returns the map of the stage."""
        proj = pyramid.Convolution(
            self.features,
            self.size,
            stride=self.size,
            run=self.run,
            torch_init=True,
            name="proj",
        )
        return LayerNorm(name="norm")(proj(x))


class MixShift(nn.Module):
    """What mixes positions: rolled and filtered along the width, and the height.

    Attributes:
      filters: sides of the chunks' filters, k.
      run: the dtype.
    """

    filters: Sequence[int]
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Returns U, in the dtype of `run`."""
        return self._mixed(x, 2, "w") + self._mixed(x, 1, "h")

    def _mixed(self, x: Array, axis: int, name: str) -> Array:
        x = moves.roll_chunks(x, SHIFTS, axis)
        chunks = itertools.pairwise(moves.chunk_ends(x.shape[-1], SHIFTS))
        filtered = [
            layers.Depthwise(
                size=(side, side), run=self.run, torch_init=True, name=f"{name}_{q}"
            )(x[..., i:j])
            for q, ((i, j), side) in enumerate(zip(chunks, self.filters, strict=True))
        ]
        return jnp.concatenate(filtered, axis=-1)


class MixShiftBlock(nn.Module):
    """One block of any stage.

    Attributes:
      filters: sides of the chunks' filters, k.
      mlp_ratio: number of hidden units of the MLP per channel.
      layer_scale: initial value of γ.
      gelu: "exact" or "tanh".
      run: how it is computed.
    """

    filters: Sequence[int]
    mlp_ratio: int
    layer_scale: float
    gelu: str
    run: Run

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], noise: Noise = Noise()
    ) -> Float[Array, "n h w c"]:
        """Returns the next state; `noise` is that of the one branch."""
        c = x.shape[-1]
        channel_mixing = pyramid.channel_mixing(self.mlp_ratio * c, self.gelu, self.run)
        (branch,) = noise.branches(1)
        start = nn.initializers.constant(self.layer_scale)
        scale = self.param("scale", start, (c,), jnp.float32)
        y = MixShift(self.filters, self.run, name="mix_shift")(x)
        y = channel_mixing(LayerNorm(name="LayerNorm_0")(y), branch)
        return x + (y * scale.reshape(1, 1, 1, -1)).astype(y.dtype)


class MsMlp(Model):
    """MS-MLP, for images whose sides are multiples of the last stage's stride.

    Attributes:
      patch_size: (height, width) in pixels of a position of the first stage.
      hidden_dim: number of channels of the first stage; each stage has twice as many.
      num_blocks: number of blocks of each stage.
      stochastic_depth: the last block's rate; it rises linearly from 0 over all
        stages. A branch that is kept is divided by 1 − rate.
      mlp_ratio: number of hidden units of an MLP per channel.
      layer_scale: initial value of the branches' scales γ.
      gelu: "exact" (the published models) or "tanh".
      mean, std: what levels from 0 to 1 are normalised by, red, green and blue.
    """

    patch_size: tuple[int, int]
    hidden_dim: int
    num_blocks: tuple[int, int, int, int]
    stochastic_depth: float = 0.0
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    gelu: str = "exact"
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless patches tile the image and channels make chunks."""
        pyramid.check_stages(self, image_size)
        # Of twice as many channels there are as many chunks.
        moves.chunk_ends(self.hidden_dim, SHIFTS)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … of all stages, `stage_1`, … with which stages
        end, all (n, h, w, c), and `pre_logits` (n, c).
        """
        self.check_image(image)

        def begin(i: int) -> nn.Module:
            size, name = ((2, 2), f"down{i}") if i else (self.patch_size, "stem")
            return Embedding(self.hidden_dim * 2**i, size, self.run, name=name)

        def rows(i: int) -> list[pyramid.Row]:
            block = functools.partial(
                MixShiftBlock,
                FILTERS[i],
                self.mlp_ratio,
                self.layer_scale,
                self.gelu,
                self.run,
            )
            return [pyramid.Row(block, self.num_blocks[i])]

        noise = pyramid.linear_noise(self, image, train, branches=1)
        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            rows,
            noise=noise,
            train=train,
        )
        return pyramid.pooled(
            x,
            out,
            self.num_classes,
            norm=LayerNorm(name="norm"),
            kernel_init=layers.NORMAL,
        )


MODEL = MsMlp
# The authors' models: patch, C, blocks, rate of stochastic depth.
_ROWS = {
    "msmlp_t": ((4, 4), 96, (3, 3, 9, 3), 0.1),
    "msmlp_s": ((4, 4), 96, (3, 3, 27, 3), 0.4),
    "msmlp_b": ((4, 4), 128, (3, 3, 27, 3), 0.5),
}
SIZES = {name: sizes(MsMlp, row) for name, row in _ROWS.items()}
TOP_1 = {"msmlp_t": 82.1, "msmlp_s": 83.4, "msmlp_b": 83.8}
CHECKED = "counts; logits of the authors' code"


def _stage(i: int) -> dict[str, str]:
    """Those of one stage; `q` are the channels of a chunk, `r` those of the last."""
    mixing = {
        f"mix_shift/{axis}_{q}": f"{side} {side} 1 {channels}"
        for axis in "wh"
        for q, (side, channels) in enumerate(zip(FILTERS[i], "qqqqr", strict=True))
    }
    block = axes(
        {
            **mixing,
            "LayerNorm_0": "c",
            "channel_mixing/Dense_0": "c dc",
            "channel_mixing/Dense_1": "dc c",
        }
    )
    return pyramid.stage_axes(i, {**block, "scale": "c"})


AXES = {
    **axes({"stem/proj": "ph pw rgb c0", "stem/norm": "c0"}),
    **_stage(0),
    **axes({"down1/proj": "2 2 c0 c1", "down1/norm": "c1"}),
    **_stage(1),
    **axes({"down2/proj": "2 2 c1 c2", "down2/norm": "c2"}),
    **_stage(2),
    **axes({"down3/proj": "2 2 c2 c3", "down3/norm": "c3"}),
    **_stage(3),
    **axes({"norm": "c3", "head": "c3 k"}),
}
_STAGES = range(len(FILTERS))
# What the authors' state dicts call what: their layer or array, and ours; {} is the
# number of a block in its stage. What begins a stage there ends the one before.
AUTHORS = (
    ("patch_embed.proj", "stem/proj"),
    ("patch_embed.norm", "stem/norm"),
    *(
        (f"layers.{i - 1}.downsample.{part}", f"down{i}/{part}")
        for i in _STAGES[1:]
        for part in ("proj", "norm")
    ),
    *(
        (f"layers.{i}.blocks.{{}}.{theirs}", f"stage{i}_block_{{}}/{ours}")
        for i in _STAGES
        for theirs, ours in (
            *((f"dwconv_lr.{q}", f"mix_shift/w_{q}") for q in range(len(SHIFTS))),
            *((f"dwconv_td.{q}", f"mix_shift/h_{q}") for q in range(len(SHIFTS))),
            ("norm", "LayerNorm_0"),
            ("pwconv1", "channel_mixing/Dense_0"),
            ("pwconv2", "channel_mixing/Dense_1"),
            ("gamma", "scale"),
        )
    ),
    ("norm", "norm"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
