"""Every shipped recipe builds what it names, and every key of it is read."""

import pathlib
import re

import jax
import pytest

from mlp_mixer import evaluators, experiment, losses, recipe, sharding
from mlp_mixer.data import image_ops, pipeline, preparation, sources
from mlp_mixer.data.preparation import vtab
from mlp_mixer.evaluators import fewshot

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
DIGITS = recipe.run_file(str(CONFIGS / "family" / "digits.py"))["MODELS"]
FAMILY = [x for x in (CONFIGS / "family").glob("*.py") if x.stem != "digits"]
RECIPES = [
    *(
        (f"mixer_{size}", "")
        for size in ("s32", "s16", "b32", "b16", "l32", "l16", "h14")
    ),
    ("mixer_b16", "imagenet21k"),
    ("mixer_h14", "jft300m"),
    ("digits", ""),
    *(("family/digits", model) for model in DIGITS),
    *((path.relative_to(CONFIGS).as_posix()[:-3], "") for path in FAMILY),
    ("family/ninformer", "cifar100"),
    ("family/paramixer", "asym"),
    ("family/spach", "s_attn"),
    ("family/msmlp", "s,paper"),
    ("family/imlp", "prior"),
    ("family/imlp", "digits"),
    ("family/imlp", "digits,prior"),
    ("family/hiremlp", "base"),
    ("family/kan_mixer", "mnist,c64"),
    ("family/kan_mixer", "cifar100,canuto"),
    ("family/convmlp", "l,cifar100"),
    ("finetune/digits", ""),
    ("finetune/digits", "select"),
    ("finetune/imagenet2012", ""),
    ("finetune/imagenet2012", "l16,448"),
    ("finetune/imagenet2012", "h14,jft300m,448,resize_crop,select"),
    ("finetune/cifar10", "s32,imagenet1k"),
    ("finetune/cifar100", "l32,select"),
    ("finetune/pets", "s16,448,select"),
    ("finetune/flowers", "b32,imagenet1k,448"),
    ("finetune/vtab", "dmlab,448,select"),
    ("finetune/vtab", "smallnorb_azimuth,hyperrule"),
    *(("finetune/vtab", task) for task in vtab.TASKS),
]


def test_all_recipes_are_tested(root):
    configs = root / "configs"
    shipped = {
        path.relative_to(configs).with_suffix("").as_posix()
        for path in configs.rglob("*.py")
    }
    assert shipped == {name for name, _ in RECIPES}


class Probe:
    """Stands in for a source; remembers what it was opened with."""

    def __init__(self, name, split, *, num_examples, num_classes, **rest):
        self.opened = (name, split, num_examples, num_classes)
        self.num_classes = num_classes or 1000
        self.class_names = None
        self.multi_label = False

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise NotImplementedError

    def label(self, index):
        raise NotImplementedError

    def name_of(self, index):
        return str(index)


@pytest.mark.parametrize(("name", "argument"), RECIPES)
def test_every_section_is_accepted_by_its_function(name, argument, monkeypatch):
    config = recipe.load(f"configs/{name}.py:{argument}")
    size = config.model.image_size
    monkeypatch.setattr(sources, "open_source", Probe)
    mesh = sharding.make_mesh(**config.mesh)
    source = sources.open_source(**config.dataset, data_dir=None, image_size=size)
    config = recipe.completed(config, len(source), source.num_classes)
    example, total_steps = pipeline.example(size), recipe.total_steps(config)
    built = experiment.build(config, mesh, example, total_steps)
    assert built.model.num_classes == source.num_classes
    assert float(built.schedule(config.optim.warmup_steps)) == pytest.approx(
        config.optim.learning_rate
    )
    evals = evaluators.create(
        evaluators.sections(config, ["all"]),
        predict=built.predict,
        mesh=mesh,
        image_size=size,
        data_dir=None,
    )
    # Training needs its own data set and no other.
    watched = evaluators.sections(config)
    assert watched
    for section in watched.values():
        assert section["type"] == "accuracy"
        assert section["dataset"]["name"] == config.dataset.name
    if name.startswith("finetune/"):
        assert list(watched) in (["minival"], ["val"], ["test"])
        assert config.dataset.name in (*preparation.PREPARABLE, "digits")
    else:
        if name.startswith("mixer") and config.dataset.name == "imagenet2012":
            # `last` is of the parameters that are not averaged.
            own = {"val"} if name.startswith("family/") else {"minival", "val"}
            assert set(watched) - {"last"} == own
            assert set(evals) == {*watched, "real", "v2", "fewshot"}
            assert isinstance(evals["fewshot"], fewshot.FewShot)
    assert {e.preprocess for e in config.evals.values()} <= set(image_ops.PROTOCOLS)
    pipeline.train_batches(
        source, **config.input, image_size=size, batch_size=config.batch_size, seed=0
    )
    assert config.loss in losses.LOSSES
    assert config.batch_size % mesh.size == 0
    assert mesh.size == (1 if config.dataset.name == "digits" else jax.device_count())


@pytest.mark.parametrize(("name", "argument"), RECIPES)
def test_docstrings_state_result_cost_and_command(root, name, argument):
    text = pathlib.Path(root, "configs", f"{name}.py").read_text()
    if not re.search(r"^(TASKS|MODELS)\b", text, re.MULTILINE):  # tables of words
        text = text.split('"""')[1]
    if "README.md in this folder" in text:
        text += pathlib.Path(root, "configs/finetune/README.md").read_text()
    for part in ("Expected:", "Cost:", "python -m mlp_mixer.train --config=configs/"):
        assert part in text
    assert f"configs/{name}.py" in text
    for word in filter(None, argument.split(",")):
        assert re.search(rf"\b{word}\b", text)
