"""CCS (Yu et al. 2021, arXiv 2106.14882): circulant channel-specific token mixing.

Mixer or ResMLP with another map across tokens, and no other change: one circulant
matrix for each of G groups of channels, without bias and without hidden units. With S
tokens in raster order, and y the normalised state,

    token_mixing(y)[i, c] = Σⱼ w[c mod G, j] y[(i + j) mod S, c]                w (G, S)

which wraps along the sequence, not along rows and columns. The paper's text says that a
group's channels lie together, its listing that they lie G apart, as here; the two
differ by the order of channels. See `mixer`, `resmlp` and `moves.circulant`.

The paper is all that there is. It gives neither the rate of stochastic depth nor the
form of GELU (the exact one here, as in the code of DeiT, whose recipe it trains with).
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, mixer, moves, resmlp, trunk
from mlp_mixer.models.derivatives import LayerNorm
from mlp_mixer.models.model import Model, Noise, Outputs, Run, sizes


class Circulant(nn.Module):
    """The map across tokens: a circulant matrix for each of `groups` of channels.

    `kernel` (g, s) has the matrices' first rows.
    """

    groups: int
    run: Run

    @nn.compact
    def __call__(
        self, y: Float[Array, "s n c"], noise: Noise = Noise()
    ) -> Float[Array, "s n c"]:
        """Returns the output of the branch, with `noise` applied."""
        s = y.shape[0]
        init = layers.uniform(s**-0.5)  # as torch's Linear(S, G) begins
        kernel = self.param("kernel", init, (self.groups, s), jnp.float32)
        y, kernel = nn.dtypes.promote_dtype(y, kernel, dtype=self.run.dtype)
        return layers.scale_images(moves.circulant(y, kernel), noise.keep)


class Base(NamedTuple):
    """The parts of the model whose token mixing is replaced."""

    stem: nn.Module
    block_name: str
    block: Callable[..., nn.Module]
    norm: nn.Module
    head_init: Initializer


class Ccs(Model):
    """Mixer or ResMLP with circulant token mixing. Tokens: of the image at `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      base: "mixer" or "resmlp": the model whose token mixing is replaced.
      groups: number of groups of channels, G, a divisor of C.
      layer_scale: initial value of the scales of ResMLP's branches; Mixer has none.
      gelu: "exact" or "tanh".
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    channels_mlp_dim: int
    base: str
    groups: int = 8
    layer_scale: float = 0.1
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        self.check_image(image)
        known.require("base", self.base, AXES)
        if self.hidden_dim % self.groups:
            raise ValueError(
                f"groups is {self.groups}, which does not divide hidden_dim "
                f"{self.hidden_dim}; try {math.gcd(self.groups, self.hidden_dim)}."
            )
        base = self._base()
        x = base.stem(image)
        y, states = trunk.row(
            self,
            base.block,
            x,
            name=base.block_name,
            train=train,
        )
        return layers.readout(
            base.norm(y), [x, *states], self.num_classes, kernel_init=base.head_init
        )

    def _base(self) -> Base:
        token_mixing = functools.partial(Circulant, self.groups, self.run)
        if self.base == "mixer":
            mlp = functools.partial(
                layers.MlpBlock, self.channels_mlp_dim, gelu=self.gelu, run=self.run
            )
            return Base(
                layers.PatchEmbed(
                    self.hidden_dim, self.patch_size, self.run, name="stem"
                ),
                "MixerBlock",
                functools.partial(mixer.MixerBlock, token_mixing, mlp),
                LayerNorm(name="pre_head_layer_norm"),
                nn.initializers.zeros,
            )
        return Base(
            resmlp.stem(self.hidden_dim, self.patch_size, self.run),
            "ResMlpBlock",
            functools.partial(
                resmlp.ResMlpBlock,
                token_mixing,
                channels_mlp_dim=self.channels_mlp_dim,
                layer_scale=self.layer_scale,
                gelu=self.gelu,
                run=self.run,
            ),
            resmlp.Affine(name="pre_head_affine"),
            layers.NORMAL,
        )


MODEL = Ccs
# Patch, layers, C, D_C, base, G, initial value of ResMLP's scales.
_ROWS = {
    "ccs_mixer_b16": ((16, 16), 12, 768, 3072, "mixer", 8),
    "ccs_resmlp_36": ((16, 16), 36, 384, 1536, "resmlp", 8, 1e-6),
    "ccs_resmlp_36_g1": ((16, 16), 36, 384, 1536, "resmlp", 1, 1e-6),
    "ccs_resmlp_36_g4": ((16, 16), 36, 384, 1536, "resmlp", 4, 1e-6),
    "ccs_resmlp_36_g384": ((16, 16), 36, 384, 1536, "resmlp", 384, 1e-6),
}
SIZES = {name: sizes(Ccs, row) for name, row in _ROWS.items()}
TOP_1 = {
    "ccs_mixer_b16": 79.8,
    "ccs_resmlp_36": 80.6,
    "ccs_resmlp_36_g1": 80.0,
    "ccs_resmlp_36_g4": 80.4,
    "ccs_resmlp_36_g384": 80.6,
}
CHECKED = "paper only: counts, three forms of the product"
FORM = "base"


def _axes(file: ModuleType, block: str) -> dict[str, str]:
    """Those of a base, with one array in the place of its token mixing's."""
    path = f"{block}_*/token_mixing"
    kernel = {f"{path}/kernel": "g s"}
    found: dict[str, str] = {}
    for name, letters in file.AXES.items():
        found |= kernel if name.startswith(path) else {name: letters}
    return found


AXES = {
    "mixer": _axes(mixer, "MixerBlock"),
    "resmlp": _axes(resmlp, "ResMlpBlock"),
}
# Why `grow` and `interpolate` have nothing to offer.
CANNOT_RESIZE = (
    "its token mixing has a weight for each distance along the sequence of tokens. On "
    "another grid, whose rows have another length, the same distance leads to another "
    "place; and the block-diagonal matrices of `grow` are not circulant"
)
