"""Every field of a recipe has the values that it may have, and they are checked."""

import math

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
    """{field: (its row, its default)} of all that a recipe may have."""
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
        "model.name": models.names(),
        "model.gelu": derivatives.GELUS,
        "model.remat": trunk.REMAT_POLICIES,
        "optim.decay": optim.DECAYS,
        "optim.decayed": optim.DECAYED,
    }
    for name, known in sets.items():
        assert set(rows[name].choices) == set(known), name
    for row in (accuracy["preprocess"], fewshot["preprocess"]):
        assert set(row.choices) == set(image_ops.PROTOCOLS)
    for name in rows["optim.name"].choices:
        optim.create(name=name, total_steps=9, learning_rate=1.0, warmup_steps=1)
    assert rows["input.randaugment_layers"].high == len(randaugment.OPS)
    # Others that are a closed set are in the list above.
    closed = {name for name, row in rows.items() if row.choices}
    dtypes = {"model.dtype", "optim.momentum_dtype"}
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
    # Of the numbers, these two fields may be any, and below 0.
    allowed += {"model.head_bias": [-1e30], "fewshot.l2_exponents": [(0, 0)]}.get(
        name, []
    )
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
        ("input.shift", 16, "less than the sides of config.model.image_size, (16, 16)"),
        ("model.num_blocks", 0, "a whole number from 1 to 10,000; or None"),
        ("model.image_size", (16,), "height and width in pixels, e.g. (16, 16)"),
        ("model.image_size", (16, 0), "height and width in pixels"),
        ("model.image_size", None, "height and width in pixels"),
        ("model.patch_size", (4, 4, 4), "height and width in pixels"),
        ("model.dropout", 1.0, "a number from 0 to below 1"),
        ("model.stochastic_depth", 1.5, "a number from 0 to below 1"),
        ("model.head_bias", math.inf, "a number."),
        ("model.dtype", "float8", "float32, bfloat16"),
        ("model.remat", "ful", "full, pre_gelu, none; or None"),
        ("optim.clip_norm", 0.0, "a number above 0; or None"),
        ("optim.eps", 0.0, "a number above 0"),
        ("optim.b2", 1.0, "a number from 0 to below 1"),
        ("optim.name", "adamw", "adam, momentum"),
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
        ({"optim.end_factor": 0.1}, "set exactly one of them"),
        ({"optim.end_learning_rate": None}, "set exactly one of them"),
        (
            {"input.randaugment_layers": 2},
            "randaugment_layers is 2, but config.input.randaugment_magnitude is 0",
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
        recipe.check(tiny)
    said = str(caught.value).splitlines()
    assert said[0] == "config.optim.b1 is missing; start from recipe.base()."
    assert said[1].startswith(
        "config.batchsize is no field of a recipe; try batch_size"
    )
    assert said[2].startswith(
        "config.evals.val.ece_bin is no field of a recipe; try ece"
    )
    assert len(said) == 3


def test_many_wrong_fields_are_counted(tiny):
    for name in "abcdefghijklmnopqrstuvwxyz":
        tiny[name] = 1
    with pytest.raises(ValueError, match="and 11 more") as caught:
        recipe.check(tiny)
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
            recipe.check(config)
    elif name == "optim.end_learning_rate":
        config = program.override(config, ["--config.optim.end_factor=0.5"])
        recipe.check(config)
    else:
        recipe.check(config)


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
        ("input.flip", True),
    ],
)
def test_values_are_read_as_they_are_written(tiny, word, value):
    config = program.override(tiny, [f"--config.{word}"])
    assert flat(config.to_dict())[word.partition("=")[0]] == value
    recipe.check(config)


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
        ("model.image_size=(1,", "numbers"),
    ],
)
def test_a_word_that_is_no_value_is_named_with_its_field(tiny, word, expected):
    with pytest.raises(SystemExit) as caught:
        program.override(tiny, [f"--config.{word}"])
    first, *_ = str(caught.value).splitlines()
    assert first.startswith(f"flag --config.{word}: expected {expected}")
