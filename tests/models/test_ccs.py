"""CCS is Mixer or ResMLP with circulant maps across tokens, and nothing else."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models, pretrained
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models import Run
from mlp_mixer.models.ccs import Ccs
from mlp_mixer.models.resmlp import ResMlp
from mlp_mixer.pretrained import tree

SMALL: dict[str, Any] = {
    "patch_size": (2, 4),
    "num_blocks": 2,
    "hidden_dim": 16,
    "channels_mlp_dim": 12,
    "num_classes": 5,
}
SIZE = (6, 16)  # 3x4 tokens


def drawn(shapes, seed=2):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        centre = path[-1].key in ("scale", "alpha")
        return jnp.asarray(centre + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_params(**fields):
    return drawn(tree.variables(Ccs(**SMALL | fields), SIZE)["params"])


def images():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.uniform(-1, 1, (2, *SIZE, 3)), jnp.float32)


def reference(params, image, base, groups):
    """Logits in float64, from the papers' equations, a channel at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.asarray(image, np.float64).reshape(2, 3, 2, 4, 4, 3)
    x = np.einsum("nhpwqx,pqxc->nhwc", x, p["stem"]["kernel"]) + p["stem"]["bias"]
    x = x.reshape(2, 12, 16)

    def layer_norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * at["scale"] + at["bias"]

    def affine(x, at):
        return x * at["alpha"] + at["beta"]

    def circulant(y, w):
        z = np.zeros_like(y)
        for c in range(16):
            for i in range(12):
                for j in range(12):
                    z[:, i, c] += w[c % groups, j] * y[:, (i + j) % 12, c]
        return z

    def mlp(y, at):
        y = y @ at["Dense_0"]["kernel"] + at["Dense_0"]["bias"]
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        return y @ at["Dense_1"]["kernel"] + at["Dense_1"]["bias"]

    of_mixer = base == "mixer"
    block, norm = ("MixerBlock", "LayerNorm") if of_mixer else ("ResMlpBlock", "Affine")
    normalised = layer_norm if of_mixer else affine
    for i in range(2):
        at = p[f"{block}_{i}"]
        y = circulant(normalised(x, at[f"{norm}_0"]), at["token_mixing"]["kernel"])
        x = x + at.get("scale_0", 1) * y
        y = mlp(normalised(x, at[f"{norm}_1"]), at["channel_mixing"])
        x = x + at.get("scale_1", 1) * y
    last = "pre_head_layer_norm" if of_mixer else "pre_head_affine"
    x = normalised(x, p[last]).mean(1)
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(("base", "groups"), [("mixer", 2), ("resmlp", 16)])
def test_the_forward_is_the_papers_in_float64_and_float32(base, groups):
    fields = {"base": base, "groups": groups}
    params, image = drawn_params(**fields), images()
    expected = reference(params, image, **fields)
    single, _ = jax.jit(Ccs(**SMALL | fields).apply)({"params": params}, image)
    with jax.enable_x64(True):
        model = Ccs(**SMALL | fields, run=Run("float64"))
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        double = np.asarray(jax.jit(model.apply)({"params": given}, image)[0])
    np.testing.assert_allclose(double, expected, rtol=0, atol=1e-9)
    assert np.abs(single - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_group_on_resmlp_is_a_resmlp_whose_matrix_is_circulant():
    params = drawn_params(base="resmlp", groups=1)
    dense = {name: dict(part) for name, part in params.items()}
    for i in range(2):
        (w,) = np.asarray(params[f"ResMlpBlock_{i}"]["token_mixing"]["kernel"])
        # Ours is (inputs, outputs): column i is w, moved i to the right.
        kernel = np.stack([np.roll(w, i) for i in range(12)], axis=1)
        mixing = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(12)}
        dense[f"ResMlpBlock_{i}"]["token_mixing"] = mixing
    circulant = Ccs(**SMALL, base="resmlp", groups=1)
    found, _ = jax.jit(circulant.apply)({"params": params}, images())
    expected, _ = jax.jit(ResMlp(**SMALL).apply)({"params": dense}, images())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ccs_mixer_b16", 57_316_992),
        ("ccs_resmlp_36_g1", 42_922_512),
        ("ccs_resmlp_36_g4", 42_943_680),
        ("ccs_resmlp_36", 42_971_904),
        ("ccs_resmlp_36_g384", 45_624_960),
    ],
)
def test_counts_are_the_bases_but_for_token_mixing(name, count):
    """Without heads, and with G·S weights in each layer instead."""
    fields = models.fields(name)
    blocks, base = fields["num_blocks"], fields["base"]

    def size(name):
        """(token mixing's parameters, all others) of the model without head."""
        model = models.create(name, num_blocks=1)
        sizes = {k: x.size for k, x in leaves(tree.variables(model, (224, 224)))}
        block = sum(n for path, n in sizes.items() if "Block_0/" in path)
        mixing = sum(n for path, n in sizes.items() if "/token_mixing/" in path)
        others = sum(sizes.values()) + (blocks - 1) * block - blocks * mixing
        return blocks * mixing, others

    mixing, others = size(name)
    assert mixing + others == count
    assert mixing == blocks * fields["groups"] * 196
    assert others == size("mixer_b16" if base == "mixer" else "resmlp_36")[1]


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="does not divide hidden_dim 16; try 4"):
        tree.variables(Ccs(**SMALL, base="mixer", groups=12), SIZE)


def test_another_grid_is_refused_and_says_why():
    params = drawn_params(base="resmlp", groups=4)
    weights = pretrained.Weights(params, "made", image_size=SIZE)
    assert (weights.model["base"], weights.model["groups"]) == ("resmlp", 4)
    assert pretrained.resized(weights, SIZE, "grow").params is params
    for how in ("grow", "interpolate"):
        with pytest.raises(ValueError, match="distance leads to another place"):
            pretrained.resized(weights, (12, 32), how)
