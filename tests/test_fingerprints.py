"""One changed bit is noticed; that topology does not matter is in test_checkpoint."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer.fingerprints import fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int32", "bool"])
def test_one_changed_bit_or_two_swapped_elements_change_the_fingerprint(dtype):
    x = np.arange(24).reshape(2, 3, 4)
    x = (x % 2 if dtype == "bool" else x).astype(dtype)
    prints = {fingerprint({"x": jnp.asarray(x)})["x"]}
    changed, swapped, crossed = x.copy(), x.copy(), x.copy()
    changed.reshape(-1).view(np.uint8)[-1] ^= 1
    swapped[0, 0, 0], swapped[1, 2, 3] = x[1, 2, 3], x[0, 0, 0]
    crossed[0, 0, 1], crossed[0, 1, 0] = x[0, 1, 0], x[0, 0, 1]
    for other in (changed, swapped, crossed):
        prints.add(fingerprint({"x": jnp.asarray(other)})["x"])
    assert len(prints) == 4
