"""S2-MLP (Yu et al. 2021, arXiv 2106.07477): hidden units that see the token beside.

An image becomes a map X of h by w tokens (patches) with C channels, which is
normalised. A layer is an MLP across channels whose hidden units are shifted (see
`moves.shift4`): a quarter of them sees the token above, and a quarter each those below,
on the left and on the right. Then it is an MLP in every token. Norms come after the
branches:

    U = X + Norm(W2 shift4(gelu(W1 X)))                              W1, W2 (C, C)
    Y = U + Norm(W4 gelu(W3 U))                        W3 (D_C, C), W4 (C, D_C)

After the last layer: the mean over tokens and a linear head, without another norm. In
the "wide" model Norm is LayerNorm, in the "deep" one it is ResMLP's Aff, a scale and a
shift for each channel. Here X is (s, n, c), tokens first: see `layers`.

No parameter belongs to a token: a model takes images of any size that patches tile.

The paper is all that there is. It does not say whether the deep model keeps ResMLP's
layer scale (not here: an Aff after its branch could only do the same again), nor the
initial values (ResMLP's here), nor the epsilon of LayerNorm (1e-6 here), nor which of
an image's two axes the first half of the channels moves along (rows here: the other
choice renames channels).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, moves, trunk
from mlp_mixer.models.derivatives import GELUS, Dense, LayerNorm
from mlp_mixer.models.model import Model, Noise, Outputs, Run, axes, sizes
from mlp_mixer.models.resmlp import Affine

NORMS: dict[str, Callable[..., nn.Module]] = {"layer": LayerNorm, "affine": Affine}


class ShiftMlp(nn.Module):
    """The MLP of token mixing: its hidden units are shifted over the grid (h, w)."""

    grid: tuple[int, int]
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        """Returns the output of the branch, before its norm."""
        dense = functools.partial(
            Dense, x.shape[-1], run=self.run, kernel_init=layers.NORMAL
        )
        gelu = known.pick("gelu", self.gelu, GELUS)
        y = gelu(checkpoint_name(dense(name="Dense_0")(x), layers.PRE_GELU))
        y = moves.shift4(y.reshape(*self.grid, *y.shape[1:])).reshape(y.shape)
        return dense(name="Dense_1")(y)


class S2MlpBlock(nn.Module):
    """One S2-MLP layer on a grid (h, w); its other attributes are those of `S2Mlp`."""

    grid: tuple[int, int]
    channels_mlp_dim: int
    norm: str
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        norm = known.pick("norm", self.norm, NORMS)
        token_mixing = ShiftMlp(self.grid, self.gelu, self.run, name="token_mixing")
        channel_mixing = layers.MlpBlock(
            self.channels_mlp_dim,
            gelu=self.gelu,
            run=self.run,
            kernel_init=layers.NORMAL,
            name="channel_mixing",
        )
        first, second = noise.branches(2)
        y = norm(name="token_norm")(token_mixing(x))
        x = x + layers.scale_images(y, first.keep)
        y = norm(name="channel_norm")(channel_mixing(x))
        return x + layers.scale_images(y, second.keep)


class S2Mlp(Model):
    """S2-MLP, for images of any size that patches tile.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      norm: "layer" (the wide model) or "affine" (the deep one).
      gelu: "exact" or "tanh"; the paper does not say which.
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    channels_mlp_dim: int
    norm: str = "layer"
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        ph, pw = self.patch_size
        norm = known.pick("norm", self.norm, NORMS)
        stem = layers.PatchEmbed(
            self.hidden_dim,
            self.patch_size,
            self.run,
            kernel_init=layers.NORMAL,
            name="stem",
        )
        block = functools.partial(
            S2MlpBlock,
            grid=(image.shape[1] // ph, image.shape[2] // pw),
            channels_mlp_dim=self.channels_mlp_dim,
            norm=self.norm,
            gelu=self.gelu,
            run=self.run,
        )
        x = norm(name="stem_norm")(stem(image))
        y, states = trunk.row(
            self,
            block,
            x,
            name="S2MlpBlock",
            train=train,
        )
        return layers.readout(
            y, [x, *states], self.num_classes, kernel_init=layers.NORMAL
        )


MODEL = S2Mlp
# Patch, layers, C, D_C, norm.
_ROWS = {
    "s2mlp_wide": ((16, 16), 12, 768, 3072, "layer"),
    "s2mlp_deep": ((16, 16), 36, 384, 1536, "affine"),
}
SIZES = {name: sizes(S2Mlp, row) for name, row in _ROWS.items()}
TOP_1 = {"s2mlp_wide": 80.0, "s2mlp_deep": 80.7}
CHECKED = "paper only: counts, the shift's law"


_LAYER = axes(
    {
        "stem": "ph pw rgb c",
        "stem_norm": "c",
        "S2MlpBlock_*/token_mixing/Dense_0": "c c",
        "S2MlpBlock_*/token_mixing/Dense_1": "c c",
        "S2MlpBlock_*/token_norm": "c",
        "S2MlpBlock_*/channel_mixing/Dense_0": "c dc",
        "S2MlpBlock_*/channel_mixing/Dense_1": "dc c",
        "S2MlpBlock_*/channel_norm": "c",
        "head": "c k",
    }
)


def _with_aff(path: str) -> str:
    """The path of a norm's array where the norms are Aff."""
    return path.replace("norm/scale", "norm/alpha").replace("norm/bias", "norm/beta")


FORM = "norm"
AXES = {
    "layer": _LAYER,
    "affine": {_with_aff(path): letters for path, letters in _LAYER.items()},
}
