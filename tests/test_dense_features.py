"""The maps of a pyramid's stages: in a dict, in a file for each image, in an export."""

import functools
import logging
import os
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from set_up import random_params

from mlp_mixer import (
    export,
    models,
    predict,
    pretrained,
    recipe,
    runs,
    sharding,
    steps,
)
from mlp_mixer.data import decoding, image_ops
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.models.model import Model


class Pooling(Model):
    """A pyramid without a parameter: each stage is the mean of its pixels, doubled."""

    num_blocks: tuple[int, ...]

    def __call__(self, image, *, train=False):
        self.check_image(image)
        out = {}
        for i in range(4):
            side = self.patch_size[0] * 2**i
            n, h, w, c = image.shape
            cut = image.reshape(n, h // side, side, w // side, side, c)
            x = 2.0 ** (i + 1) * cut.mean((2, 4)).astype(self.run.dtype)
            out[f"stage_{i + 1}"] = x
        out["pre_logits"] = image.mean((1, 2))
        return out["pre_logits"], out


SIZE = (32, 64)


def opened(model):
    mesh = sharding.make_mesh()
    return runs.Opened(
        origin="toy",
        model=model,
        mesh=mesh,
        predict=steps.make_predict(model, mesh),
        variables={"params": {}},
        image_size=SIZE,
        preprocess="vision_transformer",
        class_names=("red", "green", "blue"),
        config=None,
        step=None,
    )


PYRAMID = Pooling(patch_size=(4, 4), num_blocks=(1,) * 4, num_classes=3)
MIXER = MlpMixer((4, 4), 1, 16, 8, 64, num_classes=3)


def write_images(folder, names):
    """Images of different sizes and noise; returns their paths."""
    paths = [os.path.join(folder, name) for name in names]
    for i, path in enumerate(paths):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i, 40 - i, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    return paths


def expected(path):
    """The stages of an image, by hand."""
    with open(path, "rb") as file:
        image = decoding.decode(file.read())
    image = image_ops.preprocess(image, "vision_transformer", SIZE)
    _, out = PYRAMID.apply({}, jnp.float32(image[None]) / 127.5 - 1)
    return {name: x[0] for name, x in out.items() if name.startswith("stage_")}


# --- The function ---------------------------------------------------------------------


def test_features_are_the_maps_of_the_stages():
    image = jnp.sin(jnp.arange(2 * 64 * 32 * 3.0)).reshape(2, 64, 32, 3)
    found = jax.jit(models.features, static_argnums=0)(PYRAMID, {}, image)
    assert [*found] == ["stage_1", "stage_2", "stage_3", "stage_4"]
    for i, (name, x) in enumerate(found.items()):
        assert x.shape == (2, 16 // 2**i, 8 // 2**i, 3)
        np.testing.assert_allclose(x, PYRAMID.apply({}, image)[1][name], atol=1e-6)


def test_a_model_without_stages_says_who_has_them():
    image = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"^mixer has no stages: .* of smlpnet"):
        models.features(MIXER, {}, image)
    assert "smlpnet" in models.pyramids()
    assert not {"mixer", "spach", "imlp"} & {*models.pyramids()}


# --- Every pyramid --------------------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[1]
# Those with weights of positions, so that no other size or place is read by them.
TIED = {
    "smlpnet": "a matrix mixes the positions of a row, and one those of a column",
    "spach_ms": "an MLP mixes all positions",
}
WORDS = recipe.run_file(f"{ROOT}/configs/family/digits.py")["MODELS"]
PYRAMIDS = {
    word: fields["model"]
    for word, fields in WORDS.items()
    if isinstance(fields["model"]["num_blocks"], tuple)
}


def shapes(model, size):
    image = jnp.zeros((1, *size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image)


def shallow(fields):
    """The model of some fields, with one block in each stage."""
    once = tuple(1 for _ in fields["num_blocks"])
    fields = {k: v for k, v in fields.items() if k != "image_size"}
    return models.create(**fields | {"num_blocks": once})


def fresh(tree):
    """Statistics as training begins with them, and zeros."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, path[-1].key == "var", np.float32), tree
    )


# Tracing alone takes a second; the quick suite does one of them.
ONE_FIRST = [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "cyclemlp"))
    for name in models.pyramids()
]


@pytest.mark.parametrize("name", ONE_FIRST)
def test_features_have_the_stated_shapes_at_three_sizes(name):
    """Those of a published size."""
    size, fields = next(iter(models.family(name).SIZES.items()))
    model = shallow({"name": size, **fields})
    c = fields["hidden_dim"]
    channels = c if isinstance(c, tuple) else tuple(c * 2**i for i in range(4))
    given = None
    for height, width in ((224, 224), (256, 320), (512, 512)):
        if given is None or name in TIED:
            given = shapes(model, (height, width))
        image = jnp.zeros((2, height, width, 3))
        found = jax.eval_shape(functools.partial(models.features, model), given, image)
        assert {name: x.shape for name, x in found.items()} == {
            f"stage_{i + 1}": (2, height // side, width // side, channels[i])
            for i, side in enumerate((4, 8, 16, 32))
        }


@pytest.mark.slow
@pytest.mark.parametrize("word", PYRAMIDS)
def test_what_is_tied_to_positions_is_known(word):
    model = shallow(PYRAMIDS[word])
    tied = shapes(model, (64, 64)) != shapes(model, (128, 128))
    assert tied == (word in TIED)


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in PYRAMIDS if word not in TIED])
def test_features_move_with_the_image(word):
    """By one position of the last stage for its 32 pixels, away from borders.

    The image is constant but for its middle, since CycleMLP and Hire-MLP weight their
    branches by means over the whole map, and SPACH-MS compares all positions. Hire-MLP
    mixes groups of 4, 3, 3 and 2 positions in its stages: 192 pixels are whole groups
    of each of them.
    """
    pixels, side = (192, 960) if word == "hiremlp" else (32, 768)
    model = shallow(PYRAMIDS[word])
    given = fresh(shapes(model, (64, 64)))
    given |= {"params": random_params(model, (64, 64))}
    image = np.full((side, side, 3), 0.3, np.float32)
    at = slice((side - 64 - pixels) // 2, (side + 64 - pixels) // 2)
    image[at, at] = np.random.default_rng(0).uniform(-1, 1, (64, 64, 3))
    images = [image, np.roll(image, pixels, 0), np.roll(image, pixels, 1)]
    dense = jax.jit(models.features, static_argnums=0)
    here, below, right = dense(model, given, np.stack(images))["stage_4"]
    border, by = 10, pixels // 32
    inner = slice(border, side // 32 - border - by)
    moved = slice(border + by, side // 32 - border)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    size = here[inner, inner].std(axis=(0, 1)).max()
    assert size > 0.01
    close(below[moved, inner] / size, here[inner, inner] / size)
    close(right[inner, moved] / size, here[inner, inner] / size)


# --- Predict --------------------------------------------------------------------------


def test_every_image_gets_a_file_of_its_stages(tmp_path, caplog):
    """Eleven: more than one batch of a device each, and padded rows."""
    names = [*(f"a/{i}.png" for i in range(9)), "a/b/0.png", "b/0.png"]
    paths = write_images(tmp_path / "images", names)
    broken = tmp_path / "images/a/broken.png"
    broken.write_bytes(b"not an image")
    folder = tmp_path / "stages"
    model = opened(PYRAMID)
    files = predict.find_images([str(tmp_path / "images")])
    with caplog.at_level(logging.INFO):
        assert predict.run(files, model, features=str(folder)) == 1
    assert f"Wrote the stages of 11 images to {folder}." in caplog.text
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
    assert found == sorted(f"{name}.npz" for name in names)
    for name, path in zip(names, paths, strict=True):
        with np.load(folder / f"{name}.npz") as file:
            assert file["path"].shape == ()
            assert str(file["path"]) == path
            assert {*file} == {"path", *models.stage_names(PYRAMID)}
            for stage, x in expected(path).items():
                assert file[stage].dtype == np.float32
                np.testing.assert_allclose(file[stage], x, atol=1e-5)


def test_stages_are_written_in_float32_whatever_they_are_computed_in(tmp_path):
    (path,) = write_images(tmp_path, ["0.png"])
    model = opened(PYRAMID.clone(run=models.Run("bfloat16")))
    predict.run([path], model, features=str(tmp_path / "stages"))
    with np.load(tmp_path / "stages/0.png.npz") as file:
        assert file["stage_4"].dtype == np.float32
        right = expected(path)["stage_4"]
        np.testing.assert_allclose(file["stage_4"], right, atol=0.1)


def test_a_batch_is_written_before_the_next_one_is_read(tmp_path, monkeypatch):
    """So memory does not grow with the number of images."""
    paths = write_images(tmp_path / "images", [f"{i:02}.png" for i in range(20)])
    folder, there = tmp_path / "stages", []
    original = steps.make_predict

    def watched(*args, **options):
        compute = original(*args, **options)

        def forward(*args):
            there.append(len(list(folder.rglob("*.npz"))))
            return compute(*args)

        return forward

    monkeypatch.setattr(steps, "make_predict", watched)
    in_batches = functools.partial(predict.classify, batch_size=8)
    monkeypatch.setattr(predict, "classify", in_batches)
    predict.run(paths, opened(PYRAMID), features=str(folder))
    assert there == [0, 8, 16]


def test_two_images_never_get_the_same_file(tmp_path, monkeypatch):
    """Nor does a name leave the folder, or an ending get lost."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("here/below")
    os.symlink(tmp_path / "here/below", "link")
    files = [
        *("here/0.png", "here/0.jpg", "here/below/0.png", "0.png"),
        *("link/../1.png", "1.png", str(tmp_path / "2.png"), "here/../3.png"),
        *("link/4.png", "no/such/5.png", os.fsdecode(b"here/\xff.png")),
    ]
    found = predict.stage_files(files, "out")
    assert found == {
        "here/0.png": "out/here/0.png.npz",
        "here/0.jpg": "out/here/0.jpg.npz",
        "here/below/0.png": "out/here/below/0.png.npz",
        "0.png": "out/0.png.npz",
        "link/../1.png": "out/here/1.png.npz",
        "1.png": "out/1.png.npz",
        str(tmp_path / "2.png"): "out/2.png.npz",
        "here/../3.png": "out/3.png.npz",
        "link/4.png": "out/here/below/4.png.npz",
        "no/such/5.png": "out/no/such/5.png.npz",
        os.fsdecode(b"here/\xff.png"): os.fsdecode(b"out/here/\xff.png.npz"),
    }
    assert predict.stage_files(["here/below/0.png"], "x/../out") == {
        "here/below/0.png": "out/0.png.npz"
    }


def test_a_name_of_any_bytes_is_kept_in_the_file_too(tmp_path):
    (path,) = write_images(tmp_path / "images", [os.fsdecode(b"caf\xe9\n\xff.png")])
    predict.run([path], opened(PYRAMID), features=str(tmp_path / "stages"))
    (written,) = os.listdir(tmp_path / "stages")
    assert written == f"{os.path.basename(path)}.npz"
    with np.load(tmp_path / "stages" / written) as file:
        assert str(file["path"]) == path


def test_a_folder_with_anything_in_it_stays_as_it_is(tmp_path):
    (path,) = write_images(tmp_path / "images", ["0.png"])
    model = opened(PYRAMID)
    (tmp_path / "file").write_text("of another day")
    for name in ("images", "file"):
        with pytest.raises(FileExistsError, match=r"is not empty, .*; name a new"):
            predict.run([path], model, features=str(tmp_path / name))
    assert os.listdir(tmp_path / "images") == ["0.png"]
    assert (tmp_path / "file").read_text() == "of another day"
    (tmp_path / "empty").mkdir()
    predict.run([path], model, features=str(tmp_path / "empty"))
    assert os.listdir(tmp_path / "empty") == ["0.png.npz"]


def test_without_stages_the_message_says_what_to_write(tmp_path):
    (path,) = write_images(tmp_path, ["0.png"])
    said = r"mixer has no stages.* End it in \.npz .*--features=stages\.npz"
    with pytest.raises(ValueError, match=said):
        predict.run([path], opened(MIXER), features="stages")


def test_of_a_pyramid_a_file_holds_its_pre_logits(tmp_path):
    paths = write_images(tmp_path, ["0.png", "1.png"])
    predict.run(paths, opened(PYRAMID), features=str(tmp_path / "f.npz"))
    with np.load(tmp_path / "f.npz") as file:
        assert file["features"].shape == (2, 3)


@pytest.fixture(scope="module")
def s2mlp(tmp_path_factory):
    """Weights of a model that takes images of any size, and of one that does not."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"patch_size": (4, 4), "num_blocks": 1, "hidden_dim": 8}
    sizes |= {"channels_mlp_dim": 8}
    for name, own in (("s2mlp_wide", {}), ("mixer_s16", {"tokens_mlp_dim": 8})):
        fields: dict[str, Any] = {"name": name, **sizes, **own}
        model = models.create(**fields, num_classes=3)
        shapes = jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
        )
        params = jax.tree.map(lambda x: np.ones(x.shape, "f4"), shapes["params"])
        weights = pretrained.Weights(params, "", model=fields, image_size=(16, 16))
        pretrained.write_safetensors(weights, folder / f"{name}.safetensors")
    return folder


def test_predictions_have_stages_only_if_the_model_does(s2mlp, tmp_path):
    paths = write_images(tmp_path, ["0.png"])
    with pytest.raises(ValueError, match="mixer has no stages"):
        predict.predict(s2mlp / "mixer_s16.safetensors", paths, stages=True)
    model = opened(PYRAMID)
    (without,) = predict.classify(model, paths, top=1)
    (image,) = predict.classify(model, paths, top=1, stages=True)
    assert without.stages == {}
    assert [*image.stages] == [*models.stage_names(PYRAMID)]
    assert image.stages["stage_4"].shape == (1, 2, 3)


def test_another_image_size_is_given_to_a_model_that_takes_any(s2mlp):
    path = s2mlp / "s2mlp_wide.safetensors"
    assert runs.open_model(path).image_size == (16, 16)
    model = runs.open_model(path, image_size=(32, 24))
    assert model.image_size == (32, 24)
    with pytest.raises(ValueError, match="image_size 30 is not divisible"):
        runs.open_model(path, image_size=(30, 24))
    with pytest.raises(ValueError, match=r"makes 48 tokens .* weights are for 16"):
        runs.open_model(s2mlp / "mixer_s16.safetensors", image_size=(32, 24))


# --- Export ---------------------------------------------------------------------------


def test_an_export_of_a_model_without_stages_has_none(s2mlp, tmp_path):
    weights = pretrained.read(s2mlp / "mixer_s16.safetensors")
    with pytest.raises(ValueError, match="mixer has no stages"):
        export.export_stablehlo(weights, tmp_path / "m.stablehlo", stages=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_an_export_gives_the_stages_at_another_size_too(tmp_path):
    fields = PYRAMIDS["cyclemlp"] | {"num_blocks": (1, 1, 1, 1), "image_size": (64, 32)}
    size = fields.pop("image_size")
    model = models.create(**fields)
    weights = pretrained.Weights(
        random_params(model, (32, 32)), "random", model=fields, image_size=size
    )
    path = tmp_path / "m.stablehlo"
    export.export_stablehlo(weights, path, gradients=False, stages=True)
    image = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype("f4")
    found = jax.export.deserialize(path.read_bytes()).call(image)
    assert found.keys() == {"pre_logits", *models.stage_names(model)}
    dense = jax.jit(models.features, static_argnums=0)
    for stage, x in dense(model, weights.variables, image).items():
        np.testing.assert_allclose(found[stage], x, atol=1e-4)
