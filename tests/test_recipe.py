"""The numbers of Table 4, where recipes are found, and how a run explains itself."""

import importlib
import json
from collections import Counter

import pytest
from ml_collections import ConfigDict

from mlp_mixer import deit, errors, evaluators, models, program, recipe, shipped
from mlp_mixer.data.preparation import vtab

SIZES = ["s32", "s16", "b32", "b16", "l32", "l16", "h14"]
IMAGENET_STEPS = 92_897  # round(300 · 1,268,355 / 4096)


def load(name, argument=""):
    return recipe.load(f"configs/{name}.py:{argument}")


# epochs, learning rate, weight decay, RandAugment magnitude, mixup p, stochastic
# depth, updates at batch 4096. Where the paper has no row: the next larger (S → B) or
# smaller (H → L) model's.
B, L = (300, 0.001, 0.1, 15, 0.5, 0.1), (300, 0.001, 0.1, 15, 0.5, 0.1)
B21K, L21K = (300, 0.001, 0.1, 10, 0.2, 0.1), (300, 0.001, 0.1, 20, 0.5, 0.1)
TABLE_4 = {
    ("mixer_s32", ""): (*B, IMAGENET_STEPS),
    ("mixer_s16", ""): (*B, IMAGENET_STEPS),
    ("mixer_b32", ""): (*B, IMAGENET_STEPS),
    ("mixer_b16", ""): (*B, IMAGENET_STEPS),
    ("mixer_l32", ""): (*L, IMAGENET_STEPS),
    ("mixer_l16", ""): (*L, IMAGENET_STEPS),
    ("mixer_h14", ""): (*L, IMAGENET_STEPS),
    ("mixer_s32", "imagenet21k"): (*B21K, 1_036_078),
    ("mixer_b16", "imagenet21k"): (*B21K, 1_036_078),
    ("mixer_l16", "imagenet21k"): (*L21K, 1_036_078),
    ("mixer_h14", "imagenet21k"): (*L21K, 1_036_078),
    ("mixer_s32", "jft300m"): (5, 0.003, 0.03, None, 0.0, 0.0, 366_211),
    ("mixer_s16", "jft300m"): (5, 0.003, 0.03, None, 0.0, 0.0, 366_211),
    ("mixer_b32", "jft300m"): (7, 0.003, 0.03, None, 0.0, 0.0, 512_695),
    ("mixer_b16", "jft300m"): (7, 0.003, 0.03, None, 0.0, 0.0, 512_695),
    ("mixer_l32", "jft300m"): (7, 0.001, 0.03, None, 0.0, 0.0, 512_695),
    ("mixer_l16", "jft300m"): (14, 0.001, 0.03, None, 0.0, 0.0, 1_025_391),
    ("mixer_h14", "jft300m"): (14, 0.001, 0.03, None, 0.0, 0.0, 1_025_391),
}


@pytest.mark.parametrize(("name", "argument"), TABLE_4)
def test_recipes_hold_table_4(name, argument):
    config = load(name, argument)
    epochs, lr, decay, magnitude, mixup, depth, steps = TABLE_4[name, argument]
    assert config.epochs == epochs
    assert config.optim.learning_rate == lr
    assert config.optim.weight_decay == decay
    assert config.input.randaugment_layers == (0 if magnitude is None else 2)
    assert config.input.randaugment_magnitude == (magnitude or 0)
    assert config.mixup == mixup
    assert config.model.stochastic_depth == depth
    assert config.model.dropout == 0.0
    assert recipe.total_steps(config) == steps


@pytest.mark.parametrize(
    ("argument", "classes", "bias"),
    [("", 1000, -6.9), ("imagenet21k", 21_843, -10.0), ("jft300m", 18_291, -10.0)],
)
def test_the_common_recipe_is_section_3(argument, classes, bias):
    config = load("mixer_b16", argument)
    assert config.batch_size == 4096
    assert config.model.image_size == (224, 224)
    assert config.dataset.num_classes == classes
    assert config.model.head_bias == bias
    assert config.loss == "sigmoid_xent"
    optim = config.optim
    assert (optim.name, optim.b1, optim.b2, optim.eps) == ("adam", 0.9, 0.999, 1e-8)
    assert (optim.warmup_steps, optim.decay) == (10_000, "linear")
    assert (optim.clip_norm, optim.decayed) == (1.0, "kernels")
    # Only the run that is known to reach 76.3 % ends relative to the peak.
    ends = (optim.end_learning_rate, optim.end_factor)
    assert ends == ((None, 1e-5) if not argument else (1e-5, None))
    assert (config.input.crop, config.input.flip) == ("inception", True)


def test_short_is_the_regression_run_of_60_epochs():
    short, whole = load("mixer_b16", "short"), load("mixer_b16")
    assert recipe.total_steps(short) == 18_579
    whole.epochs = short.epochs
    assert short == whole


@pytest.mark.parametrize("size", SIZES)
def test_gpu8_is_the_same_batch_in_micro_batches(size):
    one_host, pod = (load(f"mixer_{size}", word) for word in ("gpu8", ""))
    assert one_host.batch_size == 4096
    assert one_host.accumulate > 1
    assert 4096 % (8 * one_host.accumulate) == 0
    pod.accumulate, pod.input.workers = one_host.accumulate, one_host.input.workers
    # Cards of 24 GB: the formulation that needs least memory at no extra work.
    assert (pod.run.scan, pod.run.remat) == (None, None)
    pod.run.scan, pod.run.remat = True, "pre_gelu"
    assert one_host == pod


def test_the_recipe_of_the_field_is_deits():
    """Table 9 of arXiv 2012.12877, and its code's warm-up of 5 epochs from 1e-6."""
    config = deit.training("resmlp_12", drop_path=0.1)
    recipe.check_fields(config)
    assert (config.batch_size, config.epochs) == (1024, 300)
    assert recipe.total_steps(config) == 375_342  # round(300 · 1,281,167 / 1024)
    assert (config.loss, config.label_smoothing) == ("softmax_xent", 0.1)
    assert (config.mixup, config.cutmix, config.erasing) == (0.8, 1.0, 0.25)
    assert config.model.stochastic_depth == 0.1
    given = config.input
    assert (given.crop, given.randaugment, given.repeats) == ("timm", "timm", 3)
    assert (given.randaugment_layers, given.randaugment_magnitude) == (2, 9)
    assert given.randaugment_std == 0.5
    assert given.interpolation == "bicubic"  # of crop and ops; timm's own draws it
    recipe.check_fields(deit.training("resmlp_12", magnitude=0, repeats=1))
    optim = config.optim
    assert (optim.name, optim.weight_decay, optim.decayed) == ("adam", 0.05, "matrices")
    assert (optim.learning_rate, optim.end_learning_rate) == (1e-3, 1e-5)
    assert (optim.warmup_steps, optim.warmup_learning_rate) == (6256, 1e-6)
    assert (optim.decay, optim.clip_norm, optim.ema) == ("cosine", None, 0.0)
    assert [*evaluators.sections(config)] == ["val"]
    assert config.evals.val.dataset.split == "validation"


@pytest.mark.parametrize("name", ["resmlp", "gmlp", "smlpnet"])
def test_a_papers_recipe_trains_each_of_its_sizes(name):
    """On all of ImageNet-1k; the first size if none is named."""
    for size in models.families()[name].SIZES:
        word = size.removeprefix(f"{name}_")
        config = load(f"family/{name}", word)
        recipe.check_fields(config)
        assert config.model.name == size
        assert config.dataset.num_examples == 1_281_167
    first = load(f"family/{name}").model.name.removeprefix(f"{name}_")
    with pytest.raises(ValueError, match="These are several sizes: "):
        load(f"family/{name}", f"{word},{first}")


def test_msmlps_recipe_has_the_rates_of_its_authors_code_or_of_its_paper():
    """The rest is config.py's, for 8 GPUs of 128 images."""
    for size, of_code, of_paper in (("t", 0.1, 0.2), ("s", 0.4, 0.3), ("b", 0.5, 0.5)):
        config = load("family/msmlp", size)
        recipe.check_fields(config)
        assert config.model.name == f"msmlp_{size}"
        fields = models.fields(config.model.name)
        assert "stochastic_depth" not in config.model
        assert fields["stochastic_depth"] == of_code
        paper = load("family/msmlp", f"{size},paper")
        assert paper.model.stochastic_depth == of_paper
    optim = config.optim
    assert (optim.clip_norm, optim.warmup_steps) == (5.0, 25_023)
    assert (optim.learning_rate, optim.end_learning_rate) == (1e-3, 1e-5)
    assert (config.input.repeats, optim.ema) == (1, 0.0)
    with pytest.raises(ValueError, match="exclude each other"):
        load("family/msmlp", "t,s")


def test_convmlps_recipe_is_its_authors():
    """Their configs/classification/convmlp_s_imagenet.yml, on 8 GPUs."""
    config = load("family/convmlp")
    optim = config.optim
    assert (config.batch_size, config.epochs, config.input.repeats) == (8 * 128, 310, 1)
    assert recipe.total_steps(config) - optim.cooldown_steps == 375_342  # 300 epochs
    assert (optim.warmup_learning_rate, optim.learning_rate) == (1e-4, 5e-4)
    assert (optim.end_learning_rate, optim.ema) == (1e-5, 0.99996)
    assert config.evals.val.preprocess == "timm-0.9"
    assert load("family/convmlp", "m").model.name == "convmlp_m"


def test_convmlps_fine_tuning_is_its_authors():
    """Their configs/classification/finetuned, on as many GPUs as ImageNet's."""
    for size, batch_size in (("s", 8 * 128), ("l", 8 * 64)):
        config = load("family/convmlp", f"{size},cifar100")
        recipe.check_fields(config)
        assert (config.batch_size, config.epochs) == (batch_size, 60)
        epoch = 50_000 / batch_size
        steps = config.optim.warmup_steps, config.optim.cooldown_steps
        assert steps == pytest.approx((10 * epoch, 10 * epoch), abs=1)
        assert (config.optim.learning_rate, config.optim.ema) == (3e-4, 0.0)
        assert config.optim.warmup_learning_rate == 1e-6
        assert (config.input.min_area, config.input.interpolation) == (0.8, "random")
        assert config.model.mean == (0.5071, 0.4867, 0.4408)
        assert config.init_from == f"convmlp/convmlp_{size}_imagenet"


# Recipe → data set, its classes, training images (all, with "select"), test split,
# updates, warm-up, learning rates tried (Appendix C; steps and parts of ViT's Table 4).
GRID = (0.003, 0.01, 0.03, 0.06)
FINETUNING = {
    "imagenet2012": (
        ("imagenet2012", 1000, 1_281_167, 1_268_355, "validation"),
        (20_000, 500, GRID),
    ),
    "cifar10": (("cifar10", 10, 50_000, 49_000, "test"), (10_000, 500, GRID)),
    "cifar100": (("cifar100", 100, 50_000, 49_000, "test"), (10_000, 500, GRID)),
    "pets": (("oxford_iiit_pet", 37, 3680, 3312, "test"), (500, 100, GRID)),
    "flowers": (("oxford_flowers102", 102, 2040, 1836, "test"), (500, 100, GRID)),
    "vtab": (("vtab_svhn", 10, 1000, 800, "test"), (2500, 500, GRID[:3])),
}


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_is_section_3_and_appendix_c(root, name):
    (dataset, classes, whole, part, test), numbers = FINETUNING[name]
    word = "svhn" if name == "vtab" else ""
    config = load(f"finetune/{name}", word)
    select = load(f"finetune/{name}", f"{word},select")
    rates = recipe.run_file(f"{root}/configs/finetune/{name}.py")["LEARNING_RATES"]
    optim = config.optim
    assert (config.total_steps, optim.warmup_steps, rates) == numbers
    assert optim.learning_rate in rates
    assert config.batch_size == 512
    assert (optim.name, optim.momentum, optim.momentum_dtype, optim.clip_norm) == (
        *("momentum", 0.9, "bfloat16"),
        1.0,
    )
    ends = (optim.end_learning_rate, optim.end_factor)
    assert (optim.decay, *ends, optim.weight_decay) == ("cosine", 0.0, None, 0.0)
    assert (config.loss, config.mixup) == ("softmax_xent", 0.0)
    model = recipe.completed(config).model
    assert (model.stochastic_depth, model.dropout) == (0.0, 0.0)
    assert (config.init_head, model.head_bias) == ("zero", 0.0)
    assert config.input.randaugment_layers == 0
    assert (config.input.crop, config.input.flip) == ("resize_crop", True)

    assert (config.dataset.name, config.dataset.num_classes) == (dataset, classes)
    assert (config.dataset.num_examples, select.dataset.num_examples) == (whole, part)
    ((watched, section),) = evaluators.sections(config).items()
    assert section["dataset"]["split"] == test
    assert watched == {"test": "test", "validation": "val"}[test]
    # Nothing else changes while the learning rate is chosen.
    ((_, held_out),) = evaluators.sections(select).items()
    assert held_out["dataset"]["split"] != test
    section["dataset"]["split"] = held_out["dataset"]["split"]
    assert held_out == section
    for field in ("split", "num_examples"):
        select.dataset[field] = config.dataset[field]
    select.evals = config.evals
    assert select == config


def images(split, sizes):
    """The images of a split, by name and number, as TFDS counts them."""
    found = []
    for part in split.split("+"):
        name, _, cut = part.rstrip("]").partition("[")
        start, _, stop = cut.partition(":")
        bounds = [
            round(sizes[name] * int(b.rstrip("%")) / 100) if b else None
            for b in (start, stop)
        ]
        found += [(name, i) for i in range(sizes[name])[slice(*bounds)]]
    return found


@pytest.mark.parametrize(
    ("name", "held_out", "sizes"),
    [
        ("imagenet2012", 0.01, {"train": 1_281_167}),
        ("cifar10", 0.02, {"train": 50_000}),
        ("cifar100", 0.02, {"train": 50_000}),
        ("pets", 0.1, {"train": 3680}),
        ("flowers", 0.1, {"train": 1020, "validation": 1020}),
    ],
)
def test_the_learning_rate_is_chosen_on_what_it_is_not_trained_on(
    name, held_out, sizes
):
    whole = load(f"finetune/{name}")
    select = load(f"finetune/{name}", "select")
    everything = images(whole.dataset.split, sizes)
    trained = images(select.dataset.split, sizes)
    chosen = images(select.evals.minival.dataset.split, sizes)
    assert len(everything) == whole.dataset.num_examples
    assert len(trained) == select.dataset.num_examples
    assert sorted(trained + chosen) == sorted(everything)
    assert len(chosen) / len(everything) == pytest.approx(held_out, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_at_448_token_mixing_is_four_times_as_wide(size):
    table = models.mixer.SIZES[f"mixer_{size}"]
    config = load("finetune/cifar10", f"{size},448")
    usual = load("finetune/cifar10", size)
    assert config.model.image_size == (448, 448)
    assert config.model.tokens_mlp_dim == 4 * table["tokens_mlp_dim"]
    assert usual.model.image_size == (224, 224)
    assert "tokens_mlp_dim" not in usual.model
    assert config.init_resize == "grow"
    usual.model.image_size = config.model.image_size
    usual.model.tokens_mlp_dim = config.model.tokens_mlp_dim
    assert config == usual


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("upstream", ["", "imagenet21k", "imagenet1k", "jft300m"])
def test_fine_tuning_starts_from_published_weights_or_from_a_run_of_ours(
    size, upstream
):
    config = load("finetune/pets", f"{size},{upstream}")
    if size in ("b16", "l16") and upstream != "jft300m":
        file = {"b16": "Mixer-B_16", "l16": "Mixer-L_16"}[size]
        assert config.init_from == f"{upstream or 'imagenet21k'}/{file}"
        return
    # The very folder that the pretraining recipe writes.
    word = {"": "imagenet21k", "imagenet1k": ""}.get(upstream, upstream)
    argument = f"--config=configs/mixer_{size}.py:{word}"
    assert config.init_from == shipped.default_workdir(["train", argument])
    load(f"mixer_{size}", word)


def test_the_test_images_are_those_of_table_3_or_2():
    for word, protocol in (
        ("", "paper-resmall-crop"),
        ("resize_crop", "paper-resize-crop"),
    ):
        config = load("finetune/imagenet2012", word)
        sections = evaluators.sections(config, ["all"])
        assert set(sections) == {"val", "real", "v2"}
        assert {s["preprocess"] for s in sections.values()} == {protocol}


def test_vtab_has_the_19_tasks_and_their_classes(root):
    defined = recipe.run_file(f"{root}/configs/finetune/vtab.py")
    tasks = defined["TASKS"]
    assert set(tasks) == set(vtab.TASKS)
    groups = Counter(group for _, group in tasks.values())
    assert groups == {"natural": 7, "specialized": 4, "structured": 8}
    for name, task in vtab.TASKS.items():
        if task.num_classes:
            assert tasks[name][0] == task.num_classes
    special = {*defined["SMALL"], *defined["NO_FLIP"], *defined["NO_CROP"]}
    assert special < set(tasks)


def test_vtabs_exceptions_are_hyperrules():
    def said(task):
        config = load("finetune/vtab", task)
        preprocess = config.evals.test.preprocess
        return config.input.flip, config.input.crop, preprocess

    squares, whole = (
        ("resize_crop", "paper-resize-crop"),
        (
            "resize",
            "vision_transformer",
        ),
    )
    assert said("caltech101") == (True, *squares)
    assert said("dsprites_orientation") == (False, *squares)
    assert said("smallnorb_azimuth") == (False, *squares)
    assert said("smallnorb_elevation") == (True, *squares)
    assert said("dsprites_location") == (False, *whole)
    for task in ("clevr_count", "clevr_distance", "dmlab", "kitti_distance"):
        assert said(task) == (True, *whole)


def test_vtab_is_at_448_for_large_images_alone():
    small = {"cifar100", "dsprites_location", "dsprites_orientation", "eurosat", "svhn"}
    for task in vtab.TASKS.keys() - small:
        config = load("finetune/vtab", f"{task},l16,448")
        assert config.model.image_size == (448, 448)
    # Below 96x96 pixels: 32, 64, 64, 64 and 32 a side.
    for task in small:
        with pytest.raises(ValueError, match=f"images of {task} are small"):
            load("finetune/vtab", f"{task},448")


def test_hyperrule_is_a_staircase_of_500_steps():
    config = load("finetune/vtab", "dtd,hyperrule")
    usual = load("finetune/vtab", "dtd")
    assert (config.total_steps, config.optim.decay) == (500, "staircase")
    usual.total_steps = usual.evals.test.every_steps = 500
    usual.optim.warmup_steps, usual.optim.decay = 100, "staircase"
    assert config == usual


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("cifar10", "b16,l16", "b16,l16 exclude each other: .* h14 .default: b16"),
        ("cifar10", "imagenet1k,jft300m", "exclude each other"),
        ("cifar10", "384", "word '384'; it knows: .*448, jft300m"),
        ("cifar10", "hyperrule", "does not know the word 'hyperrule'"),
        ("vtab", "", "Name one task, .* there are caltech101, "),
        ("vtab", "dtd,svhn", "Name one task"),
        ("vtab", "caltech", "word 'caltech'; it knows: caltech101"),
        ("vtab", "dtd,resize_crop", "does not know the word 'resize_crop'"),
    ],
)
def test_fine_tunings_words_are_checked(name, argument, message):
    with pytest.raises(ValueError, match=message):
        load(f"finetune/{name}", argument)


@pytest.mark.parametrize("argument", ["imagenet21k,jft300m", "short,imagenet21k"])
def test_words_that_exclude_each_other_are_refused(argument):
    with pytest.raises(ValueError, match="exclude each other"):
        load("mixer_b16", argument)


def test_words_are_checked():
    assert recipe.words("a, b", ["a", "b"]) == ["a", "b"]
    assert recipe.words("", ["a"]) == []
    with pytest.raises(ValueError, match="word 'imagenet'; it knows: imagenet21k"):
        load("mixer_l16", "imagenet")
    with pytest.raises(ValueError, match="word 'fast'; it knows: none"):
        load("digits", "fast")


def test_evaluators_follow_the_data_set_and_never_move_it():
    config = load("mixer_b16")
    config.dataset.name = "folder:/x"
    config.batch_size = 64
    config.evals.minival.batch_size = 8
    config.evals.minival.dataset.name = "cifar10"
    sections = evaluators.sections(config)
    assert sections["val"]["dataset"]["name"] == "folder:/x"
    assert sections["val"]["dataset"]["num_classes"] == 1000
    assert sections["val"]["batch_size"] == 64
    assert sections["minival"]["batch_size"] == 8
    assert (config.batch_size, config.dataset.name) == (64, "folder:/x")
    config.input.workers = 3
    everything = evaluators.sections(config, ["all"])
    assert {section["workers"] for section in everything.values()} == {3}
    config.evals.minival.every_steps = 0
    assert list(evaluators.sections(config)) == ["val"]


def test_evaluators_that_training_does_not_run_are_there_by_name():
    config = load("mixer_b16")
    config.dataset.label = "labels"
    assert set(evaluators.sections(config)) == {"minival", "val"}
    everything = evaluators.sections(config, ["all"])
    assert set(everything) == {"minival", "val", "real", "v2", "fewshot"}
    assert list(evaluators.sections(config, ["v2", "val"])) == ["v2", "val"]
    # Training's label feature goes with its data set alone.
    features = {
        k: v["dataset"]["label"] for k, v in everything.items() if k != "fewshot"
    }
    assert features == {
        "minival": "labels",
        "val": "labels",
        "real": "real_label",
        "v2": "label",
    }
    shots = everything["fewshot"]
    assert (shots["train"]["name"], shots["test"]["name"]) == ("imagenet2012",) * 2
    assert shots["train"]["split"] == "train[:65000]"
    assert shots["train"]["num_classes"] is None
    assert (shots["seeds"], shots["l2_exponents"], shots["shots"]) == (3, (10,), (5,))
    with pytest.raises(ValueError, match="no evaluator 'reel'; try real"):
        evaluators.sections(config, ["reel"])


def test_few_shot_defaults_are_section_7():
    section = recipe.fewshot("train[:1000]", "train[1000:]", "uc_merced")
    assert section.shots == (1, 5, 10, 25)
    assert section.preprocess == "paper-resize-crop"
    assert (recipe.L2_SWEEP[0], recipe.L2_SWEEP[-1], len(recipe.L2_SWEEP)) == (
        -10,
        19,
        30,
    )


def test_a_recipe_takes_from_the_data_only_what_it_does_not_state():
    config = recipe.base()
    config.dataset.num_classes = 10
    full = recipe.completed(config, num_examples=7, num_classes=11)
    assert (full.dataset.num_examples, full.dataset.num_classes) == (7, 10)
    assert config.dataset.num_examples is None


def test_a_complete_recipe_has_all_fields_of_its_model():
    config = recipe.load("configs/digits.py")
    config.model.name = "mixer_l16"
    model = recipe.completed(config).model
    assert model.hidden_dim == 64  # the recipe's own
    assert model.to_dict() == {
        "name": "mixer_l16",
        "image_size": (8, 8),
        **models.fields("mixer_l16", **DIGITS),
    }
    config.model = {"name": "mixer_l16", "image_size": (224, 224), "num_blocks": None}
    assert recipe.completed(config).model.num_blocks == 24


def test_total_steps_wins_over_epochs_and_needs_a_count():
    config = recipe.base()
    config.dataset.num_examples = 1000
    config.batch_size = 300
    config.epochs = 2.0
    assert recipe.total_steps(config) == 7
    config.epochs = 0.01
    assert recipe.total_steps(config) == 1
    config.total_steps = 5
    assert recipe.total_steps(config) == 5
    config.total_steps = None
    config.dataset.num_examples = None
    with pytest.raises(ValueError, match=r"config.dataset.num_examples is needed"):
        recipe.total_steps(config)


def test_shipped_recipes_are_found_from_any_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = f"{root}/configs/mixer_b16.py"
    assert shipped.find("configs/mixer_b16.py:imagenet21k") == (path, "imagenet21k")
    assert shipped.find("configs/mixer_b16.py") == (path, None)
    assert recipe.load("configs/digits.py").dataset.name == "digits"
    # One's own recipe comes first.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mixer_b16.py").touch()
    assert shipped.find("configs/mixer_b16.py:a") == ("configs/mixer_b16.py", "a")


def test_an_unknown_recipe_lists_the_shipped():
    with pytest.raises(
        FileNotFoundError,
        match=r"no recipe 'configs/mixr_b16.py'; .* configs/mixer_b16.py",
    ):
        recipe.load("configs/mixr_b16.py:short")


@pytest.mark.parametrize("words", ["a", "folder:/b:c", ""])
@pytest.mark.parametrize("name", ["mine.py", "a:b.py", "[x] y.py", "~.py"])
def test_the_path_of_a_recipe_may_have_any_letters(name, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "c:d"
    folder.mkdir()
    path = folder / name
    path.write_text(
        "from mlp_mixer import recipe\n"
        "def get_config(argument):\n"
        "    config = recipe.base()\n"
        "    config.loss = argument\n"
        "    return config\n"
    )
    assert shipped.find(f"{path}:{words}") == (str(path), words)
    assert recipe.load(f"~/c:d/{name}:{words}").loss == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.total_steps = 1.5", "line 4: Could not override field 'total_steps'"),
        ("config.optim.foo.bar = 1", "line 4: .*foo"),
        ("config.model.update(image_size='3')", "line 4: Could not override"),
        ("return None", "get_config returns NoneType, not a ConfigDict"),
        ("config.seed = = 1", "line 4: invalid syntax"),
        ("raise ValueError('no such word')", "^no such word$"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_with_its_line(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mlp_mixer import recipe\n"
        "def get_config(argument=''):\n"
        "    config = recipe.base()\n"
        f"    {text}\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match=message) as caught:
        recipe.load(str(path))
    assert errors.message(caught.value) == str(caught.value)


# What recipe.py had before paper.py and shipped.py were there, and where it is now.
MOVED = {
    **{name: f"paper.{name}" for name in ("pretraining", "finetuning", "evaluate_on")},
    **{name: f"paper.{name}" for name in ("PRETRAINING", "FINETUNING", "RATES")},
    **{name: f"paper.{name}" for name in ("PUBLISHED", "PRETRAINED")},
    **{name: f"shipped.{name}" for name in ("find", "split", "run_name", "PACKAGE")},
    **{name: f"shipped.{name}" for name in ("default_workdir", "LONGEST_NAME")},
    "table_4": "paper.TABLE_4",
    "TOKENS_MLP_DIM": "models.mixer.SIZES",
    "evaluations": "evaluators.sections",
    "check": "recipe.check_fields",
    "read": "workdir.load",
}
STAYED = [
    *("base", "completed", "evaluation", "fewshot", "load", "run_file"),
    *("total_steps", "words", "MOST_NAMED"),
]


@pytest.mark.parametrize("imported", [False, True], ids=["attribute", "imported"])
@pytest.mark.parametrize("name", MOVED)
def test_a_recipe_that_asks_for_a_name_that_has_moved_is_told_where(
    name, imported, tmp_path
):
    path, place = tmp_path / "mine.py", MOVED[name]
    start = f"mlp_mixer.recipe import {name}" if imported else "mlp_mixer import recipe"
    body = f"def get_config():\n  return recipe.{name}\n"
    path.write_text(f"from {start}\n{body}")
    told = rf"^recipe\.{name} is now {place}; `from mlp_mixer import (\w+)`"
    with pytest.raises(ImportError, match=told) as caught:
        recipe.load(str(path))
    assert errors.message(caught.value) == str(caught.value)
    module, *names = place.split(".")
    found = importlib.import_module(f"mlp_mixer.{module}")
    for each in names:
        found = getattr(found, each)
    assert f"import {module}`" in str(caught.value)


def test_every_other_name_of_old_recipes_is_still_there():
    assert all(hasattr(recipe, name) for name in STAYED)
    assert not hasattr(recipe, "pretraning")


@pytest.mark.parametrize("end", ["config", "config.lock()"])
def test_a_recipe_with_old_names_of_fields_is_read_and_told(end, tmp_path, caplog):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mlp_mixer import recipe\n"
        "def get_config():\n"
        "  config = recipe.base()\n"
        "  config.model.update(scan=False, dtype='bfloat16', num_blocks=3)\n"
        f"  return {end}\n"
    )
    config = recipe.load(str(path))
    assert config.run.to_dict() == {
        "dtype": "bfloat16",
        "scan": False,
        "remat": None,
        "images_at_once": None,
    }
    assert set(config.model) == {"name", "image_size", "num_blocks"}
    recipe.check_fields(config)
    assert caplog.messages == [
        f"{path}: config.model.{field} is now config.run.{field}."
        for field in ("dtype", "scan")
    ]


@pytest.mark.parametrize("model", [None, "mixer_b16", {"image_size": (8, 8)}])
def test_a_recipe_whose_model_has_no_name_is_left_for_check_to_refuse(model):
    config = ConfigDict(recipe.base().to_dict() | {"model": model})
    with pytest.raises(ValueError, match=r"^config\.model"):
        recipe.check_fields(program.override(config, ["--config.seed=1"]))
    with pytest.raises((SystemExit, ValueError), match="model"):
        program.override(config, ["--config.model.hidden_dim=3"])


# --- What a run writes ----------------------------------------------------------------

# What configs/digits.py says of its model's own fields.
DIGITS = {
    "patch_size": (2, 2),
    "num_blocks": 4,
    "hidden_dim": 64,
    "tokens_mlp_dim": 32,
    "channels_mlp_dim": 256,
}


def written(config):
    return json.loads(json.dumps(recipe.to_json(config)))


def test_what_is_written_is_read_again():
    for name in ("configs/digits.py", "configs/finetune/vtab.py:dtd,l16,448"):
        config = recipe.completed(recipe.load(name))
        tree = written(config)
        assert tree["format"] == recipe.FORMAT
        assert recipe.from_json(tree, "x").to_dict() == config.to_dict()


def test_what_an_older_version_wrote_is_the_same_recipe(caplog):
    config = recipe.completed(recipe.load("configs/digits.py"), 1500, 10)
    tree = written(config)
    # As format 1 had it: no number, `run` in `model`, and None for Table 1's sizes.
    del tree["format"], tree["run"]["images_at_once"]
    tree["model"] |= tree.pop("run")
    assert recipe.to_json(recipe.from_json(tree, "x")) == recipe.to_json(config)
    for size in DIGITS:
        tree["model"][size] = None
    sizes = models.mixer.SIZES["mixer_s16"]
    assert recipe.from_json(tree, "x").model.to_dict().items() >= sizes.items()
    assert {m.split(", ")[0] for m in caplog.messages} == {
        "x does not say run.images_at_once"  # which is younger
    }


def test_a_model_field_that_is_not_written_has_its_default_but_gelu_has_none(caplog):
    tree = written(recipe.completed(recipe.load("configs/digits.py")))
    del tree["model"]["stochastic_depth"]
    assert recipe.from_json(tree, "x").model.stochastic_depth == 0.0
    assert "x does not say model.stochastic_depth, " in caplog.text
    del tree["model"]["gelu"]
    with pytest.raises(
        ValueError, match=r"x is no recipe .*: it does not say model\.gel"
    ):
        recipe.from_json(tree, "x")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (3, "x has the format 3, and this version reads the formats 1 to 2; open it"),
        (0, "x has the format 0"),
        ("2", "x has the format 2"),
        (None, "x has the format None"),
    ],
)
def test_a_later_format_is_refused_with_its_number(number, message):
    tree = written(recipe.completed(recipe.load("configs/digits.py")))
    with pytest.raises(ValueError, match=message):
        recipe.from_json(tree | {"format": number}, "x")


def test_a_model_field_of_a_later_version_is_not_passed_over():
    tree = written(recipe.completed(recipe.load("configs/digits.py")))
    tree["model"]["depthwise"] = True
    with pytest.raises(ValueError, match="mixer_s16 has no field 'depthwise'"):
        recipe.from_json(tree, "x")


def test_a_file_without_get_config_is_no_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_confg(): ...\n")
    with pytest.raises(ValueError, match=r"mine.py is no recipe: it defines no get_co"):
        recipe.load(str(path))


@pytest.mark.parametrize(
    "words",
    ["folder:/my/images", "../../elsewhere", "a\nb", "/", "é" * 300, "x" * 300],
)
def test_a_runs_name_is_one_folder_whatever_the_words(words, tmp_path):
    name = shipped.run_name(f"mine.py:{words}")
    (tmp_path / name).mkdir()
    (folder,) = tmp_path.iterdir()
    assert folder.name == name
    assert name.isprintable()
    assert name.startswith("mine-")
    # Another end is another name.
    assert shipped.run_name(f"mine.py:{words}z") != name


def test_a_run_that_lies_further_below_is_found_again(tmp_path, monkeypatch):
    """Before, a word's slash was one in the run's path too."""
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--config=mine.py:folder:/my/images"]
    assert shipped.default_workdir(argv) == "runs/mine-folder:_my_images"
    old = tmp_path / "runs/mine-folder:/my/images"
    old.mkdir(parents=True)
    (old / "config.json").touch()
    assert shipped.default_workdir(argv) == "runs/mine-folder:/my/images"


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/mixer_b16.py", "runs/mixer_b16"),
        ("configs/mixer_b16.py:imagenet21k", "runs/mixer_b16-imagenet21k"),
        ("/a/b/mixer_b16.py:imagenet21k, gpu8", "runs/mixer_b16-imagenet21k-gpu8"),
        ("configs/finetune/cifar10.py:l16,448", "runs/finetune-cifar10-l16-448"),
        ("/a/configs/configs/finetune/vtab.py:dtd", "runs/finetune-vtab-dtd"),
        ("/a/b/finetune/cifar10.py", "runs/cifar10"),
        ("mine.py", "runs/mine"),
    ],
)
def test_the_workdir_is_named_after_the_recipe(config, workdir):
    assert shipped.default_workdir(["train", f"--config={config}"]) == workdir
    assert shipped.default_workdir(["train", "--config", config]) == workdir
