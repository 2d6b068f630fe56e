"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601, section 2 and Appendix E).

An image becomes a table X of S tokens (patches) by C channels. A layer mixes tokens,
the same way in every channel i, then channels, the same way in every token j:

    U[:, i] = X[:, i] + W2 gelu(W1 LayerNorm(X)[:, i])      W1 (D_S, S), W2 (S, D_S)
    Y[j, :] = U[j, :] + W4 gelu(W3 LayerNorm(U)[j, :])      W3 (D_C, C), W4 (C, D_C)

After the last layer: LayerNorm, the mean over tokens, a linear head. Here X is (s, n,
c), tokens first, for all n images at once: see `layers`.

The parameters have the official names and shapes: published files load as they are.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import LayerNorm
from mlp_mixer.models.model import Model, Noise, Outputs, axes, sizes


class MixerBlock(nn.Module):
    """One Mixer layer.

    Attributes:
      token_mixing, channel_mixing: what makes its two branches, given their name; each
        maps (normalised state, Noise).
      epsilon: that of both LayerNorms.
    """

    token_mixing: Callable[..., nn.Module]
    channel_mixing: Callable[..., nn.Module]
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        token_mixing = self.token_mixing(name="token_mixing")
        channel_mixing = self.channel_mixing(name="channel_mixing")
        norm = functools.partial(LayerNorm, self.epsilon)
        first, second = noise.branches(2)
        x = x + token_mixing(norm(name="LayerNorm_0")(x), first)
        return x + channel_mixing(norm(name="LayerNorm_1")(x), second)


class MlpMixer(Model):
    """MLP-Mixer. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of Mixer layers.
      hidden_dim: number of channels C.
      tokens_mlp_dim: number of hidden units of token mixing, D_S.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      gelu: "tanh" (the published models) or "exact".
      dropout: rate in both MLPs (0 was best everywhere, section 3).
      stochastic_depth: the last block's rate; it rises linearly from 0.
      rescale_stochastic_depth: whether kept branches are divided by 1 − rate (the
        authors do not).
      head_bias: initial value of the head's bias (pretraining with a sigmoid loss:
        about −ln k; the published listing: 0).
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str = "tanh"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    rescale_stochastic_depth: bool = False
    head_bias: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        stem = layers.PatchEmbed(
            self.hidden_dim, self.patch_size, self.run, name="stem"
        )
        mlp = functools.partial(
            layers.MlpBlock, gelu=self.gelu, dropout=self.dropout, run=self.run
        )
        block = functools.partial(
            MixerBlock,
            functools.partial(mlp, self.tokens_mlp_dim, axis=0),
            functools.partial(mlp, self.channels_mlp_dim),
        )
        noise = trunk.draw(  # one rate for both branches (big_vision)
            self,
            self.num_blocks,
            image.shape[0],
            train=train,
            rates=(0.0, self.stochastic_depth),
            rescale=self.rescale_stochastic_depth,
            dropout=self.dropout,
        )
        x = stem(image)
        y, states = trunk.blocks(
            self,
            block,
            x,
            name="MixerBlock",
            count=self.num_blocks,
            train=train,
            noise=noise,
        )
        y = LayerNorm(name="pre_head_layer_norm")(y)
        bias_init = nn.initializers.constant(self.head_bias)
        return layers.readout(y, [x, *states], self.num_classes, bias_init=bias_init)


MODEL = MlpMixer
# Table 1: patch, layers, C, D_S, D_C.
_ROWS = {
    "mixer_s32": ((32, 32), 8, 512, 256, 2048),
    "mixer_s16": ((16, 16), 8, 512, 256, 2048),
    "mixer_b32": ((32, 32), 12, 768, 384, 3072),
    "mixer_b16": ((16, 16), 12, 768, 384, 3072),
    "mixer_l32": ((32, 32), 24, 1024, 512, 4096),
    "mixer_l16": ((16, 16), 24, 1024, 512, 4096),
    "mixer_h14": ((14, 14), 32, 1280, 640, 5120),
}
SIZES = {name: sizes(MlpMixer, row) for name, row in _ROWS.items()}
# Table 3, from scratch on ImageNet-1k.
TOP_1 = {"mixer_b16": 76.44, "mixer_l16": 71.76}
CHECKED = "counts; logits of timm; a literal Flax model"
AXES = axes(
    {
        "stem": "ph pw rgb c",
        "MixerBlock_*/LayerNorm_0": "c",
        "MixerBlock_*/token_mixing/Dense_0": "s ds",
        "MixerBlock_*/token_mixing/Dense_1": "ds s",
        "MixerBlock_*/LayerNorm_1": "c",
        "MixerBlock_*/channel_mixing/Dense_0": "c dc",
        "MixerBlock_*/channel_mixing/Dense_1": "dc c",
        "pre_head_layer_norm": "c",
        "head": "c k",
    }
)
# What timm's mixer_* call what: their module, ours; {} is the number of a block.
TIMM = (
    ("stem.proj", "stem"),
    ("blocks.{}.norm1", "MixerBlock_{}/LayerNorm_0"),
    ("blocks.{}.mlp_tokens.fc1", "MixerBlock_{}/token_mixing/Dense_0"),
    ("blocks.{}.mlp_tokens.fc2", "MixerBlock_{}/token_mixing/Dense_1"),
    ("blocks.{}.norm2", "MixerBlock_{}/LayerNorm_1"),
    ("blocks.{}.mlp_channels.fc1", "MixerBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.mlp_channels.fc2", "MixerBlock_{}/channel_mixing/Dense_1"),
    ("norm", "pre_head_layer_norm"),
    ("head", "head"),
)
