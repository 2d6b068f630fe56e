"""MLP-Mixer as the paper's equations read: the yardstick of tests and benchmark.

Images first, a convolution for the stem, two transposes in every layer, Flax's own
Dense, LayerNorm and GELU, automatic differentiation: what anybody would write.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mlp_mixer.models import Model


class Mlp(nn.Module):
    """Dense, GELU, Dense along the last axis."""

    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        """Returns an array of the shape of `x`."""
        hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(hidden)


class Block(nn.Module):
    """Token mixing, then channel mixing."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        """Maps (n, s, c) to (n, s, c)."""
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        y = Mlp(self.tokens_mlp_dim, self.dtype, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + Mlp(self.channels_mlp_dim, self.dtype, name="channel_mixing")(y)


class LiteralMixer(Model):
    """The fields and the interface of `models.mixer.MlpMixer`, without its options."""

    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image, *, train=False):
        """Returns (logits (n, k), {"pre_logits": (n, c)})."""
        del train
        conv = nn.Conv(
            self.hidden_dim,
            self.patch_size,
            strides=self.patch_size,
            dtype=self.dtype,
            name="stem",
        )
        x = conv(image).reshape(image.shape[0], -1, self.hidden_dim)
        for i in range(self.num_blocks):
            block = Block(
                self.tokens_mlp_dim,
                self.channels_mlp_dim,
                self.dtype,
                name=f"MixerBlock_{i}",
            )
            x = block(x)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = x.mean(1, dtype=jnp.float32)
        classes: Any = self.num_classes
        head = nn.Dense(classes, kernel_init=nn.initializers.zeros, name="head")
        return head(x), {"pre_logits": x}
