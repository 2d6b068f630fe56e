"""Laws of weights for another resolution: the paper's invariants, and resampling's."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimisers
import pytest
import scipy.fft
import set_up
from einops import rearrange

from mlp_mixer import models, sharding, steps
from mlp_mixer.data import pipeline
from mlp_mixer.models import layers
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.pretrained import resize

SMALL: dict[str, Any] = {
    "num_blocks": 2,
    "hidden_dim": 16,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 64,
    "num_classes": 5,
}


class Geometry(NamedTuple):
    patch: tuple[int, int]
    grid: tuple[int, int]

    def size(self, factor=1):
        h, w = (factor * g * p for g, p in zip(self.grid, self.patch, strict=True))
        return h, w


# Scaled down: tokens of S/16 (14x14), patches of H/14, and nothing square at all.
GEOMETRIES = {
    "s16": Geometry((2, 2), (14, 14)),
    "h14": Geometry((14, 14), (2, 2)),
    "rectangular": Geometry((4, 2), (3, 5)),
}
every_geometry = pytest.mark.parametrize(
    "geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys()
)
twice_and_thrice = pytest.mark.parametrize("factor", [2, 3])


def images(size, n=2, seed=1):
    shape = (n, *size, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# As read from a file.
random_params = functools.partial(set_up.random_params, writeable=False)


@functools.cache
def shapes(model, size):
    image = jnp.zeros((1, *size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]


def small(geometry, factor=1):
    """The model for a geometry, or for the grown one."""
    wide = {"tokens_mlp_dim": factor**2 * SMALL["tokens_mlp_dim"]}
    return MlpMixer(patch_size=geometry.patch, **SMALL | wide)


def both(geometry, factor):
    """The parameters of a small model, and those grown from them."""
    old = random_params(small(geometry), geometry.size())
    return old, resize.grow(old, factor, geometry.grid)


def token_mixing(params):
    return [
        params[f"MixerBlock_{i}"]["token_mixing"] for i in range(SMALL["num_blocks"])
    ]


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def forward(model, params, image):
    return jax.device_get(compiled(model)({"params": params}, image))


def parts(image, factor):
    """(n, h, w, 3) -> (factor², n, h / factor, w / factor, 3): row by row of parts."""
    return rearrange(image, "n (a h) (b w) x -> (a b) n h w x", a=factor, b=factor)


def on_parts(model, params, image, factor):
    """The old model's (logits, out) of every part, (factor², n, …)."""
    cut = parts(image, factor)
    result = forward(model, params, cut.reshape(-1, *cut.shape[2:]))
    return jax.tree.map(lambda x: x.reshape(*cut.shape[:2], *x.shape[1:]), result)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- grow: the paper's procedure ------------------------------------------------------


def part_major(geometry, factor):
    """inv[r]: where the token of raster index r lies part by part."""
    h, w = geometry.grid
    inv = []
    for y in range(factor * h):
        for x in range(factor * w):
            (a, i), (b, j) = divmod(y, h), divmod(x, w)
            inv.append((a * factor + b) * h * w + i * w + j)
    return np.array(inv)


@twice_and_thrice
@every_geometry
def test_grown_weights_are_the_block_diagonal_ones_in_raster_order(geometry, factor):
    old, new = both(geometry, factor)
    inv, k2 = part_major(geometry, factor), factor**2
    for i in range(SMALL["num_blocks"]):
        was, now = (p[f"MixerBlock_{i}"]["token_mixing"] for p in (old, new))
        expected = {
            "Dense_0": {
                "kernel": np.kron(np.eye(k2), was["Dense_0"]["kernel"])[inv],
                "bias": np.tile(was["Dense_0"]["bias"], k2),
            },
            "Dense_1": {
                "kernel": np.kron(np.eye(k2), was["Dense_1"]["kernel"])[:, inv],
                "bias": np.tile(was["Dense_1"]["bias"], k2)[inv],
            },
        }
        jax.tree.map(np.testing.assert_array_equal, now, expected)


@twice_and_thrice
@every_geometry
def test_every_part_is_processed_as_the_old_model_would(geometry, factor):
    old, new = both(geometry, factor)
    image = images(geometry.size(factor))
    _, out = forward(small(geometry, factor), new, image)
    _, expected = on_parts(small(geometry), old, image, factor)
    inv, tokens = part_major(geometry, factor), math.prod(geometry.grid)
    for state in ("stem", *(f"block_{i}" for i in range(SMALL["num_blocks"]))):
        by_part = expected[state][inv // tokens, :, inv % tokens]
        assert_close(out[state], by_part.swapaxes(0, 1))


@twice_and_thrice
@every_geometry
def test_features_and_logits_are_the_mean_over_the_parts(geometry, factor):
    old, new = both(geometry, factor)
    image = images(geometry.size(factor))
    logits, out = forward(small(geometry, factor), new, image)
    expected, of_parts = on_parts(small(geometry), old, image, factor)
    assert_close(out["pre_logits"], of_parts["pre_logits"].mean(0))
    assert_close(logits, expected.mean(0))


@twice_and_thrice
@every_geometry
def test_an_image_tiled_from_copies_gives_the_small_images_logits(geometry, factor):
    old, new = both(geometry, factor)
    image = images(geometry.size())
    tiled = np.tile(image, (1, factor, factor, 1))
    logits, _ = forward(small(geometry, factor), new, tiled)
    assert_close(logits, forward(small(geometry), old, image)[0])


@pytest.mark.parametrize("name", ["symmixer_s16", "ninformer_cifar"])
def test_relatives_of_mixer_read_a_tiled_image_as_the_small_one(name):
    """Also where a norm is over all tokens: those of copies have one mean."""
    small = SMALL | {"patch_size": (4, 2)}
    old_model = models.create(name, **small)
    old = random_params(old_model, (12, 10))
    wide = small | {"tokens_mlp_dim": 4 * SMALL["tokens_mlp_dim"]}
    new_model, new = models.create(name, **wide), resize.grow(old, 2, (3, 5))
    image = images((12, 10))
    logits, _ = forward(new_model, new, np.tile(image, (1, 2, 2, 1)))
    assert_close(logits, forward(old_model, old, image)[0])


@twice_and_thrice
@every_geometry
def test_exchanging_the_parts_of_an_image_leaves_the_logits(geometry, factor):
    _, new = both(geometry, factor)
    image = images(geometry.size(factor))
    order = np.random.default_rng(0).permutation(factor**2)
    exchanged = rearrange(
        parts(image, factor)[order], "(a b) n h w x -> n (a h) (b w) x", a=factor
    )
    model = small(geometry, factor)
    logits, _ = forward(model, new, image)
    assert_close(forward(model, new, exchanged)[0], logits)


@twice_and_thrice
@every_geometry
def test_without_the_permutation_tokens_and_logits_differ(geometry, factor):
    """Visibly, so that the laws above are laws about it."""
    old, new = both(geometry, factor)
    image = images(geometry.size(factor))
    model = small(geometry, factor)
    logits, out = forward(model, new, image)
    eye = np.eye(factor**2, dtype=np.float32)
    for was, now in zip(token_mixing(old), token_mixing(new), strict=True):
        for name in was:
            now[name] = {
                "kernel": np.kron(eye, was[name]["kernel"]),
                "bias": np.tile(was[name]["bias"], factor**2),
            }
    wrong, out_of_order = forward(model, new, image)
    assert np.abs(out_of_order["block_0"] - out["block_0"]).mean() > 0.3
    # A mean over random tokens hides much of it, yet not from the laws' tolerance.
    assert np.abs(wrong - logits).max() > 3e-3


@twice_and_thrice
@every_geometry
def test_the_zeros_between_the_parts_are_trained(geometry, factor):
    old, new = both(geometry, factor)
    model = small(geometry, factor)
    image = jnp.asarray(images(geometry.size(factor)))

    @jax.jit
    @jax.grad
    def gradients(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, image)[0]))

    grads = gradients(new)
    ones = resize.grow(jax.tree.map(np.ones_like, old), factor, geometry.grid)
    for i in range(SMALL["num_blocks"]):
        for name in ("Dense_0", "Dense_1"):
            inside = ones[f"MixerBlock_{i}"]["token_mixing"][name]["kernel"] == 1
            of_kernel = grads[f"MixerBlock_{i}"]["token_mixing"][name]["kernel"]
            assert np.mean(np.asarray(of_kernel)[~inside] != 0) > 0.99


# Computed from the paper's closed form: without head, with 1,000 classes.
PARAMETERS_AT_448 = {
    "mixer_s16": (30_068_352, 30_581_352),
    "mixer_b32": (66_313_776, 67_082_776),
    "mixer_b16": (86_227_392, 86_996_392),
    "mixer_l32": (224_018_016, 225_043_016),
    "mixer_l16": (279_475_584, 280_500_584),
    "mixer_h14": (588_442_368, 589_723_368),
}


@pytest.mark.parametrize("name", PARAMETERS_AT_448)
def test_models_of_448_pixels_have_the_papers_parameter_counts(name):
    wide = 4 * models.create(name).tokens_mlp_dim
    model = models.create(name, num_classes=1000, tokens_mlp_dim=wide)
    tree = shapes(model, (448, 448))
    counts = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tree.items()}
    total = sum(counts.values())
    assert (total - counts["head"], total) == PARAMETERS_AT_448[name]


@pytest.fixture(scope="module")
def s16():
    """Mixer-S/16 with all parameters random, and what it grows to for 448 pixels."""
    old = random_params(models.create("mixer_s16", num_classes=1000), (224, 224))
    return old, resize.grow(old, 2, (14, 14))


def test_mixer_s16_grows_to_the_shapes_of_its_448_pixel_model(s16):
    model = models.create("mixer_s16", num_classes=1000, tokens_mlp_dim=1024)
    expected = shapes(model, (448, 448))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), s16[1]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_mixer_s16_at_448_is_the_mean_of_its_quarters(s16):
    old, new = s16
    small_model = models.create("mixer_s16", num_classes=1000)
    large_model = models.create("mixer_s16", num_classes=1000, tokens_mlp_dim=1024)
    quarter, image = images((224, 224), 1), images((448, 448), 1)
    batch = np.concatenate([np.tile(quarter, (1, 2, 2, 1)), image])
    logits, out = forward(large_model, new, batch)
    cut = np.concatenate([quarter, *parts(image, 2)])
    expected, of_parts = forward(small_model, old, cut)
    assert_close(logits[0], expected[0])
    assert_close(out["pre_logits"][1], of_parts["pre_logits"][1:].mean(0))
    assert_close(logits[1], expected[1:].mean(0))


def test_a_grown_mixer_trains_and_its_parts_begin_to_see_each_other():
    losses, params = trained(lambda params: resize.grow(params, 2, (4, 4)))
    assert losses[-1] < 0.5 * losses[0]
    untouched = resize.grow(mixer_for((4, 4)), 2, (4, 4))
    for was, now in zip(token_mixing(untouched), token_mixing(params), strict=True):
        for name in was:
            between = was[name]["kernel"] == 0
            assert between.mean() == 0.75
            assert np.mean(now[name]["kernel"][between] != 0) > 0.99


# --- interpolate ----------------------------------------------------------------------


def resampled(field, old, new):
    """SciPy's cosine transform, cut or filled with zeros: (s, …) -> (t, …)."""
    spectrum = scipy.fft.dctn(field.reshape(*old, -1), axes=(0, 1), norm="forward")
    low = tuple(slice(min(n, m)) for n, m in zip(old, new, strict=True))
    padded = np.zeros((*new, spectrum.shape[-1]))
    padded[low] = spectrum[low]
    image = scipy.fft.idctn(padded, axes=(0, 1), norm="forward")
    return image.reshape(-1, *field.shape[1:])


def mixer_for(grid, seed=2):
    """A small model's random parameters for a grid of patches."""
    geometry = Geometry((2, 2), grid)
    return random_params(small(geometry), geometry.size(), seed)


RESIZES = [
    ((7, 7), (14, 14)),
    ((14, 14), (24, 24)),
    ((6, 4), (9, 7)),
    ((6, 4), (9, 4)),
    ((1, 5), (3, 8)),
]
every_resize = pytest.mark.parametrize(("old", "new"), RESIZES, ids=str)


@every_resize
def test_up_and_back_is_the_identity(old, new):
    params = mixer_for(old)
    up = resize.interpolate(params, new, grid=old)
    back = resize.interpolate(up, old, grid=new)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), back, params
    )


def test_growing_one_side_and_shrinking_the_other_keeps_what_both_grids_hold():
    params = mixer_for((6, 4))
    there = resize.interpolate(params, (3, 9), grid=(6, 4))
    back = resize.interpolate(there, (6, 4), grid=(3, 9))
    again = resize.interpolate(back, (3, 9), grid=(6, 4))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), again, there
    )


def test_one_step_equals_two():
    params = mixer_for((3, 4))
    two = resize.interpolate(params, (5, 6), grid=(3, 4))
    two = resize.interpolate(two, (11, 7), grid=(5, 6))
    one = resize.interpolate(params, (11, 7), grid=(3, 4))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), two, one
    )


@pytest.mark.parametrize("back", [False, True], ids=["up", "down"])
@every_resize
def test_weights_are_resampled_as_sums_of_cosines(old, new, back):
    if back:
        old, new = new, old
    params = mixer_for(old)
    scale = math.prod(old) / math.prod(new)
    for was, now in zip(
        token_mixing(params),
        token_mixing(resize.interpolate(params, new, grid=old)),
        strict=True,
    ):
        expected = {
            "Dense_0": {
                "kernel": scale * resampled(was["Dense_0"]["kernel"], old, new),
                "bias": was["Dense_0"]["bias"],
            },
            "Dense_1": {
                "kernel": resampled(was["Dense_1"]["kernel"].T, old, new).T,
                "bias": resampled(was["Dense_1"]["bias"], old, new),
            },
        }
        jax.tree.map(assert_close, now, expected)


def test_a_wave_is_sampled_at_the_new_patches_centres():
    """Across and down, on grids that share no centre: no shift, no turn."""
    old, new = (6, 4), (9, 7)

    def wave(grid):
        y, x = ((np.arange(n) + 0.5) / n for n in grid)
        return np.add.outer(2 * np.cos(2 * np.pi * y), np.cos(np.pi * x)).ravel()

    params = mixer_for(old)
    params["MixerBlock_0"]["token_mixing"]["Dense_1"]["bias"] = wave(old)
    up = resize.interpolate(params, new, grid=old)
    assert_close(up["MixerBlock_0"]["token_mixing"]["Dense_1"]["bias"], wave(new))


@pytest.mark.parametrize("new", [(9, 7), (3, 2), (2, 9)], ids=str)
def test_constants_stay_constant_and_sums_over_tokens_stay(new):
    params = mixer_for((6, 4))
    constant = jax.tree.map(np.ones_like, params)
    for now in token_mixing(resize.interpolate(constant, new, grid=(6, 4))):
        assert_close(now["Dense_0"]["kernel"], 24 / math.prod(new))
        assert_close(now["Dense_0"]["bias"], 1)
        assert_close(now["Dense_1"]["kernel"], 1)
        assert_close(now["Dense_1"]["bias"], 1)
    resampled = resize.interpolate(params, new, grid=(6, 4))
    for was, now in zip(token_mixing(params), token_mixing(resampled), strict=True):
        assert_close(now["Dense_0"]["kernel"].sum(0), was["Dense_0"]["kernel"].sum(0))


@every_resize
def test_resampling_tokens_then_mixing_is_mixing_then_resampling(old, new):
    """Through the model's own MLP, its GELU included, for any tokens and weights."""
    params = mixer_for(old)
    y = np.random.default_rng(0).normal(size=(math.prod(old), 2, 16))
    mlp = layers.MlpBlock(SMALL["tokens_mlp_dim"], axis=0)
    up = resize.interpolate(params, new, grid=old)
    for was, now in zip(token_mixing(params), token_mixing(up), strict=True):
        mixed = mlp.apply({"params": was}, jnp.float32(y))
        actual = mlp.apply({"params": now}, jnp.float32(resampled(y, old, new)))
        assert_close(actual, resampled(np.asarray(mixed), old, new))


def waves(grid, coefficients):
    """Half a wave per side at the most, at the points' centres: (2, 2, d) -> (s, d)."""
    y, x = (np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, [0, 1])) for n in grid)
    field = np.einsum("yi,xj,ijd->yxd", y, x, coefficients)
    return field.reshape(-1, field.shape[-1]).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), RESIZES[:3], ids=str)
def test_smooth_weights_see_the_same_in_a_larger_smooth_image(old, new):
    """The whole model, nearly: a patch of the larger image shows less of it. Features
    of different images differ seven times as much."""
    rng = np.random.default_rng(0)
    params = mixer_for(old)
    for mlp in token_mixing(params):
        d = len(mlp["Dense_0"]["bias"])
        fields = waves(old, rng.normal(size=(2, 2, 2 * d + 1)))
        mlp["Dense_0"]["kernel"] = 2 * fields[:, :d] / len(fields)
        mlp["Dense_1"]["kernel"] = fields[:, d:-1].T * d**-0.5
        mlp["Dense_1"]["bias"] = fields[:, -1]
    coefficients = rng.normal(size=(2, 2, 8 * 3))

    def features(params, grid):
        geometry = Geometry((2, 2), grid)
        size = geometry.size()
        image = np.tanh(waves(size, coefficients)).reshape(*size, 8, 3)
        image = np.ascontiguousarray(image.transpose(2, 0, 1, 3))
        return forward(small(geometry), params, image)[1]["pre_logits"]

    expected = features(params, old)
    actual = features(resize.interpolate(params, new, grid=old), new)
    spread = expected.std(0).mean()
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.14 * spread


def test_an_interpolated_mixer_trains():
    losses, _ = trained(lambda params: resize.interpolate(params, (6, 6), (4, 4)))
    assert losses[-1] < 0.5 * losses[0]


# --- Both -----------------------------------------------------------------------------


METHODS: dict[str, Any] = {
    "grow": lambda params: resize.grow(params, 2, (3, 4)),
    "up": lambda params: resize.interpolate(params, (5, 6), grid=(3, 4)),
    "down": lambda params: resize.interpolate(params, (2, 3), grid=(3, 4)),
}
every_method = pytest.mark.parametrize("change", METHODS.values(), ids=METHODS.keys())


def trained(change):
    """Losses of some steps of the real train step on one batch, from the changed
    parameters; and the parameters afterwards."""
    params = change(mixer_for((4, 4)))
    tokens, wide = params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"].shape
    side = 2 * math.isqrt(tokens)
    model = MlpMixer(patch_size=(2, 2), **SMALL | {"tokens_mlp_dim": wide})
    mesh = sharding.make_mesh(1)
    tx, _ = optimisers.create(learning_rate=1e-2, total_steps=100, warmup_steps=0)
    target = steps.state_shapes(
        model, tx, mesh, pipeline.example((side, side)), strategy="replicated"
    )
    train_step = steps.make_train_step(
        model,
        tx,
        mesh,
        target,
        loss="softmax_xent",
        seed=0,
        mixup=0.0,
        accumulate=1,
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8),
        "label": rng.integers(0, SMALL["num_classes"], 8),
    }
    # Copies: the step donates its state.
    params = jax.tree.map(jnp.array, params)
    state = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding),
        steps.TrainState(jnp.int32(0), params, {}, tx.init(params)),
        target,
    )
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, sharding.place_rows(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@every_method
def test_only_token_mixing_changes(change):
    params = mixer_for((3, 4))
    was, now = (
        dict(jax.tree_util.tree_leaves_with_path(tree))
        for tree in (params, change(params))
    )
    assert was.keys() == now.keys()
    changed = [path for path in was if now[path] is not was[path]]
    assert {path[1].key for path in changed} == {"token_mixing"}


@every_method
def test_the_input_is_not_modified(change):
    params = mixer_for((3, 4))
    copies = jax.tree.map(np.copy, params)
    new = change(params)
    for mlp in token_mixing(new):
        for leaf in jax.tree.leaves(mlp):
            if leaf.flags.writeable:
                leaf += 1
    jax.tree.map(np.testing.assert_array_equal, params, copies)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64], ids=str)
@every_method
def test_the_dtype_is_kept_and_rounded_once(change, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), mixer_for((3, 4)))
    new = change(params)
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(dtype)}
    exact = change(jax.tree.map(lambda x: x.astype(np.float64), params))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype)), new, exact
    )


@every_method
def test_arrays_are_contiguous_for_writers_of_raw_bytes(change):
    for leaf in jax.tree.leaves(change(mixer_for((3, 4)))):
        assert isinstance(leaf, np.ndarray)
        assert leaf.flags.c_contiguous


def test_device_arrays_are_taken_too():
    params = mixer_for((3, 4))
    for change in METHODS.values():
        on_device = change(jax.tree.map(jnp.asarray, params))
        jax.tree.map(np.testing.assert_array_equal, on_device, change(params))


def test_resized_chooses_the_procedure():
    params = mixer_for((3, 4))

    def resized(new_grid, how):
        return resize.resized(params, old_grid=(3, 4), new_grid=new_grid, how=how)

    equal = np.testing.assert_array_equal
    jax.tree.map(equal, resized((6, 8), "grow"), resize.grow(params, 2, (3, 4)))
    jax.tree.map(
        equal,
        resized((6, 8), "interpolate"),
        resize.interpolate(params, (6, 8), grid=(3, 4)),
    )
    for how in ("grow", "interpolate"):
        assert resized((3, 4), how) is params


def test_a_factor_of_one_changes_nothing():
    params = mixer_for((3, 4))
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, resize.grow(params, 1, (3, 4)), params)


# --- Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0, -2])
def test_growing_takes_factors_from_1_only(factor):
    with pytest.raises(ValueError, match=rf"factor is {factor}.*interpolate"):
        resize.grow(mixer_for((3, 4)), factor, (3, 4))


@pytest.mark.parametrize(
    ("new", "tries"),
    [
        ((9, 4), "6x8"),
        ((5, 6), "6x8"),
        ((2, 2), "6x8"),
        ((6, 9), "6x8 or 9x12"),
        ((8, 6), "6x8"),
    ],
    ids=str,
)
def test_grids_that_cannot_be_grown_to_name_the_nearest_and_interpolate(new, tries):
    said = f"{new[0]}x{new[1]}.*Try {tries}, or interpolate"
    with pytest.raises(ValueError, match=said):
        resize.resized(mixer_for((3, 4)), old_grid=(3, 4), new_grid=new, how="grow")


def test_an_unknown_method_names_the_known():
    with pytest.raises(ValueError, match="'interpolated' is unknown; try interpolate"):
        resize.resized(
            mixer_for((2, 2)), old_grid=(2, 2), new_grid=(4, 4), how="interpolated"
        )


CALLS: dict[str, Any] = {
    "grow": lambda params, grid: resize.grow(params, 2, grid),
    "interpolate": lambda params, grid: resize.interpolate(params, (5, 5), grid=grid),
    "resized": lambda params, grid: resize.resized(
        params, old_grid=grid, new_grid=(6, 8), how="grow"
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.mark.parametrize("grid", [(4, 4), (-3, -4)], ids=str)
@every_call
def test_a_grid_must_fit_the_tokens(call, grid):
    said = f"{grid[0]}x{grid[1]} patches.*12 tokens; try 3x4, 2x6, 1x12"
    with pytest.raises(ValueError, match=said):
        call(mixer_for((3, 4)), grid)


def test_a_new_grid_has_rows_and_columns():
    with pytest.raises(ValueError, match=r"new_grid is \(0, 4\); expected"):
        resize.interpolate(mixer_for((3, 4)), (0, 4), grid=(3, 4))


@every_call
def test_variables_instead_of_parameters_are_refused(call):
    with pytest.raises(ValueError, match=r"but params\. Try variables\['params'\]"):
        call({"params": mixer_for((3, 4))}, (3, 4))
