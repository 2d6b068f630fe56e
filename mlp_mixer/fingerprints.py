"""Names, shapes, dtypes and fingerprints of the arrays of a tree.

None of these depends on how the arrays are sharded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlp_mixer.text import listed

PyTree = Any
Params = dict[str, Any]  # nested, of arrays or shapes
Arrays = dict[str, list[Any]]  # {"params/w": [[64, 32], "float32"]}


def leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(name, leaf) of each leaf; dict keys and fields of tuples give the same names."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def describe(tree: PyTree) -> Arrays:
    """{path: [shape, dtype]}."""
    return {name: [list(x.shape), str(x.dtype)] for name, x in leaves(tree)}


def differences(saved: Arrays, expected: Arrays) -> str:
    """The differences for people, one a line; empty if there are none."""
    lines = [
        f"{name}: got {saved.get(name, 'nothing')}, "
        f"expected {expected.get(name, 'nothing')}"
        for name in {**saved, **expected}
        if saved.get(name) != expected.get(name)
    ]
    return listed(lines)


def fingerprint(tree: PyTree) -> dict[str, int]:
    """A 32-bit fingerprint of each array by its path, equal on every topology.

    It is the sum, modulo 2**32, of a hash of each element's bits and position; a sum
    does not depend on how an array is sharded. The hash is the finaliser of MurmurHash3
    (Appleby, public domain), a bijection: one changed element always changes the sum,
    several leave it as it is with probability 2**-32.
    """
    return examine(tree)[0]


def examine(tree: PyTree) -> tuple[dict[str, int], list[str]]:
    """The fingerprints, and the paths of float arrays that are not finite."""
    # One array at a time, because a jit of the whole tree compiles for minutes. Each is
    # awaited, because many small collectives at once can deadlock on a CPU.
    found = {name: jax.device_get(_examined(x)) for name, x in leaves(tree)}
    return (
        {name: int(total) for name, (total, _) in found.items()},
        [name for name, (_, finite) in found.items() if not finite],
    )


@jax.jit
def _examined(x: Any) -> tuple[jax.Array, jax.Array]:
    """(fingerprint, whether all elements are finite)."""
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    finite = jnp.isfinite(x).all() if is_float else jnp.bool_(True)
    return _hashed_sum(x), finite


def _hashed_sum(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = lax.bitcast_convert_type(x, width)  # 8 bytes: two words on a last axis
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += position * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    h = bits.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)).sum(dtype=jnp.uint32)
