"""Names of others: what a table may say of an array, and whose table it is."""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mlp_mixer import convert, models, predict, pretrained, runs
from mlp_mixer.data import decoding, image_ops
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models import model
from mlp_mixer.models.model import IMAGENET
from mlp_mixer.pretrained import foreign
from mlp_mixer.pretrained.foreign import Names

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def a_file(authors, axes, **others):
    """An architecture that declares nothing but its arrays and their names."""
    file = types.ModuleType("mlp_mixer.models.made")
    file.__dict__.update(AUTHORS=authors, AXES=axes, **others)
    return file


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_that_is_flattened_there_has_its_axes_here(channels):
    axes = {"stem/kernel": "ph pw x c", "stem/spline": "g ph pw x c"}
    table = (
        ("embed.base", "stem/kernel", "c (x ph pw) -> ph pw x c"),
        ("embed.spline", "stem/spline", "c (x ph pw) g -> g ph pw x c"),
    )
    names = Names(a_file(table, axes), "authors")
    theirs = {
        "embed.base": numbers(5, channels * 16),
        "embed.spline": numbers(5, channels * 16, 8),
    }
    ours = names.with_our_names(theirs)
    assert ours["stem/kernel"].shape == (4, 4, channels, 5)
    y, x, rgb = 2, 3, channels - 1
    for o in range(5):
        flat = rgb * 16 + 4 * y + x
        assert ours["stem/kernel"][y, x, rgb, o] == theirs["embed.base"][o, flat]
        spline = theirs["embed.spline"][o, flat]
        np.testing.assert_array_equal(ours["stem/spline"][:, y, x, rgb, o], spline)
    again = names.with_their_names(ours)
    assert again.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array)


def test_a_kernel_is_torchs_and_any_other_array_is_as_it_is():
    axes = {"a_*/kernel": "s ds", "a_*/bias": "ds", "n/scale": "s c", "n/bias": "s c"}
    table = (("net.{}.fc.0", "a_{}"), ("norm", "n"))
    theirs = {
        "net.7.fc.0.weight": numbers(2, 3),
        "net.7.fc.0.bias": numbers(2),
        "norm.weight": numbers(3, 3),
        "norm.bias": numbers(3, 3),
    }
    names = Names(a_file(table, axes), "authors")
    ours = names.with_our_names(theirs)
    assert ours.keys() == {"a_7/kernel", "a_7/bias", "n/scale", "n/bias"}
    np.testing.assert_array_equal(ours["a_7/kernel"], theirs["net.7.fc.0.weight"].T)
    np.testing.assert_array_equal(ours["n/scale"], theirs["norm.weight"])
    assert names.with_their_names(ours).keys() == theirs.keys()
    with pytest.raises(ValueError, match="n/other has no name among its authors'"):
        names.with_their_names({"n/other": numbers(1)})


def grid(kernel):
    return np.broadcast_to(np.float32([-1, 0, 1]), (len(kernel), 3))


def test_a_buffer_is_made_and_has_to_be_what_the_model_computes_with():
    axes = {"a_*/kernel": "s ds"}
    table = (
        ("net.{}", "a_{}"),
        ("net.{}.grid", "a_{}/kernel", grid),
        ("net.{}.num_batches_tracked", None),
    )
    names = Names(a_file(table, axes), "authors")
    theirs = {"net.0.weight": numbers(2, 4), "net.0.grid": grid(numbers(4))}
    counted = theirs | {"net.0.num_batches_tracked": np.int64(3)}
    ours = names.with_our_names(counted)
    assert ours.keys() == {"a_0/kernel"}
    names.check_buffers(counted, ours)
    again = names.with_their_names(ours)
    assert again.keys() == theirs.keys()
    np.testing.assert_array_equal(again["net.0.grid"], theirs["net.0.grid"])
    for moved in (2 * theirs["net.0.grid"], theirs["net.0.grid"][:, :2]):
        with pytest.raises(ValueError, match=r"net\.0\.grid is not the constant"):
            names.check_buffers({**theirs, "net.0.grid": moved}, ours)


def test_a_batch_norm_has_its_statistics_too():
    """Of norms that share a table with it, a file has none, and lacks none."""
    axes = {f"{x}/{y}": "c" for x in ("norm_*", "last") for y in ("scale", "bias")}
    names = Names(a_file((("bn.{}", "norm_{}"), ("ln", "last")), axes), "authors")
    parts = ("weight", "bias", "running_mean", "running_var")
    theirs = {f"bn.2.{part}": i + numbers(3) for i, part in enumerate(parts)}
    theirs |= {"ln.weight": numbers(3), "ln.bias": numbers(3)}
    counted = theirs | {"bn.2.num_batches_tracked": np.int64(3)}
    ours = names.with_our_names(counted)
    norm = {f"norm_2/{x}" for x in ("scale", "bias")}
    statistics = {f"batch_stats/norm_2/{x}" for x in ("mean", "var")}
    assert ours.keys() == norm | statistics | {"last/scale", "last/bias"}
    for name, part in [("mean", "running_mean"), ("var", "running_var")]:
        found = ours[f"batch_stats/norm_2/{name}"]
        np.testing.assert_array_equal(found, theirs[f"bn.2.{part}"])
    assert names.their_name("batch_stats/norm_2/var") == "bn.2.running_var"
    again = names.with_their_names(ours)  # torch loads it strictly without the count
    assert again.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array)


def test_blocks_that_are_numbered_through_all_stages_are_told_apart_by_shape():
    axes = {f"stage{i}_block_*/{x}": f"c{i}" for i in range(3) for x in ("a", "b")}
    table = [(f"net.{{}}.{path[-1]}", path.replace("*", "{}")) for path in axes]
    names = Names(a_file(tuple(table), axes), "authors")
    channels = (2, 2, 4, 4, 4, 6)
    theirs = {
        f"net.{i}.{x}": i + numbers(c) for i, c in enumerate(channels) for x in "ab"
    }
    found = foreign.find(theirs, names.file)
    assert found == dataclasses.replace(names, first_blocks=(0, 2, 5))
    ours = found.with_our_names(theirs)
    blocks = ["stage0_block_0", "stage0_block_1", "stage1_block_0", "stage1_block_1"]
    blocks += ["stage1_block_2", "stage2_block_0"]
    assert list(ours) == [f"{block}/{x}" for block in blocks for x in "ab"]
    np.testing.assert_array_equal(ours["stage1_block_2/b"], theirs["net.4.b"])
    assert found.their_name("stage1_block_2/b") == "net.4.b"
    assert found.with_their_names(ours).keys() == theirs.keys()
    # A lost or misshapen array is not the end of a stage.
    del theirs["net.3.b"]
    assert foreign.find(theirs, names.file) == found
    # What has other stages has no names, rather than wrong ones.
    assert foreign.find({"net.0.a": numbers(2)}, names.file) == names


def test_a_row_of_blocks_may_begin_at_another_number_there():
    """Behind what is counted with the blocks, or behind another row of the stage."""
    rows = {"conv_*/a": "c", "attn_*/a": "c", "attn_*/b": "c"}
    axes = {"one": {"attn_*/a": "c", "attn_*/b": "c"}, "two": rows}
    tables = {
        "one": (("net.{1}.a", "attn_{}/a"), ("net.{1}.b", "attn_{}/b")),
        "two": (
            ("net.{1}.a", "conv_{}/a"),
            ("net.{3}.a", "attn_{}/a"),
            ("net.{3}.b", "attn_{}/b"),
        ),
    }
    file = a_file(tables, axes, FORM="form")
    theirs = ["net.1.a", "net.2.a", "net.3.a", "net.3.b", "net.4.a", "net.4.b"]
    names = foreign.find({name: numbers(2) for name in theirs}, file)
    assert names == Names(file, "authors", "two")
    ours = names.with_our_names({name: i + numbers(2) for i, name in enumerate(theirs)})
    expected = ["conv_0/a", "conv_1/a", "attn_0/a", "attn_0/b", "attn_1/a", "attn_1/b"]
    assert list(ours) == expected
    np.testing.assert_array_equal(ours["attn_1/b"], [5, 6])
    assert list(names.with_their_names(ours)) == theirs
    assert names.find("net.0.a") is None
    assert names.find("net.2.b") is None
    with pytest.raises(ValueError, match=r"attn_0/a would be net\.3\.a .* another"):
        names.with_their_names({"conv_2/a": numbers(2), "attn_0/a": numbers(2)})
    # What has no such row is of the other form.
    alone = {f"net.{i}.{x}": numbers(2) for i in (1, 2) for x in "ab"}
    assert foreign.find(alone, file) == Names(file, "authors", "one")


def test_a_form_may_have_names_of_its_own():
    axes = {
        "one": {"w/kernel": "c dc"},
        "two": {"w/kernel": "c dc", "v/kernel": "dc c"},
    }
    tables = {"one": (("fc2", "w"),), "two": (("fc1", "w"), ("fc2", "v"))}
    file = a_file(tables, axes, FORM="form")
    fc1, fc2, fc3 = ({f"fc{i}.weight": numbers(2, 3)} for i in (1, 2, 3))
    assert foreign.find(fc2, file) == Names(file, "authors", "one")
    assert foreign.find(fc1 | fc2, file) == Names(file, "authors", "two")
    assert foreign.find(fc3, file) is None
    one = Names(file, "authors", "one").with_our_names(fc2)
    assert one["w/kernel"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"timm has no names for .*--names=timm out"):
        foreign.names_of(models.smlpnet, "timm", {"name": "smlpnet_t"})


def test_several_fields_can_make_a_form():
    axes = {
        ("mlp", 1): {"w/kernel": "c dc", "v/bias": "c"},
        ("mlp", 4): {"w/kernel": "c dc", "u/bias": "c"},
    }
    file = a_file((("fc", "w"), ("four", "u")), axes, FORM=("mixing", "stem"))
    assert foreign.find({"four.bias": numbers(2)}, file) == Names(
        file, "authors", ("mlp", 4)
    )
    for form in axes:
        fields = {"stem": form[1], "mixing": form[0], "patch_size": (4, 4)}
        assert foreign.names_of(file, "authors", fields).form == form
        assert model.form_of(file, fields) == form
        told = {"mixing": form[0], "stem": form[1]}
        assert model.fields_of_form(file, form) == told
    assert model.fields_of_form(models.mixer, None) == {}


def test_a_name_that_begins_as_a_wrapper_does_is_found_in_and_out_of_wrappers():
    table = (("model.{}.fc", "a_{}"),)
    names = Names(a_file(table, {"a_*/bias": "c"}), "authors")
    for wrapper in ("", "module.", "model._orig_mod."):
        found = names.with_our_names({f"{wrapper}model.3.fc.bias": numbers(1)})
        assert found.keys() == {"a_3/bias"}


def test_of_tables_that_know_as_much_the_one_counts_that_lacks_least(tmp_path):
    """timm's Mixer has all names of a vanilla Mixer without biases, and more."""
    vanilla = safetensors.numpy.load_file(
        GOLDEN / "authors_paramixer_vanilla.safetensors"
    )
    assert foreign.find(vanilla) == Names(models.paramixer, "authors", "vanilla")
    # And an array is missing of the architecture that has the others.
    rng = np.random.default_rng(0)
    model = models.create(
        "resmlp", patch_size=(2, 2), num_blocks=2, hidden_dim=4, channels_mlp_dim=6
    )
    shapes = pretrained.tree.shapes(pretrained.tree.variables(model, (4, 4))["params"])
    ours = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for whose in foreign.TABLES:
        names = Names(models.resmlp, whose)
        theirs = names.with_their_names(ours)
        lost = next(name for name in theirs if name.startswith("blocks.1.mlp"))
        del theirs[lost]
        assert foreign.find(theirs) == names
        whole = {k: np.ascontiguousarray(x) for k, x in theirs.items()}
        safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=f"missing: {lost} as ResMlpBlock_1"):
            pretrained.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize("whose", ["authors", "timm"])
def test_a_silent_file_is_taken_to_be_for_what_its_authors_normalise_by(whose, caplog):
    weights = pretrained.read(GOLDEN / f"{whose}_resmlp.safetensors")
    assert weights.normalisation == IMAGENET
    assert str(weights).endswith(" names, normalisation assumed)")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "is taken to be for mean 0.485, 0.456, 0.406 and std 0.229, 0.2" in warning


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"token_mix.2.1.BN.running_var": None},
            "missing: token_mix.2.1.BN.running_var as batch_stats/stage1_block_1/Batch",
        ),
        (
            {"token_mix.2.1.BN.running_var": numbers(5)},
            "shape: token_mix.2.1.BN.running_var as batch_stats/stage1_block_1/BatchN",
        ),
        ({"token_mix.2.1.BN.moment": numbers(12)}, "unexpected: token_mix.2.1.BN.mo"),
        (
            {"batch_norm.running_mean": None, "batch_norm.running_var": None},
            "  batch_norm.running_mean as batch_stats/norm/mean: got nothing, expected",
        ),
    ],
)
def test_statistics_are_held_to_the_model_as_parameters_are(changed, message, tmp_path):
    arrays = safetensors.numpy.load_file(GOLDEN / "authors_smlpnet.safetensors")
    arrays |= {name: x for name, x in changed.items() if x is not None}
    arrays = {k: x for k, x in arrays.items() if changed.get(k, x) is not None}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrained.read(tmp_path / "w.safetensors")


def test_shapes_tell_the_fields_of_a_pyramid(tmp_path):
    """Its rows and columns tell the image, and so do our own files of it."""
    weights = pretrained.read(GOLDEN / "authors_smlpnet.safetensors")
    told = {"patch_size": (4, 4), "hidden_dim": 6, "num_blocks": (1, 2, 1, 1)}
    told |= {"mlp_ratio": 2, "stochastic_depth": 0.0}
    told |= {"mean": IMAGENET[0], "std": IMAGENET[1]}
    assert weights.model == {"name": "smlpnet", **told}
    assert weights.image_size == (64, 64)
    for form in ("npz", "safetensors"):
        path = tmp_path / f"w.{form}"
        pretrained.__dict__[f"write_{form}"](weights, path)
        assert pretrained.read(path).model == weights.model
    arrays = pretrained.model_of(weights.params)
    assert arrays == weights.model | {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.slow
def test_a_photograph_goes_all_the_way_through_an_authors_file(tmp_path):
    """File, run, crop, normalisation, classes: beside the steps one by one."""
    path, photo = (
        GOLDEN / name
        for name in ("authors_smlpnet.safetensors", "photos/astronaut.jpg")
    )
    runs.write_run(pretrained.read(path), str(tmp_path / "run"))
    (found,) = predict.predict(tmp_path / "run", [photo], preprocess="timm-0.9")
    pixels = decoding.decode(photo.read_bytes(), image_ops.dct_of("timm-0.9"))
    levels = image_ops.preprocess(pixels, "timm-0.9", (64, 64)) / np.float32(255)
    mean, std = np.array(IMAGENET, np.float32)
    image = (levels - mean) / std
    theirs = pretrained.read(path, mean=0.5, std=0.5)  # images as their code has them
    model = pretrained.create_model(theirs)
    logits, out = jax.jit(model.apply)(theirs.variables, jnp.asarray(image[None]))
    np.testing.assert_allclose(found.features, out["pre_logits"][0], atol=1e-5)
    expected = np.asarray(jax.nn.softmax(logits[0]))[list(found.indices)]
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)


def test_what_takes_any_image_is_taken_to_be_for_the_papers(tmp_path, caplog):
    path = GOLDEN / "authors_spach_conv.safetensors"
    weights = pretrained.read(path, mean=0.5, std=0.5)
    assert weights.image_size == (224, 224)
    text = "a spach of .* takes any: 224 x 224 px are assumed. .* --image_size=HEIGHT,W"
    assert re.search(text, caplog.text)
    # A file that says it is believed, and so are arrays that do.
    other = dataclasses.replace(weights, image_size=(16, 32))
    pretrained.write_safetensors(other, tmp_path / "w.safetensors", names="authors")
    caplog.clear()
    assert pretrained.read(tmp_path / "w.safetensors").image_size == (16, 32)
    pretrained.read(GOLDEN / "authors_smlpnet.safetensors", mean=0.5, std=0.5)
    assert not caplog.records


def test_authors_have_no_names_for_what_they_have_not_published(tmp_path):
    made = pretrained.read(GOLDEN / "timm_mixer.safetensors")
    with pytest.raises(
        ValueError, match=r"its authors have no names for mixer .*out\."
    ):
        pretrained.write_safetensors(made, tmp_path / "w.safetensors", names="authors")
    assert not any(tmp_path.iterdir())


def test_a_model_that_normalises_images_itself_is_told_how(tmp_path):
    """Of three channels, and of one: its stem is no linear map to fold it into."""
    path, arrays = GOLDEN / "authors_kan_mixer.safetensors", {}
    silent = pretrained.read(path)
    weights = pretrained.read(path, mean=IMAGENET[0], std=IMAGENET[1])
    assert (weights.model["mean"], weights.model["std"]) == IMAGENET
    report = convert.describe(weights)["normalisation"]
    assert report.startswith(
        "mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225, com"
    )
    for (name, one), (_, other) in zip(
        leaves(weights.params), leaves(silent.params), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
    for name, array in safetensors.numpy.load_file(path).items():
        of_a_pixel = name.startswith("PerPatchKAN") and not name.endswith("grid")
        arrays[name] = np.ascontiguousarray(array[:, :4] if of_a_pixel else array)
    grid = "PerPatchKAN.kan.grid"
    arrays[grid] = np.ascontiguousarray(arrays[grid][:4])
    safetensors.numpy.save_file(arrays, tmp_path / "grey.safetensors")
    grey = pretrained.read(tmp_path / "grey.safetensors", mean=0.13, std=0.31).model
    assert (grey["image_channels"], grey["mean"], grey["std"]) == (1, (0.13,), (0.31,))
    arrays[grid] = 1.01 * arrays[grid]
    safetensors.numpy.save_file(arrays, tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match=r"moved\.safetensors: PerPatchKAN\.kan\.grid"):
        pretrained.read(tmp_path / "moved.safetensors")


def test_a_form_that_shares_its_arrays_with_another_is_what_the_file_says(tmp_path):
    given = {"model": {"mlp": "asym"}, "mean": 0.5, "std": 0.5}
    weights = pretrained.read(GOLDEN / "authors_paramixer_asym.safetensors", **given)
    for names in ("ours", "authors"):
        path = tmp_path / f"{names}.safetensors"
        pretrained.write_safetensors(weights, path, names=names)
        assert pretrained.read(path).model == weights.model
    wrong = dataclasses.replace(weights, model=weights.model | {"mlp": "sym"})
    pretrained.write_safetensors(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="mlp: sym is stated, the arrays have para"):
        pretrained.read(tmp_path / "wrong.safetensors")
