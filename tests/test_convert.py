"""Conversion: the report says what weights are, and that what is written is read."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mlp_mixer import convert, evaluate, models, pretrained, workdir
from mlp_mixer.fingerprints import leaves


@pytest.fixture
def source(weights, tmp_path):
    path = tmp_path / "source.safetensors"
    pretrained.write_safetensors(weights, path)
    return path


def test_the_report_says_what_the_weights_are(source):
    report = convert.convert(source)
    parameters = 392 + 2 * (32 + (16 * 4 + 4) + (4 * 16 + 16) + (128 + 16) + (128 + 8))
    assert report == {
        "source": f"{source} (safetensors file)",
        "model": "mixer",
        "sizes": "patch_size 4 × 4, num_blocks 2, hidden_dim 8, tokens_mlp_dim 4, "
        "channels_mlp_dim 16",
        "classes": "10",
        "resolution": "16 × 16 px",
        "tokens": "16",
        "parameters": f"{parameters + 16 + 90:,}",
        "dtype": "float32",
        "gelu": "exact",
        "normalisation": "mean 0.5 and std 0.5",
        "not finite": "none",
    }


@pytest.mark.parametrize("grown", [1, 2])
def test_a_variant_is_recognised_grown_too(grown):
    model = models.create("mixer_b16", num_classes=1000, tokens_mlp_dim=384 * grown**2)
    size = (224 * grown, 224 * grown)
    image = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    report = convert.describe(pretrained.Weights(params, "made", image_size=size))
    assert report["model"] == "mixer_b16"
    assert f"tokens_mlp_dim {384 * grown**2}," in report["sizes"]
    # Sections 2.2 and 6.3 of the notes on the paper.
    assert report["parameters"] == ("59,880,472" if grown == 1 else "86,996,392")


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("t.npz", {}),
        ("t.safetensors", {}),
        ("t.safetensors", {"names": "timm"}),
        ("t", {}),
    ],
)
def test_what_is_written_is_compared_with_the_source(
    target, options, source, weights, tmp_path
):
    if target == "t.npz":  # which cannot say that the GELU is exact
        options = {"gelu": "tanh"}
    report = convert.convert(source, tmp_path / target, **options)
    assert "arrays equal bit for bit" in report["written"]
    assert report["max |Δlogit|"] == report["max |Δpre_logits|"] == "0.0e+00"
    again = dict(leaves(pretrained.load(tmp_path / target)))
    for name, x in leaves(weights.params):
        np.testing.assert_array_equal(again[name], x)


def test_bfloat16_moves_logits_by_what_is_reported(source, tmp_path):
    report = convert.convert(source, tmp_path / "t.safetensors", dtype="bfloat16")
    assert report["dtype"] == "bfloat16"
    assert 1e-4 < float(report["max |Δlogit|"]) < 0.1


def test_a_lost_gelu_shows_in_the_logits(source, tmp_path, caplog):
    report = convert.convert(source, tmp_path / "t.npz")
    assert "npz does not say that gelu is exact" in caplog.text
    assert float(report["max |Δlogit|"]) > 1e-5


def test_a_head_of_zeros_proves_nothing_and_says_so(weights, tmp_path):
    weights.params["head"]["kernel"][:] = 0
    pretrained.write_npz(weights, tmp_path / "w.npz")
    report = convert.convert(tmp_path / "w.npz", tmp_path / "t.npz")
    assert report["max |Δlogit|"] == "0.0e+00 (there is no head, or it is zero)"


def test_a_write_that_goes_wrong_is_noticed(source, tmp_path, monkeypatch):
    write = pretrained.write_npz

    def wrong(weights, path):
        params = jax.tree.map(np.copy, weights.params)
        params["head"]["bias"][0] += 1
        write(dataclasses.replace(weights, params=params), path)

    monkeypatch.setattr(pretrained, "write_npz", wrong)
    with pytest.raises(ValueError, match=r"t\.npz is not what was written: head/bias"):
        convert.convert(source, tmp_path / "t.npz")


def test_growing_and_interpolating(source, tmp_path):
    report = convert.convert(source, tmp_path / "grown", grow=2)
    assert (report["resolution"], report["tokens"]) == ("32 × 32 px", "64")
    config = workdir.load(tmp_path / "grown")
    assert config.model.image_size == (32, 32)
    assert config.model.tokens_mlp_dim == 16
    report = convert.convert(source, tmp_path / "i.safetensors", interpolate=(24, 20))
    assert (report["resolution"], report["tokens"]) == ("24 × 20 px", "30")
    for wrong, said in (
        ({"grow": 2, "interpolate": (24, 20)}, "Both --grow and --interpolate"),
        ({"interpolate": (25, 20)}, "image_size 25 is not divisible by patch_size 4"),
        ({"grow": 0}, "factor"),
    ):
        with pytest.raises(ValueError, match=said):
            convert.convert(source, **wrong)


def test_an_unknown_resolution_is_asked_for(weights, make_params, tmp_path, caplog):
    params = make_params(image_size=(8, 12))
    weights = dataclasses.replace(weights, params=params, image_size=None)
    pretrained.write_npz(weights, tmp_path / "w.npz")
    for target, options in (("run", {}), ("g.npz", {"grow": 2})):
        with pytest.raises(
            ValueError, match="do not say their image size; `python -m mlp"
        ):
            convert.convert(tmp_path / "w.npz", tmp_path / target, **options)
    convert.convert(tmp_path / "w.npz", tmp_path / "run", image_size=(8, 12))
    assert pretrained.read(tmp_path / "run").image_size == (8, 12)
    convert.convert(tmp_path / "w.npz", tmp_path / "w.safetensors")
    convert.convert(tmp_path / "run", tmp_path / "again.npz")
    assert "npz does not say that image_size is 8 × 12 px" in caplog.text


def test_nothing_is_overwritten_and_unknown_endings_teach(source, tmp_path):
    with pytest.raises(FileExistsError, match="is there already; remove it, or name"):
        convert.convert(source, source)
    with pytest.raises(
        ValueError, match=r"ends in '\.onnx'; written are \.npz, \.safe"
    ):
        convert.convert(source, tmp_path / "t.onnx")
    with pytest.raises(ValueError, match=r"--names=timm is for \.safetensors files"):
        convert.convert(source, tmp_path / "t.npz", names="timm")


def test_a_target_that_would_do_harm_is_refused_and_leaves_nothing(source, tmp_path):
    """The source and what else is there stay as they are."""
    convert.convert(source, tmp_path / "run")
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "to_run").symlink_to(tmp_path / "run", target_is_directory=True)
    (tmp_path / "to_nothing").symlink_to(tmp_path / "gone")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for target, error, said in (
        ("", ValueError, "The target has no name"),
        (source, FileExistsError, "is there already; remove it"),
        (tmp_path / "run" / ".." / source.name, FileExistsError, "is there already"),
        (tmp_path / "link.safetensors", FileExistsError, "is there already"),
        (tmp_path / "run", FileExistsError, "is not empty; name a new folder"),
        (tmp_path / "to_run", FileExistsError, "is not empty; name a new folder"),
        (tmp_path / "to_nothing", FileExistsError, "is a link to nothing"),
        (source / "new.npz", NotADirectoryError, "is a file; .* cannot lie in it"),
        (source / "new" / "run", NotADirectoryError, "is a file; .* cannot lie in it"),
        (tmp_path / "run/checkpoints/9", ValueError, "lies among the checkpoints of"),
        (tmp_path / "to_run/checkpoints/w.npz", ValueError, "lies among the checkpoin"),
        (tmp_path / f"{'x' * 300}.npz", OSError, "cannot be written: File name too lo"),
        (tmp_path / ("x" * 300), OSError, "cannot be written: File name too long"),
        (tmp_path / "w.safetensor", ValueError, r"ends in '\.safetensor'; written are"),
        (tmp_path / "w.npy", ValueError, r"ends in '\.npy'; written are"),
        (tmp_path / "w.ckpt", ValueError, r"ends in '\.ckpt'; written are"),
    ):
        with pytest.raises(error, match=said):
            convert.convert(source, target)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before


def test_a_target_in_a_new_folder_is_written_and_a_folder_is_said_to_be_one(
    source, tmp_path
):
    convert.convert(source, tmp_path / "a" / "b" / "w.safetensors")
    assert (tmp_path / "a" / "b" / "w.safetensors").is_file()
    report = convert.convert(source, tmp_path / "c" / "mixer_v1.5")
    assert f"{tmp_path}/c/mixer_v1.5, a run's folder, read back" in report["written"]
    for only in (None, ["all"]):
        with pytest.raises(ValueError, match=r"mixer_v1\.5 has no evaluators"):
            evaluate.evaluate(tmp_path / "c" / "mixer_v1.5", only=only)


@pytest.mark.slow
def test_the_script_is_a_door_to_the_program(root, source, tmp_path):
    script = [sys.executable, str(root / "scripts" / "convert_checkpoint.py")]
    arguments = [str(source), "t.safetensors", "--names=timm", "--gelu=tanh"]
    ran = subprocess.run(
        [*script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "arrays equal bit for bit" in ran.stdout
    assert "timm computes the exact GELU, these weights are for tanh" in ran.stderr
    assert pretrained.read(tmp_path / "t.safetensors").model["gelu"] == "tanh"
    ran = subprocess.run(
        [*script, "nowhere.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert (
        ran.stderr.strip().splitlines()[-1].startswith("There are no weights nowhere")
    )


def for_unit_images(path, out):
    """Writes the timm file at `path` as one for images in [0, 1] that says nothing.

    With x in [-1, 1] = 2u - 1, a stem K, b for x is one of 2K, b - sum(K) for u.
    """
    arrays = safetensors.numpy.load_file(path)
    kernel, bias = arrays["stem.proj.weight"], arrays["stem.proj.bias"]
    arrays["stem.proj.weight"] = 2 * kernel
    arrays["stem.proj.bias"] = bias - kernel.sum((1, 2, 3))
    safetensors.numpy.save_file(arrays, out, {"format": "pt"})


def logits_of(source, image):
    weights = pretrained.read(source)
    model = pretrained.create_model(weights)
    return model.apply({"params": weights.params}, image)[0]


@pytest.mark.parametrize("how", ["arguments", "config.json"])
def test_foreign_weights_become_weights_for_our_images(how, source, tmp_path, caplog):
    convert.convert(source, tmp_path / "timm.safetensors", names="timm")
    assert "for mean" not in caplog.text
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign" / "model.safetensors"
    for_unit_images(tmp_path / "timm.safetensors", foreign)
    given = {"mean": 0, "std": 1}
    if how == "config.json":
        config = {"architecture": "mixer_s16_224", "pretrained_cfg": given}
        foreign.with_name("config.json").write_text(json.dumps(config))
        given = {}
    image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    expected = logits_of(source, image)
    for target in ("ours.safetensors", "ours.npz", "theirs.safetensors", "run"):
        names = "timm" if target.startswith("theirs") else "ours"
        options = {"gelu": "tanh"} if target.endswith("npz") else {}
        report = convert.convert(
            foreign, tmp_path / target, names=names, **options, **given
        )
        assert report["normalisation"] == "mean 0 and std 1, folded into the stem"
        assert "arrays equal bit for bit" in report["written"]
        assert float(report["max |Δlogit|"]) == 0
        if target.endswith("npz"):
            continue
        again = convert.convert(tmp_path / target)
        assert again["normalisation"] == "mean 0.5 and std 0.5"
        largest = np.abs(expected).max()
        difference = logits_of(tmp_path / target, image) - expected
        assert np.abs(difference).max() < 1e-5 * largest
    said = (
        "theirs.safetensors is for mean 0.5 and std 0.5 in timm, not for the source's"
    )
    assert f"{said} mean 0 and std 1" in caplog.text
    assert "is taken to be" not in caplog.text


def test_what_is_assumed_of_foreign_weights_is_in_the_report(source, tmp_path, caplog):
    convert.convert(source, tmp_path / "timm.safetensors", names="timm")
    for_unit_images(tmp_path / "timm.safetensors", tmp_path / "foreign.safetensors")
    report = convert.convert(tmp_path / "foreign.safetensors")
    assert report["source"].endswith("timm's names, normalisation assumed)")
    assert report["normalisation"] == "mean 0.5 and std 0.5"
    assert "is taken to be for mean 0.5 and std 0.5" in caplog.text
    image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    wrong = logits_of(tmp_path / "foreign.safetensors", image)
    assert np.abs(wrong - logits_of(source, image)).max() > 0.1


@pytest.mark.slow
def test_the_normalisation_may_be_flags(program, source, tmp_path):
    convert.convert(source, tmp_path / "timm.safetensors", names="timm")
    for_unit_images(tmp_path / "timm.safetensors", tmp_path / "foreign.safetensors")
    cases = {
        "--mean=0,0,0 --std=1": "mean 0 and std 1, folded into the stem",
        "--mean=0": "--mean and --std: there is a mean and no std; give both.",
        "--mean=x --std=1": "--mean is 'x'; expected a number, e.g. 0.5, or RED,GREEN",
        "--mean=123 --std=58": "--mean and --std: mean is [123.0]; expected a number",
    }
    processes = {
        options: program(
            "convert", tmp_path / "foreign.safetensors", *options.split(), devices=1
        )
        for options in cases
    }
    for options, said in cases.items():
        output, _ = processes[options].communicate(timeout=200)
        assert said in output, output
        assert "Traceback" not in output
        assert (processes[options].returncode == 0) == ("folded" in said)


def test_a_field_that_the_source_does_not_say_is_an_argument(source, tmp_path):
    target = tmp_path / "t.safetensors"
    given = convert.fields_of_flags(["gelu=tanh", "stochastic_depth=0.5"])
    assert given == {"gelu": "tanh", "stochastic_depth": 0.5}
    convert.convert(source, target, model=given)
    written = pretrained.read(target).model
    assert (written["gelu"], written["stochastic_depth"]) == ("tanh", 0.5)
    with pytest.raises(ValueError, match="no field 'heads'"):
        convert.convert(source, model={"heads": 2})
    for wrong in ("gelu", "=tanh", "gelu="):
        with pytest.raises(ValueError, match="expected NAME=VALUE"):
            convert.fields_of_flags([wrong])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": (8, 8)}, "8x8 image makes 4 tokens"),
        ({"image_size": (17, 19)}, "image_size 17 is not divisible by patch_size 4"),
        ({"gelu": "relu"}, "gelu 'relu' is unknown; try exact, tanh"),
        ({"names": "Timm"}, "names 'Timm' is unknown; try timm, "),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; try float32, bfloat16"),
    ],
)
def test_a_wrong_argument_leaves_nothing(options, said, source, tmp_path):
    with pytest.raises(ValueError, match=said):
        convert.convert(source, tmp_path / "t.safetensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_what_is_narrowed_is_said_to_be(weights, tmp_path):
    wide = {k: x.astype(np.float64) + 1e-12 for k, x in leaves(weights.params)}
    np.savez(tmp_path / "w.npz", **wide)
    report = convert.convert(tmp_path / "w.npz", tmp_path / "t.npz")
    assert "arrays equal, narrowed to float32" in report["written"]
    report = convert.convert(tmp_path / "t.npz", tmp_path / "b.npz", dtype="bfloat16")
    assert report["dtype"] == "float32"  # what lies in the file
