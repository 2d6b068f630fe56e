"""ResMLP (Touvron et al. 2021, arXiv 2105.03404, section 2).

An image becomes a table X of S tokens (patches) by C channels. A layer is linear across
tokens, the same in every channel i, then an MLP across channels, the same in every
token j. Aff scales and shifts each channel and normalises nothing; s1 and s2 scale each
channel of a branch and start small:

    U[:, i] = X[:, i] + s1[i] (W1 Aff(X)[:, i] + b)                      W1 (S, S)
    Y[j, :] = U[j, :] + s2 ⊙ W3 gelu(W2 Aff(U)[j, :])       W2 (D_C, C), W3 (C, D_C)

After the last layer: Aff, the mean over tokens, a linear head. Here X is (s, n, c),
tokens first, for all n images at once: see `layers`.

Details and initial values are those of the authors' code (resmlp_models.py in
facebookresearch/deit). In the paper s1 and s2 come with a shift of their own.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import Dense
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, sizes


def stem(features: int, patch_size: tuple[int, int], run: Run) -> layers.PatchEmbed:
    """Returns the part `stem` of a model, which begins as torch's convolutions do."""
    ph, pw = patch_size
    uniform = layers.uniform((ph * pw * 3) ** -0.5)
    return layers.PatchEmbed(
        features,
        patch_size,
        run,
        kernel_init=uniform,
        bias_init=uniform,
        name="stem",
    )


class Affine(nn.Module):
    """Aff: a scale `alpha` and a shift `beta` for each channel, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        """Returns alpha ⊙ x + beta, in the dtype of `x`."""
        alpha = self.param("alpha", nn.initializers.ones, x.shape[-1:], jnp.float32)
        beta = self.param("beta", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = x * alpha.reshape(1, 1, -1) + beta.reshape(1, 1, -1)
        return y.astype(x.dtype)


class ResMlpBlock(nn.Module):
    """One ResMLP layer; its other attributes are those of `ResMlp`.

    Attributes:
      token_mixing: what makes the linear map across tokens, given its name.
    """

    token_mixing: Callable[..., nn.Module]
    channels_mlp_dim: int
    layer_scale: float
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        token_mixing = self.token_mixing(name="token_mixing")
        channel_mixing = layers.MlpBlock(
            self.channels_mlp_dim,
            gelu=self.gelu,
            run=self.run,
            kernel_init=layers.NORMAL,
            name="channel_mixing",
        )
        first, second = noise.branches(2)
        y = token_mixing(Affine(name="Affine_0")(x))
        x = x + self._scaled("scale_0", layers.scale_images(y, first.keep))
        y = channel_mixing(Affine(name="Affine_1")(x), second)
        return x + self._scaled("scale_1", y)

    def _scaled(self, name: str, y: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        start = nn.initializers.constant(self.layer_scale)
        scale = self.param(name, start, y.shape[-1:], jnp.float32)
        return (y * scale.reshape(1, 1, -1)).astype(y.dtype)


class ResMlp(Model):
    """ResMLP. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      layer_scale: initial value of s1 and s2.
      gelu: "exact" (the published models) or "tanh".
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    channels_mlp_dim: int
    layer_scale: float = 0.1
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        x = stem(self.hidden_dim, self.patch_size, self.run)(image)
        token_mixing = functools.partial(
            Dense, x.shape[0], axis=0, run=self.run, kernel_init=layers.NORMAL
        )
        block = functools.partial(
            ResMlpBlock,
            token_mixing,
            channels_mlp_dim=self.channels_mlp_dim,
            layer_scale=self.layer_scale,
            gelu=self.gelu,
            run=self.run,
        )
        y, states = trunk.row(
            self,
            block,
            x,
            name="ResMlpBlock",
            train=train,
        )
        y = Affine(name="pre_head_affine")(y)
        return layers.readout(
            y, [x, *states], self.num_classes, kernel_init=layers.NORMAL
        )


MODEL = ResMlp
# Patch, layers, C, D_C, initial value of s1 and s2 (timm's resmlp_12 has 1e-4).
_ROWS = {
    "resmlp_12": ((16, 16), 12, 384, 1536, 0.1),
    "resmlp_24": ((16, 16), 24, 384, 1536, 1e-5),
    "resmlp_36": ((16, 16), 36, 384, 1536, 1e-6),
    "resmlp_big_24": ((8, 8), 24, 768, 3072, 1e-6),
}
SIZES = {name: sizes(ResMlp, row) for name, row in _ROWS.items()}
# Without distillation.
TOP_1 = {
    "resmlp_12": 76.6,
    "resmlp_24": 79.4,
    "resmlp_36": 79.7,
    "resmlp_big_24": 81.0,
}
CHECKED = "counts; logits of timm"
AXES = {
    "stem/kernel": "ph pw rgb c",
    "stem/bias": "c",
    "ResMlpBlock_*/Affine_0/alpha": "c",
    "ResMlpBlock_*/Affine_0/beta": "c",
    "ResMlpBlock_*/token_mixing/kernel": "s s",
    "ResMlpBlock_*/token_mixing/bias": "s",
    "ResMlpBlock_*/scale_0": "c",
    "ResMlpBlock_*/Affine_1/alpha": "c",
    "ResMlpBlock_*/Affine_1/beta": "c",
    "ResMlpBlock_*/channel_mixing/Dense_0/kernel": "c dc",
    "ResMlpBlock_*/channel_mixing/Dense_0/bias": "dc",
    "ResMlpBlock_*/channel_mixing/Dense_1/kernel": "dc c",
    "ResMlpBlock_*/channel_mixing/Dense_1/bias": "c",
    "ResMlpBlock_*/scale_1": "c",
    "pre_head_affine/alpha": "c",
    "pre_head_affine/beta": "c",
    "head/kernel": "c k",
    "head/bias": "k",
}
# What timm's resmlp_* call what, and what the authors': a module or an array of theirs,
# ours, and the number of an array's axes there; {} is the number of a block.
TIMM = (
    ("stem.proj", "stem"),
    ("blocks.{}.norm1.alpha", "ResMlpBlock_{}/Affine_0/alpha", 3),
    ("blocks.{}.norm1.beta", "ResMlpBlock_{}/Affine_0/beta", 3),
    ("blocks.{}.linear_tokens", "ResMlpBlock_{}/token_mixing"),
    ("blocks.{}.ls1", "ResMlpBlock_{}/scale_0"),
    ("blocks.{}.norm2.alpha", "ResMlpBlock_{}/Affine_1/alpha", 3),
    ("blocks.{}.norm2.beta", "ResMlpBlock_{}/Affine_1/beta", 3),
    ("blocks.{}.mlp_channels.fc1", "ResMlpBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.mlp_channels.fc2", "ResMlpBlock_{}/channel_mixing/Dense_1"),
    ("blocks.{}.ls2", "ResMlpBlock_{}/scale_1"),
    ("norm.alpha", "pre_head_affine/alpha", 3),
    ("norm.beta", "pre_head_affine/beta", 3),
    ("head", "head"),
)
AUTHORS = (
    ("patch_embed.proj", "stem"),
    ("blocks.{}.norm1.alpha", "ResMlpBlock_{}/Affine_0/alpha"),
    ("blocks.{}.norm1.beta", "ResMlpBlock_{}/Affine_0/beta"),
    ("blocks.{}.attn", "ResMlpBlock_{}/token_mixing"),
    ("blocks.{}.gamma_1", "ResMlpBlock_{}/scale_0"),
    ("blocks.{}.norm2.alpha", "ResMlpBlock_{}/Affine_1/alpha"),
    ("blocks.{}.norm2.beta", "ResMlpBlock_{}/Affine_1/beta"),
    ("blocks.{}.mlp.fc1", "ResMlpBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.mlp.fc2", "ResMlpBlock_{}/channel_mixing/Dense_1"),
    ("blocks.{}.gamma_2", "ResMlpBlock_{}/scale_1"),
    ("norm.alpha", "pre_head_affine/alpha"),
    ("norm.beta", "pre_head_affine/beta"),
    ("head", "head"),
)
NORMALISATION = IMAGENET
