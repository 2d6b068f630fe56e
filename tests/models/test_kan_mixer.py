"""KAN layers are splines by the recursion, and both forms of the model its equations.

The references are in NumPy and float64.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline

from mlp_mixer import models, pretrained, sharding
from mlp_mixer.models import Run, kan_mixer, splines
from mlp_mixer.models.kan_mixer import Kan
from mlp_mixer.pretrained import resize, tree

KNOTS = -1 + 0.4 * (np.arange(12) - 3)
SMALL: dict[str, Any] = {
    "name": "kan_mixer",
    "patch_size": (2, 4),
    "num_blocks": 2,
    "hidden_dim": 6,
    "tokens_mlp_dim": 5,
    "channels_mlp_dim": 7,
    "num_classes": 3,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
}
SIZE = (4, 16)
forms = pytest.mark.parametrize("form", ["cheon", "canuto"])


def images(n=3):
    return np.random.default_rng(1).uniform(-1, 1, (n, *SIZE, 3))


@functools.cache
def random_params(form, **fields):
    """All parameters are random, so that nothing hides behind a zero."""
    model = models.create(**SMALL | {"form": form} | fields)
    image = jnp.zeros((1, *SIZE, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        one = path[-1].key == "scale" and "Norm" in str(path)
        return one + 0.4 * rng.normal(size=leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# --- The splines ----------------------------------------------------------------------


def by_recursion(x):
    """The 8 bases (8, …) by Cox and de Boor, from half-open cells."""
    x = np.asarray(x, np.float64)
    b = [np.float64((a <= x) & (x < z)) for a, z in itertools.pairwise(KNOTS)]
    for k in (1, 2, 3):
        b = [
            (x - KNOTS[i]) / (KNOTS[i + k] - KNOTS[i]) * b[i]
            + (KNOTS[i + k + 1] - x) / (KNOTS[i + k + 1] - KNOTS[i + 1]) * b[i + 1]
            for i in range(len(b) - 1)
        ]
    return np.stack(b)


def by_scipy(x, derivative=0):
    basis = [
        BSpline.basis_element(KNOTS[g : g + 5], extrapolate=False) for g in range(8)
    ]
    return np.stack([np.nan_to_num(b(x, derivative)) for b in basis])


def test_the_splines_are_those_of_the_recursion():
    x = np.random.default_rng(0).uniform(-2.5, 2.5, 20_000)
    np.testing.assert_allclose(by_recursion(x), by_scipy(x), rtol=0, atol=1e-14)
    single = np.asarray(splines.bases(jnp.float32(x)))
    np.testing.assert_allclose(single, by_recursion(np.float32(x)), rtol=0, atol=1e-6)
    with jax.enable_x64():
        double = splines.bases(jnp.asarray(x))
        np.testing.assert_allclose(double, by_recursion(x), rtol=0, atol=1e-14)


def test_the_gradient_of_the_splines_is_their_derivative():
    x = np.random.default_rng(0).uniform(-2.5, 2.5, 1000)
    with jax.enable_x64():
        back = jax.vjp(splines.bases, jnp.asarray(x))[1]
        for g, expected in enumerate(by_scipy(x, 1)):
            dy = jnp.zeros((8, 1000)).at[g].set(1)
            np.testing.assert_allclose(back(dy)[0], expected, rtol=0, atol=1e-13)


def test_the_splines_sum_to_one_inside_and_vanish_outside_of_the_knots():
    with jax.enable_x64():
        inside = splines.bases(jnp.linspace(-1, 1, 1001))
        np.testing.assert_allclose(inside.sum(0), 1, rtol=0, atol=1e-14)
        outside = jnp.array([-1e30, -3, KNOTS[0] - 1e-9, KNOTS[-1] + 1e-9, 3, 1e30])
        assert not splines.bases(outside).any()


# --- The layer ------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def kan(x, p):
    """One KAN layer along the last axis of `x`."""
    flat = lambda w, lead=(): w.reshape(*lead, -1, w.shape[-1])  # noqa: E731
    spline = flat(p["spline"], (8,)) * flat(p["scale"])
    return silu(x) @ flat(p["kernel"]) + np.einsum(
        "g...i,gio->...o", by_recursion(x), spline
    )


@pytest.mark.parametrize("axis", [0, -1])
def test_without_splines_the_layer_is_a_product_of_silu(axis):
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(4, 2, 4)), rng.normal(size=(4, 5))
    p = {"kernel": kernel, "spline": rng.normal(size=(8, 4, 5)), "scale": 0 * kernel}
    with jax.enable_x64():
        found = Kan(5, axis, Run("float64")).apply({"params": p}, jnp.asarray(x))
    expected = np.moveaxis(np.moveaxis(silu(x), axis, -1) @ kernel, -1, axis)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_the_first_splines_are_the_least_that_pass_through_small_noise():
    c = np.asarray(kan_mixer.fitted_noise(jax.random.key(0), (8, 50, 20), jnp.float32))
    knots = np.linspace(-1, 1, 6)
    at_knots = by_recursion(knots).T
    values = np.tensordot(at_knots, c, 1)
    assert 0.0099 < np.abs(values).max() <= 0.01 + 1e-7
    assert values.std() == pytest.approx(0.02 / 12**0.5, rel=0.02)
    least = np.tensordot(np.linalg.pinv(at_knots), values, 1)
    np.testing.assert_allclose(c, least, rtol=0, atol=1e-7)


# --- The model ------------------------------------------------------------------------


def normalise(x, p, axes):
    x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axes, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def reference(params, image, form):
    """The logits of images (n, h, w, 3); the state is (n, s, c)."""
    norm, axes = {"cheon": ("TokenChannelNorm", (1, 2)), "canuto": ("LayerNorm", 2)}[
        form
    ]
    z = ((image + 1) / 2 - SMALL["mean"]) / SMALL["std"]
    ph, pw = SMALL["patch_size"]
    patches = [
        z[:, i : i + ph, j : j + pw].reshape(len(z), -1)
        for i in range(0, SIZE[0], ph)
        for j in range(0, SIZE[1], pw)
    ]
    x, stem = np.stack(patches, 1), params["stem"]
    if form == "cheon":
        x = kan(x, stem)
    else:
        x = x @ stem["kernel"].reshape(x.shape[-1], -1) + stem["bias"]
    for i in range(SMALL["num_blocks"]):
        p = params[f"KanMixerBlock_{i}"]
        y = normalise(x, p[f"{norm}_0"], axes).swapaxes(1, 2)
        y = kan(kan(y, p["token_mixing_0"]), p["token_mixing_1"])
        x = x + y.swapaxes(1, 2)
        y = normalise(x, p[f"{norm}_1"], axes)
        x = x + kan(kan(y, p["channel_mixing_0"]), p["channel_mixing_1"])
    last = {"cheon": "pre_head_token_channel_norm", "canuto": "pre_head_layer_norm"}
    y = normalise(x, params[last[form]], axes).mean(1)
    head = params["head"]
    return kan(y, head) if form == "cheon" else y @ head["kernel"] + head["bias"]


@forms
def test_the_model_is_its_equations(form):
    image, params = images(), random_params(form)
    expected = reference(params, image, form)
    single = models.create(**SMALL, form=form, run=Run(mesh=sharding.make_mesh(1)))
    variables = {"params": jax.tree.map(np.float32, params)}
    found, _ = jax.jit(single.apply)(variables, np.float32(image))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)
    with jax.enable_x64():
        double = models.create(**SMALL, form=form, run=Run("float64"))
        found, _ = jax.jit(double.apply)({"params": params}, jnp.asarray(image))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * scale)


@forms
def test_the_axes_of_a_form_are_those_of_its_parameters(form):
    found = tree.shapes(random_params(form))
    axes = tree.layout(found, kan_mixer)
    expected = {name: len(letters) for name, letters in axes.items()}
    assert {name: len(shape) for name, shape in found.items()} == expected
    assert tree.geometry(found, kan_mixer)["form"] == form


def test_of_grey_images_the_first_channel_is_read():
    fields = SMALL | {"image_channels": 1, "mean": (0.4,), "std": (0.2,)}
    model, image = models.create(**fields), images().astype(np.float32)
    params = random_params("cheon", image_channels=1, mean=(0.4,), std=(0.2,))
    assert params["stem"]["kernel"].shape == (2, 4, 1, 6)
    apply = jax.jit(lambda x: model.apply({"params": params}, x)[0])
    other = np.stack([image[..., 0], -image[..., 1], 0 * image[..., 2]], -1)
    np.testing.assert_array_equal(apply(image), apply(other))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"form": "cheom"}, "form 'cheom' is unknown; try cheon, canuto"),
        ({"image_channels": 1}, "mean is .*; expected 1 numbers each"),
        ({"image_channels": 2}, "image_channels is 2; expected 1 or 3"),
        ({"std": (0.5,)}, r"std \(0.5,\); expected"),
    ],
)
def test_a_form_or_a_normalisation_that_there_is_not_is_refused(fields, words):
    model = models.create(**SMALL | fields)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))


@pytest.mark.parametrize(("classes", "channels"), [(100, 3), (10, 1)])
def test_counts_for_other_classes_and_for_grey_images_are_the_authors(
    classes, channels
):
    expected = {
        (100, 3): (407_040, 855_040, 1_873_920),
        (10, 1): (391_360, 823_680, 1_811_200),
    }
    of_channels = {f: (0.5,) * channels for f in ("mean", "std")}
    for size, count in zip(kan_mixer.SIZES, expected[classes, channels], strict=True):
        model = models.create(
            size, num_classes=classes, image_channels=channels, **of_channels
        )
        init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        assert sum(x.size for x in jax.tree.leaves(init)) == count


def test_a_new_head_of_zeros_learns_in_all_its_parts():
    params = random_params("cheon")
    target = params | {"head": random_params("cheon", num_classes=4)["head"]}
    head = pretrained.merge(params, target)["head"]
    features = jax.random.normal(jax.random.key(4), (5, 6))
    towards = jax.random.normal(jax.random.key(5), (5, 4))

    def logits(head) -> Any:
        return Kan(4).apply({"params": head}, features)

    gradient = jax.jit(jax.grad(lambda head: (towards * logits(head)).sum()))
    first = gradient(head)
    assert not logits(head).any()
    assert first["kernel"].all()
    assert np.count_nonzero(first["spline"]) > 50
    then = gradient(jax.tree.map(jnp.add, head, first))
    assert then["scale"].all()


def test_it_cannot_be_resized():
    with pytest.raises(ValueError, match="kan_mixer cannot be resized: on each edge"):
        resize.resized(
            random_params("cheon"), old_grid=(2, 4), new_grid=(4, 8), how="interpolate"
        )


def kept_for_the_backward_pass(remat, blocks):
    """Number of values that the backward pass is given, but for the parameters."""
    fields = SMALL | {"num_blocks": blocks}
    model = models.create(**fields, run=Run(remat=remat))
    image = jnp.zeros((4, *SIZE, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    forward = lambda p: model.apply({"params": p}, image, train=True)[0]  # noqa: E731
    kept = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    return sum(x.size for x in jax.tree.leaves(kept) if 4 in x.shape)


def test_with_pre_gelu_a_layer_keeps_its_inputs_and_no_splines():
    """Of four KANs the inputs, two of them outputs of a norm, and the block's input."""
    added = {
        remat: kept_for_the_backward_pass(remat, 2)
        - kept_for_the_backward_pass(remat, 1)
        for remat in ("none", "pre_gelu")
    }
    s, n, c, ds, dc = 8, 4, 6, 5, 7
    assert added["pre_gelu"] == n * (3 * s * c + ds * c + s * dc)
    assert added["none"] > 8 * n * (2 * s * c + ds * c + s * dc)
