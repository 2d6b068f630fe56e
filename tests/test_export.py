import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from flax.traverse_util import unflatten_dict
from odd_names import NAMES

from mlp_mixer import export, graphs, models, pretrained
from mlp_mixer.fingerprints import leaves

# A grid of 2 x 3 patches of 4 x 8 pixels, and no two sizes alike: nothing can be
# transposed unnoticed.
SIZES = {
    "patch_size": (4, 8),
    "num_blocks": 2,
    "hidden_dim": 16,
    "tokens_mlp_dim": 5,
    "channels_mlp_dim": 24,
}
IMAGE_SIZE = (8, 24)


def random_weights(model, image_size, **fields):
    """Every array random, zero-born heads and biases included."""
    image = jnp.zeros((1, *image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    rng = np.random.default_rng(7)

    def draw(name, shape):
        spread = np.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.3
        centre = 1.0 if name.endswith(("scale", "alpha")) else 0.0
        return rng.normal(centre, spread, shape).astype(np.float32)

    drawn = {name: draw(name, x.shape) for name, x in leaves(shapes)}
    params = unflatten_dict(drawn, sep="/")
    known = {
        "model": {"gelu": model.gelu},
        "image_size": image_size,
        "origin": "random",
    } | fields
    return pretrained.Weights(params, **known)


def small_weights(gelu="tanh", num_classes=7, **fields):
    model = models.mixer.MlpMixer(**SIZES, gelu=gelu, num_classes=num_classes)
    return random_weights(model, IMAGE_SIZE, **fields)


def images(n, size=IMAGE_SIZE):
    rng = np.random.default_rng(3)
    return rng.uniform(-1, 1, (n, *size, 3)).astype(np.float32)


def expected(weights, image):
    model = pretrained.create_model(weights)
    logits, out = jax.jit(model.apply)({"params": weights.params}, image)
    return {"logits": logits, "pre_logits": out["pre_logits"]}


def close(found, right):
    np.testing.assert_allclose(found, right, rtol=0, atol=3e-6)


def run_onnx(path, image):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image}), strict=True))


def run_stablehlo(path, image):
    return jax.export.deserialize(path.read_bytes()).call(image)


KINDS = {
    "m.onnx": (export.export_onnx, run_onnx),
    "m.stablehlo": (export.export_stablehlo, run_stablehlo),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "fields",
    [{"gelu": "tanh"}, {"gelu": "exact"}, {"num_classes": None}],
    ids=["tanh", "exact", "no_head"],
)
def test_an_export_computes_the_model(name, fields, tmp_path):
    weights = small_weights(**fields)
    write, run = KINDS[name]
    write(weights, tmp_path / "folder" / name)
    names = {"pre_logits"} if "num_classes" in fields else {"logits", "pre_logits"}
    right = expected(weights, images(4))
    for n in (1, 4):
        found = run(tmp_path / "folder" / name, images(4)[:n])
        assert found.keys() == names
        for output in names:
            close(found[output], right[output][:n])
    assert right["pre_logits"].std() > 0.1


# The other models with a graph.
OTHERS: dict[str, dict[str, Any]] = {
    "resmlp": {},
    "gmlp": {"channels_mlp_dim": 20},
    "s2mlp": {},
    "s2mlp-affine": {"norm": "affine"},
    "ccs": {"base": "mixer", "groups": 2},
    "ccs-resmlp": {"base": "resmlp", "groups": 8},
}


def other_weights(case):
    sizes = {k: v for k, v in SIZES.items() if k != "tokens_mlp_dim"} | OTHERS[case]
    model = models.create(case.partition("-")[0], num_classes=7, **sizes)
    return random_weights(model, IMAGE_SIZE)


@pytest.mark.parametrize("case", OTHERS)
def test_a_graph_computes_its_model(case, tmp_path):
    weights = other_weights(case)
    found = export.export_onnx(weights, tmp_path / "m.onnx")
    assert {d.batch for d in found} == {1, 3}
    assert max(d.difference for d in found) < 1e-5
    assert min(d.largest for d in found) > 0.1


def test_every_model_with_a_graph_is_tested():
    tested = {models.families()[case.partition("-")[0]] for case in OTHERS}
    assert {*graphs.GRAPHS} == {*tested, models.mixer}


def test_both_gelus_can_be_told_apart():
    """Or the test above would not see them swapped."""
    tanh, exact = (
        expected(small_weights(gelu), images(4))["logits"] for gelu in ("tanh", "exact")
    )
    assert np.abs(tanh - exact).max() > 3e-5


PROGRAM = """
import sys
sys.modules["mlp_mixer"] = sys.modules["flax"] = None
import jax, jax.export, numpy as np
folder, image = sys.argv[1], np.load(sys.argv[1] + "/image.npy")
mixer = jax.export.deserialize(open(folder + "/m.stablehlo", "rb").read())
slope = jax.grad(lambda x: (mixer.call(x)["logits"] ** 2).sum())(image)
np.savez(folder + "/found.npz", slope=slope, **mixer.call(image))
"""


def test_stablehlo_needs_no_code_of_ours_also_for_gradients(tmp_path):
    weights, image = small_weights(), images(2)
    export.export_stablehlo(weights, tmp_path / "m.stablehlo")
    np.save(tmp_path / "image.npy", image)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True)
    found = np.load(tmp_path / "found.npz")
    right = expected(weights, image)
    slope = jax.grad(lambda x: (expected(weights, x)["logits"] ** 2).sum())(image)
    right["slope"] = slope
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    assert np.abs(slope).max() > 0.1


def test_stablehlo_without_gradients_is_half_as_large(tmp_path):
    weights = small_weights(num_classes=20_000)
    sizes = {}
    for gradients in (True, False):
        path = tmp_path / f"{gradients}.stablehlo"
        export.export_stablehlo(weights, path, gradients=gradients)
        sizes[gradients] = path.stat().st_size
    assert 0.45 < sizes[False] / sizes[True] < 0.55
    with pytest.raises(ValueError, match="No VJP is available"):
        jax.grad(lambda x: run_stablehlo(path, x)["logits"].sum())(images(1))


def test_stablehlo_runs_on_three_platforms_and_any_batch(tmp_path):
    path = tmp_path / "m.stablehlo"
    export.export_stablehlo(small_weights(), path)
    exported = jax.export.deserialize(path.read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (image,) = exported.in_avals
    assert str(image) == "float32[n,8,24,3]"
    # Neither where this package lies nor where its libraries do.
    for folder in (pathlib.Path(export.__file__).parent, sys.prefix):
        assert str(folder).encode() not in path.read_bytes()


def test_onnx_has_our_parameters_by_name_and_any_batch(tmp_path):
    weights = small_weights()
    model = export.to_onnx(weights)
    onnx.checker.check_model(model, full_check=True)
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    for name, array in leaves(weights.params):
        np.testing.assert_array_equal(arrays[name], array)
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "image": ["n", 8, 24, 3],
        "logits": ["n", 7],
        "pre_logits": ["n", 16],
    }


def test_what_is_known_travels_with_both(tmp_path):
    names = tuple(f"Käse {i}" for i in range(7))
    weights = small_weights(class_names=names, preprocess="big_vision")
    export.export_onnx(weights, tmp_path / "m.onnx")
    export.export_stablehlo(weights, tmp_path / "m.stablehlo")
    about = json.loads((tmp_path / "m.stablehlo.json").read_text(encoding="utf-8"))
    assert about["class_names"] == list(names)
    assert about["source"] == "random"
    assert about["preprocess"] == "big_vision"
    assert about["image_size"] == [8, 24]
    assert about["patch_size"] == [4, 8]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    props = session.get_modelmeta().custom_metadata_map
    read = {
        k: v if isinstance(about[k], str) else json.loads(v) for k, v in props.items()
    }
    assert read == about


def test_names_that_are_no_text_travel_with_both(tmp_path):
    names = [NAMES[k] for k in ("bytes", "half a pair", "lines", "CJK", "nothing")]
    weights = small_weights(class_names=(*names, "a", "b"), origin="\udcff.npz")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    export.export_stablehlo(weights, folder / "m.stablehlo", gradients=False)
    about = json.loads((folder / "m.stablehlo.json").read_text(encoding="utf-8"))
    assert about["class_names"] == [*names, "a", "b"]
    props = {p.key: p.value for p in export.to_onnx(weights).metadata_props}
    assert json.loads(props["class_names"]) == [*names, "a", "b"]
    assert props["source"] == r"\udcff.npz"
    # The onnx package takes paths in UTF-8 only: said before the work.
    with pytest.raises(ValueError, match=r"caf\\udce9/m.onnx is not UTF-8"):
        export.export_onnx(weights, folder / "m.onnx")


def test_what_is_not_known_is_not_invented():
    props = {p.key for p in export.to_onnx(small_weights()).metadata_props}
    assert not props & {"class_names", "preprocess"}
    assert {"source", "num_blocks", "gelu"} < props


def test_other_dtypes_are_exported_as_float32(tmp_path):
    weights = small_weights()
    low = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), weights.params)
    export.export_onnx(dataclasses.replace(weights, params=low), tmp_path / "m.onnx")
    rounded = jax.tree.map(lambda x: x.astype(np.float32), low)
    right = expected(dataclasses.replace(weights, params=rounded), images(1))
    found = run_onnx(tmp_path / "m.onnx", images(1))
    close(found["logits"], right["logits"])


# --- What is wrong is not kept --------------------------------------------------------


def wrong_onnx(monkeypatch, error):
    real = export.to_onnx

    def emit(weights):
        model = real(weights)
        for array in model.graph.initializer:
            if array.name == "MixerBlock_1/token_mixing/Dense_0/bias":
                values = onnx.numpy_helper.to_array(array) + np.float32(error)
                array.CopyFrom(onnx.numpy_helper.from_array(values, array.name))
        return model

    monkeypatch.setattr(export, "to_onnx", emit)


def wrong_stablehlo(monkeypatch, error):
    real = jax.export.export

    def trace(mixer, **kwargs):
        @jax.jit
        def wrong(image):
            return mixer(image) | {"pre_logits": mixer(image)["pre_logits"] + error}

        return real(wrong, **kwargs)

    monkeypatch.setattr(jax.export, "export", trace)


@pytest.mark.parametrize("error", [0.01, np.nan])
@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_export_is_not_kept(name, error, tmp_path, monkeypatch):
    write, _ = KINDS[name]
    wrong = wrong_onnx if name.endswith(".onnx") else wrong_stablehlo
    (tmp_path / name).write_text("an older one")
    wrong(monkeypatch, error)
    with pytest.raises(ValueError, match=r"not kept: at a batch of 1 .* differ by"):
        write(small_weights(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "an older one"


def test_the_verified_difference_is_returned(tmp_path, monkeypatch):
    wrong_stablehlo(monkeypatch, 2.0**-14)  # 6e-5: less than is allowed
    found = export.export_stablehlo(small_weights(), tmp_path / "m.stablehlo")
    assert [(d.output, d.batch) for d in found] == [
        (name, n) for n in (1, 3) for name in ("logits", "pre_logits")
    ]
    for one in found:
        error = 0 if one.output == "logits" else 2.0**-14
        assert abs(one.difference - error) < 3e-6
        assert one.allowed == 1e-4 * max(1, one.largest)


@pytest.mark.parametrize("write", [write for write, _ in KINDS.values()])
def test_weights_that_are_not_finite_are_refused_by_name(write, tmp_path):
    weights = small_weights()
    weights.params["head"]["bias"][:2] = np.inf
    weights.params["MixerBlock_1"]["LayerNorm_0"]["scale"][3] = np.nan
    with pytest.raises(ValueError, match="random") as caught:
        write(weights, tmp_path / "m")
    assert "head/bias: 2 values" in str(caught.value)
    assert "MixerBlock_1/LayerNorm_0/scale: 1 values" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": None}, "6 tokens, which make no square, .*--image_size"),
        ({"image_size": (8, 25)}, "try 24 or 32"),
        ({"image_size": (24, 24)}, "24x24 image makes 18 tokens .* are for 6"),
        ({"model": {"gelu": "fast"}}, "gelu 'fast' is unknown; try exact, tanh"),
    ],
)
def test_weights_that_say_too_little_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        export.to_onnx(dataclasses.replace(small_weights(), **fields))


# --- Two gigabytes --------------------------------------------------------------------


def test_onnx_puts_what_is_too_large_beside_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LIMIT_BYTES", 10_000)
    weights = small_weights(num_classes=300)
    export.export_onnx(weights, tmp_path / "m.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert (tmp_path / "m.onnx.data").stat().st_size > 300 * 16 * 4
    assert (tmp_path / "m.onnx").stat().st_size < 300 * 16 * 4
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1
    # Wherever the two are moved to.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    found = run_onnx(moved / "m.onnx", images(2))
    right = expected(weights, images(2))
    close(found["logits"], right["logits"])


@pytest.mark.parametrize(
    ("gradients", "message"), [(True, "twice.*--nogradients"), (False, "once.*ONNX")]
)
def test_stablehlo_says_what_is_too_large(gradients, message, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LIMIT_BYTES", 10_000)
    with pytest.raises(ValueError, match=message):
        export.export_stablehlo(
            small_weights(num_classes=300),
            tmp_path / "m.stablehlo",
            gradients=gradients,
        )
    assert not list(tmp_path.iterdir())


# --- The program ----------------------------------------------------------------------


def test_the_program_exports_weights_from_a_file(program, tmp_path):
    weights = dataclasses.replace(small_weights("exact"), image_size=None)
    low = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), weights.params)
    weights = dataclasses.replace(weights, params=low)
    source = tmp_path / "weights.safetensors"
    pretrained.write_safetensors(weights, source)
    process = program(
        "export",
        *(source, tmp_path / "m.onnx", tmp_path / "m.stablehlo"),
        *("--image_size=8,24", "--gelu=tanh", "--nogradients"),
    )
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "Parameters in bfloat16 are exported as float32." in said
    assert said.count("verified on random images") == 2
    assert said.count("largest difference") == 2
    rounded = jax.tree.map(lambda x: x.astype(np.float32), low)
    weights = dataclasses.replace(small_weights("tanh"), params=rounded)
    right = expected(weights, images(2))
    for name, (_, run) in KINDS.items():
        found = run(tmp_path / name, images(2))
        close(found["logits"], right["logits"])
    assert not jax.export.deserialize((tmp_path / "m.stablehlo").read_bytes()).has_vjp()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the weights and the files"),
        (["runs/digits"], "Name the weights and the files"),
        (
            ["runs/digits", "m.onnx", "m.pb"],
            "ending '.pb' is unknown; try .stablehlo, .onnx",
        ),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        export.main(arguments)


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("m.stablehlo", ["flatbuffers"], "needs flatbuffers;"),
        ("m.onnx", ["onnx"], "needs onnx;"),
        ("m.onnx", ["onnx", "onnxruntime"], "needs onnx and onnxruntime;"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    name, modules, message, tmp_path, monkeypatch
):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    command = r" pip install '\.\[export\]'"
    with pytest.raises(ModuleNotFoundError, match=message + command):
        export.main(["no weights are read", name])
    with pytest.raises(ModuleNotFoundError, match=message + command):
        KINDS[name][0](small_weights(), tmp_path / name)


def test_the_step_is_handed_on(tmp_path, monkeypatch):
    pretrained.write_npz(small_weights(), tmp_path / "w.npz")
    given = types.SimpleNamespace(step=3, ema=None, stages=False)
    monkeypatch.setattr(export.flags, "FLAGS", given)
    with pytest.raises(ValueError, match="no run's folder: it has no step 3"):
        export.main([str(tmp_path / "w.npz"), str(tmp_path / "m.onnx")])


def test_stages_are_of_stablehlo_alone(monkeypatch):
    given = types.SimpleNamespace(step=None, ema=None, stages=True)
    monkeypatch.setattr(export.flags, "FLAGS", given)
    with pytest.raises(ValueError, match=r"Pyramids have no ONNX graph, .* --stages"):
        export.main(["no weights are read", "m.stablehlo", "M.ONNX"])


# --- The real one ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_mixer_b16_is_exported_within_1e_4(name, tmp_path):
    model = models.create("mixer_b16", num_classes=1000)
    weights = random_weights(model, (224, 224))
    write, run = KINDS[name]
    found = write(weights, tmp_path / name)
    assert {d.batch for d in found} == {1, 3}
    assert max(d.difference for d in found) <= 1e-4
    assert min(d.largest for d in found) > 0.5
    image = images(2, (224, 224))
    given, right = run(tmp_path / name, image), expected(weights, image)
    for output in ("logits", "pre_logits"):
        assert np.abs(given[output] - right[output]).max() <= 1e-4
