"""NiNformer is its equations, in NumPy and float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from mlp_mixer.models import Run, layers
from mlp_mixer.models.mixer import MixerBlock
from mlp_mixer.models.model import Noise
from mlp_mixer.models.ninformer import NiNBlock

S, N, C, DS, DC = 6, 3, 5, 4, 7


def block(dtype="float64"):
    return NiNBlock(DS, DC, dropout=0.0, gelu="exact", run=Run(dtype))


def state():
    return np.random.default_rng(1).normal(size=(S, N, C))


def weights():
    """Of one block, in float64, all random."""
    rng = np.random.default_rng(2)

    def dense(inner, outer):
        kernel = rng.normal(size=(inner, outer)) / math.sqrt(inner)
        return {"kernel": kernel, "bias": 0.3 * rng.normal(size=outer)}

    def mlp(inner, hidden):
        return {"Dense_0": dense(inner, hidden), "Dense_1": dense(hidden, inner)}

    def norm():
        scale, bias = 0.3 * rng.normal(size=(2, C))
        return {"scale": 1 + scale, "bias": bias}

    return {
        "LayerNorm_0": norm(),
        "gate": dense(C, C),
        "MixerBlock_0": {
            "LayerNorm_0": norm(),
            "token_mixing": mlp(S, DS),
            "LayerNorm_1": norm(),
            "channel_mixing": mlp(C, DC),
        },
        "channel_mixing": mlp(C, DC),
    }


def apply(one, params, x):
    """The block's result, computed in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(one.apply)({"params": params}, x, Noise()))


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def mlp(x, p):
    h = linear(x, p["Dense_0"])
    return linear(h * scipy.special.ndtr(h), p["Dense_1"])


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def mixer(x, p):
    """MLP-Mixer's block, of images one after the other."""
    x = x.copy()
    for table in x.swapaxes(0, 1):
        table += mlp(norm(table, p["LayerNorm_0"]).T, p["token_mixing"]).T
        table += mlp(norm(table, p["LayerNorm_1"]), p["channel_mixing"])
    return x


def reference(x, p):
    y = norm(x, p["LayerNorm_0"])
    x = x + linear(y, p["gate"]) * mixer(y, p["MixerBlock_0"])
    return x + mlp(norm(x, p["LayerNorm_0"]), p["channel_mixing"])


def test_a_block_is_its_equations():
    p, x = weights(), state()
    expected = reference(x, p)
    np.testing.assert_allclose(apply(block(), p, x), expected, rtol=0, atol=1e-9)
    coarse, given = jax.tree.map(np.float32, (p, x))
    found = jax.jit(block("float32").apply)({"params": coarse}, given, Noise())
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_with_a_gate_of_ones_the_mixer_block_is_added():
    """To the state; what it mixes and adds to itself is the normalised one."""
    p, x = weights(), state()
    gate = {"kernel": np.zeros((C, C)), "bias": np.ones(C)}
    nothing = jax.tree.map(np.zeros_like, p["channel_mixing"])
    found = apply(block(), p | {"gate": gate, "channel_mixing": nothing}, x)
    y = norm(x, p["LayerNorm_0"])
    plain = functools.partial(layers.MlpBlock, gelu="exact", run=Run("float64"))
    inner = MixerBlock(
        functools.partial(plain, DS, axis=0), functools.partial(plain, DC), epsilon=1e-5
    )
    expected = x + apply(inner, p["MixerBlock_0"], y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_dropout_is_in_every_mlp_and_not_in_the_gate():
    p = jax.tree.map(np.float32, weights())
    one = NiNBlock(DS, DC, dropout=0.5, gelu="exact", run=Run())
    noise = Noise(rng=jax.random.key(3))
    _, seen = jax.jit(
        functools.partial(one.apply, capture_intermediates=True, mutable=True)
    )({"params": p}, jnp.float32(state()), noise)
    seen, inner = seen["intermediates"], seen["intermediates"]["MixerBlock_0"]
    mlps = [inner["token_mixing"], inner["channel_mixing"], seen["channel_mixing"]]
    kept = [np.asarray(mlp["__call__"][0] != 0) for mlp in mlps]
    assert all(0.3 < mask.mean() < 0.7 for mask in kept)
    assert len({mask.tobytes() for mask in kept}) == 3
    assert np.all(seen["gate"]["__call__"][0])
