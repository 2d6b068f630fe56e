"""Weights in and out of files: what goes in comes out, or one error says what is wrong.

Forms: npz as published, npz of the older layout, safetensors with our names and with
timm's, torch state dicts, runs.
"""

import argparse
import dataclasses
import io
import json
import math
import pathlib
import re
import shutil
import struct
import sys
import time
import tracemalloc
import types
import zipfile
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import mlp_mixer
from mlp_mixer import models, pretrained, runs, train
from mlp_mixer.data import image_ops
from mlp_mixer.fingerprints import leaves
from mlp_mixer.pretrained import tree
from mlp_mixer.pretrained.foreign import Names

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TIMM = Names(models.mixer, "timm")
WRITERS = {
    "npz": (".npz", pretrained.write_npz, {}),
    "safetensors": (".safetensors", pretrained.write_safetensors, {}),
    "timm": (".safetensors", pretrained.write_safetensors, {"names": "timm"}),
    "run": ("", runs.write_run, {}),
}


def write(form, weights, folder):
    suffix, writer, options = WRITERS[form]
    path = folder / f"{form}{suffix}"
    writer(weights, path, **options)
    return path


def assert_bitwise(got, expected):
    got, expected = dict(leaves(got)), dict(leaves(expected))
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert got[name].tobytes() == np.asarray(x).tobytes(), name


# --- Round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITERS)
def test_a_round_trip_is_bitwise(form, weights, tmp_path):
    again = pretrained.read(write(form, weights, tmp_path))
    assert_bitwise(again.params, weights.params)
    assert again.image_size == (16, 16)
    if form != "npz":  # which is pure arrays, as published
        known = ("model", "class_names")
        assert all(getattr(again, f) == getattr(weights, f) for f in known)


@pytest.mark.parametrize("name", models.mixer.SIZES)
@pytest.mark.parametrize("num_classes", [None, 1000])
def test_names_and_shapes_of_every_variant_go_to_timm_and_back(name, num_classes):
    model = models.create(name, num_classes=num_classes)
    image = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    # Of the right shape, and of four bytes.
    flat = {k: np.broadcast_to(np.float32(0), x.shape) for k, x in leaves(shapes)}
    back = TIMM.with_our_names(TIMM.with_their_names(flat))
    assert {k: x.shape for k, x in back.items()} == {
        k: x.shape for k, x in flat.items()
    }
    params = unflatten_dict(back, sep="/")
    assert not tree.problems({k: x.shape for k, x in back.items()}, models.mixer)
    fields = pretrained.model_of(params)
    assert fields.pop("name") == name
    assert all(getattr(model, field) == value for field, value in fields.items())
    assert pretrained.told_image_size(params, fields) == (224, 224)


@pytest.mark.parametrize(
    "name",
    [
        "mixer_s32",
        pytest.param("mixer_s16", marks=pytest.mark.slow),
        pytest.param("mixer_b32", marks=pytest.mark.slow),
        pytest.param("mixer_b16", marks=pytest.mark.slow),
    ],
)
def test_the_real_sizes_go_round_all_forms_bitwise(name, make_params, tmp_path):
    none = dict.fromkeys(
        ("patch_size", "num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    )
    params = make_params(name, num_classes=1000, image_size=(224, 224), **none)
    weights = pretrained.Weights(params, "made", image_size=(224, 224))
    for form in WRITERS:
        path = write(form, weights, tmp_path)
        weights = pretrained.read(path)  # each from what the one before has written
        assert_bitwise(weights.params, params)


@pytest.mark.parametrize("form", ["safetensors", "timm", "run"])
def test_bfloat16_is_kept(form, weights, tmp_path):
    params = pretrained.cast(weights.params, "bfloat16")
    weights = dataclasses.replace(weights, params=params)
    path = write(form, weights, tmp_path)
    assert_bitwise(pretrained.read(path, dtype=None).params, params)
    widened = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_bitwise(pretrained.load(path), widened)


def test_bfloat16_in_npz_is_found(weights, tmp_path):
    """NumPy writes it as two bytes of nothing."""
    params = pretrained.cast(weights.params, "bfloat16")
    np.savez(tmp_path / "b.npz", **dict(leaves(params)))
    with np.load(tmp_path / "b.npz") as file:
        assert file["stem/bias"].dtype == "V2"
    assert_bitwise(pretrained.read(tmp_path / "b.npz", dtype=None).params, params)
    widened = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_bitwise(pretrained.load(tmp_path / "b.npz"), widened)
    # And written again it is float32, as the authors' code expects.
    wide = dataclasses.replace(weights, params=params)
    pretrained.write_npz(wide, tmp_path / "f.npz")
    assert_bitwise(pretrained.read(tmp_path / "f.npz", dtype=None).params, widened)


def test_the_npz_has_the_published_names(weights, tmp_path):
    """Section 11.2 of the notes on the released files: flat, '/' between the parts."""
    pretrained.write_npz(weights, tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as file:
        assert len(file.files) == 2 + 2 * 12 + 2 + 2
        shapes = {name: file[name].shape for name in file.files}
    assert shapes["stem/kernel"] == (4, 4, 3, 8)
    assert shapes["MixerBlock_1/token_mixing/Dense_0/kernel"] == (16, 4)
    assert shapes["MixerBlock_1/channel_mixing/Dense_1/kernel"] == (16, 8)
    assert shapes["pre_head_layer_norm/scale"] == (8,)
    assert shapes["head/kernel"] == (8, 10)


# --- The older layout -----------------------------------------------------------------


def old_layout(params, norms=(0, 1), singletons=False):
    """The names of before Linen, as big_vision's loader knows them."""
    old = {}
    for name, x in leaves(params):
        if name.startswith("stem/"):
            name = name.replace("stem/", "embedding/")
        elif name.startswith("pre_head_layer_norm/"):
            name = f"Mixer/{name.replace('pre_head_layer_norm', 'encoder_norm')}"
        elif name.startswith("MixerBlock_"):
            block, part, *rest = name.split("/")
            if part.startswith("LayerNorm"):
                part = f"LayerNorm_{norms[int(part[-1])]}"
            else:
                dense, leaf = rest
                rest = [f"{leaf}{int(dense[-1]) + 1}"]
                part = f"{part}_phase_0"
                x = x[None] if singletons else x
            name = "/".join(
                ["Mixer", block.replace("MixerBlock", "encoderblock"), part]
            )
            name = "/".join([name, *rest])
        old[name] = x
    return old


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("norms", [(0, 1), (0, 2)])
@pytest.mark.parametrize("singletons", [False, True])
def test_the_older_layout_loads(prefix, norms, singletons, make_params, tmp_path):
    params = make_params(num_blocks=11)  # 10 comes after 9, not after 1
    old = old_layout(params, norms, singletons)
    assert "Mixer/encoderblock_10/token_mixing_phase_0/kernel2" in old
    arrays = {f"{prefix}{name}": x for name, x in old.items()}
    if prefix.startswith("opt/"):
        arrays["opt/state/step"] = np.int64(7)
    np.savez(tmp_path / "old.npz", **arrays)
    assert_bitwise(pretrained.load(tmp_path / "old.npz"), params)


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_the_current_layout_loads_with_a_prefix(prefix, make_params, tmp_path):
    params = make_params(num_classes=None)
    arrays = {f"{prefix}{name}": x for name, x in leaves(params)}
    np.savez(tmp_path / "w.npz", **arrays, **{"opt/state/step": np.int64(7)})
    assert_bitwise(pretrained.load(tmp_path / "w.npz"), params)


# --- timm -----------------------------------------------------------------------------


def test_a_timm_model_agrees_with_its_recorded_logits():
    """Recorded from timm, whose GELU is exact; see tests/golden/README.md."""
    weights = pretrained.read(GOLDEN / "timm_mixer.safetensors")
    assert weights.model["gelu"] == "exact"
    assert weights.image_size is None  # 4 × 6 patches
    model = pretrained.create_model(weights)
    with np.load(GOLDEN / "timm_mixer.npz") as recorded:
        image = jnp.asarray(recorded["image"])
        logits, out = model.apply({"params": weights.params}, image)
        assert np.abs(recorded["logits"]).max() > 0.5
        np.testing.assert_allclose(logits, recorded["logits"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(
            out["pre_logits"], recorded["pre_logits"], atol=1e-5, rtol=0
        )
        # With the other GELU they do not.
        tanh = pretrained.create_model(weights, gelu="tanh")
        other, _ = tanh.apply({"params": weights.params}, image)
        assert np.abs(other - recorded["logits"]).max() > 1e-4


@pytest.mark.parametrize("wrapper", ["module.", "model._orig_mod."])
def test_timm_names_load_out_of_wrappers(wrapper, weights, tmp_path):
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    whole = {f"{wrapper}{k}": np.ascontiguousarray(x) for k, x in arrays.items()}
    safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
    assert_bitwise(pretrained.load(tmp_path / "w.safetensors"), weights.params)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_a_torch_state_dict_loads(nest, weights, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    state = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in arrays.items()}
    state["stem.proj.bias"] = state["stem.proj.bias"].bfloat16()
    path = tmp_path / "w.pth"
    torch.save({nest: state, "epoch": 3} if nest else state, path)
    read = pretrained.read(path, dtype=None)
    assert read.model["gelu"] == "exact"
    rounded = read.params["stem"].pop("bias")
    expected = weights.params["stem"].pop("bias")
    np.testing.assert_array_equal(rounded, expected.astype(ml_dtypes.bfloat16))
    assert_bitwise(read.params, weights.params)
    flip(path, path.read_bytes().find(np.float32(arrays["norm.bias"][0]).tobytes()))
    with pytest.raises(ValueError, match="not a whole torch file"):
        pretrained.read(path)


def test_averaged_weights_are_read_among_what_a_training_program_saves(
    weights, tmp_path, caplog
):
    """Its arguments are a Namespace in timm's and DeiT's programs."""
    torch = pytest.importorskip("torch")
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    state = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in arrays.items()}
    last = {k: x + 1 for k, x in state.items()}
    saved = {"model": last, "model_ema": state, "optimizer": {"state": {0: {}}}}
    arguments = argparse.Namespace(lr=1e-3, aa="rand-m9", decay=None, opt_betas=(0.9,))
    torch.save({**saved, "args": arguments, "epoch": 3}, tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        assert_bitwise(pretrained.load(tmp_path / "w.pth"), weights.params)
    assert "read model_ema; it holds ['model'] too" in caplog.text
    kernels = [
        pretrained.read(tmp_path / "w.pth", ema=ema).params["head"]["bias"]
        for ema in (True, False)
    ]
    np.testing.assert_array_equal(kernels[0], weights.params["head"]["bias"])
    np.testing.assert_array_equal(kernels[1], weights.params["head"]["bias"] + 1)
    for nest, ema, holds in [("model", True, "no"), ("model_ema", False, "only")]:
        torch.save({nest: state}, tmp_path / "one.pth")
        with pytest.raises(ValueError, match=f"one.pth holds {holds} averaged weights"):
            pretrained.read(tmp_path / "one.pth", ema=ema)


def test_the_settings_that_swins_program_saves_are_no_obstacle(
    weights, tmp_path, monkeypatch
):
    """A class of yacs, a dictionary with attributes, whether or not it is installed."""
    torch = pytest.importorskip("torch")
    module = types.ModuleType("yacs.config")
    settings = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    vars(module)["CfgNode"] = settings
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = settings(DATA=settings(IMG_SIZE=224), OUTPUT="out")
    config.__dict__["__immutable__"] = True
    config.__dict__["__deprecated_keys__"] = {"OLD"}
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    state = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in arrays.items()}
    torch.save({"model": state, "config": config, "epoch": 299}, tmp_path / "w.pth")
    monkeypatch.undo()
    assert_bitwise(pretrained.load(tmp_path / "w.pth"), weights.params)


def test_a_torch_file_never_runs_code(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights alone"):
        pretrained.read(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


# --- Foreign weights say their normalisation ------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MIIL = (0.0, 1.0)  # images in [0, 1]: timm's mixer_b16_224.miil_in21k_ft_in1k


@pytest.fixture
def foreign(tmp_path):
    """A timm file that says nothing but its arrays, alone in a folder."""
    path = tmp_path / "foreign" / "model.safetensors"
    path.parent.mkdir()
    shutil.copy(GOLDEN / "timm_mixer.safetensors", path)
    return path


def config_beside(path, config):
    text = config if isinstance(config, str) else json.dumps(config)
    path.with_name("config.json").write_text(text, encoding="utf-8")


def hub_config(mean, std, **fields):
    """What timm's save_for_hf writes, as far as it matters."""
    pretrained_cfg = {"mean": mean, "std": std, "crop_pct": 0.875}
    size = {"model_args": {"img_size": [32, 48]}}
    said = {"architecture": "mixer_b16_224", "num_classes": 10, **size, **fields}
    return said | {"pretrained_cfg": pretrained_cfg}


def by_flags(path, mean, std):
    return pretrained.read(path, mean=mean, std=std)


def by_hub_config(path, mean, std):
    config_beside(path, hub_config(mean, std))
    return pretrained.read(path)


def by_old_config(path, mean, std):
    config = {"architecture": "mixer_s16", "mean": mean, "std": std}
    config_beside(path, config | {"input_size": [3, 32, 48]})
    return pretrained.read(path)


@pytest.mark.parametrize("said_by", [by_flags, by_hub_config, by_old_config])
@pytest.mark.parametrize(("mean", "std"), [IMAGENET, MIIL, (0.3, (0.2, 0.7, 1.0))])
def test_weights_for_other_images_make_of_ours_what_timm_made_of_theirs(
    said_by, mean, std, foreign, caplog
):
    """timm's recorded logits, its images being taken for ones so normalised."""
    weights = said_by(foreign, mean, std)
    assert not caplog.records
    assert str(weights.normalisation).startswith(f"mean {np.ravel(mean)[0]:g}")
    model = pretrained.create_model(weights)
    with np.load(GOLDEN / "timm_mixer.npz") as recorded:
        levels = recorded["image"].astype(np.float64) * std + mean
        image = jnp.asarray(2 * levels - 1, jnp.float32)
        logits, _ = model.apply({"params": weights.params}, image)
        largest = np.abs(recorded["logits"]).max()
        assert np.abs(logits - recorded["logits"]).max() < 1e-5 * largest
    silent = pretrained.load(GOLDEN / "timm_mixer.safetensors")
    other, _ = model.apply({"params": silent}, image)
    assert np.abs(other - logits).max() > 0.01


def test_a_config_that_contradicts_itself_is_read_as_timm_reads_it(foreign):
    old = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 8, 8]}
    config_beside(foreign, hub_config(0, 1) | old)
    assert str(pretrained.read(foreign).normalisation) == "mean 0 and std 1"


def test_the_config_beside_a_link_is_the_one_that_counts(foreign, tmp_path):
    """The hub's cache is links by name to files by checksum."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(foreign)
    config_beside(snapshot / "model.safetensors", hub_config(0, 1))
    weights = pretrained.read(snapshot / "model.safetensors")
    assert str(weights.normalisation) == "mean 0 and std 1"


def test_nothing_is_folded_for_our_own_images(foreign):
    before = pretrained.load(foreign)
    assert_bitwise(by_hub_config(foreign, [0.5] * 3, [0.5] * 3).params, before)
    assert_bitwise(pretrained.load(foreign), before)


def test_a_folded_stem_of_bfloat16_is_kept_in_float32(weights, tmp_path):
    params = pretrained.cast(weights.params, "bfloat16")
    arrays = TIMM.with_their_names(dict(leaves(params)))
    whole = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
    folded = pretrained.read(tmp_path / "w.safetensors", dtype=None, mean=0.3, std=0.2)
    kernel = params["stem"]["kernel"].astype(np.float64)
    bias = params["stem"]["bias"].astype(np.float64) + kernel.sum((0, 1, 2))
    got = folded.params
    np.testing.assert_allclose(got["stem"]["kernel"], 2.5 * kernel, rtol=1e-7)
    np.testing.assert_allclose(got["stem"]["bias"], bias, rtol=1e-6)
    assert {str(x.dtype) for x in got["stem"].values()} == {"float32"}
    assert {str(x.dtype) for x in got["head"].values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, r"no config\.json is beside it"),
        ({"model": {"name": "mixer_b16"}, "dataset": {}}, r"nor does .*config\.json"),
        ({"architecture": "mixer_b16_224"}, r"nor does .*config\.json"),
        ({"pretrained_cfg": {"mean": None, "std": None}}, r"nor does .*config\.json"),
        ("[1, 2]", r"nor does .*config\.json"),
        (hub_config(0, 1, architecture="vit_tiny"), r"config\.json is of a vit_tiny"),
    ],
)
def test_what_a_timm_file_does_not_say_is_said_to_be_assumed(
    config, why, foreign, caplog
):
    if config is not None:
        config_beside(foreign, config)
    weights = pretrained.read(foreign)
    assert str(weights).endswith("timm's names, normalisation assumed)")
    assert_bitwise(weights.params, pretrained.load(GOLDEN / "timm_mixer.safetensors"))
    warning = caplog.records[0].getMessage()
    assert warning.startswith(f"{foreign} does not say")
    assert re.search(why, warning)
    for said in ("mean 0.5 and std 0.5", "[-1, 1]", "exact GELU", "--mean", "--std"):
        assert said in warning


def test_a_config_says_gelu_image_size_and_classes_too(foreign):
    names = [f"c{i}" for i in range(10)]
    tanh = {"img_size": [32, 48], "act_layer": "gelu_tanh"}
    config_beside(foreign, hub_config(0, 1, model_args=tanh, label_names=names))
    weights = pretrained.read(foreign)
    assert (weights.model["gelu"], weights.image_size) == ("tanh", (32, 48))
    assert weights.class_names == tuple(names)
    numbered = {str(i): name for i, name in reversed(list(enumerate(names)))}
    config_beside(foreign, hub_config(0, 1, label_names=numbered))
    weights = pretrained.read(foreign)
    assert (weights.model["gelu"], weights.class_names) == ("exact", tuple(names))


@pytest.mark.parametrize(
    ("prepared", "protocol"),
    [
        ({"crop_pct": 0.875}, "timm"),
        ({"crop_pct": 0.9, "interpolation": "bicubic"}, "timm-0.9"),
        (
            {"crop_pct": 1, "interpolation": "bicubic", "crop_mode": "center"},
            "timm-1.0",
        ),
        ({"crop_pct": 0.875, "interpolation": "bilinear"}, None),
        ({"crop_pct": 0.95}, None),
        ({}, None),
    ],
)
def test_a_config_says_how_images_are_prepared(prepared, protocol, foreign, caplog):
    config_beside(foreign, {"mean": 0.5, "std": 0.5, **prepared})
    assert pretrained.read(foreign).preprocess == protocol
    assert protocol is None or protocol in image_ops.PROTOCOLS
    silent = protocol is not None or not prepared
    assert silent != ("for which there is no protocol here" in caplog.text)


@pytest.mark.parametrize("size", [(16, 16), (8, 32), (17, 16)])
def test_a_config_may_say_the_image_size_of_arrays_without_tokens(
    size, weights, tmp_path, monkeypatch, caplog
):
    """Of an architecture that has no letter `s`, any that the patches tile."""
    axes = {
        path: " ".join("t" if letter == "s" else letter for letter in letters.split())
        for path, letters in models.mixer.AXES.items()
    }
    path = tmp_path / "model.safetensors"
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    safetensors.numpy.save_file(whole, path)
    config_beside(path, hub_config(0.5, 0.5, model_args={"img_size": size}))
    monkeypatch.setattr(models.mixer, "AXES", axes)
    if size == (17, 16):
        assert pretrained.read(path).image_size is None
        assert "says that images are 17 x 16 px; the weights beside" in caplog.text
    else:
        assert pretrained.read(path).image_size == size


def test_what_a_config_says_that_does_not_fit_is_passed_by_aloud(foreign, caplog):
    config = hub_config(0, 1, model_args={"img_size": 224}, label_names=["a", "b"])
    config_beside(foreign, config)
    weights = pretrained.read(foreign)
    assert (weights.image_size, weights.class_names) == (None, None)
    assert str(weights.normalisation) == "mean 0 and std 1"
    assert "says that images are 224 x 224 px; the weights beside it" in caplog.text
    assert "names 2 classes; the weights beside it have 10" in caplog.text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "is no JSON that can be read"),
        ('{"mean": 0', "is no JSON that can be read"),
        ("[" * 100_000, "is no JSON that can be read"),
        ('{"mean": NaN, "std": 1}', "is no JSON that can be read"),
        ('{"mean": 0, "mean": 0.5, "std": 1}', "'mean' stands there twice"),
        ({"pretrained_cfg": [0, 1]}, r"pretrained_cfg \[0, 1\]; expected a table"),
        ({"mean": 0}, "there is a mean and no std; give both"),
        ({"std": 1}, "there is a std and no mean; give both"),
        (hub_config([0.5, 0.5], 1), r"mean is \[0\.5, 0\.5\]; expected a number from"),
        (hub_config(0, [1, 0, 1]), r"std is \[1, 0, 1\]; expected a number above 0"),
        (hub_config(0, -1), "std is -1; expected a number above 0"),
        (hub_config(-0.5, 1), "mean is -0.5; expected a number from 0 to 1"),
        (hub_config("0", 1), "mean is 0; expected a number"),
        (hub_config(True, 1), "mean is True; expected a number"),
        (hub_config({"red": 0}, 1), "mean is {'red': 0}; expected a number"),
        (hub_config(10**400, 1), "mean is 1000.*; expected a number"),
        (hub_config([123.675, 116.28, 103.53], 58), "Divide mean and std by 255"),
        (hub_config(0, 255), "std is 255; .* Divide mean and std by 255"),
        (
            hub_config(0, 1, num_classes=1000),
            "num_classes 1000, the weights .* have 10",
        ),
        (hub_config(0, 1, num_classes="ten"), "num_classes ten; expected a whole"),
        ({"mean": 0, "std": 1, "crop_pct": "x"}, "crop_pct x; expected a number"),
        (hub_config(0, 1, architecture=3), "architecture 3; expected a name"),
        (hub_config(0, 1, model_args="x"), "model_args x; expected a table"),
        (
            hub_config(0, 1, model_args={"act_layer": "silu"}),
            "act_layer silu; expected",
        ),
        (hub_config(0, 1, model_args={"img_size": "x"}), "img_size x; expected"),
        (hub_config(0, 1, input_size=[3, 9], model_args={}), r"input_size \[3, 9\]; "),
        (hub_config(0, 1, label_names={"0": 7}), r"label_names \[7\]; expected a list"),
    ],
)
def test_a_config_without_sense_is_one_line_that_names_it(config, said, foreign):
    config_beside(foreign, config)
    name = re.escape(str(foreign.with_name("config.json")))
    with pytest.raises(ValueError, match=f"^{name}.*{said}") as error:
        pretrained.read(foreign)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (0, None, "there is a mean and no std"),
        ([0.5, 0.5], [0.5, 0.5], "mean is .*or three: red, green, blue"),
        (0.5, 0, "std is 0; expected a number above 0, at most 1"),
        ((123.675, 116.28, 103.53), (58.4, 57.1, 57.4), "Divide mean and std by 255"),
        (float("nan"), 1, "mean is nan"),
        ([], 1, r"mean is \[\]"),
    ],
)
def test_a_given_normalisation_without_sense_teaches(mean, std, said, foreign):
    with pytest.raises(ValueError, match=f"^--mean and --std: .*{said}"):
        pretrained.read(foreign, mean=mean, std=std)


def test_a_normalisation_that_contradicts_the_source_is_refused(
    foreign, weights, tmp_path
):
    """What is said twice alike is no contradiction."""
    config_beside(foreign, hub_config([0, 0, 0], [1, 1, 1]))
    runs.write_run(weights, tmp_path / "run")
    pretrained.write_safetensors(weights, tmp_path / "w.safetensors", names="timm")
    sources = {
        foreign: (r"config\.json, is for mean 0 and std 1", 0.5, 0.5),
        tmp_path / "run": ("is a run, which is for mean 0.5 and std 0.5", 0, 1),
        tmp_path / "w.safetensors": ("by mlp_mixer, and is for mean 0.5", 0, 1),
        "imagenet1k/Mixer-B_16": ("is published, and is for mean 0.5", 0, 1),
    }
    for source, (said, mean, std) in sources.items():
        both = (
            f"{re.escape(str(source))}.*{said}.* --mean and --std say mean {mean} and"
        )
        with pytest.raises(ValueError, match=both):
            pretrained.read(source, mean=mean, std=std)
    folded = pretrained.load(foreign)
    assert_bitwise(pretrained.read(foreign, mean=0, std=(1, 1, 1)).params, folded)
    pretrained.read(tmp_path / "run", mean=0.5, std=0.5)


# --- Runs -----------------------------------------------------------------------------


def test_a_run_gives_its_weights_and_what_it_knows(tiny, tmp_path):
    state = train.train(tiny, tmp_path / "run")
    weights = pretrained.read(tmp_path / "run")
    assert_bitwise(weights.params, jax.device_get(state.params))
    assert weights.origin == "run at step 12"
    assert (weights.model["gelu"], weights.image_size) == ("tanh", (16, 16))
    assert (weights.class_names, weights.preprocess) == (None, "vision_transformer")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint 3"):
        pretrained.read(tmp_path / "run", step=3)


# --- What is wrong with a file --------------------------------------------------------


def flip(path, at, mask=0x01):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("form", ["npz", "safetensors", "timm"])
def test_a_cut_file_is_refused(form, weights, tmp_path):
    path = write(form, weights, tmp_path)
    whole = path.read_bytes()
    for keep in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"{path.name} is not a whole"):
            pretrained.read(path)


@pytest.mark.parametrize("form", ["npz", "safetensors", "timm"])
def test_a_flipped_bit_is_refused_or_changes_nothing(form, weights, tmp_path):
    path = write(form, weights, tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # The two ends, where names and shapes are, and some of the rest.
    ends = [*range(0, 6000, 17), *range(len(whole) - 3000, len(whole), 17)]
    places = [*ends, *rng.integers(0, len(whole), 200)]
    refused = 0
    for at in places:
        path.write_bytes(whole)
        flip(path, at, 1 << int(rng.integers(8)))
        try:
            again = pretrained.read(path)
        except ValueError:
            refused += 1
        else:
            assert_bitwise(again.params, weights.params)
            assert again.image_size == weights.image_size
            assert form == "npz" or again.model["gelu"] == weights.model["gelu"]
    assert refused > 0.5 * len(places)


# --- Small files that could hurt ------------------------------------------------------


def npy(array, shape=None, descr="<f4"):
    """A .npy file, perhaps of another shape and dtype than it says."""
    file = io.BytesIO()
    shape = np.shape(array) if shape is None else shape
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + np.asarray(array, np.float32).tobytes()


def archive(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(f"{name}.npy", content)


def with_header(flat, header, content=b""):
    """The members of `flat`, one of which begins with another header."""
    first, *others = flat
    return [(first, header + content), *((name, npy(flat[name])) for name in others)]


def far_block(path, flat):
    one = np.zeros(1, np.float32)
    np.savez(path, **{"MixerBlock_99999999/LayerNorm_0/scale": one, "stem/bias": one})


def block_of_many_digits(path, flat):
    np.savez(path, **{f"MixerBlock_{'9' * 5000}/LayerNorm_0/scale": np.zeros(1)})


def old_names_of_many_digits(path, flat):
    name = f"Mixer/encoderblock_99999999/LayerNorm_{'9' * 5000}/scale"
    np.savez(path, **{name: np.zeros(1), "embedding/bias": np.zeros(1)})


def inflates(path, flat):
    stem = {"stem/kernel": np.zeros(8_000_000, np.float32)}
    np.savez_compressed(path, **flat | stem)


def inflates_beside(path, flat):
    np.savez_compressed(path, **flat, zeros=np.zeros(8_000_000, np.float32))


def says_less_than_it_inflates_to(path, flat):
    """The archive's directory has the size and CRC-32 of a good array."""
    *others, name = flat
    bomb = npy(np.zeros(8_000_000), shape=flat[name].shape)
    archive(path, [*((k, npy(flat[k])) for k in others), (name, bomb)])
    data, good = bytearray(path.read_bytes()), npy(flat[name])
    entry = data.rindex(b"PK\x01\x02")  # the last member's
    struct.pack_into("<I", data, entry + 16, zlib.crc32(good))
    struct.pack_into("<I", data, entry + 24, len(good))
    path.write_bytes(data)


def a_header_without_end(path, flat):
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
    archive(path, with_header(flat, header, bytes(4 * 10**7)))


def a_huge_element(path, flat):
    header = npy(np.zeros(0), shape=(), descr="|V40000000")
    archive(path, with_header(flat, header, bytes(4 * 10**7)))


def more_than_it_has(path, flat):
    archive(path, with_header(flat, npy(np.zeros(0), shape=(2**20, 2**20))))


def negative_sizes(path, flat):
    archive(path, with_header(flat, npy(np.zeros(8), shape=(-2, -4))))


def objects(path, flat):
    archive(path, with_header(flat, npy(np.zeros(0), shape=(8,), descr="|O")))


def another_compression(path, flat):
    members = [(name, npy(array)) for name, array in flat.items()]
    archive(path, members, zipfile.ZIP_LZMA)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def two_members_of_one_name(path, flat):
    members = [(name, npy(array)) for name, array in flat.items()]
    archive(path, [*members, ("stem/bias", npy(np.ones(8)))])


def a_consistent_mixer_of_zeros(path, flat):
    """Of the right shapes, and so large as no file of its size can be."""
    sizes = {"ph": 4, "pw": 4, "rgb": 3, "s": 16, "ds": 4, "c": 2**14, "dc": 2**14}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, axes in tree.layout(["MixerBlock_0/x"], models.mixer).items():
            shape = tuple(sizes[axis] for axis in axes)
            with file.open(f"{name}.npy", "w") as member:
                member.write(npy(np.zeros(0), shape=shape))
                for _ in range(math.prod(shape) // 2**10):
                    member.write(bytes(2**12))
                member.write(bytes(4 * (math.prod(shape) % 2**10)))


def thousands_of_names(path, flat):
    extra = {f"x{i}\x1b[31m\n": np.zeros(1, np.float32) for i in range(300)}
    np.savez(path, **flat, **extra)


def a_name_of_50_kb(path, flat):
    np.savez(path, **flat, **{"x" * 50_000: np.zeros(1, np.float32)})


def empty_arrays(path, flat):
    np.savez(path, **{name: x[..., :0] for name, x in flat.items()})


NPZ_BOMBS = {
    far_block: r"unexpected: MixerBlock_99999999/LayerNorm_0/scale \(1,\)",
    block_of_many_digits: "unexpected: MixerBlock_999",
    old_names_of_many_digits: "unexpected: MixerBlock_99999999/LayerNorm_999",
    inflates: r"stem/kernel is \(8000000,\)",
    inflates_beside: r"unexpected: zeros \(8000000,\)",
    says_less_than_it_inflates_to: "Bad CRC-32",
    a_header_without_end: "expected 4294967295 bytes",
    a_huge_element: r"holds no numbers, but \|V40000000",
    more_than_it_has: "has 128 bytes; its header says 4,398,046,511,232",
    negative_sizes: r"\(-2, -4\)|its header says",
    objects: "holds no numbers, but object",
    another_compression: "is compressed as no npz file is",
    two_members_of_one_name: "two members are called stem/bias",
    thousands_of_names: r"unexpected: x0\\x1b\[31m\\n \(1,\)",
    a_name_of_50_kb: "unexpected: xxx",
    empty_arrays: "which is empty",
}


def assert_refused_cheaply(path, message):
    """Within seconds, 20 MB and 20 lines that no terminal obeys."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            pretrained.read(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    lines = str(error.value).splitlines()
    assert path.name in lines[0]
    assert len(lines) <= 20
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert most < 20e6
    assert time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", NPZ_BOMBS, ids=lambda make: make.__name__)
def test_a_small_npz_cannot_hurt(make, weights, tmp_path):
    make(tmp_path / "w.npz", dict(leaves(weights.params)))
    assert_refused_cheaply(tmp_path / "w.npz", NPZ_BOMBS[make])


@pytest.mark.slow
def test_a_mixer_of_zeros_may_not_be_larger_than_any(tmp_path):
    a_consistent_mixer_of_zeros(tmp_path / "w.npz", {})
    said = r"that declare 2,1\d\d,\d\d\d,\d\d\d are no weights"
    assert_refused_cheaply(tmp_path / "w.npz", said)


def test_a_compressed_npz_of_zeros_is_read(make_params, tmp_path):
    """Small ones may inflate by any factor."""
    params = jax.tree.map(np.zeros_like, make_params(hidden_dim=256))
    np.savez_compressed(tmp_path / "w.npz", **dict(leaves(params)))
    assert (tmp_path / "w.npz").stat().st_size < 50_000
    assert_bitwise(pretrained.load(tmp_path / "w.npz"), params)


def header_of(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + size], data[8 + size :]


SAFETENSORS_BOMBS = {
    "length beyond the file": (lambda h: h, 2**62, "header says that it has 4,611,686"),
    "length beyond any": (lambda h: h, 2**64 - 1, "header says that it has 18,446,744"),
    "lists without end": (lambda h: b"[" * 10**6, None, "its header is no JSON"),
    "objects without end": (lambda h: b'{"a":' * 10**6, None, "its header is no JSON"),
    "an array twice": (
        lambda h: (
            h.rstrip()[:-1] + b',"a":{"dtype":"F32","shape":[0],'
            b'"data_offsets":[0,0]}' * 2 + b"}"
        ),
        None,
        "the key 'a' stands there twice",
    ),
    "a field twice": (
        lambda h: h.replace(b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"', 1),
        None,
        "the key 'dtype' stands there twice",
    ),
    "shapes beyond the file": (
        lambda h: h.replace(b'"shape":[8]', b'"shape":[4611686018427387904]'),
        None,
        "is not a whole safetensors file",
    ),
    "a far block": (
        lambda h: h.replace(b"MixerBlock_1", b"MixerBlock_99999999"),
        None,
        "does not hold the parameters|is not a whole",
    ),
    "a name that commands": (
        lambda h: h.replace(b"head/bias", rb"head/\u001b[31m\nbias"),
        None,
        r"head/\\x1b\[31m\\nbias",
    ),
}


@pytest.mark.parametrize("count", [0, 7])
def test_a_safetensors_file_without_a_header_says_no_header(count, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"{" * count)
    with pytest.raises(ValueError, match=rf"safetensors file \(it has {count} bytes\)"):
        pretrained.read(path)


@pytest.mark.parametrize("kind", SAFETENSORS_BOMBS)
def test_a_small_safetensors_file_cannot_hurt(kind, weights, tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(dict(leaves(weights.params)), path)
    change, length, message = SAFETENSORS_BOMBS[kind]
    header, rest = header_of(path)
    changed = change(header)
    assert changed != header or length
    path.write_bytes(struct.pack("<Q", length or len(changed)) + changed + rest)
    assert_refused_cheaply(path, message)


def expanded(torch, arrays):
    return {k: torch.zeros(1).expand(*x.shape) for k, x in arrays.items()}


TORCH_BOMBS = {
    "a far block": (
        lambda torch, _: {"blocks.99999999.norm1.weight": torch.zeros(1)},
        "unexpected|holds",
    ),
    "one number as a huge array": (
        lambda torch, a: a | {"stem.proj.weight": torch.zeros(1).expand(10**6, 10**6)},
        "does not hold the parameters",
    ),
    "one number as every array": (expanded, r"declares [\d,]+ bytes of tensors"),
    "no device": (
        lambda torch, a: a | {"stem.proj.weight": torch.empty(10**9, device="meta")},
        "stem.proj.weight holds no plain numbers",
    ),
    "sparse": (
        lambda torch, a: (
            a | {"norm.bias": torch.sparse_coo_tensor(size=(10**9, 10**9))}
        ),
        "norm.bias holds no plain numbers",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant", "ignore:Validating sparse")
@pytest.mark.parametrize("kind", TORCH_BOMBS)
def test_a_small_torch_file_cannot_hurt(kind, make_params, tmp_path):
    torch = pytest.importorskip("torch")
    make, message = TORCH_BOMBS[kind]
    arrays = TIMM.with_their_names(dict(leaves(make_params(hidden_dim=128))))
    tensors = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
    torch.save(make(torch, tensors), tmp_path / "w.pth")
    assert_refused_cheaply(tmp_path / "w.pth", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, names[0]], "two members are called"),
        (lambda names: names, "is compressed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_torch_archive_is_as_torch_writes_it(change, message, weights, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    state = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
    torch.save(state, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good:
        names = change(good.namelist())
        packed = zipfile.ZIP_DEFLATED if "compressed" in message else zipfile.ZIP_STORED
        with zipfile.ZipFile(tmp_path / "w.pth", "w", packed) as file:
            for name in names:
                file.writestr(name, good.read(name))
    assert_refused_cheaply(tmp_path / "w.pth", message)


def test_a_damaged_array_is_named(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    pretrained.write_safetensors(weights, path)
    value = weights.params["MixerBlock_1"]["LayerNorm_0"]["scale"][3]
    flip(path, path.read_bytes().find(struct.pack("<f", value)))
    with pytest.raises(
        ValueError, match=r"wrong bits in MixerBlock_1/LayerNorm_0/scale;"
    ):
        pretrained.read(path)


def test_missing_unexpected_and_contradicting_arrays_are_one_error(weights, tmp_path):
    flat = dict(leaves(weights.params))
    del flat["MixerBlock_0/LayerNorm_1/bias"]
    del flat["head/bias"]
    flat["MixerBlock_0/layer_scale"] = np.zeros(8, np.float32)
    flat["MixerBlock_1/token_mixing/Dense_0/kernel"] = np.zeros((15, 4), np.float32)
    flat["stem/bias"] = np.zeros((1, 8), np.float32)
    np.savez(tmp_path / "w.npz", **flat)
    with pytest.raises(
        ValueError, match=r"w\.npz does not hold the parameters"
    ) as error:
        pretrained.read(tmp_path / "w.npz")
    assert str(error.value).splitlines()[1:] == [
        "  unexpected: MixerBlock_0/layer_scale (8,)",
        "  shape: stem/bias is (1, 8), the others say (c=8)",
        "  shape: MixerBlock_1/token_mixing/Dense_0/kernel is (15, 4), the others say "
        "(s=16, ds=4)",
        "  missing: MixerBlock_0/LayerNorm_1/bias",
        "  missing: head/bias",
    ]


def test_one_stray_array_is_the_one_that_is_named(weights, tmp_path):
    """Not all that would have to be there if it belonged there."""
    ours = dict(leaves(weights.params))
    forms = {
        "npz": ours,
        "ours": ours,
        "timm": TIMM.with_their_names(ours),
    }
    strays = {
        "ours": [
            "MixerBlock_12/LayerNorm_0/scale",
            "MixerBlock_7/token_mixing/Dense_0/bias",
        ],
        "timm": ["blocks.12.norm1.weight", "blocks.999999999.mlp_tokens.fc1.bias"],
    }
    strays["npz"] = strays["ours"]
    everywhere = [
        "MixerBlock_1/layer_scale",
        "backbone.x",
        "head/extra",
        "optimizer/mu",
    ]
    for form, arrays in forms.items():
        for stray in [*strays[form], *everywhere]:
            if form == "timm" and "." not in stray:
                stray = stray.replace("/", ".")
            whole = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
            whole[stray] = np.zeros(8, np.float32)
            path = tmp_path / ("w.npz" if form == "npz" else "w.safetensors")
            if form == "npz":
                np.savez(path, **whole)
            else:
                safetensors.numpy.save_file(whole, path)
            with pytest.raises(ValueError, match="does not hold the par") as error:
                pretrained.read(path)
            first, *lines = str(error.value).splitlines()
            assert first.startswith(str(path))
            assert len(lines) == 1
            assert lines[0].startswith(f"  unexpected: {stray} ")
            assert lines[0].endswith(" (8,)")


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        (
            "blocks.1.mlp_tokens.fc1.weight",
            np.zeros((2, 2, 2)),
            r"shape: {} as Mixer.*\(s=16, ds=4",
        ),
        (
            "blocks.1.mlp_tokens.fc1.weight",
            np.zeros(8),
            "shape: {} as MixerBlock_1/token",
        ),
        ("stem.proj.weight", np.zeros((8, 48)), r"shape: {} as stem/kernel .*ph=\?"),
        ("norm.bias", np.zeros(0), "shape: {} as .*, which is empty"),
        ("norm.bias", np.zeros(8, np.int8), "dtype: {} as .* is int8, expected floats"),
        ("stem.proj.weight", None, "missing: {} as stem/kernel"),
        ("blocks.0.norm2.bias", None, "missing: {} as MixerBlock_0/LayerNorm_1/bias"),
    ],
)
def test_one_wrong_array_is_named_as_its_file_names_it(
    name, array, said, weights, tmp_path
):
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    arrays.pop(name)
    if array is not None:
        arrays[name] = array
    whole = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors does not hold") as error:
        pretrained.read(tmp_path / "w.safetensors")
    _, line = str(error.value).splitlines()
    assert re.search(said.format(re.escape(name)), line)


def test_a_block_that_is_missing_is_missing(make_params, tmp_path):
    """Between others it does not make those after it unexpected."""
    flat = dict(leaves(make_params(num_blocks=4)))
    whole = {k: x for k, x in flat.items() if not k.startswith("MixerBlock_1/")}
    np.savez(tmp_path / "w.npz", **whole)
    with pytest.raises(ValueError, match="does not hold") as error:
        pretrained.read(tmp_path / "w.npz")
    lines = str(error.value).splitlines()[1:]
    assert {line.partition("/")[0] for line in lines} == {"  missing: MixerBlock_1"}
    assert len(lines) == 12


def test_another_model_altogether_is_told_in_twenty_lines(tmp_path):
    parts = ("norm1.weight", "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight")
    arrays = {f"blocks.{i}.{p}": np.zeros((8, 8)) for i in range(12) for p in parts}
    safetensors.numpy.save_file(arrays, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"vit\.safetensors does not hold") as error:
        pretrained.read(tmp_path / "vit.safetensors")
    lines = str(error.value).splitlines()
    assert len(lines) == 20
    assert lines[1].startswith("  unexpected: blocks.0.attn.")


def test_another_architecture_is_refused_by_name(weights, tmp_path):
    """ResMLP's blocks of timm have other parts."""
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    arrays["blocks.0.ls1"] = np.zeros(8, np.float32)
    whole = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.ls1 \(8,\)"):
        pretrained.read(tmp_path / "w.safetensors")
    np.savez(tmp_path / "nothing.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"known here \(mixer.*\n  unexpected: a"):
        pretrained.read(tmp_path / "nothing.npz")


def test_what_else_lies_beside_prefixed_parameters(make_params, tmp_path):
    """An optimiser is left out unread; anything else is unexpected."""
    params = make_params()
    arrays = {f"params/{name}": x for name, x in leaves(params)}
    optimiser = {"opt/state/who": np.array([{}], object), "opt/target/x": np.zeros(3)}
    np.savez(tmp_path / "w.npz", **arrays, **optimiser)
    assert_bitwise(pretrained.load(tmp_path / "w.npz"), params)
    np.savez(tmp_path / "w.npz", **arrays, **{"MixerBlock_0/extra": np.zeros(3)})
    with pytest.raises(ValueError, match=r"unexpected: MixerBlock_0/extra \(3,\)"):
        pretrained.load(tmp_path / "w.npz")


def test_only_floats_are_parameters(weights, tmp_path):
    for wrong in (np.zeros(8, np.int8), np.array(["a"] * 8), np.zeros(8, complex)):
        flat = dict(leaves(weights.params)) | {"stem/bias": wrong}
        np.savez(tmp_path / "w.npz", **flat)
        said = rf"dtype: stem/bias is {wrong.dtype}, expected floats"
        with pytest.raises(ValueError, match=said):
            pretrained.read(tmp_path / "w.npz")


@pytest.mark.parametrize("stray", ["params/stem/bias", "opt/target/stem/bias"])
def test_an_array_with_and_without_a_prefix_is_there_twice(stray, weights, tmp_path):
    flat = dict(leaves(weights.params))
    other = {stray: np.ones(8, np.float32)}
    for arrays in (flat | other, other | flat):
        np.savez(tmp_path / "w.npz", **arrays)
        with pytest.raises(ValueError, match=r"w\.npz has two arrays for stem/bias"):
            pretrained.read(tmp_path / "w.npz")


def test_two_arrays_of_one_name_are_refused(weights, tmp_path):
    arrays = TIMM.with_their_names(dict(leaves(weights.params)))
    arrays["model.stem.proj.bias"] = np.zeros(8, np.float32)
    whole = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    safetensors.numpy.save_file(whole, tmp_path / "w.safetensors")
    said = (
        r"w\.safetensors: there are two arrays for stem/bias: model\.stem\.proj\.bias "
    )
    with pytest.raises(ValueError, match=f"{said}and stem"):
        pretrained.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ('{"image_size": [16, 20]}', "16x20 image makes 20 tokens .* are for 16"),
        ('{"image_size": null}', "metadata that is not ours"),
        ('["tanh"]', "metadata that is not ours"),
        ('{"gelu": "relu"}', "gelu 'relu' is unknown; try exact, tanh"),
        ('{"gelu": ["tanh"]}', "metadata that is not ours: gelu is"),
        ('{"gelu": null}', "metadata that is not ours: gelu is None"),
        ('{"image_size": [16.0, 16]}', "metadata that is not ours: image_size is"),
        ('{"image_size": [0, 0]}', "image_size 0 is not divisible"),
        ('{"class_names": ["a", 3]}', "metadata that is not ours: class_names is"),
        ('{"class_names": ["a"]}', "1 names of classes for a head of 10"),
        ('{"preprocess": {}}', "metadata that is not ours: preprocess is"),
        ('{"gelu": "tanh", "gelu": "exact"}', "'gelu' stands there twice"),
        ("[" * 100_000, "metadata that is not ours"),
        ("", "metadata that is not ours"),
    ],
)
def test_metadata_that_cannot_be_is_refused(known, said, weights, tmp_path):
    flat, path = dict(leaves(weights.params)), tmp_path / "w.safetensors"
    safetensors.numpy.save_file(flat, path, metadata={"mlp_mixer": known})
    with pytest.raises(ValueError, match=said) as error:
        pretrained.read(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1
    # A field of a later version is passed by.
    later = {"mlp_mixer": '{"gelu": "exact", "depth": 3}'}
    safetensors.numpy.save_file(flat, path, metadata=later)
    assert pretrained.read(path).model["gelu"] == "exact"


def test_damaged_checksums_are_damage(weights, tmp_path):
    flat, path = dict(leaves(weights.params)), tmp_path / "w.safetensors"
    for sums in ("[]", "[[1, 2]]", "3", "{", '{"a": 1, "a": 1}'):
        safetensors.numpy.save_file(flat, path, metadata={"crc32": sums})
        with pytest.raises(ValueError, match=r"w\.safetensors is damaged: its checks"):
            pretrained.read(path)


def test_a_torch_file_without_torch_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "w.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ModuleNotFoundError, match="torch is not installed: pip install"
    ):
        pretrained.read(tmp_path / "w.pth")


def test_pickles_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="is not a whole npz file"):
        pretrained.read(tmp_path / "w.npz")


def test_values_that_are_not_finite_are_reported(weights, tmp_path, caplog):
    weights.params["stem"]["kernel"][0, 0, 0, :3] = np.nan
    weights.params["head"]["bias"][1] = np.inf
    path = write("npz", weights, tmp_path)
    caplog.clear()
    found = pretrained.not_finite(pretrained.load(path))
    assert found == {"stem/kernel": 3, "head/bias": 1}
    assert "3 values of stem/kernel are not finite" in caplog.text


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("nowhere", FileNotFoundError, "There are no weights"),
        ("folder", FileNotFoundError, "holds no run"),
        ("notes.txt", ValueError, r"ends in '\.txt'; weights are read from"),
        ("", ValueError, "'' are no weights; expected a run's folder"),
        ("https://x.org/w.npz", ValueError, "or a published name: imagenet1k/Mixer"),
    ],
)
def test_a_source_that_is_none_teaches(source, error, said, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder" / "config.json").write_text("{}")  # of another library
    somewhere = source if not source or ":" in source else tmp_path / source
    with pytest.raises(error, match=said):
        pretrained.read(somewhere)


def test_only_a_run_has_steps_and_only_some_dtypes_exist(weights, tmp_path):
    path = write("npz", weights, tmp_path)
    with pytest.raises(ValueError, match="no run's folder: it has no step 3"):
        pretrained.read(path, step=3)
    with pytest.raises(ValueError, match="dtype 'float16' is unknown; try bfloat16"):
        pretrained.load(path, dtype="float16")


def test_writing_is_whole_or_not_at_all(weights, tmp_path):
    path = write("npz", weights, tmp_path)
    before = path.read_bytes()
    broken = dataclasses.replace(
        weights, params={"stem": {"bias": np.array(["no number"])}}
    )
    with pytest.raises(ValueError, match="could not convert"):
        pretrained.write_npz(broken, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_metadata_is_json_of_what_is_known(weights, tmp_path):
    path = write("safetensors", weights, tmp_path)
    with safetensors.safe_open(path, "np") as file:
        known = json.loads(file.metadata()["mlp_mixer"])
    assert known == {
        "format": 2,
        "version": mlp_mixer.__version__,
        "gelu": "exact",  # for versions that know no "model"
        "model": json.loads(json.dumps(weights.model)),
        "image_size": [16, 16],
        "class_names": list("abcdefghij"),
        "preprocess": "timm",
    }
    assert weights.model["name"] == "mixer"
    assert weights.model["patch_size"] == (4, 4)


def test_names_for_another_number_of_classes_are_refused(weights, tmp_path):
    file = tmp_path / "w.safetensors"
    wrong = dataclasses.replace(weights, class_names=("a", "b"))
    pretrained.write_safetensors(wrong, file)
    with pytest.raises(ValueError, match="has 2 names of classes for a head of 10"):
        pretrained.read(file)
