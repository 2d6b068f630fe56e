"""S2-MLP is its equations, in NumPy and float64, on a grid of any size."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models, pretrained
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models import Run
from mlp_mixer.models.s2mlp import S2Mlp
from mlp_mixer.pretrained import tree

SMALL: dict[str, Any] = {
    "patch_size": (2, 4),
    "num_blocks": 2,
    "hidden_dim": 8,
    "channels_mlp_dim": 12,
    "num_classes": 5,
}
SIZE = (6, 16)  # 3x4 tokens
NORMS = ("layer", "affine")


def drawn_params(norm, seed=2):
    """All random: nothing hides behind a zero."""
    shapes = tree.variables(S2Mlp(**SMALL, norm=norm), SIZE)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        centre = path[-1].key in ("scale", "alpha")
        return jnp.asarray(centre + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(n=2, size=SIZE):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.uniform(-1, 1, (n, *size, 3)), jnp.float32)


def reference(params, image, norm, shifted=True):
    """(logits, last state (n, h, w, c)) in float64, from the paper's equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    kernel = p["stem"]["kernel"]
    ph, pw = kernel.shape[:2]
    n, height, width, _ = image.shape
    h, w = height // ph, width // pw
    x = np.asarray(image, np.float64).reshape(n, h, ph, w, pw, 3)
    x = np.einsum("nhpwqx,pqxc->nhwc", x, kernel) + p["stem"]["bias"]

    def linear(x, at):
        return x @ at["kernel"] + at["bias"]

    def normalised(x, at):
        if norm == "affine":
            return x * at["alpha"] + at["beta"]
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * at["scale"] + at["bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def shift(x):
        y, q = x.copy(), x.shape[-1] // 4
        y[:, 1:, :, :q] = x[:, :-1, :, :q]
        y[:, :-1, :, q : 2 * q] = x[:, 1:, :, q : 2 * q]
        y[:, :, 1:, 2 * q : 3 * q] = x[:, :, :-1, 2 * q : 3 * q]
        y[:, :, :-1, 3 * q :] = x[:, :, 1:, 3 * q :]
        return y

    x = normalised(x, p["stem_norm"])
    for i in range(SMALL["num_blocks"]):
        block = p[f"S2MlpBlock_{i}"]
        tokens, channels = block["token_mixing"], block["channel_mixing"]
        y = gelu(linear(x, tokens["Dense_0"]))
        y = linear(shift(y) if shifted else y, tokens["Dense_1"])
        x = x + normalised(y, block["token_norm"])
        y = linear(gelu(linear(x, channels["Dense_0"])), channels["Dense_1"])
        x = x + normalised(y, block["channel_norm"])
    return linear(x.mean((1, 2)), p["head"]), x


@pytest.mark.parametrize("norm", NORMS)
def test_the_forward_is_the_papers_in_float64_and_float32(norm):
    params, image = drawn_params(norm), images()
    expected, state = reference(params, image, norm)
    single, _ = jax.jit(S2Mlp(**SMALL, norm=norm).apply)({"params": params}, image)
    with jax.enable_x64(True):
        model = S2Mlp(**SMALL, norm=norm, run=Run("float64"))
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        logits, out = jax.jit(model.apply)({"params": given}, image)
        double = np.asarray(logits), np.asarray(out["block_1"])
    np.testing.assert_allclose(double[0], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(double[1], state.reshape(2, 12, 8), rtol=0, atol=1e-9)
    assert np.abs(single - expected).max() < 1e-4 * np.abs(expected).max()


def test_without_neighbours_it_is_an_mlp_of_each_token():
    """The ablation without a shift: each patch as an image of its own."""
    params, image = drawn_params("layer"), images(1)
    _, state = reference(params, image, "layer", shifted=False)
    patches = image.reshape(3, 2, 4, 4, 3).swapaxes(1, 2).reshape(12, 2, 4, 3)
    _, out = jax.jit(S2Mlp(**SMALL).apply)({"params": params}, patches)
    np.testing.assert_allclose(
        out["block_1"].reshape(1, 3, 4, 8), state, rtol=0, atol=1e-5
    )
    # And an image of equal patches is a map that shifts leave as it is.
    same = jnp.asarray(np.tile(patches[0], (1, 3, 4, 1)))
    _, out = jax.jit(S2Mlp(**SMALL).apply)({"params": params}, same)
    np.testing.assert_allclose(
        out["block_1"].reshape(12, 8), np.tile(state[0, 0, 0], (12, 1)), atol=1e-5
    )


def test_a_layer_sees_one_token_further_up_down_left_and_right():
    params, image = drawn_params("layer"), np.array(images(1, (14, 28)))
    changed = image.copy()
    changed[:, 6:8, 12:16] += 0.5  # the token in row 3, column 3 of 7x7
    model = S2Mlp(**SMALL)
    _, out = jax.jit(model.apply)({"params": params}, np.stack([image[0], changed[0]]))
    rows, columns = np.indices((7, 7))
    distance = abs(rows - 3) + abs(columns - 3)
    for name, reach in [("stem", 0), ("block_0", 1), ("block_1", 2)]:
        a, b = np.asarray(out[name]).reshape(2, 7, 7, 8)
        np.testing.assert_array_equal((a != b).any(-1), distance <= reach)


def test_any_image_that_patches_tile_fits_the_same_weights():
    weights = pretrained.Weights(
        drawn_params("affine"), "made", image_size=SIZE, model={"gelu": "exact"}
    )
    assert weights.model["norm"] == "affine"
    for how in ("grow", "interpolate"):
        larger = pretrained.resized(weights, (8, 20), how)
        assert larger.image_size == (8, 20)
        for (_, a), (_, b) in zip(
            leaves(larger.params), leaves(weights.params), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="not divisible by patch_size 4; try 16 or 20"):
        pretrained.resized(weights, (8, 18), "grow")


@pytest.mark.parametrize(
    ("name", "count"), [("s2mlp_wide", 71_433_984), ("s2mlp_deep", 53_476_224)]
)
def test_counts_without_norms_and_head_are_the_papers_formula(name, count):
    model = models.create(name, num_blocks=1)
    params = dict(leaves(tree.variables(model, (224, 224))["params"]))
    sizes = {path: x.size for path, x in params.items() if "norm/" not in path}
    block = sum(size for path, size in sizes.items() if path.startswith("S2MlpBlock_"))
    n, c = models.fields(name)["num_blocks"], model.hidden_dim
    assert sum(sizes.values()) + (n - 1) * block == count
    assert count == n * (2 * (c**2 + c) + 8 * c**2 + 5 * c) + 768 * c + c
