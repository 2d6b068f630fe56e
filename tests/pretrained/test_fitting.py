"""Weights into models: strictly, but for the head and the resolution."""

import dataclasses
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mlp_mixer import checkpoint, models, pretrained, runs, train, workdir
from mlp_mixer.fingerprints import leaves
from mlp_mixer.pretrained import tree


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_equal(got, expected):
    got, expected = dict(leaves(got)), dict(leaves(expected))
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, name)


# --- create_model ---------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 10])
def test_the_model_of_parameters_gives_logits_features_and_gradients(
    num_classes, make_params
):
    params = make_params(num_classes=num_classes)
    model = pretrained.create_model(params)
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1)
    logits, out = model.apply({"params": params}, image)
    assert out["pre_logits"].shape == (2, 8)
    assert logits.shape == (2, num_classes or 8)
    slope = jax.grad(lambda x: model.apply({"params": params}, x)[0].sum())(image)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0
    slopes = jax.grad(lambda p: model.apply({"params": p}, image)[0].sum())(params)
    assert np.abs(slopes["stem"]["kernel"]).max() > 0


def test_the_model_of_weights_has_their_gelu(weights):
    assert pretrained.create_model(weights).gelu == "exact"
    assert pretrained.create_model(weights.params).gelu == "tanh"
    assert pretrained.create_model(weights, gelu="tanh", dropout=0.1).dropout == 0.1


# --- merge ----------------------------------------------------------------------------


def test_weights_that_fit_are_taken_as_they_are(make_params):
    params = make_params()
    assert_equal(pretrained.merge(params, shapes_of(make_params(seed=1))), params)


@pytest.mark.parametrize("had", [None, 10])
def test_the_head_for_other_classes_is_a_zero_one(had, make_params, caplog):
    caplog.set_level("INFO")
    params = make_params(num_classes=had)
    merged = pretrained.merge(params, shapes_of(make_params(num_classes=7)))
    head = merged.pop("head")
    params.pop("head", None)
    assert_equal(merged, params)
    assert {k: (x.shape, np.abs(x).max()) for k, x in head.items()} == {
        "kernel": ((8, 7), 0),
        "bias": ((7,), 0),
    }
    assert f"zeros for 7 classes (the weights': {had or 'none'})" in caplog.text


def test_a_zero_head_may_be_asked_for_and_a_head_left_out(make_params):
    params = make_params()
    target = shapes_of(make_params())
    assert np.abs(pretrained.merge(params, target)["head"]["kernel"]).max() > 0
    zero = pretrained.merge(params, target, head="zero")
    assert np.abs(zero["head"]["kernel"]).max() == 0
    target.pop("head")
    assert "head" not in pretrained.merge(params, target)
    with pytest.raises(ValueError, match="head 'new' is unknown; try zero, match"):
        pretrained.merge(params, target, head="new")


def test_every_name_that_does_not_fit_is_listed(make_params):
    params = make_params(num_blocks=3, tokens_mlp_dim=5)
    del params["MixerBlock_0"]["LayerNorm_0"]["scale"]
    del params["MixerBlock_2"]["LayerNorm_0"]["scale"]
    with pytest.raises(ValueError, match="do not fit the model") as error:
        pretrained.merge(params, shapes_of(make_params()))
    first, *lines = str(error.value).splitlines()
    assert "num_blocks 3" in first
    assert "num_blocks 2" in first
    unexpected = [
        f"  unexpected: {n}"
        for n, _ in leaves({"MixerBlock_2": params["MixerBlock_2"]})
    ]
    wide = [
        f"  shape: MixerBlock_{i}/token_mixing/{name} is {was}, the model's {new}"
        for i in range(2)
        for name, was, new in (
            ("Dense_0/bias", (5,), (4,)),
            ("Dense_0/kernel", (16, 5), (16, 4)),
            ("Dense_1/kernel", (5, 16), (4, 16)),
        )
    ]
    assert sorted(lines) == sorted(
        ["  missing: MixerBlock_0/LayerNorm_0/scale", *unexpected, *wide]
    )


def test_what_is_no_tree_of_parameters_is_said(make_params):
    params = make_params()
    for wrong in ({}, {"params": params}, {"head": params["head"]}):
        with pytest.raises(
            ValueError, match=r"variables\['params'\] instead|missing: stem"
        ):
            pretrained.create_model(wrong)
        with pytest.raises(ValueError, match=r"\(.*\) do not fit") as e:
            pretrained.merge(wrong, shapes_of(params))
        assert len(str(e.value).splitlines()) == 20


def test_another_variant_is_named():
    def shapes(name):
        model = models.create(name, num_classes=1000)
        image = jnp.zeros((1, 224, 224, 3))
        return jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]

    said = r"\(mixer_s16, 196 tokens, 1000 classes\) do not fit the model \(mixer_b16, "
    with pytest.raises(ValueError, match=said):
        pretrained.merge(shapes("mixer_s16"), shapes("mixer_b16"))


# --- initial --------------------------------------------------------------------------


@pytest.fixture
def saved(weights, tmp_path):
    pretrained.write_safetensors(weights, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


class State(NamedTuple):
    params: Any
    stats: Any


def start(source, make_params, size=(16, 16), how="grow", head="match", **fields):
    """`initial` for a model of the saved weights' sizes, but for `fields`."""
    target = State(shapes_of(make_params(image_size=size, **fields)), {})
    model = pretrained.create_model(target.params, gelu="exact")
    given = pretrained.initial(
        source, model, target, image_size=size, head=head, resize_by=how
    )
    assert given.pop("stats", {}) == {}
    return given.get("params")


def test_a_run_may_start_from_nothing_or_from_weights(saved, weights, make_params):
    assert start(None, make_params) is None
    assert_equal(start(saved, make_params), weights.params)


def test_weights_grow_to_the_resolution_of_the_run(saved, weights, make_params):
    grown = start(saved, make_params, (32, 32), tokens_mlp_dim=16)
    kernel = grown["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    old = weights.params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    assert kernel.shape == (64, 16)
    np.testing.assert_allclose(np.abs(kernel).sum(), 4 * np.abs(old).sum(), rtol=1e-6)
    same = ("stem", "pre_head_layer_norm", "head")
    for part in same:
        assert_equal({part: grown[part]}, {part: weights.params[part]})


def test_weights_are_interpolated_to_any_grid(saved, make_params):
    got = start(saved, make_params, (24, 20), how="interpolate")
    kernel = got["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    assert kernel.shape == (30, 4)
    with pytest.raises(ValueError, match="cannot grow"):
        start(saved, make_params, (24, 20))


def test_growing_says_which_width_it_needs(saved, make_params):
    said = r"from 4x4 to 8x8 patches .* 16 hidden units, .*\.tokens_mlp_dim=16\."
    with pytest.raises(ValueError, match=said):
        start(saved, make_params, (32, 32))


def test_an_unknown_grid_is_asked_for(weights, make_params, tmp_path, caplog):
    params = make_params(image_size=(8, 12))
    unknown = dataclasses.replace(weights, params=params, image_size=None)
    pretrained.write_npz(unknown, tmp_path / "w.npz")
    assert_equal(start(tmp_path / "w.npz", make_params, (12, 8)), params)  # 6 tokens
    assert "do not say their grid; it is taken to be 3x2" in caplog.text
    with pytest.raises(ValueError, match="6 tokens, which make no square"):
        start(tmp_path / "w.npz", make_params, (16, 24), tokens_mlp_dim=16)


def test_another_gelu_is_said(saved, make_params, caplog):
    target = shapes_of(make_params())
    model = pretrained.create_model(target)
    arguments = {"image_size": (16, 16), "head": "match", "resize_by": "grow"}
    pretrained.initial(saved, model, State(target, {}), **arguments)
    assert "are for gelu exact, this model computes tanh; --config" in caplog.text


def test_another_normalisation_is_said(caplog):
    """Of a model that normalises its images itself."""
    path = pathlib.Path(__file__).parents[1] / "golden" / "authors_smlpnet.safetensors"
    weights = pretrained.read(path)
    model = pretrained.create_model(weights, mean=(0.5,) * 3, std=(0.5,) * 3)
    state = State(weights.params, weights.stats)
    arguments = {"image_size": (64, 64), "head": "match", "resize_by": "grow"}
    pretrained.initial(path, model, state, **arguments)
    assert (
        "are for mean (0.485, 0.456, 0.406), this model computes (0.5," in caplog.text
    )
    assert "--config.model.std='(0.229, 0.224, 0.225)' keeps theirs" in caplog.text


def test_a_run_starts_from_foreign_weights_made_for_our_images(
    weights, make_params, tmp_path
):
    """Which were for images in [0, 1], as a config.json beside them says."""
    pretrained.write_safetensors(weights, tmp_path / "t.safetensors", names="timm")
    arrays = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    arrays["stem.proj.bias"] -= arrays["stem.proj.weight"].sum((1, 2, 3))
    arrays["stem.proj.weight"] *= 2
    foreign = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, foreign)
    config = {"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = start(foreign, make_params)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(
            params["stem"].pop(name), weights.params["stem"].pop(name), atol=1e-5
        )
    assert_equal(params, weights.params)


def test_errors_name_the_file(saved, weights, make_params, tmp_path):
    """Whichever of a start's checks it is that fails."""
    name = re.escape(str(saved))
    for said, options in {
        "unexpected: MixerBlock_1": {"num_blocks": 1},
        "shape: head/kernel|shape: MixerBlock_0": {"hidden_dim": 16},
        "cannot grow": {"size": (24, 20)},
        "gives token mixing 16": {"size": (32, 32)},
    }.items():
        with pytest.raises(ValueError, match=f"{name}[^$]*({said})"):
            start(saved, make_params, **options)
    unknown = dataclasses.replace(
        weights, params=make_params(image_size=(8, 12)), image_size=None
    )
    pretrained.write_npz(unknown, tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"w\.npz \(npz file\) have 6 tokens"):
        start(tmp_path / "w.npz", make_params, (16, 24), tokens_mlp_dim=16)


def test_weights_of_another_depth_are_told_in_twenty_lines(saved, make_params):
    with pytest.raises(ValueError, match="do not fit the model") as error:
        start(saved, make_params, num_blocks=12, hidden_dim=16)
    lines = str(error.value).splitlines()
    assert len(lines) == 20
    assert lines[1].startswith("  shape: ")


# --- A run of weights, and from weights -----------------------------------------------


def test_training_starts_from_the_weights_and_resumes_without_them(
    tiny, make_params, tmp_path
):
    """The state before any update is not kept: a learning rate of zero shows it."""
    params = make_params(
        num_classes=8, hidden_dim=32, tokens_mlp_dim=16, channels_mlp_dim=128
    )
    file = tmp_path / "w.npz"
    pretrained.write_npz(pretrained.Weights(params, "made"), file)
    tiny.init_from = str(file)
    tiny.total_steps = 4
    tiny.optim.learning_rate = tiny.optim.end_learning_rate = 0.0
    assert_equal(jax.device_get(train.train(tiny, tmp_path / "run").params), params)
    assert_equal(pretrained.load(tmp_path / "run"), params)
    # What it began with is not needed any more.
    file.unlink()
    assert int(train.train(tiny, tmp_path / "run").step) == 4
    with pytest.raises(FileNotFoundError, match="There are no weights"):
        train.train(tiny, tmp_path / "another")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_become_no_run(weights, tmp_path, value):
    broken = jax.tree.map(np.array, weights.params)
    broken["head"]["bias"][1] = value
    weights = dataclasses.replace(weights, params=broken)
    with pytest.raises(ValueError, match=r"cannot become a run[^/]*\n  head/bias$"):
        runs.write_run(weights, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_weights_opens_like_any_other(weights, tmp_path):
    runs.write_run(weights, tmp_path / "run")
    run = runs.open_model(tmp_path / "run")
    assert (run.step, run.class_names) == (0, tuple("abcdefghij"))
    assert_equal(jax.device_get(run.variables["params"]), weights.params)
    assert run.config.model.gelu == "exact"
    with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
        runs.write_run(weights, tmp_path / "run")
    _, variables = checkpoint.restore_variables(tmp_path / "run" / "checkpoints")
    assert_equal(variables, {"params": weights.params})


def test_a_run_of_weights_may_be_of_bfloat16_and_without_a_head(make_params, tmp_path):
    params = pretrained.cast(make_params(num_classes=None), "bfloat16")
    runs.write_run(
        pretrained.Weights(params, "made", image_size=(16, 16)), tmp_path / "run"
    )
    run = runs.open_model(tmp_path / "run")
    assert run.class_names == ()
    assert_equal(
        jax.device_get(run.variables["params"]), pretrained.cast(params, "float32")
    )
    with pytest.raises(FileExistsError):
        runs.write_run(
            pretrained.Weights(params, "made", image_size=(16, 16)),
            tmp_path / "run" / "config.json",
        )


def test_a_run_of_imagenet_weights_is_evaluated_as_pretraining_is(
    make_params, tmp_path
):
    params = make_params(num_classes=1000)
    weights = pretrained.Weights(params, "made", image_size=(16, 16), preprocess="timm")
    runs.write_run(weights, tmp_path / "run")
    config = workdir.load(tmp_path / "run")
    assert config.dataset.name == "imagenet2012"
    assert {"minival", "val", "real", "v2", "fewshot"} == set(config.evals)
    assert {e.preprocess for e in config.evals.values()} == {"timm"}
    # Evaluation names them as prediction does.
    names = runs.open_model(tmp_path / "run").class_names
    assert tuple(names) == runs.open_model(tmp_path / "run").class_names
    assert names[0] == "tench, Tinca tinca"


# --- A kept head's classes ------------------------------------------------------------


def began_with(params, names, had, tmp_path, head="match"):
    """What a run on data with `names` begins with, from weights with those they had."""
    file = tmp_path / "w.safetensors"
    pretrained.write_safetensors(pretrained.Weights(params, "", class_names=had), file)
    given = pretrained.initial(
        file,
        pretrained.create_model(params),
        State(shapes_of(params), {}),
        image_size=(16, 16),
        head=head,
        resize_by="grow",
        class_names=names,
    )
    return given["params"]


LETTERS = tuple("abcdefghij")


def test_a_kept_head_answers_as_before_in_the_order_of_the_new_classes(
    make_params, tmp_path
):
    params = make_params()
    names = tuple("jihgfabcde")
    new = began_with(params, names, LETTERS, tmp_path)
    model = pretrained.create_model(params)
    image = jax.random.uniform(jax.random.key(0), (5, 16, 16, 3), minval=-1)
    before, after = (model.apply({"params": p}, image)[0] for p in (params, new))
    order = [LETTERS.index(name) for name in names]
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before)[:, order])
    assert_equal({**new, "head": {}}, {**params, "head": {}})


@pytest.mark.parametrize(
    ("names", "had"),
    [
        (LETTERS, LETTERS),
        (None, LETTERS),
        (LETTERS, None),
        (tuple("0123456789"), LETTERS),
        (("e\u0301", *LETTERS[1:]), ("\u00e9", *LETTERS[1:])),
    ],
)
def test_a_head_for_the_same_classes_or_nameless_ones_stays(
    names, had, make_params, tmp_path
):
    params = make_params()
    assert_equal(began_with(params, names, had, tmp_path), params)


@pytest.mark.parametrize("names", [("k", *LETTERS[1:]), ("A", *LETTERS[1:])])
def test_a_head_for_other_classes_is_not_kept(names, make_params, tmp_path):
    params = make_params()
    message = f"(?s)'{names[0]}'.*: 'a'.*--config.init_head=zero"
    with pytest.raises(ValueError, match=message):
        began_with(params, names, LETTERS, tmp_path)
    new = began_with(params, names, LETTERS, tmp_path, head="zero")
    assert not new["head"]["kernel"].any()


def test_a_new_head_gives_zeros_and_can_learn_whatever_arrays_it_has():
    """A KAN's, say: its splines are scaled, and two zeros would keep each other."""

    def head(classes):
        ends = {"kernel": (4,), "scale": (4,), "spline": (8, 4)}
        shapes = {name: (*end, classes) for name, end in ends.items()}
        return {"head": {name: np.ones(x, np.float32) for name, x in shapes.items()}}

    assert tree.num_classes(head(5)) == 5
    assert tree.num_classes({"stem": {}}) is None
    merged = pretrained.merge(head(5), head(3))["head"]
    assert not merged["kernel"].any()
    assert not merged["spline"].any()
    assert (merged["scale"] == 1).all()
    same = pretrained.merge(head(5), head(5))["head"]
    assert all((x == 1).all() for x in same.values())
