"""Token mixing with its bias as a row computes what ours does."""

import bias_row
import jax
import jax.numpy as jnp
import numpy as np
from set_up import random_params

from mlp_mixer import models


def test_a_bias_as_a_row_gives_the_same_logits_and_gradients():
    fields = {"patch_size": (4, 4), "num_blocks": 1, "hidden_dim": 8}
    fields |= {"tokens_mlp_dim": 4, "channels_mlp_dim": 16}
    model = models.create("mixer_s16", num_classes=3, image_size=(12, 12), **fields)
    params = random_params(model, (12, 12), 0)
    image = jax.random.uniform(jax.random.key(1), (2, 12, 12, 3))

    def lowered():
        def weighted(params):
            logits = model.apply({"params": params}, image)[0]
            # No two weigh alike.
            return (logits * jnp.cos(jnp.arange(6.0).reshape(2, 3))).sum(), logits

        return jax.jit(jax.grad(weighted, has_aux=True)).lower(params)

    plain = lowered()
    with bias_row.traced():
        row = lowered()
    assert "tensor<16x2x8xf32>" in row.as_text()  # nine tokens, one, and six of zeros
    assert "tensor<16x2x8xf32>" not in plain.as_text()
    found = [jax.tree.leaves(one.compile()(params)) for one in (plain, row)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 1e-6)
