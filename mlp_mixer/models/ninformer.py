"""NiNformer (Abdullah and Aydin 2024, arXiv 2403.02411).

An image becomes a table X of S tokens (patches) by C channels. In ViT's block a whole
Mixer block, a network in the network, takes the place of attention: what it makes of
the table is multiplied by a linear map of each token.

    Y  = LayerNorm(X)
    U  = X + (Y P + p) ⊙ Mixer(Y)                         P (C, C)
    X' = U + W2 gelu(W1 LayerNorm(U) + b1) + b2           for each token; hidden size D

Mixer is MLP-Mixer's block (mixer.py) with its own two LayerNorms and its own residual
connections. Both LayerNorms that are written here are one, with the same parameters.
All four Linears of hidden size D, and P, have biases; D is the same for tokens, for
channels and outside. After the last block: the mean over tokens, a linear head; no
LayerNorm. Here X is (s, n, c), tokens first, for all n images at once: see `layers`.

Details and initial values (torch's: uniform in ±1/√fan_in) are those of the authors'
code (ninformer.py and train.py in Abdullah-88/NiNformer), whose models come without
weights. Their dropout of 0.5, after each GELU and each second Linear, is a part of the
size. They have no stochastic depth; here it drops whole branches of the outer block.
"""

import functools

import flax.linen as nn
from jaxtyping import Array, Float

from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import Dense, LayerNorm
from mlp_mixer.models.mixer import MixerBlock
from mlp_mixer.models.model import Model, Noise, Outputs, Run, axes, sizes


class NiNBlock(nn.Module):
    """One block; its attributes are those of `NiNformer`."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout: float
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        mlp = functools.partial(
            layers.MlpBlock,
            gelu=self.gelu,
            dropout=self.dropout,
            run=self.run,
            torch_init=True,
        )
        norm = LayerNorm(1e-5, name="LayerNorm_0")
        channel_mixing = functools.partial(mlp, self.channels_mlp_dim)
        mixer = MixerBlock(
            functools.partial(mlp, self.tokens_mlp_dim, axis=0),
            channel_mixing,
            epsilon=1e-5,
            name="MixerBlock_0",
        )
        gate = Dense(x.shape[-1], run=self.run, torch_init=True, name="gate")
        first, second = noise.branches(2)
        y = norm(x)
        y = gate(y) * mixer(y, Noise(rng=first.rng))
        x = x + layers.scale_images(y, first.keep)
        return x + channel_mixing(name="channel_mixing")(norm(x), second)


class NiNformer(Model):
    """NiNformer. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of blocks.
      hidden_dim: number of channels C.
      tokens_mlp_dim: number of hidden units of token mixing, D.
      channels_mlp_dim: number of hidden units of both MLPs of channels, D.
      dropout: rate in all MLPs.
      gelu: "exact" (the authors' models) or "tanh".
      stochastic_depth: every block's rate; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout: float = 0.0
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        ph, pw = self.patch_size
        uniform = layers.uniform((ph * pw * 3) ** -0.5)
        stem = layers.PatchEmbed(
            self.hidden_dim,
            self.patch_size,
            self.run,
            kernel_init=uniform,
            bias_init=uniform,
            name="stem",
        )
        block = functools.partial(
            NiNBlock,
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            dropout=self.dropout,
            gelu=self.gelu,
            run=self.run,
        )
        x = stem(image)
        y, states = trunk.row(
            self,
            block,
            x,
            name="NiNBlock",
            train=train,
        )
        return layers.readout(
            y,
            [x, *states],
            self.num_classes,
            kernel_init=layers.uniform(self.hidden_dim**-0.5),
            bias_init=layers.uniform(self.hidden_dim**-0.5),
        )


MODEL = NiNformer
# The authors' CIFAR-10 and CIFAR-100: patch, blocks, C, D twice, dropout.
_ROWS = {"ninformer_cifar": ((4, 4), 4, 256, 512, 512, 0.5)}
SIZES = {name: sizes(NiNformer, row) for name, row in _ROWS.items()}
COUNTED = {"ninformer_cifar": (32, 10)}
# The paper has no ImageNet.
TOP_1: dict[str, float] = {}
CHECKED = "counts; logits of the authors' code"
AXES = axes(
    {
        "stem": "ph pw rgb c",
        "NiNBlock_*/LayerNorm_0": "c",
        "NiNBlock_*/gate": "c c",
        "NiNBlock_*/MixerBlock_0/LayerNorm_0": "c",
        "NiNBlock_*/MixerBlock_0/token_mixing/Dense_0": "s ds",
        "NiNBlock_*/MixerBlock_0/token_mixing/Dense_1": "ds s",
        "NiNBlock_*/MixerBlock_0/LayerNorm_1": "c",
        "NiNBlock_*/MixerBlock_0/channel_mixing/Dense_0": "c dc",
        "NiNBlock_*/MixerBlock_0/channel_mixing/Dense_1": "dc c",
        "NiNBlock_*/channel_mixing/Dense_0": "c dc",
        "NiNBlock_*/channel_mixing/Dense_1": "dc c",
        "head": "c k",
    }
)
# The names in the authors' state dicts, ours; {} is the number of a block.
AUTHORS = (
    ("patcher", "stem"),
    ("model.{}.norm", "NiNBlock_{}/LayerNorm_0"),
    ("model.{}.mgu.proj", "NiNBlock_{}/gate"),
    ("model.{}.mgu.Mixer.token_mix.0", "NiNBlock_{}/MixerBlock_0/LayerNorm_0"),
    (
        "model.{}.mgu.Mixer.token_mix.2.net.0",
        "NiNBlock_{}/MixerBlock_0/token_mixing/Dense_0",
    ),
    (
        "model.{}.mgu.Mixer.token_mix.2.net.3",
        "NiNBlock_{}/MixerBlock_0/token_mixing/Dense_1",
    ),
    ("model.{}.mgu.Mixer.channel_mix.0", "NiNBlock_{}/MixerBlock_0/LayerNorm_1"),
    (
        "model.{}.mgu.Mixer.channel_mix.1.net.0",
        "NiNBlock_{}/MixerBlock_0/channel_mixing/Dense_0",
    ),
    (
        "model.{}.mgu.Mixer.channel_mix.1.net.3",
        "NiNBlock_{}/MixerBlock_0/channel_mixing/Dense_1",
    ),
    ("model.{}.ffn.net.0", "NiNBlock_{}/channel_mixing/Dense_0"),
    ("model.{}.ffn.net.3", "NiNBlock_{}/channel_mixing/Dense_1"),
    ("classifier", "head"),
)
