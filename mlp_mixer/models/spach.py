"""SPACH (Zhao et al. 2021, arXiv 2108.13002, section 3, single stage).

An image becomes a table X of S tokens (patches) by C channels. A layer mixes tokens in
one of three forms, or not at all but by the depthwise convolution that all of them
have, then mixes channels, the same way in every token j:

    U       = X + γ ⊙ Mix(LayerNorm(X)) + DW(X)          γ (C), DW 3x3 in each channel
    Y[j, :] = U[j, :] + W4 gelu(W3 LayerNorm(U)[j, :])   W3 (D_C, C), W4 (C, D_C)

    mlp     Mix(Z)[:, i] = W2 gelu(W1 Z[:, i])           W1 (D_S, S), W2 (S, D_S)
    attn    Mix(Z) = [softmax(Q Kᵀ / √d) V of each head] Wo     [Q, K, V] = Z Wi
    conv    no Mix, no γ and no LayerNorm before it

DW reads X itself and sees zeros outside of the map. Before the first layer: LayerNorm.
After the last: LayerNorm, the mean over tokens, a linear head. Here X is (s, n, c),
tokens first, for all n images at once: see `layers`. Attention, for whose products
images come first, holds all weights of a layer, n·heads·S² numbers, and the gradient
keeps them unless `run.remat` computes them again.

Details and initial values are those of the authors' code (models/spach of
microsoft/SPACH). It means to draw the biases of MLPs from N(0, 1e-6), but none of its
layers has the name that it looks for; they are zeros. Stochastic depth leaves out Mix
and the MLP, each by itself, and never DW; its rate is the same in all blocks.

The form conv, and attn, whose tokens know their place by DW alone, take any
resolution.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import Dense, LayerNorm, at_least_float32
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, axes, sizes

MIXINGS = ("mlp", "conv", "attn")
XAVIER = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head self-attention of the tokens of each image.

    Attributes:
      num_heads: number of heads, which divides the channels.
      run: the products' dtype and form.
    """

    num_heads: int
    run: Run

    @nn.compact
    def __call__(
        self, y: Float[Array, "s n c"], noise: Noise = Noise()
    ) -> Float[Array, "s n c"]:
        """Returns the output of the branch, with `noise` applied."""
        s, n, c = y.shape
        dense = functools.partial(Dense, run=self.run, kernel_init=XAVIER)
        qkv = dense(3 * c, name="Dense_0")(y)
        qkv = qkv.reshape(s, n, 3, self.num_heads, c // self.num_heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query = query * query.shape[-1] ** -0.5
        wide = at_least_float32(y.dtype)
        weights = jnp.einsum("snhd,tnhd->nhst", query, key, preferred_element_type=wide)
        weights = jax.nn.softmax(weights, axis=-1).astype(y.dtype)
        y = jnp.einsum("nhst,tnhd->snhd", weights, value).reshape(s, n, c)
        return layers.scale_images(dense(c, name="Dense_1")(y), noise.keep)


class SpachBlock(nn.Module):
    """One layer of any form, on tokens that are a map.

    Attributes:
      grid: (height, width) of the map in tokens.
      mix: makes Mix, which maps (normalised state, Noise); None: there is none.
      channel_mixing: makes the MLP, given its name.
      run: how it is computed.
    """

    grid: tuple[int, int]
    mix: Callable[[], nn.Module] | None
    channel_mixing: Callable[..., nn.Module]
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        depthwise = layers.Depthwise(
            self.grid, self.run, kernel_init=layers.KAIMING, name="depthwise"
        )
        channel_mixing = self.channel_mixing(name="channel_mixing")
        first, second = noise.branches(2)
        u = x + depthwise(x)
        if self.mix is not None:
            start = nn.initializers.constant(1e-4)
            scale = self.param("scale", start, x.shape[-1:], jnp.float32)
            y = self.mix()(LayerNorm(name="LayerNorm_0")(x), first)
            u = u + (y * scale.reshape(1, 1, -1)).astype(y.dtype)
        return u + channel_mixing(LayerNorm(name="LayerNorm_1")(u), second)


def layer(
    mixing: str,
    grid: tuple[int, int],
    *,
    channels_mlp_dim: int,
    tokens_mlp_dim: Any = None,
    num_heads: Any = None,
    gelu: str,
    run: Run,
) -> Callable[..., SpachBlock]:
    """Returns what makes a layer, given its name.

    Args:
      mixing: one of `MIXINGS`.
      grid: (height, width) of the map in tokens.
      channels_mlp_dim: number of hidden units of channel mixing.
      tokens_mlp_dim: number of hidden units of token mixing; of the form mlp.
      num_heads: number of attention's heads; of the form attn.
      gelu: "exact" or "tanh".
      run: how it is computed.
    """
    mlp = functools.partial(layers.MlpBlock, gelu=gelu, run=run, kernel_init=XAVIER)
    mixings: dict[str, Callable[[], nn.Module] | None] = {
        "mlp": functools.partial(mlp, tokens_mlp_dim, axis=0, name="token_mixing"),
        "conv": None,
        "attn": functools.partial(Attention, num_heads, run, name="attention"),
    }
    channel_mixing = functools.partial(mlp, channels_mlp_dim)
    return functools.partial(SpachBlock, grid, mixings[mixing], channel_mixing, run)


class Spach(Model):
    """SPACH of one stage. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      mixing: "mlp", "conv" or "attn", the form of a layer.
      tokens_mlp_dim: number of hidden units of token mixing, D_S; of the form mlp.
      num_heads: number of attention's heads; of the form attn.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    channels_mlp_dim: int
    mixing: str = "mlp"
    tokens_mlp_dim: int | None = None
    num_heads: int | None = None
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless patches tile the image and the form has its sizes.

        Of the form attn the heads also have to divide the channels.
        """
        super().check_size(image_size)
        known.require("mixing", self.mixing, MIXINGS)
        field = {"mlp": "tokens_mlp_dim", "attn": "num_heads"}.get(self.mixing)
        if field and getattr(self, field) is None:
            raise ValueError(
                f"{field} is None, but the layers of mixing {self.mixing!r} need it; "
                "set it, or try mixing 'conv'."
            )
        if self.mixing == "attn" and self.hidden_dim % (self.num_heads or 1):
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide hidden_dim, "
                f"{self.hidden_dim}; try heads of 32 channels, as the authors'."
            )

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        (h, w), (ph, pw) = image.shape[1:3], self.patch_size
        stem = layers.PatchEmbed(
            self.hidden_dim,
            self.patch_size,
            self.run,
            kernel_init=layers.KAIMING,
            name="stem",
        )
        block = layer(
            self.mixing,
            (h // ph, w // pw),
            channels_mlp_dim=self.channels_mlp_dim,
            tokens_mlp_dim=self.tokens_mlp_dim,
            num_heads=self.num_heads,
            gelu=self.gelu,
            run=self.run,
        )
        x = LayerNorm(name="stem_layer_norm")(stem(image))
        y, states = trunk.row(self, block, x, name="SpachBlock", train=train)
        y = LayerNorm(name="pre_head_layer_norm")(y)
        return layers.readout(y, [x, *states], self.num_classes)


MODEL = Spach
# The authors' models: patch, layers, C, D_C, form, and D_S or heads.
_ROWS: dict[str, tuple[Any, ...]] = {
    "spach_xxs_mlp": ((16, 16), 12, 384, 768, "mlp", 98),
    "spach_xs_mlp": ((16, 16), 24, 384, 768, "mlp", 98),
    "spach_s_mlp": ((16, 16), 24, 512, 1536, "mlp", 98),
    "spach_xxs_conv": ((16, 16), 12, 384, 768, "conv"),
    "spach_xs_conv": ((16, 16), 24, 384, 768, "conv"),
    "spach_s_conv": ((16, 16), 24, 512, 1536, "conv"),
    "spach_xxs_attn": ((16, 16), 12, 192, 384, "attn", None, 6),
    "spach_xs_attn": ((16, 16), 12, 384, 768, "attn", None, 12),
    "spach_s_attn": ((16, 16), 12, 512, 1536, "attn", None, 16),
}
SIZES = {name: sizes(Spach, row) for name, row in _ROWS.items()}
FORM = "mixing"
_BLOCK = "SpachBlock_*"
_MIXING = {
    "mlp": {
        f"{_BLOCK}/LayerNorm_0": "c",
        f"{_BLOCK}/token_mixing/Dense_0": "s ds",
        f"{_BLOCK}/token_mixing/Dense_1": "ds s",
    },
    "conv": {},
    "attn": {
        f"{_BLOCK}/LayerNorm_0": "c",
        f"{_BLOCK}/attention/Dense_0": "c 3c",
        f"{_BLOCK}/attention/Dense_1": "c c",
    },
}


def _axes(mixing: str) -> dict[str, str]:
    return {
        **axes({"stem": "ph pw rgb c", "stem_layer_norm": "c"}),
        **axes({f"{_BLOCK}/depthwise": "3 3 1 c", **_MIXING[mixing]}),
        **({} if mixing == "conv" else {f"{_BLOCK}/scale": "c"}),
        **axes(
            {
                f"{_BLOCK}/LayerNorm_1": "c",
                f"{_BLOCK}/channel_mixing/Dense_0": "c dc",
                f"{_BLOCK}/channel_mixing/Dense_1": "dc c",
                "pre_head_layer_norm": "c",
                "head": "c k",
            }
        ),
    }


AXES = {mixing: _axes(mixing) for mixing in MIXINGS}
TOP_1: dict[str, float] = {}  # the paper prints those of the pyramids
CHECKED = "counts; logits of the authors' code"
# What the authors' state dicts call what: their layer or array, ours, and the number of
# an array's axes there; {} is the number of a block.
AUTHORS = (
    ("stem.proj", "stem"),
    ("norm1", "stem_layer_norm"),
    ("blocks.{}.cpe_net.net.1", "SpachBlock_{}/depthwise"),
    ("blocks.{}.norm1", "SpachBlock_{}/LayerNorm_0"),
    ("blocks.{}.spatial_func.fc1", "SpachBlock_{}/token_mixing/Dense_0"),
    ("blocks.{}.spatial_func.fc2", "SpachBlock_{}/token_mixing/Dense_1"),
    ("blocks.{}.spatial_func.qkv", "SpachBlock_{}/attention/Dense_0"),
    ("blocks.{}.spatial_func.proj", "SpachBlock_{}/attention/Dense_1"),
    ("blocks.{}.gamma_1", "SpachBlock_{}/scale", 3),
    ("blocks.{}.norm2", "SpachBlock_{}/LayerNorm_1"),
    ("blocks.{}.channel_func.fc1", "SpachBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.channel_func.fc2", "SpachBlock_{}/channel_mixing/Dense_1"),
    ("norm2", "pre_head_layer_norm"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
