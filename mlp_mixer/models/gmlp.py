"""gMLP (Liu et al. 2021, arXiv 2105.08050, section 2).

An image becomes a table X of S tokens (patches) by C channels. A layer widens every
token, lets one half of its units gate the other, and narrows it again. Only the gate
sees other tokens, the same way in every unit i:

    [Z1, Z2] = gelu(LayerNorm(X) U)                          U (C, D)
    G[:, i]  = W LayerNorm(Z2)[:, i] + b                     W (S, S)
    Y        = X + (Z1 ⊙ G) V                                V (D/2, C)

W starts near zero and b at one: at first a layer is an MLP. After the last layer:
LayerNorm, the mean over tokens, a linear head. Here X is (s, n, c), tokens first, for
all n images at once: see `layers`.

Details and initial values are those of timm.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import GELUS, Dense, LayerNorm
from mlp_mixer.models.model import Model, Noise, Outputs, Run, axes, sizes


class SpatialGatingUnit(nn.Module):
    """Halves the channels: one half, mapped linearly across tokens, gates the other."""

    run: Run

    @nn.compact
    def __call__(self, z: Float[Array, "s n d"]) -> Float[Array, "s n dg"]:
        """Returns the gated half."""
        z1, z2 = jnp.split(z, 2, axis=-1)
        gate = Dense(
            z.shape[0],
            axis=0,
            run=self.run,
            kernel_init=nn.initializers.normal(1e-6),
            bias_init=nn.initializers.ones,
            name="Dense_0",
        )
        return z1 * gate(LayerNorm(1e-5, name="LayerNorm_0")(z2))


class GMlpBlock(nn.Module):
    """One gMLP layer; its attributes are those of `GMlp`."""

    channels_mlp_dim: int
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of the one branch."""
        dense = functools.partial(
            Dense,
            run=self.run,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        gelu = known.pick("gelu", self.gelu, GELUS)
        (branch,) = noise.branches(1)
        y = LayerNorm(name="LayerNorm_0")(x)
        y = dense(self.channels_mlp_dim, name="Dense_0")(y)
        y = gelu(checkpoint_name(y, layers.PRE_GELU))
        y = SpatialGatingUnit(self.run, name="gating")(y)
        y = dense(x.shape[-1], name="Dense_1")(y)
        return x + layers.scale_images(y, branch.keep)


class GMlp(Model):
    """gMLP. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      channels_mlp_dim: number of hidden units D, before the gate halves them.
      gelu: "exact" (timm's models) or "tanh".
      stochastic_depth: every block's rate; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    channels_mlp_dim: int
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        stem = layers.PatchEmbed(
            self.hidden_dim, self.patch_size, self.run, name="stem"
        )
        block = functools.partial(
            GMlpBlock,
            channels_mlp_dim=self.channels_mlp_dim,
            gelu=self.gelu,
            run=self.run,
        )
        x = stem(image)
        y, states = trunk.row(
            self,
            block,
            x,
            name="GMlpBlock",
            train=train,
            branches=1,
        )
        y = LayerNorm(name="pre_head_layer_norm")(y)
        return layers.readout(y, [x, *states], self.num_classes)


MODEL = GMlp
# Patch, layers, C, D.
_ROWS = {
    "gmlp_ti16": ((16, 16), 30, 128, 768),
    "gmlp_s16": ((16, 16), 30, 256, 1536),
    "gmlp_b16": ((16, 16), 30, 512, 3072),
}
SIZES = {name: sizes(GMlp, row) for name, row in _ROWS.items()}
TOP_1 = {"gmlp_ti16": 72.3, "gmlp_s16": 79.6, "gmlp_b16": 81.6}
CHECKED = "counts; logits of timm"
AXES = axes(
    {
        "stem": "ph pw rgb c",
        "GMlpBlock_*/LayerNorm_0": "c",
        "GMlpBlock_*/Dense_0": "c dc",
        "GMlpBlock_*/gating/LayerNorm_0": "dg",
        "GMlpBlock_*/gating/Dense_0": "s s",
        "GMlpBlock_*/Dense_1": "dg c",
        "pre_head_layer_norm": "c",
        "head": "c k",
    }
)
# What timm's gmlp_* call what: their module, ours; {} is the number of a block.
TIMM = (
    ("stem.proj", "stem"),
    ("blocks.{}.norm", "GMlpBlock_{}/LayerNorm_0"),
    ("blocks.{}.mlp_channels.fc1", "GMlpBlock_{}/Dense_0"),
    ("blocks.{}.mlp_channels.gate.norm", "GMlpBlock_{}/gating/LayerNorm_0"),
    ("blocks.{}.mlp_channels.gate.proj", "GMlpBlock_{}/gating/Dense_0"),
    ("blocks.{}.mlp_channels.fc2", "GMlpBlock_{}/Dense_1"),
    ("norm", "pre_head_layer_norm"),
    ("head", "head"),
)
