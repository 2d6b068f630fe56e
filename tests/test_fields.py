"""Every field of a recipe has the values that it may have, and they are checked."""

import math
import types

import optimisers
import pytest

from mlp_mixer import (
    evaluators,
    fields,
    losses,
    models,
    optim,
    program,
    recipe,
    sharding,
    train,
)
from mlp_mixer.data import image_ops, pipeline, randaugment
from mlp_mixer.models import derivatives, trunk
from mlp_mixer.pretrained import fitting, resize


def flat(tree, prefix=""):
    found: dict = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def defaults():
    """{field: (its row, its default)} of all that a recipe has."""
    base = flat(recipe.base().to_dict())
    found = {name: (fields.RECIPE[name], value) for name, value in base.items()}
    for section in (recipe.evaluation("val"), recipe.fewshot("train", "val")):
        rows = fields.EVALUATORS[section.type]
        values = flat(section.to_dict())
        del values["type"]
        assert rows.keys() == values.keys()
        found |= {f"{section.type}.{k}": (rows[k], v) for k, v in values.items()}
    return found


DEFAULTS = defaults()


def test_every_field_has_its_row_and_every_row_its_field():
    assert fields.EVALUATORS.keys() == evaluators.EVALUATORS.keys()
    assert fields.RECIPE.keys() == flat(recipe.base().to_dict()).keys()


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_a_value_that_the_field_may_have(name):
    row, value = DEFAULTS[name]
    assert row.fits(value), row.expected(value)


def test_the_names_of_closed_sets_are_the_keys_of_the_tables():
    rows = fields.RECIPE
    accuracy, fewshot = fields.EVALUATORS["accuracy"], fields.EVALUATORS["fewshot"]
    sets = {
        "loss": losses.LOSSES,
        "init_head": fitting.HEADS,
        "init_resize": resize.METHODS,
        "sharding": sharding.STRATEGIES,
        "input.crop": pipeline.CROPS,
        "input.interpolation": image_ops.INTERPOLATIONS,
        "input.randaugment": pipeline.RANDAUGMENTS,
        "run.remat": trunk.REMAT_POLICIES,
        "optim.decay": optim.DECAYS,
        "optim.decayed": optim.DECAYED,
    }
    for name, known in sets.items():
        assert set(rows[name].choices) == set(known), name
    assert set(fields.MODEL["gelu"].choices) == set(derivatives.GELUS)
    mixings = {*models.spach.MIXINGS, *models.spach_ms.MIXINGS}
    assert set(fields.MODEL["mixing"].choices) == mixings
    for row in (accuracy["preprocess"], fewshot["preprocess"]):
        assert set(row.choices) == set(image_ops.PROTOCOLS)
    for name in rows["optim.name"].choices:
        optimisers.create(name=name, total_steps=9, learning_rate=1.0, warmup_steps=1)
    assert rows["input.randaugment_layers"].high == len(randaugment.OPS)
    # Others that are a closed set are in the list above.
    closed = {name for name, row in rows.items() if row.choices}
    dtypes = {"run.dtype", "optim.momentum_dtype"}
    assert closed == {*sets, "optim.name", *dtypes}


WRONG = {
    int: (None, "3", 1.5, True, math.nan, -(2**70), 2**70, (1,)),
    float: (None, "3", True, math.nan, math.inf, -math.inf, -1e30, (1.0,)),
    bool: (None, 0, 1, "true", 1.0, ()),
    str: (None, 3, True, "", " ", ("a",)),
    tuple: (None, 3, "3", (), (0, 0), (1.5, 1), ("8", "8"), (True, True), (None,)),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_of_another_kind_is_none_of_a_fields_values(name):
    row, _ = DEFAULTS[name]
    kind = tuple if row.length is not None else row.types[-1]
    right = [w for w in WRONG[kind] if row.fits(w)]
    allowed = [None] * row.none + [row.also] * (row.also == "")
    # Numbers from below 0.
    allowed += [(0, 0)] * (name == "fewshot.l2_exponents")
    allowed += [()] * (name == "optim.rates")
    assert right == allowed


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("accumulate", 0, "a whole number from 1 to 2,147,483,647"),
        ("accumulate", -2, "a whole number from 1 to"),
        ("mixup", -0.2, "a number from 0 to 1000"),
        ("mixup", math.nan, "a number from 0 to 1000"),
        ("seed", -1, "a whole number from 0 to 4,294,967,295"),
        ("seed", True, "a whole number from 0 to"),
        ("log_every_steps", 0, "a whole number from 1 to"),
        ("loss", "softmax", "softmax_xent, sigmoid_xent"),
        ("sharding", "fdsp", "fsdp, replicated"),
        ("mesh.data", 0, "a number of devices from 1, or -1 for all"),
        ("input.workers", -1, "a whole number from 0 to 1,024"),
        ("input.repeats", 0, "a whole number from 1 to 1,000"),
        ("input.randaugment", "tim", "timm, big_vision"),
        ("input.randaugment_std", -0.5, "a number from 0 to 10"),
        ("input.interpolation", "bilinear", "bicubic, random"),
        ("input.shift", 16, "less than the sides of config.model.image_size, (16, 16)"),
        ("model.num_blocks", 0, "a whole number from 1 to 10,000; or None"),
        ("model.image_size", (16,), "height and width in pixels, e.g. (16, 16)"),
        ("model.image_size", (16, 0), "height and width in pixels"),
        ("model.image_size", None, "height and width in pixels"),
        ("model.patch_size", (4, 4, 4), "height and width in pixels"),
        ("model.dropout", 1.0, "a number from 0 to below 1"),
        ("model.stochastic_depth", 1.5, "a number from 0 to below 1"),
        ("model.head_bias", math.inf, "a number; or None."),
        ("model.head_bias", "0", "a number; or None"),
        ("model.gelu", "exactly", "exact, tanh; or None"),
        ("model.name", "mixer_b61", "mixer_b16, "),
        ("run.dtype", "float8", "float32, bfloat16"),
        ("run.remat", "ful", "full, pre_gelu, none; or None"),
        ("optim.clip_norm", 0.0, "a number above 0; or None"),
        ("optim.eps", 0.0, "a number above 0"),
        ("optim.b2", 1.0, "a number from 0 to below 1"),
        ("optim.name", "adamw", "adam, "),
        ("optim.end_factor", 2.0, "a number from 0 to 1; or None"),
        ("checkpoint.keep_latest", 0, "a whole number from 1 to"),
        ("evals.val.every_steps", -1, "a whole number from 0 to"),
        ("evals.val.preprocess", "tim", "timm, "),
        ("evals.val.dataset.num_classes", 0, "a whole number from 1 to"),
        ("evals.val.type", "acc", "accuracy, fewshot"),
        ("evals.val", 3, "a section of recipe.evaluation or recipe.fewshot"),
        ("evals.shots.shots", (), "whole numbers from 1, e.g. (1, 5)"),
        ("evals.shots.shots", (0,), "whole numbers from 1"),
        ("evals.shots.l2_exponents", (2000,), "whole numbers from -100 to 100"),
        ("dataset.name", "", "the name of a data set"),
    ],
)
def test_a_wrong_value_is_named_before_any_data_is_opened(
    tiny, field, value, expected, tmp_path, monkeypatch
):
    monkeypatch.delattr(train.sources, "open_source")
    tiny.evals.shots = recipe.fewshot("train", "val")
    *sections, last = field.split(".")
    holder = tiny
    for section in sections:
        holder = holder[section]
    with tiny.ignore_type():
        holder[last] = value
    with pytest.raises(ValueError, match=r"^config\.") as caught:
        train.train(tiny, tmp_path / "run")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"config.{field} is {value!r}; expected {expected}") or (
        field == "input.shift" and expected in line
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (
            {"batch_size": 15, "accumulate": 2},
            r"batch_size is 15, and config.accumulate, 2 .* try a batch_size of 14\.",
        ),
        (
            {"batch_size": 12},
            r"A batch of 12 does not divide among 8 devices; try 8\.",
        ),
        (
            {"accumulate": 4},
            r"A batch of 16 .* among 4 micro-batches on 8 devices; try 32\.",
        ),
        (
            {"optim.warmup_steps": 12},
            r"warmup_steps is 12, but the run has 12 steps; expected fewer, e.g. 1\.",
        ),
        (
            {"optim.warmup_steps": 2, "optim.cooldown_steps": 10},
            r"cooldown_steps is 10, but the run has 10 steps after its warm-up; expe",
        ),
        ({"optim.end_factor": 0.1}, "set exactly one of them"),
        ({"optim.end_learning_rate": None}, "set exactly one of them"),
        (
            {"input.randaugment_layers": 2},
            "randaugment_layers is 2, but config.input.randaugment_magnitude is 0",
        ),
        (
            {
                "input.randaugment": "timm",
                "input.randaugment_layers": 2,
                "input.randaugment_magnitude": 15,
            },
            r"randaugment_magnitude is 15; set it to 1 \.\.\. 10 for timm, or the la",
        ),
        (
            {"input.randaugment_std": 0.5},
            "randaugment_std is 0.5, .*randaugment is 'big_vision' with 0",
        ),
        (
            {"input.randaugment_std": 0.5, "input.randaugment": "timm"},
            "randaugment_std is 0.5, .* config.input.randaugment is 'timm' with 0",
        ),
        (
            {"input.min_area": 0.8},
            "min_area is 0.8, which only timm's crop reads, but .*crop is 'inception'",
        ),
        (
            {"input.interpolation": "random"},
            "interpolation is 'random', which only timm's crop and RandAugment read",
        ),
        (
            {"total_steps": None, "epochs": 1e12},
            r"config.epochs is 1e\+12, which makes 6,000,000,000,000 steps",
        ),
        (
            {"model.image_size": (18, 16)},
            "image_size 18 is not divisible by patch_size 4; try 16 or 20",
        ),
        (
            {"model.patch_size": (5, 4)},
            "image_size 16 is not divisible by patch_size 5; try 15 or 20",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named_before_any_data_is_opened(
    tiny, differences, message, tmp_path, monkeypatch
):
    monkeypatch.delattr(train.sources, "open_source")
    tiny.update_from_flattened_dict(differences)
    with pytest.raises(ValueError, match=message):
        train.train(tiny, tmp_path / "run")


def test_a_field_that_nobody_reads_and_one_that_is_missing_are_named(tiny):
    tiny.batchsize = 12
    del tiny.optim.b1
    tiny.evals.val.ece_bin = 3
    with pytest.raises(ValueError, match="config") as caught:
        recipe.check_fields(tiny)
    said = str(caught.value).splitlines()
    assert said[0] == "config.optim.b1 is missing; start from recipe.base()."
    evaluator, training = sorted(said[1:], reverse=True)
    assert training.startswith("config.batchsize is no field of a recipe; try batch_si")
    near = "is no field of a recipe; try evals.val.ece_bins, "
    assert evaluator.startswith(f"config.evals.val.ece_bin {near}")


# --- The fields of models -------------------------------------------------------------


@pytest.mark.parametrize("name", models.names())
def test_what_a_table_and_a_class_say_are_values_that_a_models_fields_may_have(name):
    rows = fields.of_model(name)
    for field, value in models.fields(name).items():
        assert rows[field].fits(value), (field, value)
        assert rows[field].fits(None)
        assert not rows[field].fits(b"")


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, (0, 3), (-1, 1.5, True, "3", (3,))),
        (float, (-0.5, 3), (math.inf, math.nan, "3", (3.0,))),
        (bool, (True,), (1, "true")),
        (str, ("any",), ("", 3)),
        (tuple[int, int], ((3, 4),), (3, (3,), (3, 4, 5), (3, -1), [3, 4])),
        (tuple[int, ...], ((3,), (3, 4, 5)), (3, ())),
        (tuple[float, ...], ((0.5, 1),), (0.5, ("a",))),
        (float | None, (0.5,), ("a",)),
    ],
)
def test_a_field_of_which_nothing_is_said_has_the_values_of_its_type(
    annotation, right, wrong, monkeypatch
):
    declared = {"new": types.SimpleNamespace(type=annotation)}
    monkeypatch.setattr(models, "declared", lambda name: declared)
    row = fields.of_model("mixer_b16")["new"]
    assert all(map(row.fits, (None, *right)))
    assert not any(map(row.fits, wrong))


def test_a_well_known_field_may_have_a_value_by_stage(monkeypatch):
    declared = {"hidden_dim": types.SimpleNamespace(type=tuple[int, ...])}
    monkeypatch.setattr(models, "declared", lambda name: declared)
    row = fields.of_model("mixer_b16")["hidden_dim"]
    assert row.fits((80, 160, 320))
    assert not row.fits((80, 0))
    assert not row.fits(80)
    assert row.expected(80).startswith("values, each a whole number from 1 to ")


def test_a_type_that_no_recipe_can_say_is_the_models_mistake(monkeypatch):
    declared = {"new": types.SimpleNamespace(type=dict)}
    monkeypatch.setattr(models, "declared", lambda name: declared)
    with pytest.raises(TypeError, match=r"field new is annotated with .*dict"):
        fields.of_model("mixer_b16")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.num_bloks", "is no field of mixer_s16; try model.num_blocks, "),
        ("model.scan", r"is now config\.run\.scan\."),
        ("run.num_blocks", "is no field of a recipe; try model.num_blocks, "),
    ],
)
def test_a_field_that_a_model_does_not_have_is_named(tiny, field, message):
    section, _, name = field.partition(".")
    tiny[section][name] = 3
    with pytest.raises(ValueError, match=rf"^config\.{field} {message}"):
        recipe.check_fields(tiny)


def test_an_architecture_without_a_size_needs_all_of_its_sizes(tiny):
    tiny.model.name = "mixer"
    recipe.check_fields(tiny)
    del tiny.model.hidden_dim
    with pytest.raises(
        ValueError, match=r"config\.model\.name: mixer needs hidden_dim"
    ):
        recipe.check_fields(tiny)


def test_many_wrong_fields_are_counted(tiny):
    for name in "abcdefghijklmnopqrstuvwxyz":
        tiny[name] = 1
    with pytest.raises(ValueError, match="and 11 more") as caught:
        recipe.check_fields(tiny)
    assert len(str(caught.value).splitlines()) == 16


# --- The command line -----------------------------------------------------------------

OPTIONAL = [name for name, (row, _) in DEFAULTS.items() if row.none]


def on_the_command_line(tiny, name):
    """The field's name in a recipe with both evaluators, and its section there."""
    tiny.evals.shots = recipe.fewshot("train", "val")
    for kind, evaluator in (("accuracy", "val"), ("fewshot", "shots")):
        if name.startswith(f"{kind}."):
            return name.replace(kind, f"evals.{evaluator}", 1)
    return name


@pytest.mark.parametrize("name", DEFAULTS)
def test_none_is_taken_where_it_may_be_and_refused_by_name_elsewhere(tiny, name):
    field = on_the_command_line(tiny, name)
    tiny.optim.end_learning_rate = 0.0
    config = program.override(tiny, [f"--config.{field}=None"])
    assert flat(config.to_dict())[field] is None
    if name not in OPTIONAL:
        with pytest.raises(ValueError, match=rf"^config\.{field} is None; expected "):
            recipe.check_fields(config)
    elif name == "optim.end_learning_rate":
        config = program.override(config, ["--config.optim.end_factor=0.5"])
        recipe.check_fields(config)
    else:
        recipe.check_fields(config)


@pytest.mark.parametrize("field", [*models.declared("mixer_s16")])
def test_every_field_of_the_model_can_be_set_and_taken_away(tiny, field):
    """Whether the recipe says it or not."""
    value = models.fields("mixer_h14", head_bias=0.5)[field]
    for recipe_says in (True, False):
        if recipe_says:
            tiny.model[field] = models.fields("mixer_b32")[field]
        elif field in tiny.model:
            del tiny.model[field]
        config = program.override(tiny, [f"--config.model.{field}={value}"])
        assert config.model[field] == value
        assert type(config.model[field]) is type(value)
        recipe.check_fields(config)
        config = program.override(tiny, [f"--config.model.{field}=None"])
        assert field not in config.model
        recipe.check_fields(config)


def test_the_fields_are_those_of_the_model_that_the_command_line_names(tiny):
    del tiny.model.hidden_dim
    words = ["--config.model.name=mixer", "--config.model.hidden_dim=24"]
    config = program.override(tiny, words)
    assert (config.model.name, config.model.hidden_dim) == ("mixer", 24)
    words = ["--config.model.name", "mixr"]
    with pytest.raises(ValueError, match=r"name is 'mixr'; expected mixer"):
        recipe.check_fields(program.override(tiny, words))
    with pytest.raises(ValueError, match="'mixr' is unknown; try mixer"):
        program.override(tiny, [*words, "--config.model.hidden_dim=24"])
    # No name is no name, whatever stands behind it.
    config = program.override(tiny, ["--config.model.name=", "--config.seed=1"])
    with pytest.raises(ValueError, match=r"config\.model\.name is ''; expected mixer"):
        recipe.check_fields(config)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("model.image_size=(32,16)", (32, 16)),
        ("model.image_size=32,16", (32, 16)),
        ("model.image_size=[32,16]", (32, 16)),
        ("init_from=", ""),
        ("optim.clip_norm=2", 2.0),
        ("total_steps=0x10", 16),
        ("input.flip=false", False),
        ("model.dropout=1e-1", 0.1),
        ("input.flip", True),
    ],
)
def test_values_are_read_as_they_are_written(tiny, word, value):
    config = program.override(tiny, [f"--config.{word}"])
    assert flat(config.to_dict())[word.partition("=")[0]] == value
    recipe.check_fields(config)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--config.model.scan=False"], False),
        (["--config.model.scan"], True),
        (["--noconfig.model.scan"], False),
        (["--config.model.scan", "--config.run.scan=False"], False),
        (["--config.model.scan=None"], None),
    ],
)
def test_an_old_name_of_a_field_sets_the_new_one_and_is_told(
    tiny, words, value, caplog
):
    tiny.run.scan = None if value is not None else True
    config = program.override(tiny, words)
    assert config.run.scan is value
    assert "scan" not in config.model
    assert caplog.messages == ["config.model.scan is now config.run.scan."]
    recipe.check_fields(config)


def test_a_value_may_be_the_next_word_and_a_switch_may_stand_alone(tiny):
    tiny.input.flip = False
    words = (
        "--config.seed 3 --config.input.flip --config.mesh.data -1 --config.run.scan"
    )
    config = program.override(tiny, words.split())
    assert (config.seed, config.mesh.data) == (3, -1)
    assert config.input.flip is config.run.scan is True
    for wrong in ("--noconfig.input.flip=True", "--confg.seed=3", "seed=3"):
        with pytest.raises(ValueError, match="is no flag"):
            program.override(tiny, [wrong])
    with pytest.raises(SystemExit, match=r"no field of the recipe; try optim\."):
        program.override(tiny, ["--config.optim=3"])


def test_a_tuple_may_be_given_number_by_number(tiny):
    field = "--config.model.image_size"
    config = program.override(tiny, [f"{field}=32", f"{field}=16"])
    assert config.model.image_size == (32, 16)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=abc", "a whole number"),
        ("seed=1.5", "a whole number"),
        ("seed=", "a whole number"),
        ("mixup=", "a number"),
        ("mixup=1,5", "a number"),
        ("input.flip=2", "true or false"),
        ("model.num_blocks=two", "a whole number"),
        ("model.dropout=", "a number"),
        ("model.scan=2", "true or false"),
        ("model.image_size=(1,x", "height and width"),
    ],
)
def test_a_word_that_is_no_value_is_named_with_its_field(tiny, word, expected):
    with pytest.raises(SystemExit) as caught:
        program.override(tiny, [f"--config.{word}"])
    first, *_ = str(caught.value).splitlines()
    word = word.replace("model.scan", "run.scan")
    assert first.startswith(f"flag --config.{word}: expected {expected}")
