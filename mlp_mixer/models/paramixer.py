"""ParaMixer (Karakida, Ota and Taki 2024, arXiv 2406.12220, section 5).

An image becomes a table X of S tokens (patches) by C channels. Seen as one step of an
associative memory of three layers, a block normalises the whole table and mixes tokens
and channels of the same result, in parallel:

    Y  = LayerNorm(X)                  one mean, one variance; γ and β are (S, C)
    X' = X + Tok(Y) + Chan(Y)          Tok for each column, Chan for each row of Y

Tok and Chan are MLPs without biases, of hidden sizes D_S and D_C. The field `mlp` says
which; for a row or a column u:

    para    V gelu(W u)                W (d, i), V (i, d)
    sym     Wᵀ gelu(W u)               as an associative memory has it
    asym    Wᵀ gelu(W u) + V gelu(W u)

asym adds λ Σ ‖V‖² over all V to the loss (section 6.2): from sym, λ → ∞, to as free as
para, λ = 0. The fourth, vanilla, is para's MLPs in MLP-Mixer's order, with a LayerNorm
for each: X' = X + Tok(LayerNorm(X)), then X' + Chan(LayerNorm(X')). It is no MLP-Mixer:
it has no biases, and its LayerNorms are these. A block may be applied `n_iter` times.

After the last block: LayerNorm over channels, the mean over tokens, a linear head. Here
X is (s, n, c), tokens first, for all n images at once: see `layers`.

Details and initial values are those of the authors' code (models/ and util/utils.py in
Toshihiro-Ota/paramixer), whose models come without weights. There and here the flow's
energy is exact for a scalar γ alone; training has one for each entry.

para and asym have the same arrays, whatever `n_iter`: where a file holds arrays alone,
`mlp="asym"` and `n_iter` have to be said.

At another resolution (`pretrained.resize`) the mean and the variance are of more
tokens, so a grown model is not the old one on every part of the image; and a tied W
cannot keep both its products when it is interpolated: its output shrinks with the
number of tokens. Both are starts for fine-tuning.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, mixer, trunk
from mlp_mixer.models.derivatives import GELUS, LayerNorm, linear
from mlp_mixer.models.model import Model, Noise, Outputs, Run

XAVIER = nn.initializers.xavier_uniform()


class Matrix(nn.Module):
    """A `kernel` that is multiplied by elsewhere; shape (in, out)."""

    shape: tuple[int, int]
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "i o"]:
        """Returns it, in float32."""
        kernel = self.param("kernel", self.kernel_init, self.shape, jnp.float32)
        # Parameters may come from a file, as NumPy arrays.
        return jnp.asarray(kernel)


class TiedMlp(nn.Module):
    """The MLPs of sym and asym; Dense_0 is Wᵀ, Dense_1 Vᵀ, as matrices (in, out).

    Attributes:
      mlp_dim: number of hidden units d.
      axis: 0 mixes tokens, -1 mixes channels.
      free: whether there is a V.
      gelu: "exact" or "tanh".
      run: the products' dtype and form.
    """

    mlp_dim: int
    axis: int = -1
    free: bool = False
    gelu: str = "exact"
    run: Run = Run()

    @nn.compact
    def __call__(
        self, y: Float[Array, "s n c"], noise: Noise = Noise()
    ) -> Float[Array, "s n c"]:
        """Returns the output of the branch, with `noise` applied."""
        shape = (y.shape[self.axis], self.mlp_dim)
        inward = Matrix(shape, XAVIER, name="Dense_0")()
        outward = inward.T
        if self.free:  # one product for both terms
            outward = outward + Matrix(shape[::-1], XAVIER, name="Dense_1")()
        gelu = known.pick("gelu", self.gelu, GELUS)
        h = linear(y, inward, None, self.axis, self.run)
        h = gelu(checkpoint_name(h, layers.PRE_GELU))
        y = linear(h, outward, None, self.axis, self.run)
        return layers.scale_images(y, noise.keep)


PLAIN = functools.partial(layers.MlpBlock, use_bias=False, kernel_init=XAVIER)
MLPS: dict[str, Callable[..., nn.Module]] = {
    "para": PLAIN,
    "sym": TiedMlp,
    "asym": functools.partial(TiedMlp, free=True),
    "vanilla": PLAIN,
}


class ParaMixerBlock(nn.Module):
    """One block, in parallel or in vanilla's order; attributes are `ParaMixer`'s."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    mlp: str
    n_iter: int
    gelu: str
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches, each time anew."""
        mlp = functools.partial(
            known.pick("mlp", self.mlp, MLPS), gelu=self.gelu, run=self.run
        )
        token_mixing = mlp(self.tokens_mlp_dim, axis=0, name="token_mixing")
        channel_mixing = mlp(self.channels_mlp_dim, name="channel_mixing")
        norm = layers.TokenChannelNorm(name="LayerNorm_0")
        serial = self.mlp == "vanilla"
        second_norm = layers.TokenChannelNorm(name="LayerNorm_1") if serial else None
        branches = noise.branches(2 * self.n_iter)
        for first, second in zip(branches[::2], branches[1::2], strict=True):
            if second_norm is None:
                y = norm(x)
                x = x + token_mixing(y, first) + channel_mixing(y, second)
            else:
                x = x + token_mixing(norm(x), first)
                x = x + channel_mixing(second_norm(x), second)
        return x


class ParaMixer(Model):
    """ParaMixer and its relatives. The image given to `init` says how many tokens.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of blocks.
      hidden_dim: number of channels C.
      tokens_mlp_dim: number of hidden units of token mixing, D_S.
      channels_mlp_dim: number of hidden units of channel mixing, D_C.
      mlp: "para", "sym", "asym" or "vanilla".
      n_iter: how often each block is applied.
      penalty: λ; training adds λ Σ ‖V‖² to the loss of an asym.
      gelu: "exact" (the authors' models) or "tanh".
      stochastic_depth: every branch's rate, each time it is computed; kept branches are
        divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    mlp: str = "para"
    n_iter: int = 1
    penalty: float = 0.0
    gelu: str = "exact"
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c); in training
        also the scalar `penalty`, unless λ is 0.
        """
        self.check_image(image)
        if self.penalty and self.mlp != "asym":
            raise ValueError(
                f"penalty is {self.penalty} and mlp {self.mlp!r}, which has no V to "
                'penalise; try mlp="asym", or a penalty of 0.'
            )
        stem = layers.PatchEmbed(
            self.hidden_dim, self.patch_size, self.run, name="stem"
        )
        block = functools.partial(
            ParaMixerBlock,
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            mlp=self.mlp,
            n_iter=self.n_iter,
            gelu=self.gelu,
            run=self.run,
        )
        x = stem(image)
        y, states = trunk.row(
            self,
            block,
            x,
            name="ParaMixerBlock",
            train=train,
            branches=2 * self.n_iter,
        )
        y = LayerNorm(name="pre_head_layer_norm")(y)
        logits, out = layers.readout(y, [x, *states], self.num_classes)
        if train and self.penalty:
            out["penalty"] = self.penalty * self._asymmetry()
        return logits, out

    def _asymmetry(self) -> Float[Array, ""]:
        """Σ ‖V‖² over token and channel mixing of all blocks.

        Of parameters as they are cut, where they are: nothing is gathered for a sum.
        """
        params = self.variables.get(trunk.CUT, self.variables["params"])
        blocks = (params[f"ParaMixerBlock_{i}"] for i in range(self.num_blocks))
        squares = [
            jnp.square(block[mlp]["Dense_1"]["kernel"]).sum()
            for block in blocks
            for mlp in ("token_mixing", "channel_mixing")
        ]
        return functools.reduce(jnp.add, squares)


MODEL = ParaMixer
# Its sizes are MLP-Mixer's.
_MIXERS = {size: mixer.SIZES[f"mixer_{size}"] for size in ("s32", "s16", "b16", "l16")}


def _sizes(model: str, mlp: str) -> dict[str, dict[str, Any]]:
    """Those of one form; of S/16 also those that repeat each block."""
    once = {f"{model}_{k}": {**v, "mlp": mlp, "n_iter": 1} for k, v in _MIXERS.items()}
    s16 = once[f"{model}_s16"]
    return once | {f"{model}_s16_ni{n}": s16 | {"n_iter": n} for n in (2, 3, 4)}


SIZES = {
    **_sizes("paramixer", "para"),
    **_sizes("symmixer", "sym"),
    "asymmixer_s16": {**_MIXERS["s16"], "mlp": "asym", "n_iter": 1},
    **_sizes("vanillamixer", "vanilla"),
}
# The authors train on CIFAR-10 alone.
COUNTED = dict.fromkeys(SIZES, (224, 10))
TOP_1: dict[str, float] = {}
CHECKED = "counts; logits of the authors' code; energy never rises"

FORM = "mlp"
_OUTER = {
    "stem/kernel": "ph pw rgb c",
    "stem/bias": "c",
    "pre_head_layer_norm/scale": "c",
    "pre_head_layer_norm/bias": "c",
    "head/kernel": "c k",
    "head/bias": "k",
}
_NORM_0, _NORM_1 = (
    {f"ParaMixerBlock_*/LayerNorm_{i}/{leaf}": "s c" for leaf in ("scale", "bias")}
    for i in (0, 1)
)
_W, _V = (
    {
        f"ParaMixerBlock_*/token_mixing/Dense_{i}/kernel": tokens,
        f"ParaMixerBlock_*/channel_mixing/Dense_{i}/kernel": channels,
    }
    for i, (tokens, channels) in enumerate([("s ds", "c dc"), ("ds s", "dc c")])
)
AXES = {
    "para": {**_OUTER, **_NORM_0, **_W, **_V},
    "sym": {**_OUTER, **_NORM_0, **_W},
    "asym": {**_OUTER, **_NORM_0, **_W, **_V},
    "vanilla": {**_OUTER, **_NORM_0, **_NORM_1, **_W, **_V},
}
# The names in the authors' state dicts, ours. There sym's one matrix is called fc2.
_AUTHORS = (
    ("stem.proj", "stem"),
    ("blocks.{}.mlp_tokens.fc1", "ParaMixerBlock_{}/token_mixing/Dense_0"),
    ("blocks.{}.mlp_tokens.fc2", "ParaMixerBlock_{}/token_mixing/Dense_1"),
    ("blocks.{}.mlp_channels.fc1", "ParaMixerBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.mlp_channels.fc2", "ParaMixerBlock_{}/channel_mixing/Dense_1"),
    ("norm", "pre_head_layer_norm"),
    ("head", "head"),
)
_AUTHORS_PARALLEL = (*_AUTHORS, ("blocks.{}.norm", "ParaMixerBlock_{}/LayerNorm_0"))
AUTHORS = {
    "para": _AUTHORS_PARALLEL,
    "sym": (
        ("stem.proj", "stem"),
        ("blocks.{}.norm", "ParaMixerBlock_{}/LayerNorm_0"),
        ("blocks.{}.mlp_tokens.fc2", "ParaMixerBlock_{}/token_mixing/Dense_0"),
        ("blocks.{}.mlp_channels.fc2", "ParaMixerBlock_{}/channel_mixing/Dense_0"),
        ("norm", "pre_head_layer_norm"),
        ("head", "head"),
    ),
    "asym": _AUTHORS_PARALLEL,
    "vanilla": (
        *_AUTHORS,
        ("blocks.{}.norm1", "ParaMixerBlock_{}/LayerNorm_0"),
        ("blocks.{}.norm2", "ParaMixerBlock_{}/LayerNorm_1"),
    ),
}
