"""SPACH-MS is its equations, in NumPy and float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spach_equations as equations

from mlp_mixer import models, pretrained
from mlp_mixer.models import Run, spach_ms, trunk
from mlp_mixer.models.model import Noise
from mlp_mixer.pretrained import tree

SMALL: dict[str, Any] = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "patch_size": (2, 4),
    "hidden_dim": 4,
    "mlp_ratio": 2,
    "num_heads": 2,
    "stem_dim": 3,
    "num_classes": 5,
}
HYBRID: dict[str, Any] = {
    **SMALL,
    "mixing": "hybrid_late",
    "num_blocks": (1, 1, 1, 2, 2, 1),
    "stem": "conv4",
}
SIZE = (16, 64)  # 8x16, 4x8, 2x4 and 1x2 tokens


def images(size=SIZE, n=3):
    return np.random.default_rng(1).uniform(-1, 1, (n, *size, 3))


def shapes(model, size=SIZE):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def random_variables(module, *inputs, dtype="float64"):
    """All random, and each kernel large enough that a lost one is seen."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1].key == "var":
            value = rng.uniform(1e-3, 1, leaf.shape)  # epsilon shows
        else:
            value = (path[-1].key == "scale") + 0.2 * value
        return jnp.asarray(value, dtype)

    found = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw, found)


def assert_close(found, expected, error):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=error * largest)


# --- The equations, image by image ----------------------------------------------------


def convolution(x, kernel, stride):
    """Of one image (h, w, c), with zeros around."""
    size = kernel.shape[0]
    padded = np.pad(x, [(size // 2,) * 2] * 2 + [(0, 0)])
    h, w = (side // stride for side in x.shape[:2])
    y = np.zeros((h, w, kernel.shape[-1]))
    for i, j in np.ndindex(h, w):
        seen = padded[i * stride : i * stride + size, j * stride : j * stride + size]
        y[i, j] = np.einsum("yxc,yxcd->d", seen, kernel)
    return y


def patches(x, kernel):
    """Of one image (h, w, c): a linear map of each patch."""
    ph, pw = kernel.shape[:2]
    h, w = x.shape[0] // ph, x.shape[1] // pw
    y = np.zeros((h, w, kernel.shape[-1]))
    for i, j in np.ndindex(h, w):
        seen = x[i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
        y[i, j] = np.einsum("yxc,yxcd->d", seen, kernel)
    return y


class Numpy:
    """SPACH-MS in float64; `stats` are those after the batch where it trains."""

    def __init__(self, variables, fields, train=False, keep=None):
        variables = jax.tree.map(lambda x: np.array(x, np.float64), variables)
        self.params, self.stats = variables["params"], variables.get("batch_stats", {})
        self.fields, self.train, self.keep = fields, train, keep

    def __call__(self, batch):
        """Returns (logits, states)."""
        maps, states, block = self.stem(batch), dict[str, Any](), 0
        states["stem"] = maps
        counts = iter(self.fields["num_blocks"])
        for i, stage in enumerate(spach_ms.MIXINGS[self.fields["mixing"]]):
            maps = self.down(maps, self.params[f"down{i}"]) if i else maps
            for mixing in stage:
                for j in range(next(counts)):
                    p = self.params[f"stage{i}_{mixing}_{j}"]
                    maps = self.layer(maps, p, mixing, block)
                    states[f"block_{block}"] = maps
                    block += 1
            states[f"stage_{i + 1}"] = maps
        y = equations.layer_norm(maps, self.params["pre_head_layer_norm"])
        y = states["pre_logits"] = y.mean((1, 2))
        head = self.params["head"]
        return y @ head["kernel"] + head["bias"], states

    def stem(self, x):
        p, last = self.params["stem"], self.params["stem"]
        if self.fields["stem"] == "conv4":
            for i, stride in enumerate((2, 1, 1)):
                kernel = p[f"conv{i}"]["kernel"]
                x = np.stack([convolution(image, kernel, stride) for image in x])
                x = np.maximum(0, self.batch_norm(x, f"norm{i}"))
            last = p["conv3"]
        x = np.stack([patches(image, last["kernel"]) for image in x]) + last["bias"]
        return equations.layer_norm(x, self.params["stem_layer_norm"])

    def batch_norm(self, x, name):
        p, stats = self.params["stem"][name], self.stats["stem"][name]
        mean, variance = stats["mean"], stats["var"]
        if self.train:
            values = x.reshape(-1, x.shape[-1])
            mean, variance = values.mean(0), values.var(0)
            stats["mean"] = 0.9 * stats["mean"] + 0.1 * mean
            stats["var"] = 0.9 * stats["var"] + 0.1 * values.var(0, ddof=1)
        return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]

    def down(self, x, p):
        y = np.stack([patches(image, p["conv"]["kernel"]) for image in x])
        mean = y.mean((1, 2, 3), keepdims=True)
        variance = y.var((1, 2, 3), keepdims=True)
        y = (y - mean) / np.sqrt(variance + 1e-5)
        return y * p["norm"]["scale"] + p["norm"]["bias"]

    def layer(self, x, p, mixing, block):
        keep = np.ones((2, len(x))) if self.keep is None else self.keep[block]
        grid, heads = x.shape[1:3], self.fields["num_heads"]
        tokens = x.reshape(len(x), math.prod(grid), -1)
        states = [
            equations.layer(image, p, mixing, grid, heads, factors)
            for image, factors in zip(tokens, np.transpose(keep), strict=True)
        ]
        return np.stack(states).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "dtype", "error"),
    [(False, "float64", 1e-9), (True, "float64", 1e-9), (True, "float32", 1e-4)],
)
def test_the_model_is_its_equations(train, dtype, error, monkeypatch):
    """With noise and statistics, on a map that is no square."""
    with jax.enable_x64(dtype == "float64"):
        model = models.create("spach_ms", **HYBRID, run=Run(dtype=dtype))
        image = jnp.asarray(images(), dtype)
        variables = random_variables(model, image, dtype=dtype)
        keep = np.random.default_rng(3).choice([0, 1.25], (8, 2, len(image)))
        if train:
            noise = Noise(jnp.asarray(keep, dtype))
            monkeypatch.setattr(trunk, "draw", lambda *_, **__: noise)
        (logits, out), stats = jax.jit(
            lambda variables, image: model.apply(
                variables, image, train=train, mutable=["batch_stats"]
            )
        )(variables, image)
        theirs = Numpy(variables, HYBRID, train, keep if train else None)
        expected, states = theirs(np.asarray(image, np.float64))
        assert out.keys() == states.keys()
        for name, state in states.items():
            assert_close(out[name], state, error)
        assert_close(logits, expected, error)
        assert np.abs(expected).max() > 0.5
        jax.tree.map(
            lambda a, b: assert_close(a, b, error), stats["batch_stats"], theirs.stats
        )


def test_between_stages_all_values_of_an_image_are_normalised_together():
    """So neither its scale nor what is added to it matters, unlike to LayerNorm's."""
    with jax.enable_x64():
        x = jnp.asarray(images((4, 6), n=2)[..., :1] * np.ones(4))
        module = spach_ms.Down(8, Run(dtype="float64"))
        variables = random_variables(module, x)
        theirs = Numpy({"params": {}}, {}).down(
            np.asarray(x), jax.tree.map(np.asarray, variables["params"])
        )
        tokens: Any = module.apply(variables, x)
        found = jnp.moveaxis(tokens.reshape(2, 3, 2, 8), 2, 0)
        assert_close(found, theirs, 1e-12)
        y = module.apply(variables, 1e3 * x)
        assert_close(y, module.apply(variables, 2e3 * x), 1e-6)


# --- Sizes and fields -----------------------------------------------------------------


def test_without_an_mlp_of_tokens_it_takes_any_multiple_of_the_stride():
    fields = HYBRID | {"mixing": "hybrid", "num_blocks": (1,) * 7}
    model = models.create("spach_ms", **fields)
    variables = shapes(model)
    for size in ((16, 32), (48, 32), (32, 96)):
        logits, out = jax.eval_shape(model.apply, variables, jnp.zeros((2, *size, 3)))
        assert logits.shape == (2, 5)
        for i in range(4):
            h, w = size[0] // 2 ** (i + 1), size[1] // 2 ** (i + 2)
            assert out[f"stage_{i + 1}"].shape == (2, h, w, 4 * 2**i)


def test_an_mlp_of_tokens_is_tied_to_the_resolution():
    model = models.create("spach_ms", **SMALL, mixing="mlp", num_blocks=(1, 1, 1, 1))
    variables = shapes(model)
    params = variables["params"]
    # One token has one hidden unit, as the authors' code.
    small = shapes(model, (16, 32))["params"]["stage3_mlp_0"]["token_mixing"]
    assert small["Dense_0"]["kernel"].shape == (1, 1)
    hidden = params["stage1_mlp_0"]["token_mixing"]["Dense_0"]["kernel"].shape
    assert hidden == (32, 16)
    with pytest.raises(ValueError, match=r"128 tokens.*or take mixing 'conv'"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 64, 3)))


def test_the_rate_rises_over_the_layers_of_all_rows(monkeypatch):
    asked = []

    def draw(model, count, images, **how):
        asked.append((count, how["rates"], how["rescale"]))
        return Noise()

    monkeypatch.setattr(trunk, "draw", draw)
    shapes(models.create("spach_ms", **HYBRID, stochastic_depth=0.3))
    assert asked == [(8, (0.0, 0.3), True)]


@pytest.mark.parametrize(
    "size",
    [
        *("spach_ms_hybrid_s_plus", "spach_ms_hybrid_xs"),
        pytest.param("spach_ms_xxs_mlp", marks=pytest.mark.slow),
    ],
)
def test_shapes_tell_each_size(size):
    """But for heads and, of the stem conv4, patches: those are the size's."""
    model = models.create(size, num_classes=7)
    params = shapes(model, (32, 32))["params"]
    assert tree.model_of(params) == {"name": size, **models.fields(size)}


def test_weights_without_an_mlp_of_tokens_change_their_resolution_as_they_are():
    model = models.create("spach_ms", **HYBRID | {"stem": "conv1"})
    params = random_variables(model, jnp.zeros((1, *SIZE, 3)), dtype="float32")
    fields = tree.model_of(params["params"], num_heads=2)
    assert fields["patch_size"] == (2, 4)
    weights = pretrained.Weights(
        params["params"], "made here", image_size=SIZE, model=fields
    )
    wide = pretrained.resized(weights, (32, 32), "interpolate")
    assert wide.image_size == (32, 32)
    jax.tree.map(np.testing.assert_array_equal, wide.params, params["params"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_blocks": (1, 1, 1, 1)}, r"7 numbers for mixing 'hybrid': .*conv, conv"),
        ({"num_heads": 3}, "3; expected a divisor of hidden_dim, 4"),
        ({"num_heads": None}, "num_heads is None; expected a divisor"),
        ({"patch_size": (1, 2)}, r"\(1, 2\), of which the stem 'conv4' takes half"),
        ({"mixing": "pool"}, "mixing 'pool' is unknown"),
        ({"stem": "conv2"}, "stem 'conv2' is unknown"),
        ({"patch_size": (4, 8)}, "32 is not divisible by the last stage's stride 64"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, words):
    all_fields = HYBRID | {"mixing": "hybrid", "num_blocks": (1,) * 7} | fields
    with pytest.raises(ValueError, match=words):
        models.create("spach_ms", **all_fields, image_size=(32, 32))
