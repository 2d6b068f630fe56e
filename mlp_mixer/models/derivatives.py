"""Closed-form derivatives and fast products; the mathematics is Flax's own.

`LayerNorm`, `gelu` and `Dense` compute what `nn.LayerNorm`, `nn.gelu` and `nn.Dense`
do, with the same parameters; a reader of a model may take them for those. Left to
automatic differentiation, LayerNorm's backward pass is fused by XLA into kernels that
grow with depth, and GELU's keeps several activations instead of its input alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax import lax
from jaxtyping import Array, Float

from mlp_mixer.models.model import Run


def add_bias(
    x: Float[Array, "..."], bias: Float[Array, " c"] | None, axis: int = -1
) -> Array:
    """Adds `bias`, if there is one, along `axis` of `x`; written out, so that rank
    promotion can be forbidden in tests.
    """
    if bias is None:
        return x
    return x + lax.broadcast_in_dim(bias, x.shape, (axis % x.ndim,))


def at_least_float32(dtype: Any) -> Any:
    """Returns the dtype of statistics: float32, or float64 where activations are."""
    return jnp.dtype("float64" if dtype == jnp.float64 else "float32")


# --- LayerNorm over channels --------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rows c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float = 1e-6,
) -> Float[Array, "*rows c"]:
    """Normalises over the last axis, with statistics in float32.

    The variance is E[x²] − E[x]² and epsilon 1e-6, as in Flax's LayerNorm, which the
    authors' code uses unchanged.
    """
    return _layer_norm_fwd(x, scale, bias, epsilon)[0]


def _layer_norm_fwd(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    z = x.astype(at_least_float32(x.dtype))
    mean = z.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (z * z).mean(-1, keepdims=True) - mean * mean)
    r = lax.rsqrt(variance + epsilon)
    row = (1,) * (x.ndim - 1) + scale.shape
    y = add_bias((z - mean) * (r * scale.reshape(row)), bias)
    return y.astype(x.dtype), (x, mean, r, scale)


def _layer_norm_bwd(
    epsilon: float, residuals: tuple[Any, ...], dy: Array
) -> tuple[Array, Array, Array]:
    del epsilon
    x, mean, r, scale = residuals
    dy = dy.astype(at_least_float32(dy.dtype))
    normalised = (x.astype(dy.dtype) - mean) * r
    g = dy * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    along = (g * normalised).mean(-1, keepdims=True)
    dx = r * (g - g.mean(-1, keepdims=True) - normalised * along)
    rows = tuple(range(x.ndim - 1))
    dscale, dbias = (dy * normalised).sum(rows), dy.sum(rows)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class LayerNorm(nn.Module):
    """LayerNorm over channels; parameters `scale` and `bias` in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
        """Returns `x` normalised, in the dtype of `x`."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        # Parameters may come from a file, as NumPy arrays.
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon)


# --- GELU ---------------------------------------------------------------------------

# tanh(u) = 2 sigmoid(2u) - 1, so tanh-GELU(x) = x sigmoid(a x + b x³).
_GELU_A = 1.5957691216057308  # 2 sqrt(2 / pi)
_GELU_B = 0.044715 * _GELU_A


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU: `nn.gelu`'s default, hence the published one."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_bwd(x: Array, dy: Array) -> tuple[Array]:
    # Written with the logistic function on purpose: it shares no subexpression with
    # the forward pass, so the compiler has nothing to keep but x itself.
    z = x.astype(at_least_float32(x.dtype))
    q = jax.nn.sigmoid(z * (_GELU_A + _GELU_B * z * z))
    slope = q + z * q * (1 - q) * (_GELU_A + 3 * _GELU_B * z * z)
    return ((dy.astype(z.dtype) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)

GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": gelu,
    "exact": functools.partial(jax.nn.gelu, approximate=False),
}


# --- Products -----------------------------------------------------------------------


# XLA's CPU products run at half speed when the left operand is transposed, and it folds
# a plain transpose into the product: the barrier keeps it a copy of its own.


def _transposed(x: Array) -> Array:
    return lax.optimization_barrier(x.T)


@jax.custom_vjp
def _map_rows(x: Array, kernel: Array) -> Array:
    """x (m, c), kernel (c, d) -> (m, d), with a fast weight gradient on CPU."""
    return x @ kernel


_map_rows.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda kept, dy: (dy @ kept[1].T, _transposed(kept[0]) @ dy),
)


@jax.custom_vjp
def _map_columns(x: Array, kernel: Array) -> Array:
    """x (s, m), kernel (s, d) -> (d, m), fast on CPU."""
    return _transposed(kernel) @ x


_map_columns.defvjp(
    lambda x, kernel: (_transposed(kernel) @ x, (x, kernel)),
    lambda kept, dy: (kept[1] @ dy, kept[0] @ dy.T),
)


def linear(
    x: Float[Array, "..."],
    kernel: Any,
    bias: Any,
    axis: int,
    run: Run,
) -> Float[Array, "..."]:
    """Maps the first (0) or the last (-1) axis of `x` linearly, in the dtype of `run`.

    Args:
      x: the tokens or their hidden units.
      kernel: the matrix (in, out).
      bias: the vector (out,) that is added along the axis afterwards; None: none.
      axis: 0 for tokens, -1 for channels.
      run: the product's dtype and form.
    """
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=run.dtype)
    features, tokens = kernel.shape[1], axis == 0
    if run.flat:
        # The bias is added to a matrix, too: the sum that is its gradient takes longer
        # over three axes (XLA's CPU, bfloat16: a sixth of the step).
        if tokens:
            y = add_bias(_map_columns(x.reshape(x.shape[0], -1), kernel), bias, 0)
            return y.reshape(features, *x.shape[1:])
        y = add_bias(_map_rows(x.reshape(-1, x.shape[-1]), kernel), bias)
        return y.reshape(*x.shape[:-1], features)
    # Weight first: the other operand order transposes the whole result.
    y = jnp.einsum("sd,s...->d...", kernel, x) if tokens else x @ kernel
    return add_bias(y, bias, axis)


# torch's initial values of kernels, uniform in ±1/√fan_in.
TORCH_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Dense(nn.Module):
    """A linear map along the first (tokens) or the last (channels) axis.

    Parameters, names and initial values are those of Flax's Dense: `kernel`
    (in, features), lecun_normal, and `bias` (features,), zeros.

    Attributes:
      features: size of the axis afterwards.
      axis: 0 for tokens, -1 for channels.
      run: the product's dtype and form.
      use_bias: whether a bias is added.
      kernel_init, bias_init: other initial values.
      torch_init: whether both begin as torch's instead, uniform in ±1/√fan_in.
    """

    features: int
    axis: int = -1
    run: Run = Run()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `x` with `axis` mapped to `features` entries."""
        shape = (x.shape[self.axis], self.features)
        kernel_init, bias_init = self.kernel_init, self.bias_init
        if self.torch_init:
            limit = shape[0] ** -0.5
            bias_init = functools.partial(
                jax.random.uniform, minval=-limit, maxval=limit
            )
            kernel_init = TORCH_KERNEL
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", bias_init, shape[1:], jnp.float32)
        return linear(x, kernel, bias, self.axis, self.run)
