"""Damaged files in a run's folder are named, each in one line."""

import json

import pytest
from set_up import DAMAGED, one_line, random_params

from mlp_mixer import models, pretrained, recipe, runs, workdir


def changed(path, change):
    """Writes a file of JSON again, changed."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.fixture
def run(tmp_path):
    """A run that has begun, without a checkpoint."""
    config = recipe.load("configs/mixer_b16.py")
    workdir.claim(config, tmp_path, [f"class {i}" for i in range(1000)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_recipe_of_a_run_is_one_line(kind, run):
    (run / "config.json").write_bytes(DAMAGED[kind])
    for read in (workdir.load, runs.open_model, pretrained.read):
        with pytest.raises(ValueError, match=r"config\.json") as error:
            read(run)
        assert one_line(error, "config.json")
    with pytest.raises(ValueError, match=r"config\.json") as error:
        workdir.claim(recipe.load("configs/mixer_b16.py"), run)
    assert one_line(error, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "it does not say batch_size, checkpoint, dataset"),
        (lambda c: c.pop("model"), "it does not say model"),
        (lambda c: c["model"].pop("gelu"), "it does not say model.gelu"),
        (lambda c: c.update(model=[]), "model is .*; expected a section"),
        (lambda c: c.update(model=None), "model is None; expected a section"),
        (lambda c: c.update(batch_size="64"), "batch_size is '64'; expected a whole"),
        (lambda c: c.update(batch_size=None), "batch_size is None; expected a whole"),
        (lambda c: c["model"].update(gelu=["tanh"]), "model.gelu is .*; expected tanh"),
        (lambda c: c["model"].update(image_size=16), "model.image_size is 16; exp"),
        (
            lambda c: c["model"].update(hidden_dim=-1),
            "model.hidden_dim is -1; expected",
        ),
        (lambda c: c["model"].update(gelu="relu"), "model.gelu is 'relu'; expected"),
        (
            lambda c: c["model"].update(image_size=[8, "x"]),
            "model.image_size is .8, 'x",
        ),
        (lambda c: c["optim"].update({"a.b": 1}), "no recipe .*key a.b contains"),
        (lambda c: c.update(evals={"val": 3}), "evals.val is no evaluator of type"),
        (lambda c: c["evals"]["val"].pop("type"), "evals.val is no evaluator of type"),
        (lambda c: c["evals"]["val"].update(type=[]), "config.json is no recipe"),
        (lambda c: c["evals"]["val"].update(dataset=1), "evals.val.dataset is 1; exp"),
        (lambda c: c.update({"\x1b[31m": {"\n": 1}, "seed": ""}), "seed is"),
    ],
)
def test_a_recipe_of_other_fields_is_one_line(change, message, run):
    changed(run / "config.json", change)
    for read in (workdir.load, runs.open_model, pretrained.read):
        with pytest.raises(ValueError, match=message) as error:
            read(run)
        assert one_line(error, "config.json")


def test_a_field_of_a_later_version_has_its_default(run, caplog):
    """An older version's run opens and goes on, and the log says what is taken."""

    def older(tree):
        del tree["input"]["max_broken_images"], tree["evals"]["val"]["ece_bins"]
        tree["field_of_another_version"] = 3

    changed(run / "config.json", older)
    config = workdir.load(run)
    assert config.input.max_broken_images == recipe.base().input.max_broken_images
    assert config.evals.val.ece_bins == 0
    assert config.field_of_another_version == 3
    assert "does not say evals.val.ece_bins, input.max_broken_images" in caplog.text
    changed(run / "config.json", lambda tree: tree.pop("field_of_another_version"))
    workdir.check_run(recipe.load("configs/mixer_b16.py"), run)


@pytest.mark.parametrize("kind", [k for k in DAMAGED if k != "null"])
def test_damaged_names_of_classes_are_one_line(kind, run):
    (run / "class_names.json").write_bytes(DAMAGED[kind])
    for read in (
        lambda: workdir.load_class_names(run, 1000),
        lambda: pretrained.read(run),
    ):
        with pytest.raises(ValueError, match=r"class_names\.json") as error:
            read()
        assert one_line(error, "class_names.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", 3], "holds a number among the names"),
        (["a", None], "holds null among the names"),
        (["a", ["b"]], "holds a list among the names"),
        (["a"], "has 1 names, but the model 1,000 classes"),
        ({"a": 1}, "holds an object; expected a list or null"),
    ],
)
def test_names_that_are_none_are_one_line(names, message, run):
    (run / "class_names.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=message) as error:
        pretrained.read(run)
    assert one_line(error, "class_names.json")


def test_names_that_are_not_there_are_one_line(run):
    (run / "class_names.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*class_names\.json"):
        pretrained.read(run)


def test_a_recipe_of_many_other_fields_is_told_in_20_lines(run):
    def many(tree):
        tree["optim"].update({f"x{i}\x1b": i for i in range(5000)})

    changed(run / "config.json", many)
    with pytest.raises(ValueError, match="another recipe") as error:
        workdir.claim(recipe.load("configs/mixer_b16.py"), run)
    lines = str(error.value).splitlines()
    assert len(lines) == 20
    assert all(map(str.isprintable, lines))


def test_a_checkpoint_of_another_number_of_classes_is_refused(tmp_path):
    """Without names of classes nothing else would notice."""
    fields = {"num_blocks": 1, "hidden_dim": 4, "channels_mlp_dim": 4}
    model = models.create("resmlp_12", num_classes=3, **fields)
    params = random_params(model, (32, 32))
    weights = pretrained.Weights(params, "made", image_size=(32, 32))
    runs.write_run(weights, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    changed(config, lambda c: c["dataset"].update(num_classes=5))
    with pytest.raises(ValueError, match="has 3 classes, that says 5") as error:
        runs.open_model(tmp_path / "run")
    assert one_line(error, "config.json")
