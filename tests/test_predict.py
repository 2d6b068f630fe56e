"""What is on images: the model's own softmax, in every form, and nothing silent.

The command line itself, on a trained run, is in test_programs.
"""

import csv
import functools
import io
import json
import logging
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from odd_names import NAMES as ODD_NAMES

from mlp_mixer import (
    checkpoint,
    predict,
    pretrained,
    recipe,
    runs,
    text,
    visualize,
    workdir,
)
from mlp_mixer.data import decoding, image_ops
from mlp_mixer.models.mixer import MlpMixer

SIZE = (16, 16)
NAMES = (
    "ant",
    "bumblebee",
    'a "big" cat, tom',
    "dog",
    "eels",
    "foxes",
    "gnu",
    "hen house",
)


@pytest.fixture(scope="module")
def params():
    model = MlpMixer((4, 4), 1, 16, 8, 64, num_classes=len(NAMES))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes["params"]
    )
    params["head"]["kernel"] *= 20  # or images would hardly differ
    return params


@pytest.fixture(scope="module")
def weights(params, tmp_path_factory):
    """A file that says everything about itself."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    known = {"class_names": NAMES, "preprocess": "vision_transformer"}
    pretrained.write_safetensors(pretrained.Weights(params, "", **known), path)
    return str(path)


def write_images(folder, names):
    """Images of different sizes and noise."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i, 30 - i, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven: more than one batch of a device each."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [*(f"{i}.png" for i in range(9)), "z/10.png", "z/y/11.PNG"])
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def some(images):
    return [str(images / f"{i}.png") for i in range(3)]


def written(images, *, weights, **options):
    """(how many images, how many of them are broken), as the command line does it."""
    files = predict.find_images(images)
    model_options = {k: options.pop(k) for k in ("step", "labels") if k in options}
    model = runs.open_model(weights, **model_options)
    return len(files), predict.run(files, model, **options)


@functools.cache
def applied(gelu):
    model = MlpMixer((4, 4), 1, 16, 8, 64, gelu, num_classes=len(NAMES))
    return jax.jit(model.apply)


def seen_by_the_model(path, protocol):
    image = decoding.decode(pathlib.Path(path).read_bytes())
    image = image_ops.preprocess(image, protocol, SIZE)
    return jnp.asarray(image[None], jnp.float32) / 127.5 - 1


def by_hand(params, path, protocol):
    """Class probabilities and features, image by image, with nothing of predict.py."""
    image = seen_by_the_model(path, protocol)
    logits, out = applied("tanh")({"params": params}, image)
    return np.asarray(jax.nn.softmax(logits[0])), np.asarray(out["pre_logits"][0])


# --- What is predicted ----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_prediction_is_the_softmax_of_the_model(weights, params, images, batch_size):
    found = list(predict.predict(weights, [images], top=3, batch_size=batch_size))
    assert [os.path.relpath(p.path, images) for p in found] == [
        *(f"{i}.png" for i in range(9)),
        *("z/10.png", "z/y/11.PNG"),
    ]
    for one in found:
        p, features = by_hand(params, one.path, "vision_transformer")
        best = np.argsort(-p)[:3]
        assert one.indices == tuple(best)
        assert one.classes == tuple(NAMES[k] for k in best)
        np.testing.assert_allclose(one.probabilities, p[best], rtol=1e-4)
        np.testing.assert_allclose(one.features, features, rtol=1e-4, atol=1e-5)
        assert one.features.dtype == np.float32
    # Or the above would hold for a constant model.
    assert len({one.classes for one in found}) > 1


def test_a_run_is_a_source_and_its_evaluation_says_the_protocol(
    tiny, params, some, tmp_path
):
    tiny.model.update(num_blocks=1, hidden_dim=16, tokens_mlp_dim=8)
    tiny.model.channels_mlp_dim = 64
    tiny.evals.val = recipe.evaluation("val", preprocess="paper-resize-crop")
    workdir.claim(tiny, tmp_path, NAMES)
    folder = tmp_path / "checkpoints"
    for step, factor in ((1, 1.0), (2, 0.0)):
        with checkpoint.Checkpointer(folder, every_steps=1) as saver:
            tree = jax.tree.map(lambda x, f=factor: jnp.asarray(f * x), params)
            saver.save(step, {"params": tree}, force=True)
    model = runs.open_model(tmp_path, step=1)
    assert (model.preprocess, model.image_size) == ("paper-resize-crop", SIZE)
    assert model.class_names == NAMES
    for one in predict.predict(tmp_path, some, step=1, top=8):
        p, _ = by_hand(params, one.path, "paper-resize-crop")
        np.testing.assert_allclose(one.probabilities, -np.sort(-p), rtol=1e-4)
    (newest,) = predict.predict(tmp_path, some[:1])
    np.testing.assert_allclose(newest.probabilities, 1 / 8, rtol=1e-6)
    # Evaluation and prediction call the classes of TFDS's imagenet2012 alike.
    ids = ("n01440764", "n01443537", *(f"n0149{i}" for i in (1361, 4475, 6331, 8041)))
    (tmp_path / "class_names.json").write_text(
        json.dumps((*ids, "n01514668", "n01514859"))
    )
    names = runs.open_model(tmp_path, step=1).class_names
    assert names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")


def test_a_file_that_says_nothing_gets_the_authors_protocol(params, some, tmp_path):
    path = tmp_path / "w.npz"
    pretrained.write_npz(pretrained.Weights(params, ""), path)
    for protocol in (None, "timm"):
        (one,) = predict.predict(path, some[:1], preprocess=protocol, top=8)
        p, _ = by_hand(params, one.path, protocol or "big_vision")
        np.testing.assert_allclose(one.probabilities, -np.sort(-p), rtol=1e-4)
        assert one.classes == tuple(f"class {k}" for k in one.indices)
    with pytest.raises(ValueError, match="protocol 'tim' is unknown; try timm"):
        list(predict.predict(path, some, preprocess="tim"))


def test_the_exact_gelu_of_timms_models_is_computed(params, some, tmp_path):
    path = tmp_path / "timm.safetensors"
    written = pretrained.Weights(params, "", model={"gelu": "exact"})
    pretrained.write_safetensors(written, path, names="timm")
    (one,) = predict.predict(path, some[:1])
    image = seen_by_the_model(one.path, "big_vision")
    away = {
        gelu: np.abs(
            applied(gelu)({"params": params}, image)[1]["pre_logits"][0] - one.features
        ).max()
        for gelu in ("exact", "tanh")
    }
    assert away["exact"] < away["tanh"] / 10


def test_synset_ids_are_shown_as_words(params, some, tmp_path):
    ids = ("n01440764", "n02123045", "n15075141", "n02012849", "n03126707")
    known = {"class_names": (*ids, "n01443537", "n01484850", "n01491361")}
    path = tmp_path / "w.safetensors"
    pretrained.write_safetensors(pretrained.Weights(params, "", **known), path)
    (one,) = predict.predict(path, some[:1], top=8)
    called = dict(zip(one.indices, one.classes, strict=True))
    assert called[0] == "tench, Tinca tinca"
    assert called[1] == "tabby, tabby cat"
    assert (called[3], called[4]) == ("crane (n02012849)", "crane (n03126707)")
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join(f"name {i}" for i in range(8)))
    (one,) = predict.predict(path, some[:1], labels=labels)
    assert one.classes == tuple(f"name {i}" for i in one.indices)


# --- What is written ------------------------------------------------------------------


def test_foreign_weights_predict_as_they_were_trained(params, some, tmp_path, caplog):
    """Here for images normalised as ImageNet's often are: their config.json says so."""
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    model = pretrained.Weights(params, "made", model={"gelu": "exact"})
    pretrained.write_safetensors(model, tmp_path / "t.safetensors", names="timm")
    arrays = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    kernel = arrays["stem.proj.weight"] * (2 * std[:, None, None])
    arrays["stem.proj.weight"] = kernel.astype(np.float32)
    bias = arrays["stem.proj.bias"] + np.einsum("crhw,r->c", kernel, (mean - 0.5) / std)
    arrays["stem.proj.bias"] = bias.astype(np.float32)
    foreign = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, foreign)

    def probabilities(source):
        found = predict.predict(source, some, preprocess="vision_transformer", top=8)
        ranked = [dict(zip(x.indices, x.probabilities, strict=True)) for x in found]
        return np.array([[one[k] for k in range(len(NAMES))] for one in ranked])

    expected = probabilities(tmp_path / "t.safetensors")
    assert np.abs(probabilities(foreign) - expected).max() > 0.01
    assert "model.safetensors does not say what its images" in caplog.text
    caplog.clear()
    said = {"mean": list(mean), "std": list(std)}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": said}))
    np.testing.assert_allclose(probabilities(foreign), expected, atol=1e-5)
    assert "does not say" not in caplog.text


def test_csv_is_clean_and_holds_what_was_predicted(weights, some, capsys):
    assert written(some, weights=weights, format="csv", top=2) == (3, 0)
    said = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(said)))
    columns = ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert said.splitlines()[0] == ",".join(columns)
    for row, one in zip(rows, predict.predict(weights, some, top=2), strict=True):
        values = [one.path, one.classes[0], one.classes[1]]
        assert [row[c] for c in ("path", "class_1", "class_2")] == values
        numbers = [float(row["probability_1"]), float(row["probability_2"])]
        assert numbers == pytest.approx(one.probabilities, rel=1e-5)


def test_names_may_hold_commas_and_quotes(weights, some, capsys):
    written(some, weights=weights, format="csv", top=99)
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert all(len(row) == len(header) == 17 for row in rows)
    assert all(NAMES[2] in row for row in rows)


def test_jsonl_says_how_it_came_about(weights, some, tmp_path, capsys):
    path = tmp_path / "new" / "out.jsonl"
    written(some, weights=weights, format="jsonl", top=99, out=str(path))
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record, one in zip(records, predict.predict(weights, some, top=8), strict=True):
        assert record["path"] == one.path
        assert record["preprocess"] == "vision_transformer"
        assert weights in record["weights"]
        found = record["predictions"]
        assert [p["index"] for p in found] == list(one.indices)
        assert [p["class"] for p in found] == list(one.classes)
        assert sum(p["probability"] for p in found) == pytest.approx(1, abs=1e-4)


def test_the_table_has_an_aligned_line_for_each_image(weights, images, capsys):
    written([str(images)], weights=weights, top=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert len({len(line) for line in lines}) == 1
    at = {m.start() for line in lines for m in re.finditer("%", line)}
    assert len(at) == 8
    for line, one in zip(lines, predict.predict(weights, [images], top=8), strict=True):
        assert line.startswith(one.path)
        for name, p in zip(one.classes, one.probabilities, strict=True):
            assert f"{name} " in line
            assert f"{100 * p:.1f} %" in line


def test_a_name_of_any_bytes_is_written_as_it_is(weights, some, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    with open(some[0], "rb") as source, open(path, "wb") as file:
        file.write(source.read())
    out, sheet = tmp_path / "out.csv", tmp_path / "sheet.png"
    written([path], weights=weights, format="csv", out=str(out), sheet=str(sheet))
    assert os.fsencode(path) in out.read_bytes()


def test_features_lie_in_a_file_in_the_order_of_the_images(
    weights, params, images, tmp_path, capsys
):
    headless = tmp_path / "headless.npz"
    body = {name: group for name, group in params.items() if name != "head"}
    pretrained.write_npz(pretrained.Weights(body, ""), headless)
    for source, protocol in ((weights, "vision_transformer"), (headless, "big_vision")):
        out = tmp_path / "features.npz"
        order = [str(images / "z"), str(images / "0.png")]
        written(order, weights=str(source), format="csv", features=str(out))
        with np.load(out) as file:
            assert set(file) == {"path", "features"}
            paths, features = file["path"], file["features"]
        assert [os.path.basename(p) for p in paths] == ["10.png", "11.PNG", "0.png"]
        assert (features.dtype, features.shape) == (np.float32, (3, 16))
        for path, row in zip(paths, features, strict=True):
            expected = by_hand(params, path, protocol)[1]
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
        # Without a head there is nothing else to say.
        assert bool(capsys.readouterr().out) == (source == weights)
    for more in ({}, {"out": "x.csv", "features": "x.npz"}):
        with pytest.raises(ValueError, match=r"has no head, .* --features=FILE\.npz"):
            written(order, weights=str(headless), **more)
    (one,) = predict.predict(headless, [images / "0.png"])
    assert (one.classes, one.probabilities, len(one.features)) == ((), (), 16)


def test_the_sheet_shows_images_evenly_up_to_its_size(
    weights, images, tmp_path, monkeypatch
):
    drawn = []
    original = visualize.sheet

    def sheet(images, **texts):
        drawn.append((images, texts))
        return original(images, **texts)

    monkeypatch.setattr(visualize, "sheet", sheet)
    monkeypatch.setattr(predict, "SHEET", 5)
    path = tmp_path / "sheet.png"
    written([str(images)], weights=weights, sheet=str(path), top=2)
    with PIL.Image.open(path) as picture:
        assert picture.size[0] == 1400
    ((pictures, texts),) = drawn
    all_of_them = list(predict.predict(weights, [images], top=2))
    chosen = [all_of_them[i] for i in (0, 2, 5, 8, 10)]
    assert texts["captions"] == [one.path for one in chosen]
    assert texts["classes"] == [one.classes for one in chosen]
    assert "images: 5 of 11" in texts["title"]
    assert "preprocessed by vision_transformer" in texts["title"]
    np.testing.assert_array_equal(
        pictures[1], decoding.decode((images / "2.png").read_bytes())
    )


def test_a_photo_is_made_small_before_it_is_drawn(weights, tmp_path, monkeypatch):
    seen = []
    original = visualize.sheet

    def sheet(images, **texts):
        seen.append(images[0].shape)
        return original(images, **texts)

    monkeypatch.setattr(visualize, "sheet", sheet)
    PIL.Image.new("RGB", (1600, 800)).save(tmp_path / "photo.png")
    path = str(tmp_path / "sheet.png")
    written([str(tmp_path)], weights=weights, sheet=path)
    assert seen == [(400, 800, 3)]


# --- Names of any kind, and photos that Exif turns ------------------------------------


@pytest.fixture(scope="module")
def oddly_named(params, tmp_path_factory):
    """Weights whose classes have odd names, and images that have them too."""
    folder = tmp_path_factory.mktemp("odd")
    kinds = ("bytes", "lines", "markup", "mathtext", "half a pair", "nothing", "CJK")
    classes = (*(ODD_NAMES[kind] for kind in kinds), 'a, "b"\r')
    weights = pretrained.Weights(params, "", class_names=classes)
    pretrained.write_safetensors(weights, folder / "w.safetensors")
    names = [
        f"{i} {ODD_NAMES[kind].replace('/', '')}"
        for i, kind in enumerate(kinds)
        if kind != "half a pair"
    ]
    write_images(folder / "images", [*(f"{name}.png" for name in names), "a\rb.png"])
    return str(folder / "w.safetensors"), str(folder / "images"), classes


def test_csv_and_jsonl_hold_any_name_exactly(oddly_named, tmp_path):
    weights, images, classes = oddly_named
    paths = sorted(f"{images}/{name}" for name in os.listdir(images))
    out = tmp_path / "out.csv"
    written([images], weights=weights, format="csv", top=8, out=str(out))
    content = out.read_bytes().decode("utf-8", "surrogateescape")
    _, *rows = csv.reader(io.StringIO(content, newline=""))
    assert [row[0] for row in rows] == paths
    # Half a pair of surrogates has no bytes.
    known = {text.encodable(name) for name in classes}
    assert known - {*classes} == {r"\ud83d and \ude00"}
    assert all({*row[1::2]} == known for row in rows)
    out = tmp_path / "out.jsonl"
    written([images], weights=weights, format="jsonl", top=8, out=str(out))
    records = [*map(json.loads, out.read_text(encoding="utf-8").splitlines())]
    assert [record["path"] for record in records] == paths
    for record in records:
        assert {p["class"] for p in record["predictions"]} == {*classes}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_table_shows_any_name_in_any_encoding(
    oddly_named, encoding, tmp_path, monkeypatch
):
    weights, images, _ = oddly_named
    data, sheet = io.BytesIO(), tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding))
    text.accept_any_text(sys.stdout)
    monkeypatch.chdir(images)
    written(["."], weights=weights, top=8, sheet=str(sheet))
    lines = data.getvalue().decode(encoding).splitlines()
    assert len(lines) == 7  # a line each
    assert any(r"0 caf\udce9 \udcff.png" in line for line in lines)
    assert all(r" caf\udce9 \udcff " in line for line in lines)
    if encoding == "utf-8":  # else an ideogram is written as long as its escape
        assert len({*map(text.width, lines)}) == 1
    assert sheet.exists()


def test_predictions_are_kept_if_the_sheet_cannot_be_drawn(weights, some, tmp_path):
    out = tmp_path / "out.csv"
    (tmp_path / "sheet.png").mkdir()
    files = {"out": str(out), "sheet": str(tmp_path / "sheet.png")}
    with pytest.raises(RuntimeError, match=r"sheet\.png is not drawn: .*All else is"):
        written(some, weights=weights, format="csv", **files)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 4


def test_a_sheet_without_a_readable_image_is_one_line(
    weights, some, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict, "SHEET", 1)  # the first, which is broken
    (tmp_path / "broken.png").write_bytes(b"not an image")
    given, sheet = [str(tmp_path / "broken.png"), *some], str(tmp_path / "sheet.png")
    with pytest.raises(RuntimeError, match="none of the images chosen for it could"):
        written(given, weights=weights, sheet=sheet)


def test_photos_that_exif_turns_are_counted_and_turned_if_asked(
    weights, params, some, tmp_path, caplog, monkeypatch
):
    with PIL.Image.open(some[0]) as image:
        pixels = image.copy()
    exif = PIL.Image.Exif()
    for name, orientation in (("a.png", 6), ("b.tiff", 8), ("c.png", 1)):
        exif[0x0112] = orientation
        pixels.save(tmp_path / name, exif=exif)
    pixels.transpose(PIL.Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.tiff", "c.png")]
    as_stored, _ = by_hand(params, some[0], "vision_transformer")
    for one in predict.predict(weights, paths, top=8):
        np.testing.assert_allclose(one.probabilities, -np.sort(-as_stored), rtol=1e-4)
    said = "2 of 3 images are turned by Exif; they were read as they are stored"
    assert [said in message for message in caplog.messages] == [True]
    caplog.clear()
    turned, _, same = predict.predict(weights, paths, top=8, exif=True)
    upright, _ = by_hand(params, tmp_path / "upright.png", "vision_transformer")
    np.testing.assert_allclose(turned.probabilities, -np.sort(-upright), rtol=1e-4)
    np.testing.assert_allclose(same.probabilities, -np.sort(-as_stored), rtol=1e-4)
    assert not np.allclose(turned.probabilities, same.probabilities, rtol=1e-2)
    assert caplog.messages == ["2 of 3 images were turned as Exif says."]
    shown: list[tuple[int, ...]] = []
    original = visualize.sheet

    def sheet(images, **texts):
        shown.extend(image.shape for image in images)
        return original(images, **texts)

    monkeypatch.setattr(visualize, "sheet", sheet)
    options = {"exif": True, "sheet": str(tmp_path / "sheet.png")}
    written(paths, weights=weights, **options)
    assert shown == [(30, 9, 3), (30, 9, 3), (9, 30, 3)]


# --- What is broken, missing or mistyped ----------------------------------------------


def test_broken_images_are_named_counted_and_left_out(
    weights, some, tmp_path, caplog, capsys
):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    given = [some[0], str(tmp_path), some[1]]
    files = {
        k: str(tmp_path / v) for k, v in (("features", "f.npz"), ("sheet", "s.png"))
    }
    with caplog.at_level(logging.INFO):
        assert written(given, weights=weights, format="csv", **files) == (3, 1)
    assert "broken.png: cannot decode" in caplog.text
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == some[:2]
    with np.load(tmp_path / "f.npz") as file:
        assert file["path"].tolist() == some[:2]
        assert len(file["features"]) == 2
    assert "images: 2." in caplog.text


def test_if_all_are_broken_nothing_is_written_over(weights, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    old = {k: tmp_path / f"old.{k}" for k in ("csv", "npz")}
    for path in old.values():
        path.write_text("of another day")
    with pytest.raises(ValueError, match="None of 1 images could be read"):
        written(
            [str(tmp_path / "broken.png")],
            weights=weights,
            format="csv",
            out=str(old["csv"]),
            features=str(old["npz"]),
        )
    assert {path.read_text() for path in old.values()} == {"of another day"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_list_on_stdin_names_files_and_folders(
    weights, images, some, monkeypatch, caplog, capsys
):
    lines = [some[2], "", "no-such.png", str(images / "z"), ""]
    listed = io.TextIOWrapper(io.BytesIO(os.fsencode("\n".join(lines))))
    monkeypatch.setattr(sys, "stdin", listed)
    count = written([some[0], "-"], weights=weights, format="csv")
    assert count == (5, 1)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = [os.path.basename(row["path"]) for row in rows]
    assert names == ["0.png", "2.png", "10.png", "11.PNG"]
    assert "Broken image no-such.png" in caplog.text


MISTAKES = {
    "no images": ([], {}, ValueError, "Name image files, folders or globs"),
    "no such file": (["no.png"], {}, FileNotFoundError, "no file or folder no.png"),
    "no match": (["no*.png"], {}, FileNotFoundError, r"no match for no\*\.png"),
    "no such weights": (
        ["{images}"],
        {"weights": "nowhere.npz"},
        FileNotFoundError,
        "nowhere.npz",
    ),
    "a folder without a run": (
        ["{images}"],
        {"weights": "{images}"},
        FileNotFoundError,
        "holds no run",
    ),
    "no classes": (
        ["{images}"],
        {"top": 0},
        ValueError,
        "top is 0 .* must be 1 or more",
    ),
    "a step of a file": (["{images}"], {"step": 3}, ValueError, "it has no step 3"),
    "features elsewhere": (
        ["{images}"],
        {"features": "f.csv"},
        ValueError,
        r"mixer has no stages.* --features=f\.csv\.npz",
    ),
    "a sheet elsewhere": (
        ["{images}"],
        {"sheet": "s.pdf"},
        ValueError,
        r"end it in .p",
    ),
    "too few names": (
        ["{images}"],
        {"labels": "{images}/notes.txt"},
        ValueError,
        r"notes\.txt has 1 names, but the model 8 classes",
    ),
}


@pytest.mark.parametrize(
    ("given", "options", "kind", "message"), MISTAKES.values(), ids=MISTAKES
)
def test_a_mistake_is_explained(given, options, kind, message, weights, images):
    def fill(value):
        return value.format(images=images) if isinstance(value, str) else value

    filled = {"weights": weights} | {k: fill(v) for k, v in options.items()}
    with pytest.raises(kind, match=message):
        written([fill(each) for each in given], **filled)


def test_tokens_that_make_no_square_need_an_image_size(tmp_path, some):
    model = MlpMixer((4, 4), 1, 16, 8, 64, num_classes=3)
    init = jax.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 20, 3)))["params"]
    params = jax.device_get(params)
    told, silent = tmp_path / "told.safetensors", tmp_path / "silent.npz"
    pretrained.write_npz(pretrained.Weights(params, ""), silent)
    known = {"image_size": (8, 20)}
    pretrained.write_safetensors(pretrained.Weights(params, "", **known), told)
    with pytest.raises(ValueError, match=r"10 tokens, .* do not say their image size"):
        predict.predict(silent, some)
    assert len(list(predict.predict(told, some))) == 3


def test_no_image_or_no_batch_is_refused_at_once(tmp_path):
    said = r"batch_size is \d+; each must be 1 or more"
    with pytest.raises(ValueError, match=said):
        predict.predict(tmp_path, [])
    with pytest.raises(ValueError, match=said):
        predict.predict(tmp_path, [__file__], batch_size=0)
