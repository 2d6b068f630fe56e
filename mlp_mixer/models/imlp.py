"""I-MLP (Wu et al. 2024, arXiv 2410.09655): an MLP between itself and a prior.

Unroll a Mixer: a map of its tokens, or of its channels, becomes one matrix over all S·C
units of an image, most of it zeros and copies. An MLP whose matrices have these shapes,
every weight free, takes its weights from in between, for one α in [0, 1]:

    W_eff = (1 − α) W + α unroll(prior)

Only W is trained. The prior, a Mixer that was trained before, is frozen: it is the
collection `prior`, under the Mixer's names (but for the blocks'), where
`config.init_from` puts it. α = 1 is the prior, and α = 0 a plain MLP, which needs none.
For X (S, C) and units H, (D_S, C) of token mixing or (S, D_C) of channel mixing:

    H[t, e] = Σ W[s, c, t, e] X[s, c] + b[t, e]

    unroll(A)[s, c, t, e] = A[s, t] δ[c, e]      of tokens: Aᵀ ⊗ I over the units
    unroll(B)[s, c, t, e] = δ[s, t] B[c, e]      of channels: I ⊗ Bᵀ

No such matrix is made. A layer is linear in its weights, so it computes (1 − α) times
what W computes plus α times what the prior computes. The MLP's own kernels are large,
(S·C)(D_S·C) and (S·C)(S·D_C) weights: more than 2048 units are refused, and so is a
change of the resolution.

The paper is known here by its abstract: train a prior, a CNN or a Mixer, fix it,
interpolate. What follows is ours. The prior is a Mixer. Stem and head are unrolled too,
the head with the mean over tokens before it. Biases are interpolated as kernels are. A
LayerNorm normalises what the prior's does, the channels of each token, or α = 1 would
not be the prior; its scale and bias, one for each unit, are interpolated. α is
constant. W begins as Flax's Dense does. The paper's schedule of α, widths and results
are not known.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from flax.typing import Initializer
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, trunk
from mlp_mixer.models.derivatives import (
    GELUS,
    Dense,
    LayerNorm,
    at_least_float32,
    layer_norm,
)
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.models.model import Model, Noise, Outputs, Run, sizes

MOST_UNITS = 2048
PRIOR = "prior"  # the collection


class Interpolated(nn.Module):
    """Base of the layers: own weights in `params`, the prior's in `prior`.

    Attributes:
      alpha: weight α of the prior.
      run: how it is computed.
    """

    alpha: float
    run: Run

    def between(self, own: Array, layer: nn.Module, x: Array) -> Array:
        """Returns (1 − α) own + α layer(x).

        Args:
          own: what the own weights compute.
          layer: the prior's layer, bound to no parent.
          x: its input.
        """
        if self.is_initializing():
            fresh = layer.init(self.make_rng("params"), x)["params"]
            for name, value in fresh.items():
                self.put_variable(PRIOR, name, value)
        frozen = lax.stop_gradient(self.variables[PRIOR])
        prior: Any = layer.apply({"params": frozen}, x)
        return (1 - self.alpha) * own + self.alpha * prior


class UnitDense(Interpolated):
    """A linear map of all units; the prior's maps the first or the last axis.

    Attributes:
      features: size of the axis afterwards.
      axis: 0 for tokens, -1 for channels.
    """

    features: int
    axis: int

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "t n e"]:
        """Returns the hidden units, or those of the state, of each image."""
        s, _, c = x.shape
        t, e = (self.features, c) if self.axis == 0 else (s, self.features)
        kernel = self.param("kernel", _lecun_normal(2), (s, c, t, e), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (t, e), jnp.float32)
        layer = Dense(self.features, self.axis, self.run, parent=None)
        z, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.run.dtype)
        return self.between(_map_units(_units(z), kernel, bias), layer, x)


class UnitStem(Interpolated):
    """A linear map of all pixels; the prior's is that of each patch.

    Attributes:
      features: number of channels of a token.
      patch_size: (height, width) of a patch in pixels.
    """

    features: int
    patch_size: tuple[int, int]

    @nn.compact
    def __call__(self, image: Float[Array, "n h w 3"]) -> Float[Array, "s n c"]:
        """Returns the first state."""
        (_, h, w, rgb), (ph, pw) = image.shape, self.patch_size
        s, c = (h // ph) * (w // pw), self.features
        shape = (s, ph, pw, rgb, s, c)
        kernel = self.param("kernel", _lecun_normal(4), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (s, c), jnp.float32)
        layer = layers.PatchEmbed(c, self.patch_size, self.run, parent=None)
        z, kernel, bias = nn.dtypes.promote_dtype(
            image, kernel, bias, dtype=self.run.dtype
        )
        z = rearrange(z, "n (gh ph) (gw pw) x -> n (gh gw ph pw x)", ph=ph, pw=pw)
        return self.between(_map_units(z, kernel, bias), layer, image)


class UnitNorm(Interpolated):
    """LayerNorm over the channels of each token, with a scale and a bias per unit."""

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        """Returns `x` normalised."""
        shape = x.shape[::2]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        z = layer_norm(x, jnp.ones(shape[-1:]), jnp.zeros(shape[-1:]))
        own = z * jnp.expand_dims(scale, 1) + jnp.expand_dims(bias, 1)
        return self.between(own.astype(x.dtype), LayerNorm(parent=None), x)


class UnitHead(Interpolated):
    """Logits of all units; the prior's are of the mean over tokens.

    Attributes:
      num_classes: number of classes.
    """

    num_classes: int

    @nn.compact
    def __call__(self, units: Float[Array, "n u"], y: Array) -> Float[Array, "n k"]:
        """Returns the logits of `units`, and of `y` (s, n, c), which has the same."""
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
        shape = (units.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
        own = units @ kernel + jnp.expand_dims(bias, 0)
        mean = y.mean(0, dtype=units.dtype)
        return self.between(own, dense(self.num_classes, parent=None), mean)


def _units(x: Float[Array, "s n c"]) -> Float[Array, "n u"]:
    return rearrange(x, "s n c -> n (s c)")


def _map_units(
    x: Float[Array, "n u"], kernel: Float[Array, "... t e"], bias: Float[Array, "t e"]
) -> Float[Array, "t n e"]:
    """One product of matrices: twice as fast on a CPU as over the axes as they are."""
    t, e = bias.shape
    y = x @ kernel.reshape(x.shape[-1], t * e)
    return rearrange(y, "n (t e) -> t n e", t=t) + jnp.expand_dims(bias, 1)


def _lecun_normal(inputs: int) -> Initializer:
    """Flax's initial values of a kernel whose first so many axes are its inputs."""
    return lambda key, shape, dtype: nn.initializers.lecun_normal()(
        key, (math.prod(shape[:inputs]), math.prod(shape[inputs:])), dtype
    ).reshape(shape)


class UnitMlp(nn.Module):
    """The MLP in place of the prior's token mixing or channel mixing.

    Attributes:
      mlp_dim: number of hidden units of the prior's MLP.
      axis: 0 for token mixing, -1 for channel mixing.
      gelu: "tanh" or "exact".
      dense: makes a `UnitDense`.
    """

    mlp_dim: int
    axis: int
    gelu: str
    dense: Callable[..., UnitDense]

    @nn.compact
    def __call__(self, y: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the output of the branch, with `noise` applied."""
        dense = functools.partial(self.dense, axis=self.axis)
        gelu = known.pick("gelu", self.gelu, GELUS)
        h = dense(features=self.mlp_dim, name="Dense_0")(y)
        h = gelu(checkpoint_name(h, layers.PRE_GELU))
        y = dense(features=y.shape[self.axis], name="Dense_1")(h)
        return layers.scale_images(y, noise.keep)


class ImlpBlock(nn.Module):
    """One layer; its attributes are those of `Imlp`."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str
    alpha: float
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        norm = functools.partial(UnitNorm, self.alpha, self.run)
        dense = functools.partial(UnitDense, self.alpha, self.run)
        mlp = functools.partial(UnitMlp, gelu=self.gelu, dense=dense)
        token_mixing = mlp(self.tokens_mlp_dim, 0, name="token_mixing")
        channel_mixing = mlp(self.channels_mlp_dim, -1, name="channel_mixing")
        first, second = noise.branches(2)
        x = x + token_mixing(norm(name="LayerNorm_0")(x), first)
        return x + channel_mixing(norm(name="LayerNorm_1")(x), second)


class Imlp(Model):
    """I-MLP. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of the prior's patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of the prior's channels C.
      tokens_mlp_dim: number of hidden units of the prior's token mixing, D_S.
      channels_mlp_dim: number of hidden units of the prior's channel mixing, D_C.
      alpha: weight α of the prior; 0 is the MLP alone, 1 the prior alone.
      gelu: "tanh" or "exact", as the prior's.
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    alpha: float = 0.0
    gelu: str = "tanh"
    stochastic_depth: float = 0.0

    @property
    def prior(self) -> MlpMixer:
        """The Mixer whose parameters are the prior."""
        fields = {name: getattr(self, name) for name in _SIZES}
        classes = self.num_classes
        return MlpMixer(**fields, gelu=self.gelu, num_classes=classes, run=self.run)

    def with_prior(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables that hold a Mixer's parameters as the prior."""
        named = {k.replace("MixerBlock", "ImlpBlock"): x for k, x in params.items()}
        return {PRIOR: named}

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless patches tile the image and give few enough units."""
        super().check_size(image_size)
        tokens = math.prod(
            side // patch
            for side, patch in zip(image_size, self.patch_size, strict=True)
        )
        if (units := tokens * self.hidden_dim) > MOST_UNITS:
            hidden = units * tokens * self.channels_mlp_dim
            raise ValueError(
                f"{tokens} tokens of hidden_dim {self.hidden_dim} are {units:,} units; "
                f"expected at most {MOST_UNITS:,}, since each is connected with every "
                f"other (a kernel of channel mixing: {hidden:,} weights). Try larger "
                "patches, a smaller image, or a smaller hidden_dim."
            )

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, s·c), all
        units.
        """
        self.check_image(image)
        stem = UnitStem(
            self.alpha, self.run, self.hidden_dim, self.patch_size, name="stem"
        )
        block = functools.partial(
            ImlpBlock,
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            gelu=self.gelu,
            alpha=self.alpha,
            run=self.run,
        )
        x = stem(image)
        y, states = trunk.row(
            self,
            block,
            x,
            name="ImlpBlock",
            train=train,
        )
        y = UnitNorm(self.alpha, self.run, name="pre_head_layer_norm")(y)
        out = layers.named_states([x, *states])
        units = _units(y.astype(at_least_float32(y.dtype)))
        out["pre_logits"] = units
        if self.num_classes is None:
            return units, out
        head = UnitHead(self.alpha, self.run, self.num_classes, name="head")
        return head(units, y), out


MODEL = Imlp
# The prior's sizes.
_SIZES = (
    *("patch_size", "num_blocks", "hidden_dim"),
    *("tokens_mlp_dim", "channels_mlp_dim"),
)
# Ours, for images of 32x32: the paper's are not known. Patch, layers, C, D_S, D_C.
_ROWS = {"imlp_c32": ((4, 4), 4, 32, 16, 32)}
SIZES = {name: sizes(Imlp, row) for name, row in _ROWS.items()}
_BLOCK = {
    "LayerNorm_0": "s c",
    "token_mixing/Dense_0": "s c ds c",
    "token_mixing/Dense_1": "ds c s c",
    "LayerNorm_1": "s c",
    "channel_mixing/Dense_0": "s c s dc",
    "channel_mixing/Dense_1": "s dc s c",
}


def _axes(path: str, letters: str) -> dict[str, str]:
    """Entries of `AXES` of a layer: a bias has the units that come out."""
    units = " ".join(letters.split()[-2:])
    array = "scale" if letters == units else "kernel"
    return {f"{path}/{array}": letters, f"{path}/bias": units}


AXES = {
    **_axes("stem", "s ph pw rgb s c"),
    **{
        name: letters
        for path, its in _BLOCK.items()
        for name, letters in _axes(f"ImlpBlock_*/{path}", its).items()
    },
    **_axes("pre_head_layer_norm", "s c"),
    "head/kernel": "u k",
    "head/bias": "k",
}
COUNTED = {"imlp_c32": (32, 10)}
# Why `grow` and `interpolate` have nothing to offer.
CANNOT_RESIZE = (
    "every unit has weights of its own to every other, in the head too, and the prior "
    "is of the same grid. A prior can be resized, and an MLP begin anew from it"
)
TOP_1: dict[str, float] = {}  # not known
CHECKED = "its ends α = 0 and 1"
