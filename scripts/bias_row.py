"""Token mixing whose first bias is one more token: a form for the suite to measure.

W1ᵀ y + b1 = [W1; b1; 0]ᵀ [y; 1; 0]: LayerNorm's kernel writes a row of ones and rows of
zeros after the tokens, up to a multiple of eight. Nothing but the GELU is then left
after the product, so that a library can take it in, the gradient of b1 falls out of
W1's, and 196 tokens, which no fast kernel of a GPU likes as the length of a sum, are
200. The same mathematics; parameters, their names and shapes stay.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlp_mixer.models import layers
from mlp_mixer.models.derivatives import Dense

MULTIPLE = 8


class BiasRowDense(Dense):
    """`Dense` that adds its bias, where it is an MLP's first along tokens, as a row."""

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `x` with `axis` mapped to `features` entries."""
        if self.axis != 0 or self.name != "Dense_0" or self.run.flat:
            return super().__call__(x)
        tokens = x.shape[0]
        kernel = self.param(
            "kernel", self.kernel_init, (tokens, self.features), jnp.float32
        )
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.run.dtype)
        rows = -(-(tokens + 1) // MULTIPLE) * MULTIPLE - tokens
        ones = jnp.zeros((rows, *x.shape[1:]), x.dtype).at[0].set(1)
        x = jnp.concatenate([x, ones])
        below = jnp.zeros((rows - 1, self.features), kernel.dtype)
        kernel = jnp.concatenate([kernel, bias[None], below])
        return jnp.einsum("sd,s...->d...", kernel, x)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """While it is entered, what is traced of a Mixer has its token bias as a row."""
    with mock.patch.object(layers, "Dense", BiasRowDense):
        yield
