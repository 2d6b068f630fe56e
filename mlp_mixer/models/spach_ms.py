"""SPACH-MS (Zhao et al. 2021, arXiv 2108.13002): the layers of SPACH in four stages.

A layer is that of one stage (see `spach`), of one of its forms. Four stages see the
image at 1/4, 1/8, 1/16 and 1/32 with C, 2C, 4C and 8C channels. What their layers mix
by is, from the first stage to the last,

    mlp           conv | mlp        | mlp        | mlp
    conv          conv | conv       | conv       | conv
    attn          conv | attn       | attn       | attn
    hybrid        conv | conv, attn | conv, attn | conv, attn
    hybrid_late   conv | conv       | conv, attn | conv, attn

where "conv, attn" are some layers of the one form and then some of the other. A stage
of S tokens has D_S = S/2 hidden units of token mixing, and D_C = r C of C channels.
Attention has the same number of heads in all stages.

The stem is a linear map of 4x4 pixels (conv1), or three convolutions to 64 channels, of
7x7 with stride 2, 3x3 and 3x3, each without bias and with BatchNorm and ReLU behind,
then a linear map of 2x2 (conv4). After it: LayerNorm. Between stages: a linear map of
2x2 tokens without bias, then GroupNorm with one group (epsilon 1e-5), which normalises
all values of an image together and scales each channel:

    Z = Y / std(Y) ⊙ a + b     Y (S, C) minus its mean, a, b (C)

After the last stage: LayerNorm, the mean over tokens, a linear head. In a stage the
state is (s, n, c), tokens first; it is a map (n, h, w, c) where a stage begins.

Details and initial values are those of the authors' code (models/spach of
microsoft/SPACH). Stochastic depth rises linearly over all layers. The forms without
token mixing by an MLP take any image whose sides are multiples of the last stage's
stride, 32 pixels.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mlp_mixer import known
from mlp_mixer.models import layers, pyramid, spach
from mlp_mixer.models.derivatives import LayerNorm
from mlp_mixer.models.model import (
    IMAGENET,
    Model,
    Outputs,
    Run,
    axes,
    check_divisible,
    sizes,
)

# What the rows of layers of each stage mix by.
MIXINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mlp": (("conv",), ("mlp",), ("mlp",), ("mlp",)),
    "conv": (("conv",), ("conv",), ("conv",), ("conv",)),
    "attn": (("conv",), ("attn",), ("attn",), ("attn",)),
    "hybrid": (("conv",), *[("conv", "attn")] * 3),
    "hybrid_late": (("conv",), ("conv",), *[("conv", "attn")] * 2),
}
STEMS = ("conv1", "conv4")


class Conv4Stem(nn.Module):
    """Three convolutions with BatchNorm, then a linear map of half a patch.

    Attributes:
      features: number of channels c.
      hidden: number of channels of the convolutions.
      patch_size: (height, width) in pixels of a token, even numbers.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    features: int
    hidden: int
    patch_size: tuple[int, int]
    train: bool
    run: Run

    @nn.compact
    def __call__(self, image: Float[Array, "n h w 3"]) -> Float[Array, "s n c"]:
        """Returns the tokens in raster order, rows first."""
        x = image
        for i, (size, stride) in enumerate(((7, 2), (3, 1), (3, 1))):
            convolution = pyramid.Convolution(
                self.hidden,
                (size, size),
                stride,
                size // 2,
                self.run,
                use_bias=False,
                kernel_init=layers.KAIMING,
                name=f"conv{i}",
            )
            x = pyramid.BatchNorm(self.train, name=f"norm{i}")(convolution(x))
            x = nn.relu(x)
        height, width = self.patch_size
        return layers.PatchEmbed(
            self.features,
            (height // 2, width // 2),
            self.run,
            kernel_init=layers.KAIMING,
            name="conv3",
        )(x)


class Down(nn.Module):
    """What is between two stages: a linear map of 2x2 tokens, and GroupNorm.

    Attributes:
      features: number of channels afterwards.
      run: the product's dtype.
    """

    features: int
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "n h w x"]) -> Float[Array, "s n c"]:
        """Returns the tokens of the next stage."""
        merge = layers.PatchEmbed(
            self.features,
            (2, 2),
            self.run,
            use_bias=False,
            kernel_init=layers.KAIMING,
            name="conv",
        )
        return layers.TokenChannelNorm(1e-5, by_token=False, name="norm")(merge(x))


class SpachMs(Model, kw_only=True):
    """SPACH of four stages. With MLPs, tied to the resolution of the image of `init`.

    Attributes:
      patch_size: (height, width) in pixels of a token of the first stage.
      hidden_dim: number of channels C of the first stage; each stage has twice as many.
      num_blocks: number of layers of each row of `MIXINGS`, from the first stage on.
      mlp_ratio: number of hidden units of channel mixing per channel, r.
      mixing: a key of `MIXINGS`.
      num_heads: number of attention's heads, in all stages.
      stem: "conv1" or "conv4".
      stem_dim: number of channels of the convolutions of the stem conv4.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: the last layer's rate; it rises linearly from 0 over all
        stages. A branch that is kept is divided by 1 − rate.
      mean, std: what levels from 0 to 1 are normalised by, red, green and blue. The
        stem conv4 sees zeros around the image, so that they are a part of the model.
    """

    patch_size: tuple[int, int] = (4, 4)  # which the stem conv4 does not tell
    hidden_dim: int
    num_blocks: tuple[int, ...]
    mlp_ratio: int
    mixing: str = "mlp"
    num_heads: int | None = None
    stem: str = "conv1"
    stem_dim: int = 64
    gelu: str = "exact"
    stochastic_depth: float = 0.0
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless the last stage's tokens tile the image.

        The fields have to fit each other, too: number of rows, heads, stem.
        """
        known.require("mixing", self.mixing, MIXINGS)
        known.require("stem", self.stem, STEMS)
        height, width = self.patch_size
        check_divisible(image_size, (8 * height, 8 * width), "the last stage's stride")
        rows = [mixing for stage in MIXINGS[self.mixing] for mixing in stage]
        if len(self.num_blocks) != len(rows):
            raise ValueError(
                f"num_blocks is {self.num_blocks}; expected {len(rows)} numbers for "
                f"mixing {self.mixing!r}: those of {', '.join(rows)}."
            )
        if self.stem == "conv4" and (height % 2 or width % 2):
            raise ValueError(
                f"patch_size is {self.patch_size}, of which the stem 'conv4' takes "
                "half; try even numbers, or the stem 'conv1'."
            )
        if "attn" in rows and (
            self.num_heads is None or self.hidden_dim % self.num_heads
        ):
            raise ValueError(
                f"num_heads is {self.num_heads}; expected a divisor of hidden_dim, "
                f"{self.hidden_dim}. The authors' heads have 32 channels in the first "
                "stage."
            )

    def check_image(self, image: Array) -> None:
        """Raises ValueError unless `image` fits the model and its parameters."""
        super().check_image(image)
        (h, w), (ph, pw) = image.shape[1:3], self.patch_size
        tokens, expected = (h // ph) * (w // pw), self.size_of("s1")
        if expected is not None and tokens != 4 * expected:
            raise ValueError(
                f"A {h}x{w} image makes {tokens} tokens of {ph}x{pw} pixels, but the "
                f"parameters are for {4 * expected} tokens: an MLP that mixes tokens "
                "is tied to the resolution. Resize the image to the training "
                "resolution, or take mixing 'conv' or 'attn'."
            )

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are the maps (n, h, w, c) `stem`, `block_0`, … and, where stages end,
        `stage_1`, …; and `pre_logits` (n, c).
        """
        self.check_image(image)
        (h, w), (ph, pw) = image.shape[1:3], self.patch_size
        grids = [(h // ph // 2**i, w // pw // 2**i) for i in range(4)]
        counts = iter(self.num_blocks)
        stages = [
            [(mixing, next(counts)) for mixing in stage]
            for stage in MIXINGS[self.mixing]
        ]

        def as_map(i: int, x: Float[Array, "s n c"]) -> Float[Array, "n h w c"]:
            return jnp.moveaxis(x.reshape(*grids[i], *x.shape[1:]), 2, 0)

        def begin(i: int) -> Callable[[Array], Array]:
            if not i:
                norm = LayerNorm(name="stem_layer_norm")
                return lambda image: norm(self._stem(train)(image))
            down = Down(self.hidden_dim * 2**i, self.run, name=f"down{i}")
            return lambda x: down(as_map(i - 1, x))

        def rows(i: int) -> list[pyramid.Row]:
            tokens = grids[i][0] * grids[i][1]
            layer = functools.partial(
                spach.layer,
                grid=grids[i],
                channels_mlp_dim=self.mlp_ratio * self.hidden_dim * 2**i,
                tokens_mlp_dim=max(tokens // 2, 1),
                num_heads=self.num_heads,
                gelu=self.gelu,
                run=self.run,
            )
            return [pyramid.Row(layer(mixing), n, mixing) for mixing, n in stages[i]]

        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            rows,
            noise=pyramid.linear_noise(
                self,
                image,
                train,
                counts=[sum(n for _, n in stage) for stage in stages],
            ),
            train=train,
            as_map=as_map,
        )
        y = as_map(3, LayerNorm(name="pre_head_layer_norm")(x))
        zeros = nn.initializers.zeros
        return pyramid.pooled(y, out, self.num_classes, kernel_init=zeros)

    def _stem(self, train: bool) -> nn.Module:
        if self.stem == "conv4":
            return Conv4Stem(
                self.hidden_dim,
                self.stem_dim,
                self.patch_size,
                train,
                self.run,
                name="stem",
            )
        return layers.PatchEmbed(
            self.hidden_dim,
            self.patch_size,
            self.run,
            kernel_init=layers.KAIMING,
            name="stem",
        )


MODEL = SpachMs
_SMALL, _LARGE = (2, 2, 6, 2), (3, 4, 12, 3)
_HYBRID, _LATE = (3, 2, 2, 2, 10, 1, 2), (3, 4, 2, 10, 1, 2)
# The authors' models: patch, C, layers, r, mixing, heads, stem.
_ROWS: dict[str, tuple[Any, ...]] = {
    "spach_ms_xxs_mlp": ((4, 4), 64, _SMALL, 2, "mlp", None, "conv1"),
    "spach_ms_xs_mlp": ((4, 4), 96, _LARGE, 2, "mlp", None, "conv1"),
    "spach_ms_s_mlp": ((4, 4), 128, _LARGE, 3, "mlp", None, "conv1"),
    "spach_ms_xxs_conv": ((4, 4), 64, _SMALL, 2, "conv", None, "conv1"),
    "spach_ms_xs_conv": ((4, 4), 96, _LARGE, 2, "conv", None, "conv1"),
    "spach_ms_s_conv": ((4, 4), 128, _LARGE, 3, "conv", None, "conv1"),
    "spach_ms_xxs_attn": ((4, 4), 32, _SMALL, 2, "attn", 1, "conv1"),
    "spach_ms_xs_attn": ((4, 4), 64, _LARGE, 2, "attn", 2, "conv1"),
    "spach_ms_s_attn": ((4, 4), 96, _LARGE, 3, "attn", 3, "conv1"),
    "spach_ms_hybrid_xs": ((4, 4), 96, _LATE, 2, "hybrid_late", 3, "conv1"),
    "spach_ms_hybrid_s": ((4, 4), 128, _HYBRID, 3, "hybrid", 4, "conv1"),
    "spach_ms_hybrid_s_plus": ((4, 4), 128, _HYBRID, 3, "hybrid", 4, "conv4"),
}
SIZES = {name: sizes(SpachMs, row) for name, row in _ROWS.items()}
FORM = ("mixing", "stem")
# Of a layer, but for `scale`, the array of its own that those have which mix.
_MIX = {
    "conv": {},
    "mlp": {
        "LayerNorm_0": "c",
        "token_mixing/Dense_0": "s ds",
        "token_mixing/Dense_1": "ds s",
    },
    "attn": {
        "LayerNorm_0": "c",
        "attention/Dense_0": "c 3c",
        "attention/Dense_1": "c c",
    },
}
_STEM = {
    "conv1": {"stem": "ph pw rgb c0"},
    "conv4": {
        "stem/norm0": "e",
        "stem/norm1": "e",
        "stem/norm2": "e",
        "stem/conv3": "hp wp e c0",
    },
}
_CONV4 = {
    "stem/conv0/kernel": "7 7 rgb e",
    "stem/conv1/kernel": "3 3 e e",
    "stem/conv2/kernel": "3 3 e e",
}


def _layer_axes(mixing: str) -> dict[str, str]:
    return axes(
        {
            "depthwise": "3 3 1 c",
            **_MIX[mixing],
            "LayerNorm_1": "c",
            "channel_mixing/Dense_0": "c dc",
            "channel_mixing/Dense_1": "dc c",
        }
    ) | ({} if mixing == "conv" else {"scale": "c"})


def _axes(mixing: str, stem: str) -> dict[str, str]:
    found = axes({**_STEM[stem], "stem_layer_norm": "c0"})
    found |= _CONV4 if stem == "conv4" else {}
    for i, stage in enumerate(MIXINGS[mixing]):
        if i:
            found[f"down{i}/conv/kernel"] = f"2 2 c{i - 1} c{i}"
            found |= axes({f"down{i}/norm": f"c{i}"})
        for row in stage:
            found |= pyramid.stage_axes(i, _layer_axes(row), row)
    return found | axes({"pre_head_layer_norm": "c3", "head": "c3 k"})


AXES = {(mixing, stem): _axes(mixing, stem) for mixing in MIXINGS for stem in STEMS}
TOP_1 = {
    "spach_ms_xxs_mlp": 74.5,
    "spach_ms_s_mlp": 82.1,
    "spach_ms_xxs_conv": 73.1,
    "spach_ms_s_conv": 81.6,
    "spach_ms_xxs_attn": 65.4,
    "spach_ms_s_attn": 82.9,
    "spach_ms_hybrid_s": 83.7,
    "spach_ms_hybrid_s_plus": 83.9,
}
CHECKED = "counts; logits and statistics of the authors' code"
# What the authors' state dicts call what: their layer or array, ours, and the number of
# an array's axes there.
_LAYER_AUTHORS = (
    ("cpe_net.net.1", "depthwise"),
    ("norm1", "LayerNorm_0"),
    ("spatial_func.fc1", "token_mixing/Dense_0"),
    ("spatial_func.fc2", "token_mixing/Dense_1"),
    ("spatial_func.qkv", "attention/Dense_0"),
    ("spatial_func.proj", "attention/Dense_1"),
    ("gamma_1", "scale", 3),
    ("norm2", "LayerNorm_1"),
    ("channel_func.fc1", "channel_mixing/Dense_0"),
    ("channel_func.fc2", "channel_mixing/Dense_1"),
)


def _authors(mixing: str) -> Iterator[tuple[Any, ...]]:
    """They count what is between stages as a stage's number 0, and then its layers.

    Where the second row of a stage begins is thus what the published sizes say.
    """
    yield from (("stem.proj", "stem"), ("norm1", "stem_layer_norm"))
    for i in range(3):
        yield f"stem.proj.{3 * i}", f"stem/conv{i}"
        yield f"stem.proj.{3 * i + 1}", f"stem/norm{i}"
    yield "stem.proj.9", "stem/conv3"
    published = (row["num_blocks"] for row in SIZES.values() if row["mixing"] == mixing)
    counts = iter(next(published))
    for i, stage in enumerate(MIXINGS[mixing]):
        first = 0
        if i:
            yield f"layer{i + 1}.0.net.1.0", f"down{i}/conv"
            yield f"layer{i + 1}.0.net.1.1", f"down{i}/norm"
            first = 1
        for row in stage:
            for theirs, ours, *how in _LAYER_AUTHORS:
                block = f"layer{i + 1}.{{{first}}}.{theirs}"
                yield block, f"stage{i}_{row}_{{}}/{ours}", *how
            first += next(counts)
    yield from (("norm2", "pre_head_layer_norm"), ("head", "head"))


AUTHORS = {form: tuple(_authors(form[0])) for form in AXES}
NORMALISATION = IMAGENET
