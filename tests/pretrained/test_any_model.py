"""Weights of an architecture that this package has never seen: what its file declares
is enough for every form, for another resolution, for the programs.
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy_family

from mlp_mixer import convert, export, models, pretrained, runs, workdir
from mlp_mixer.fingerprints import leaves
from mlp_mixer.pretrained import foreign, resize, tree


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Its line in `FAMILIES`."""
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, toy_family))


def toy(image_size=(16, 24), **fields):
    """Weights of a small one, every array random."""
    given = {"patch_size": (4, 4), "num_blocks": 2, "hidden_dim": 6} | fields
    model = models.create("toy_family", num_classes=10, **given)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32),
        dict(tree.variables(model, image_size)),
    )
    named = {"name": "toy_family", **models.fields("toy_family", **given)}
    return pretrained.Weights(
        variables.pop("params"),
        "made",
        model=named,
        stats=variables,
        image_size=image_size,
        class_names=tuple("abcdefghij"),
    )


def assert_bitwise(got, expected):
    got, expected = dict(leaves(got)), dict(leaves(expected))
    assert got.keys() == expected.keys()
    assert all(x.tobytes() == expected[name].tobytes() for name, x in got.items())


def test_statistics_go_round_all_forms_bitwise(tmp_path):
    """From each form into the next."""
    made = toy(power="two")
    pretrained.write_safetensors(made, tmp_path / "0.safetensors")
    last = tmp_path / "0.safetensors"
    for target in ("1.npz", "run", "2.safetensors", "3.safetensors"):
        report = convert.convert(last, tmp_path / target)
        last = tmp_path / target
        assert report["max |Δlogit|"] == "0.0e+00"
        again = pretrained.read(last)
        assert_bitwise(again.params, made.params)
        assert_bitwise(again.stats, made.stats)
        assert (again.model, again.image_size) == (made.model, (16, 24))
        assert again.class_names == made.class_names
    assert set(made.stats["batch_stats"]) == {"ToyBlock_0", "ToyBlock_1"}


def test_another_array_than_the_models_is_named(tmp_path):
    weights = toy()
    del weights.stats["batch_stats"]["ToyBlock_1"]["norm"]["var"]
    pretrained.write_safetensors(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="arrays of its model") as error:
        pretrained.read(tmp_path / "w.safetensors")
    assert str(error.value).splitlines()[1:] == [
        "  batch_stats/ToyBlock_1/norm/var: got nothing, expected (6,)"
    ]


def test_metadata_that_contradict_the_arrays_are_refused(tmp_path):
    weights = dataclasses.replace(toy(), model=toy().model | {"num_blocks": 10**9})
    pretrained.write_safetensors(weights, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match="num_blocks: 1000000000 is stated, the arrays"
    ):
        pretrained.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize("form", ["w.npz", "w.safetensors"])
def test_a_later_format_says_which_version_wrote_it(form, tmp_path, monkeypatch):
    from mlp_mixer.pretrained import weights as module

    monkeypatch.setattr(module, "FORMAT", 3)
    monkeypatch.setattr("mlp_mixer.__version__", "7.0")
    write = pretrained.write_npz if form == "w.npz" else pretrained.write_safetensors
    write(toy(), tmp_path / form)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format 3, written by mlp_mixer 7\.0; this"):
        pretrained.read(tmp_path / form)


def test_statistics_have_their_checksums_too(tmp_path):
    weights = toy()
    path = tmp_path / "w.safetensors"
    pretrained.write_safetensors(weights, path)
    value = weights.stats["batch_stats"]["ToyBlock_0"]["norm"]["mean"]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.find(value.tobytes())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="wrong bits in batch_stats/ToyBlock_0/norm"):
        pretrained.read(path)


def test_the_paper_says_what_no_shape_tells(tmp_path):
    """Of parameters alone: the size that they have, and the fields of its row."""
    params = toy(num_blocks=3, hidden_dim=16).params
    assert pretrained.model_of(params)["name"] == "toy_l"
    assert pretrained.model_of(params)["start"] == 0.2
    other = pretrained.model_of(toy().params, power="two")
    assert (other["name"], other["start"], other["power"]) == ("toy_family", 0.5, "two")
    assert pretrained.create_model(params).num_blocks == 3


# Those of a pyramid take long: the quick suite does the first of each.
ALL_SIZES = [
    pytest.param(name, marks=[pytest.mark.slow] if slow else [])
    for file in models.FAMILIES
    for i, (name, fields) in enumerate(file.SIZES.items())
    for slow in [i > 0 and isinstance(fields["num_blocks"], tuple)]
]


@pytest.mark.parametrize("name", ALL_SIZES)
def test_parameters_alone_are_a_model_or_say_what_they_lack(name):
    """A field that no shape tells is named, with what to try; which then works."""
    model = models.create(name, num_classes=10)
    side, _ = models.counted(name)
    params = tree.variables(model, (side, side))["params"]
    family = tree.family_name(models.family(name))
    try:
        fields = pretrained.model_of(params)
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"These are the parameters of a {family}, whose shapes")
        assert "Give them, or the name of a size" in said
        declared = models.declared(name).values()
        none = {f.name for f in declared if f.default is dataclasses.MISSING}
        lacking = said.partition("do not say its ")[2].partition(". ")[0].split(", ")
        assert {*lacking} <= none
        assert name in said
        values = {field: getattr(model, field) for field in lacking}
        made = pretrained.create_model(params, **values)
        assert {field: getattr(made, field) for field in values} == values
        assert pretrained.create_model(params, name=name) == model
    else:
        # The first size that has these arrays; a name tells it from others.
        first = models.create(fields["name"], num_classes=10)
        same = tree.variables(first, (side, side))["params"]
        assert tree.shapes(same) == tree.shapes(params)
        assert fields["name"] == name or first != model
        assert pretrained.create_model(params, name=name) == model


def test_timms_names_are_what_its_file_says(tmp_path, caplog):
    """Without statistics, which no file of timm's that is read here has."""
    made = dataclasses.replace(toy(image_size=(16, 16)), stats={})
    pretrained.write_safetensors(made, tmp_path / "t.safetensors", names="timm")
    arrays = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    assert arrays["blocks.1.gamma"].shape == (1, 1, 6)
    assert arrays["blocks.1.toy.weight"].shape == (16, 16)
    expected = made.params["ToyBlock_1"]["mix"]["kernel"].T
    np.testing.assert_array_equal(arrays["blocks.1.toy.weight"], expected)
    names = foreign.find(arrays)
    assert names == foreign.Names(toy_family, "timm")
    flat = names.with_our_names(arrays)
    assert flat.keys() == dict(leaves(made.params)).keys()
    for name, array in leaves(made.params):
        np.testing.assert_array_equal(flat[name], array)


def in_parts(image, k):
    h, w = (side // k for side in image.shape[1:3])
    return [
        image[:, a * h : (a + 1) * h, b * w : (b + 1) * w]
        for a in range(k)
        for b in range(k)
    ]


def test_what_mixes_tokens_with_tokens_grows_as_each_part_alone():
    weights = toy()
    big = pretrained.resized(weights, (32, 48), "grow")
    assert big.params["ToyBlock_0"]["mix"]["kernel"].shape == (96, 96)
    assert big.model == weights.model
    image = jax.random.uniform(jax.random.key(1), (2, 32, 48, 3), minval=-1)
    apply = pretrained.create_model(weights).apply
    parts = [apply(weights.variables, part)[0] for part in in_parts(image, 2)]
    whole = pretrained.create_model(big).apply(big.variables, image)[0]
    np.testing.assert_allclose(whole, np.mean(parts, 0), rtol=1e-4)


def test_interpolation_of_a_square_matrix_and_back_is_the_identity():
    weights = toy()
    up = pretrained.resized(weights, (24, 32), "interpolate")
    back = pretrained.resized(up, (16, 24), "interpolate")
    for (name, a), (_, b) in zip(
        leaves(back.params), leaves(weights.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    # A constant image stays what it was, summed over more tokens.
    image = jnp.full((1, 24, 32, 3), 0.3)
    small = pretrained.create_model(weights).apply(
        weights.variables, image[:, :16, :24]
    )
    large = pretrained.create_model(up).apply(up.variables, image)
    assert np.isfinite(large[0]).all()
    assert large[0].shape == small[0].shape


@pytest.fixture
def axes(monkeypatch):
    """Letters of the toy without `s`: what is tied to the resolution is no token."""
    axes = {path: x.replace("s s", "t t") for path, x in toy_family.AXES.items()}
    axes["ToyBlock_*/mix/bias"] = "t"
    monkeypatch.setattr(toy_family, "AXES", axes)
    return axes


def test_a_model_without_tokens_asks_for_the_image_size_it_needs(
    axes, tmp_path, caplog
):
    """A start takes it for its own; a conversion has no image to compare logits of."""
    made = dataclasses.replace(toy(), image_size=None)
    pretrained.write_safetensors(made, tmp_path / "w.safetensors")
    weights = pretrained.read(tmp_path / "w.safetensors")
    assert weights.image_size is None
    with pytest.raises(ValueError, match=r"w\.safetensors .* do not say their image"):
        convert.convert(tmp_path / "w.safetensors", tmp_path / "t.npz")
    assert not (tmp_path / "t.npz").exists()
    assert convert.convert(tmp_path / "w.safetensors")["resolution"] == "not said"
    given = pretrained.initial(
        tmp_path / "w.safetensors",
        pretrained.create_model(weights),
        types.SimpleNamespace(params=made.params, stats=made.stats),
        image_size=(16, 24),
        head="match",
        resize_by="grow",
    )
    assert_bitwise(given["params"], made.params)
    assert "do not say their grid; it is taken to be 4x6" in caplog.text


def test_without_tokens_among_its_letters_nothing_is_resized(axes, monkeypatch):
    said = "toy_family cannot be resized: none of its arrays has an axis of tokens"
    with pytest.raises(ValueError, match=said):
        resize.grow(toy().params, 2, (4, 6))
    # And what is tied to the resolution by two letters is found by its shape.
    monkeypatch.setitem(axes, "ToyBlock_*/mix/bias", "s")
    with pytest.raises(
        ValueError, match=r"but not by tokens, s: ToyBlock_0/mix/kernel"
    ):
        pretrained.resized(toy(), (32, 48), "grow")


def test_the_programs_take_it(tmp_path, caplog):
    pytest.importorskip("flatbuffers")
    pytest.importorskip("onnx")
    weights = toy()
    runs.write_run(weights, tmp_path / "run")
    saved = workdir.load(tmp_path / "run").model
    assert (saved.name, saved.power) == ("toy_family", "one")
    found = export.export_stablehlo(
        pretrained.read(tmp_path / "run"), tmp_path / "t.stablehlo"
    )
    assert all(one.difference <= one.allowed for one in found)
    about = json.loads((tmp_path / "t.stablehlo.json").read_text())
    assert (about["model"], about["num_blocks"]) == ("toy_family", 2)
    with pytest.raises(ValueError, match="no ONNX graph of toy_family, only of mixer"):
        export.export_onnx(weights, tmp_path / "t.onnx")
    model = runs.open_model(tmp_path / "run")
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), np.uint8)
    out = model.predict(model.variables, {"image": image})
    expected, _ = pretrained.create_model(weights).apply(
        weights.variables, (jnp.float32(image) - 127.5) / 127.5
    )
    np.testing.assert_allclose(out["logits"], expected, rtol=1e-5)
