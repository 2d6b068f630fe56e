"""Hire-MLP is its authors' code, written again in NumPy and float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import models
from mlp_mixer.models import Run, moves
from mlp_mixer.models.hiremlp import HireBlock, RegionMlp
from mlp_mixer.models.model import Noise

# dtype, error relative to the largest value.
DTYPES = pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-9), ("float32", 1e-4)]
)
# Positions of a side, of a region, and a step: all that there are at 224 px.
REGIONS = [
    *((56, 4, 0), (56, 4, 2), (28, 3, 0), (28, 3, 2)),
    *((14, 3, 0), (14, 3, 1), (14, 3, 2), (7, 2, 0), (7, 2, 1)),
]
# Three blocks of one stage, with regions that do not tile the 4x5 positions.
ONE_STAGE: dict[str, Any] = {
    "hidden_dim": (4,),
    "num_blocks": (3,),
    "mlp_ratio": 2,
    "pixel": (3,),
    "step_stride": (3,),
    "step_dilation": (1,),
    "num_classes": 3,
}


def drawn(*shape, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_variables(module, *inputs, dtype="float64", seed=1):
    """All random, so that nothing hides behind a zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def draw(path, leaf):
        kind = path[-1].key
        value = rng.normal(size=leaf.shape)
        if kind == "kernel":
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif kind == "var":
            value = rng.uniform(1e-3, 1, leaf.shape)  # epsilon shows
        else:
            value = 0.3 * value + (kind == "scale")
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def in_numpy(variables):
    """Parameters and statistics of each module together, in float64."""
    merged: dict[str, Any] = {}
    for tree in variables.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            place = merged
            for key in path[:-1]:
                place = place.setdefault(key.key, {})
            place[path[-1].key] = np.asarray(leaf, np.float64)
    return merged


def assert_close(found, expected, error):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=error * np.abs(expected).max()
    )


# --- The authors' code, on (n, c, h, w) -----------------------------------------------


def conv1x1(x, p):
    y = np.einsum("nihw,io->nohw", x, p["kernel"])
    return y + p["bias"][:, None, None] if "bias" in p else y


def batch_norm(x, p):
    less, by = p["mean"], np.sqrt(p["var"] + 1e-5) / p["scale"]
    return (x - less[:, None, None]) / by[:, None, None] + p["bias"][:, None, None]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def along_rows(x, p, pixel, step):
    """mlp_h: the rows, one below the other, in regions of `pixel`."""
    n, c, h, w = x.shape
    extra = (pixel - h % pixel) % pixel
    y = np.pad(np.roll(x, step, 2), ((0, 0), (0, 0), (0, extra), (0, 0)), "wrap")
    y = y.reshape(n, c, -1, pixel, w).transpose(0, 1, 3, 2, 4)
    y = y.reshape(n, c * pixel, -1, w)
    y = np.maximum(batch_norm(conv1x1(y, p["Dense_0"]), p["BatchNorm_0"]), 0)
    y = conv1x1(y, p["Dense_1"]).reshape(n, c, pixel, -1, w).transpose(0, 1, 3, 2, 4)
    return np.roll(y.reshape(n, c, -1, w)[:, :, :h], -step, 2)


def along_columns(x, p, pixel, step):
    return along_rows(x.swapaxes(2, 3), p, pixel, step).swapaxes(2, 3)


def block(x, p, pixel, step):
    z = batch_norm(x, p["BatchNorm_0"])
    h = along_rows(z, p["mlp_h"], pixel, step)
    w = along_columns(z, p["mlp_w"], pixel, step)
    c = conv1x1(z, p["mlp_c"])
    a = (h + w + c).mean((2, 3), keepdims=True)
    a = conv1x1(gelu(conv1x1(a, p["fusion"]["Dense_0"])), p["fusion"]["Dense_1"])
    a = np.exp(a.reshape(len(x), -1, 3)).transpose(2, 0, 1)[..., None, None]
    a = a / a.sum(0)
    x = x + conv1x1(h * a[0] + w * a[1] + c * a[2], p["fusion"]["proj"])
    y = conv1x1(batch_norm(x, p["BatchNorm_1"]), p["channel_mixing"]["Dense_0"])
    return x + conv1x1(gelu(y), p["channel_mixing"]["Dense_1"])


def channels_first(x):
    return np.asarray(x, np.float64).transpose(0, 3, 1, 2)


# --- A branch, a block, a stage -------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2])
def test_a_branch_is_the_authors_for_every_region_size_and_step(axis):
    with jax.enable_x64():
        given, applied = [], []
        for size, pixel, step in REGIONS:
            x = drawn(2, *((size, 3) if axis == 1 else (3, size)), 4)
            module = RegionMlp(axis, pixel, False, Run("float64"))
            variables = random_variables(module, x, step)
            given.append((variables, x))
            applied.append(functools.partial(module.apply, step=step))
        # All at once: compiling is what takes long.
        found = jax.jit(
            lambda args: [f(*a) for f, a in zip(applied, args, strict=True)]
        )(given)
        numpy = along_rows if axis == 1 else along_columns
        for y, (variables, x), (_, pixel, step) in zip(
            found, given, REGIONS, strict=True
        ):
            expected = numpy(channels_first(x), in_numpy(variables), pixel, step)
            assert y.dtype == jnp.float64
            assert_close(channels_first(y), expected, 1e-13)


@DTYPES
def test_a_block_is_the_authors(dtype, error):
    with jax.enable_x64(dtype == "float64"):
        x = drawn(2, 4, 5, 8, dtype=dtype)
        module = HireBlock(3, 4, "exact", False, Run(dtype))
        variables = random_variables(module, x, Noise(), 2, dtype=dtype)
        y = jax.jit(module.apply)(variables, x, Noise(), 2)
        assert y.dtype == dtype
        expected = block(channels_first(x), in_numpy(variables), 3, 2)
        assert_close(channels_first(y), expected, error)


def one_stage(**fields):
    return models.create("hiremlp", **ONE_STAGE, **fields)


def test_each_block_of_a_stage_rolls_by_its_own_step():
    model, image = one_stage(), drawn(2, 16, 20, 3, dtype="float32")
    variables = random_variables(model, image, dtype="float32")
    _, out = jax.jit(model.apply)(variables, image)
    p, x = in_numpy(variables), channels_first(out["stem"])
    for i, step in enumerate([0, 1, 2]):
        x = block(x, p[f"stage0_block_{i}"], 3, step)
        assert_close(channels_first(out[f"block_{i}"]), x, 1e-4)
    np.testing.assert_array_equal(out["stage_1"], out["block_2"])


def test_a_scan_compiles_one_block_and_computes_all_of_them(monkeypatch):
    """Though they differ by their steps, which are then traced."""
    image, fold, folds = drawn(2, 16, 20, 3, dtype="float32"), moves.fold, []

    def counted(*given):
        folds.append(given)
        return fold(*given)

    monkeypatch.setattr(moves, "fold", counted)
    variables = random_variables(one_stage(), image, dtype="float32")

    def train(run):
        folds.clear()
        model = one_stage(run=run)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        return jax.jit(apply)(variables, image), len(folds)

    expected, each = train(Run())
    assert each == 2 * 3  # along rows and along columns
    found, once = train(Run(scan=True))
    assert once == 2
    jax.tree.map(functools.partial(assert_close, error=1e-5), found, expected)


@pytest.mark.parametrize(
    ("stage", "steps"),
    [(0, [0, 2] * 2), (1, [0, 2] * 3), (2, [0, 1, 2] * 8), (3, [0, 1, 0])],
)
def test_the_steps_of_the_stages_are_the_authors(stage, steps):
    np.testing.assert_array_equal(models.create("hiremlp_base").steps(stage), steps)


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patch_size": (2, 2)}, r"\(2, 2\), but the convolutions .* by \(4, 4\)"),
        ({"pixel": (4, 3, 3)}, r"pixel is \(4, 3, 3\), but num_blocks has 4 stages"),
        ({"step_stride": (2,)}, r"step_stride is \(2,\), but num_blocks has 4"),
        ({"image_size": (64, 48)}, "48 is not divisible by the last stage's stride 32"),
    ],
)
def test_fields_and_images_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        models.create("hiremlp_tiny", **{"image_size": (64, 64)} | fields)
