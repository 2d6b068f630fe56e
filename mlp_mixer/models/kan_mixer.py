"""KAN-Mixer (Cheon 2024, arXiv 2406.14916, section 3), and KAN-Mixers (2503.08939).

Mixer with layers of a Kolmogorov-Arnold network (KAN) in place of its MLPs. Such a
layer has a function of its own on each edge from an input i to an output o, and sums:

    KAN(x)_o = Σ_i W_b[i, o] silu(x_i) + Σ_i s[i, o] Σ_g c[g, i, o] B_g(x_i)

B_1 … B_8 are the cubic B-splines of `splines`. An image becomes a table X of S tokens
(patches) by C channels, each token by one KAN of its pixels. A layer, with LN over the
S·C numbers of a table, its scale and shift (S, C):

    U[:, i] = X[:, i] + KAN_2(KAN_1(LN(X)[:, i]))                           S → H → S
    Y[j, :] = U[j, :] + KAN_4(KAN_3(LN(U)[j, :]))                           C → H → C

After the last layer: LN, the mean over tokens, a KAN to the logits. No KAN has a bias.
Here X is (s, n, c), tokens first, for all n images at once: see `layers`.

This is the form "cheon". Details and initial values are those of the authors' code
(jmj2316/KAN-in-VIsion). A KAN's input cannot be scaled by its weights, so what the
authors' images are normalised by are the fields `mean` and `std`.

Form "canuto" is the architecture of KAN-Mixers (Canuto et al. 2025): LN over each
token's channels, a linear stem, and a linear head. Of its configuration (patch, sizes,
knots) only the paper's text knows, so none is in `SIZES`.

Neither form can be resized to another resolution: see `CANNOT_RESIZE`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import layers, splines, trunk
from mlp_mixer.models.derivatives import LayerNorm, at_least_float32, linear
from mlp_mixer.models.model import Model, Noise, Outputs, Run, axes, sizes

EPSILON = 1e-5  # of every LayerNorm
NORMS = {"cheon": layers.TokenChannelNorm, "canuto": LayerNorm}
LAST_NORMS = {"cheon": "pre_head_token_channel_norm", "canuto": "pre_head_layer_norm"}


def fitted_noise(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """Draws coefficients (g, …) whose splines are small noise at the inner knots.

    The least-squares fit of least norm to values within ±0.01, one for each knot from
    −1 to 1.
    """
    knots = np.linspace(-1, 1, splines.CELLS + 1, dtype=np.float32)
    fit = jnp.linalg.pinv(splines.bases(jnp.asarray(knots)).T)
    noise = jax.random.uniform(key, (len(knots), *shape[1:]), dtype, -0.01, 0.01)
    return jnp.tensordot(fit.astype(dtype), noise, 1)


class Kan(nn.Module):
    """One KAN layer along the first (tokens) or the last (channels) axis, no bias.

    Parameters in float32: `kernel` W_b and `scale` s (in, features), `spline` c
    (8, in, features).

    Attributes:
      features: number of outputs.
      axis: 0 for tokens, -1 for channels.
      run: the product's dtype and form.
      inputs: shape by which the parameters name an input, e.g. that of a patch; None:
        the length of the axis.
    """

    features: int
    axis: int = -1
    run: Run = Run()
    inputs: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `x` with `axis` mapped to `features` entries."""
        inputs, dtype = self.inputs or (x.shape[self.axis],), self.run.dtype
        shape = (*inputs, self.features)
        uniform = layers.uniform(math.prod(inputs) ** -0.5)
        kernel = self.param("kernel", uniform, shape, jnp.float32)
        scale = self.param("scale", uniform, shape, jnp.float32)
        shape = (splines.BASES, *shape)
        spline = self.param("spline", fitted_noise, shape, jnp.float32)
        kernel, spline = (jnp.asarray(w, dtype) for w in (kernel, scale[None] * spline))
        weights = jnp.concatenate([kernel[None], spline])
        weights = weights.reshape(len(weights), -1, self.features)
        # Rematerialisation keeps this, and not nine times as much.
        x = checkpoint_name(x, layers.PRE_GELU)
        exact = x.astype(at_least_float32(x.dtype))
        # Silu and the splines of an input lie so that no product transposes them.
        tokens, at = self.axis == 0, 0 if self.axis == 0 else -2
        silu = jnp.expand_dims(jax.nn.silu(exact), at)
        y = jnp.concatenate([silu, splines.bases(exact, at)], at).astype(dtype)
        if not self.run.flat:
            if tokens:
                return jnp.einsum("gio,gi...->o...", weights, y)
            return jnp.einsum("...gi,gio->...o", y, weights)
        shape = (-1, *x.shape[1:]) if tokens else (*x.shape[:-1], -1)
        weights = weights.reshape(-1, self.features)
        return linear(y.reshape(shape), weights, None, self.axis, self.run)


class KanMixerBlock(nn.Module):
    """One layer; its attributes are those of `KanMixer`."""

    form: str
    tokens_mlp_dim: int
    channels_mlp_dim: int
    run: Run

    @nn.compact
    def __call__(self, x: Float[Array, "s n c"], noise: Noise) -> Float[Array, "s n c"]:
        """Returns the next state; `noise` is that of both branches."""
        s, _, c = x.shape
        norm = NORMS[self.form]
        on_tokens = functools.partial(Kan, axis=0, run=self.run)
        on_channels = functools.partial(Kan, run=self.run)
        first, second = noise.branches(2)
        y = norm(EPSILON)(x)
        y = on_tokens(self.tokens_mlp_dim, name="token_mixing_0")(y)
        y = on_tokens(s, name="token_mixing_1")(y)
        x = x + layers.scale_images(y, first.keep)
        y = norm(EPSILON)(x)
        y = on_channels(self.channels_mlp_dim, name="channel_mixing_0")(y)
        y = on_channels(c, name="channel_mixing_1")(y)
        return x + layers.scale_images(y, second.keep)


class KanMixer(Model):
    """KAN-Mixer. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of layers.
      hidden_dim: number of channels C.
      tokens_mlp_dim, channels_mlp_dim: number of hidden units H of token and of channel
        mixing.
      form: "cheon" or "canuto".
      image_channels: number of channels that are read of an image: 3, or 1, the first,
        of grey images.
      mean, std: what levels from 0 to 1 are normalised by, in each channel.
      stochastic_depth: rate of every block; kept branches are divided by 1 − rate. Not
        in the papers.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    form: str = "cheon"
    image_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits (n, k), out) of images (n, h, w, 3) in [−1, 1].

        In `out` are `stem`, `block_0`, … (n, s, c) and `pre_logits` (n, c).
        """
        norm = known.pick("form", self.form, NORMS)
        self.check_image(image)
        pixels = self._normalised(image)
        if self.form == "cheon":
            patch = (*self.patch_size, self.image_channels)
            stem = Kan(self.hidden_dim, run=self.run, inputs=patch, name="stem")
            x = stem(layers.patches(pixels, self.patch_size))
        else:
            embed = layers.PatchEmbed(
                self.hidden_dim, self.patch_size, self.run, name="stem"
            )
            x = embed(pixels)
        block = functools.partial(
            KanMixerBlock,
            form=self.form,
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            run=self.run,
        )
        y, states = trunk.row(
            self,
            block,
            x,
            name="KanMixerBlock",
            train=train,
        )
        y, states = norm(EPSILON, name=LAST_NORMS[self.form])(y), [x, *states]
        if self.form == "canuto":
            return layers.readout(y, states, self.num_classes)
        features, out = layers.readout(y, states, None)
        if self.num_classes is None:
            return features, out
        run = Run(features.dtype)
        return Kan(self.num_classes, run=run, name="head")(features), out

    def _normalised(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n h w x"]:
        """The channels that are read, with levels from 0 to 1 less `mean`, by `std`."""
        count = self.image_channels
        if count not in (1, 3):
            raise ValueError(f"image_channels is {count}; expected 1 or 3.")
        return layers.normalised(image[..., :count], self.mean, self.std)


def _kan_axes(layers_by_path: dict[str, str]) -> dict[str, str]:
    """Returns the entries of `AXES` for KAN layers, with the letters of a kernel."""
    found: dict[str, str] = {}
    for path, letters in layers_by_path.items():
        found |= {f"{path}/{array}": letters for array in ("kernel", "scale")}
        found[f"{path}/spline"] = f"g {letters}"
    return found


MODEL = KanMixer
# Patch, layers, C, H of token and of channel mixing; for images of 32x32 pixels.
_ROWS = {
    "kan_mixer_c16_h32": ((2, 2), 2, 16, 32, 32),
    "kan_mixer_c32_h64": ((2, 2), 2, 32, 64, 64),
    "kan_mixer_c64_h128": ((2, 2), 2, 64, 128, 128),
}
SIZES = {name: sizes(KanMixer, row) for name, row in _ROWS.items()}
COUNTED = dict.fromkeys(SIZES, (32, 10))
TOP_1: dict[str, float] = {}
CHECKED = "counts; logits of the authors' code (Canuto: the paper's text)"
CANNOT_RESIZE = (
    "on each edge of its KANs two parameters are multiplied, and resampling both keeps "
    "no function"
)
FORM = "form"
# Letter x: the channels of an image that are read; g: the splines of an edge.
_MIXING = _kan_axes(
    {
        "KanMixerBlock_*/token_mixing_0": "s ds",
        "KanMixerBlock_*/token_mixing_1": "ds s",
        "KanMixerBlock_*/channel_mixing_0": "c dc",
        "KanMixerBlock_*/channel_mixing_1": "dc c",
    }
)
_NORMS = [f"KanMixerBlock_*/TokenChannelNorm_{i}" for i in (0, 1)]
AXES = {
    "cheon": {
        **_kan_axes({"stem": "ph pw x c"}),
        **_MIXING,
        **{
            f"{norm}/{array}": "s c"
            for norm in (*_NORMS, "pre_head_token_channel_norm")
            for array in ("scale", "bias")
        },
        **_kan_axes({"head": "c k"}),
    },
    "canuto": {
        **axes({"stem": "ph pw x c"}),
        **_MIXING,
        **axes(
            {
                "KanMixerBlock_*/LayerNorm_0": "c",
                "KanMixerBlock_*/LayerNorm_1": "c",
                "pre_head_layer_norm": "c",
                "head": "c k",
            }
        ),
    },
}


def _grid(kernel: np.ndarray) -> np.ndarray:
    """The authors' buffer of knots, (inputs, 12), beside a kernel of ours."""
    knots = np.arange(-3, splines.CELLS + 4, dtype=np.float32) * (2 / splines.CELLS) - 1
    return np.tile(np.float32(knots), (math.prod(kernel.shape[:-1]), 1))


def _authors(theirs: str, ours: str, there: str = "i", here: str = "i") -> list[Any]:
    """The names of a KAN layer's arrays, and how they name an input there and here."""
    return [
        (f"{theirs}.base_weight", f"{ours}/kernel", f"o {there} -> {here} o"),
        (f"{theirs}.spline_scaler", f"{ours}/scale", f"o {there} -> {here} o"),
        (f"{theirs}.spline_weight", f"{ours}/spline", f"o {there} g -> g {here} o"),
        (f"{theirs}.grid", f"{ours}/kernel", _grid),
    ]


# What the authors' state dicts call what; {} is the number of a block. The pixels of a
# patch are flattened there, channel by channel.
AUTHORS = {
    "cheon": (
        *_authors("PerPatchKAN.kan", "stem", "(x ph pw)", "ph pw x"),
        ("MixerStack.{}.0.layer_norm", "KanMixerBlock_{}/TokenChannelNorm_0"),
        *_authors("MixerStack.{}.0.kan1", "KanMixerBlock_{}/token_mixing_0"),
        *_authors("MixerStack.{}.0.kan2", "KanMixerBlock_{}/token_mixing_1"),
        ("MixerStack.{}.1.layer_norm", "KanMixerBlock_{}/TokenChannelNorm_1"),
        *_authors("MixerStack.{}.1.kan3", "KanMixerBlock_{}/channel_mixing_0"),
        *_authors("MixerStack.{}.1.kan4", "KanMixerBlock_{}/channel_mixing_1"),
        ("OutputKAN.layer_norm", "pre_head_token_channel_norm"),
        *_authors("OutputKAN.out_kan", "head"),
    )
}
