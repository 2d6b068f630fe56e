"""Recipes: every field of a run, with its unit and meaning, and where runs live.

`base` is the dictionary of the project and the only place where defaults stand. A
recipe is a file with `get_config(argument)` that starts from `base`, `pretraining` or
`finetuning` and states the differences; it imports nothing but this module, so it
works wherever it lies. Each section holds the arguments of exactly one function.
"""

import difflib
import hashlib
import logging
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath
from ml_collections import ConfigDict, FieldReference, config_dict

from mlp_mixer import fields, files
from mlp_mixer.text import brief, printable

logger = logging.getLogger(__name__)

PACKAGE = pathlib.Path(__file__).parent


def base() -> ConfigDict:
    """Returns every field with its default."""
    config = ConfigDict()
    # Of parameters, data order, augmentation, mixup, dropout, stochastic depth.
    config.seed = 0
    # Images per update, over all devices and micro-batches.
    config.batch_size = 4096
    # Passes over dataset.num_examples; total_steps follows from it.
    config.epochs = 300.0
    # Updates; None: round(epochs · num_examples / batch_size), at least 1.
    config.total_steps = config_dict.placeholder(int)
    # A key of losses.LOSSES.
    config.loss = "sigmoid_xent"
    # p of mixup's Beta(p, p); 0 does not mix.
    config.mixup = 0.0
    # Weights to start from: a run's folder, a file or a published name such as
    # "imagenet21k/Mixer-B_16"; None, or nothing on the command line: random ones.
    config.init_from = config_dict.placeholder(str)
    # Their head: "match" keeps one of as many classes, else it is zero; or "zero".
    config.init_head = "match"
    # If they are for another grid of patches: "grow" (the paper's) or "interpolate".
    config.init_resize = "grow"
    # Micro-batches per update: 1/accumulate of the activations, the same update.
    config.accumulate = 1
    # Where parameters and moments live: "replicated" or "fsdp".
    config.sharding = "replicated"
    # Updates between two records of training metrics.
    config.log_every_steps = 50

    # sharding.make_mesh
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that cut the batch; -1: as many as there are
    config.mesh.fsdp = 1  # times so many, which with sharding="fsdp" cut parameters

    # data.sources.open_source, for training; evaluators have their own
    config.dataset = ConfigDict()
    # "digits", "synthetic", "folder:/path/to/images" or any TFDS name.
    config.dataset.name = "imagenet2012"
    config.dataset.split = "train"
    # The feature of TFDS data that holds an image's class, or its classes.
    config.dataset.label = "label"
    # What the recipe was computed for, so that a run can be planned without the data;
    # compared with the data at the start. None: what the data has.
    config.dataset.num_examples = config_dict.placeholder(int)
    config.dataset.num_classes = config_dict.placeholder(int)

    # data.pipeline.train_batches
    config.input = ConfigDict()
    config.input.crop = "inception"  # or "resize_crop", "resize"
    config.input.flip = True  # horizontally, with probability 1/2
    config.input.shift = 0  # pad by so many pixels and crop at random
    config.input.randaugment_layers = 0
    config.input.randaugment_magnitude = 0
    config.input.workers = 0  # processes that decode; 0: threads of this one
    config.input.max_broken_images = 10  # distinct; one more ends the run

    # models.create, with dataset.num_classes; None: what Table 1 says of the model
    config.model = ConfigDict()
    config.model.name = "mixer_b16"
    config.model.image_size = (224, 224)  # height, width in pixels
    config.model.patch_size = config_dict.placeholder(tuple)
    config.model.num_blocks = config_dict.placeholder(int)
    config.model.hidden_dim = config_dict.placeholder(int)
    config.model.tokens_mlp_dim = config_dict.placeholder(int)
    config.model.channels_mlp_dim = config_dict.placeholder(int)
    config.model.gelu = "tanh"  # or "exact"
    config.model.dropout = 0.0
    config.model.stochastic_depth = 0.0  # the last block's rate, linear from 0
    config.model.rescale_stochastic_depth = False
    config.model.head_bias = 0.0  # initial value
    config.model.dtype = "float32"  # of activations and products, or "bfloat16"
    # How training computes it, which moves no result; None: sharding.formulation.
    config.model.scan = config_dict.placeholder(bool)
    config.model.remat = config_dict.placeholder(str)  # "none", "pre_gelu", "full"

    # optim.create
    config.optim = ConfigDict()
    config.optim.name = "adam"  # or "momentum"
    config.optim.learning_rate = 0.001  # the peak
    config.optim.warmup_steps = 10_000
    config.optim.decay = "linear"  # or "cosine", "staircase"
    # The last learning rate: either absolute, or a fraction of the peak.
    config.optim.end_learning_rate = config_dict.placeholder(float)
    config.optim.end_learning_rate = 1e-5
    config.optim.end_factor = config_dict.placeholder(float)
    config.optim.weight_decay = 0.0  # decoupled; times the learning rate
    config.optim.decayed = "kernels"  # or "all"
    config.optim.clip_norm = config_dict.placeholder(float)
    config.optim.clip_norm = 1.0  # global norm; None: no clipping
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9
    config.optim.momentum_dtype = "float32"

    # evaluators.sections: {name: evaluation(...) or fewshot(...)}
    config.evals = ConfigDict()

    # checkpoint.Checkpointer; the last step is kept in any case
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_every_steps = config_dict.placeholder(int)
    config.checkpoint.keep_best = config_dict.placeholder(str)  # e.g. "val/top1"
    return config


def evaluation(split: str, **differences: Any) -> ConfigDict:
    """An evaluator's section: accuracy on a split. None: as in training."""
    section = ConfigDict()
    section.type = "accuracy"
    # Of training, its last step included; 0: only by `evaluate --only`.
    section.every_steps = 2500
    section.batch_size = config_dict.placeholder(int)
    section.preprocess = "big_vision"  # a key of data.image_ops.PROTOCOLS
    section.ece_bins = 0  # of the expected calibration error; 0: without it
    section.dataset = _dataset(split)
    section.update(differences)
    return section


# Exponents of two: the range of the 2021 protocol (section 7.2).
L2_SWEEP = tuple(range(-10, 20))


def fewshot(
    train: str, test: str, name: str | None = None, **differences: Any
) -> ConfigDict:
    """An evaluator's section: few-shot linear evaluation (section 7.2).

    big_vision's data sets: caltech101, cars196, cifar100, dtd and oxford_iiit_pet,
    train → test; uc_merced, train[:1000] → train[1000:].

    Args:
      train: the split in which shots are drawn.
      test: the split that is classified.
      name: the data set of both; None: training's.
      **differences: from the fields below. The 2021 sweep is `seeds=0,
        l2_exponents=recipe.L2_SWEEP`; `evaluate` then chooses one l2 for all data sets.
    """
    section = ConfigDict()
    section.type = "fewshot"
    section.every_steps = 25_000  # as above
    section.batch_size = config_dict.placeholder(int)
    section.preprocess = "paper-resize-crop"
    section.shots = (1, 5, 10, 25)  # per class
    section.seeds = 3  # draws of the shots; 0: the first ones as they stand
    section.l2_exponents = (10,)  # l2 = 2^exponent
    section.train = _dataset(train)
    section.test = _dataset(test)
    section.train.name = section.test.name = name
    section.update(differences)
    return section


def _dataset(split: str) -> ConfigDict:
    """Arguments of data.sources.open_source; name None: training's, and its label."""
    dataset = ConfigDict()
    dataset.name = config_dict.placeholder(str)
    dataset.split = split
    dataset.label = config_dict.placeholder(str)
    dataset.num_examples = config_dict.placeholder(int)
    dataset.num_classes = config_dict.placeholder(int)
    return dataset


def completed(config: ConfigDict, num_examples: int, num_classes: int) -> ConfigDict:
    """The recipe with what its data set has, where it did not say."""
    config = config.copy_and_resolve_references()
    found = {"num_examples": num_examples, "num_classes": num_classes}
    for field, value in found.items():
        if config.dataset[field] is None:
            config.dataset[field] = value
    return config


def table_4(
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    randaugment: int | None = None,
    mixup: float = 0.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
) -> dict[str, Any]:
    """A row of the paper's Table 4; without RandAugment, JFT's crop and flip only."""
    return {
        "epochs": float(epochs),
        "mixup": mixup,
        "input": {
            "randaugment_layers": 0 if randaugment is None else 2,
            "randaugment_magnitude": randaugment or 0,
        },
        "model": {"dropout": dropout, "stochastic_depth": stochastic_depth},
        "optim": {"learning_rate": learning_rate, "weight_decay": weight_decay},
    }


# Data set → training split and size (section 3.1 and big_vision's configs), classes,
# initial head bias (big_vision for ImageNet; its ViT configs' for the others), and
# arguments of `evaluation`. ImageNet-21k: 14,197,122 images without the two held-out
# parts. JFT-300M is Google's; a set of one's own takes --config.dataset.name.
PRETRAINING: dict[str, dict[str, Any]] = {
    "imagenet2012": {
        "split": "train[:99%]",
        "num_examples": 1_268_355,
        "num_classes": 1000,
        "head_bias": -6.9,
        "evals": {
            "minival": {"split": "train[99%:]"},
            "val": {"split": "validation"},
            # These need data sets of their own.
            "real": {
                "split": "validation",
                "every_steps": 0,
                "dataset": {"name": "imagenet2012_real", "label": "real_label"},
            },
            "v2": {
                "split": "test",
                "every_steps": 0,
                "dataset": {"name": "imagenet_v2"},
            },
        },
    },
    "imagenet21k": {
        "split": "full[51200:]",
        "num_examples": 14_145_922,
        "num_classes": 21_843,
        "head_bias": -10.0,
        "evals": {"val": {"split": "full[25600:51200]"}},
    },
    "jft300m": {
        "split": "train",
        "num_examples": 300_000_000,
        "num_classes": 18_291,
        "head_bias": -10.0,
        "evals": {"val": {"split": "test[:49511]"}},
    },
}


def pretraining(
    model: str, argument: str, rows: dict[str, dict[str, Any]], *, gpu8: int
) -> ConfigDict:
    """The paper's pretraining of `model` (section 3.1, Table 4) and its evaluators.

    What is watched during training is the training data set alone. ReaL, ImageNet-v2
    and 5-shot on ImageNet have every_steps = 0: `evaluate --only=all` runs them, and so
    does training with, say, --config.evals.real.every_steps=2500.

    Args:
      model: a key of `models.MODELS`.
      argument: what stands behind the colon of `--config`: a data set of `rows`
        (nothing for ImageNet-1k), "short" (60 epochs of ImageNet-1k, big_vision's
        regression test), "gpu8" (one host with 8 GPUs).
      rows: data set → `table_4` row.
      gpu8: micro-batches with which a batch of 4096 fits 8 GPUs of 24 GB: 4 to 20 GB
        each, by the compiler's account (on CPU).

    Raises:
      ValueError: an unknown word, or words that exclude each other.
    """
    standard = "imagenet2012"
    others = [key for key in rows if key != standard]
    given = words(argument, [*others, "short", "gpu8"])
    datasets = [word for word in given if word in others] or [standard]
    if len(datasets) > 1 or ("short" in given and datasets != [standard]):
        raise ValueError(
            f"The words {argument!r} exclude each other: name at most one of "
            f"{', '.join(others)}, and short only for ImageNet-1k, without them."
        )
    name = datasets[0]
    data, config = PRETRAINING[name], base()
    config.dataset.name = name
    for field in ("split", "num_examples", "num_classes"):
        config.dataset[field] = data[field]
    config.model.name = model
    config.model.head_bias = data["head_bias"]
    config.update(rows[name])
    evaluate_on(config, name)
    if "short" in given:
        config.epochs = 60.0
    if "gpu8" in given:
        config.accumulate = gpu8
        # Less memory than a GPU's fastest formulation.
        config.model.scan, config.model.remat = True, "pre_gelu"
        config.input.workers = 32  # half the cores of a usual host of 8 GPUs
    return config


def evaluate_on(config: ConfigDict, name: str) -> None:
    """Adds the evaluators of a data set of `PRETRAINING`, and 5-shot on ImageNet."""
    for key, differences in PRETRAINING[name]["evals"].items():
        config.evals[key] = evaluation(**differences)
    # The first 65,000 hold at least 30 images of each class.
    config.evals.fewshot = fewshot(
        "train[:65000]", "validation", "imagenet2012", shots=(5,), every_steps=0
    )


# The learning rates that the paper tried (Appendix C); which won, it does not say.
RATES = (0.003, 0.01, 0.03, 0.06)
# Data set → classes; training split, its size and the test split; the same with a part
# of training held out to choose the learning rate with; updates, of which warm-up.
# Steps and held-out parts: ViT's Table 4, which the paper follows. Warm-up:
# big_vision's transfer configs. Flowers' 2k images are train and validation.
FINETUNING: dict[str, dict[str, Any]] = {
    "imagenet2012": {
        "num_classes": 1000,
        "final": ("train", 1_281_167, "validation"),
        "select": ("train[:99%]", 1_268_355, "train[99%:]"),
        "steps": (20_000, 500),
        "learning_rates": RATES,
    },
    "cifar10": {
        "num_classes": 10,
        "final": ("train", 50_000, "test"),
        "select": ("train[:98%]", 49_000, "train[98%:]"),
        "steps": (10_000, 500),
        "learning_rates": RATES,
    },
    "cifar100": {
        "num_classes": 100,
        "final": ("train", 50_000, "test"),
        "select": ("train[:98%]", 49_000, "train[98%:]"),
        "steps": (10_000, 500),
        "learning_rates": RATES,
    },
    "oxford_iiit_pet": {
        "num_classes": 37,
        "final": ("train", 3680, "test"),
        "select": ("train[:90%]", 3312, "train[90%:]"),
        "steps": (500, 100),
        "learning_rates": RATES,
    },
    "oxford_flowers102": {
        "num_classes": 102,
        "final": ("train+validation", 2040, "test"),
        "select": (
            "train[:90%]+validation[:90%]",
            1836,
            "train[90%:]+validation[90%:]",
        ),
        "steps": (500, 100),
        "learning_rates": RATES,
    },
    # Ours: the embedded digits.
    "digits": {
        "num_classes": 10,
        "final": ("train", 1500, "test"),
        "select": ("train[:90%]", 1350, "train[90%:]"),
        "steps": (150, 25),
        "learning_rates": RATES,
    },
    # Each of 19 tasks; the recipe adds its name and classes.
    "vtab": {
        "num_classes": None,
        "final": ("train800val200", 1000, "test"),
        "select": ("train800", 800, "val200"),
        "steps": (2500, 500),
        "learning_rates": (0.003, 0.01, 0.03),
    },
}
# Table 1: model → D_S, of which there are four times as many at twice the resolution.
TOKENS_MLP_DIM = {
    "s32": 256,
    "s16": 256,
    "b32": 384,
    "b16": 384,
    "l32": 512,
    "l16": 512,
    "h14": 640,
}
# The weights that the authors have published: model → name below the data set's.
PUBLISHED = {"b16": "Mixer-B_16", "l16": "Mixer-L_16"}
# What was pretrained on → the words of the recipes that do so, by run folder.
PRETRAINED = {"imagenet21k": "-imagenet21k", "imagenet1k": "", "jft300m": "-jft300m"}


def finetuning(name: str, argument: str) -> ConfigDict:
    """The paper's fine-tuning on a data set (section 3 and Appendix C).

    SGD with momentum 0.9 (the accumulator in bfloat16, as the authors have it), batch
    512, clip 1, cosine to 0, no weight decay; a zero head, softmax cross-entropy; no
    mixup, no Inception crop, no stochastic depth.

    Args:
      name: a key of `FINETUNING`.
      argument: what stands behind the colon of `--config`: a model of Table 1 ("b16" if
        there is none); what it was pretrained on ("imagenet21k" if there is nothing);
        "448" for this resolution; "resize_crop" for the test images of Table 2 (to
        256x256, centre 224) instead of Table 3's (shorter side to 256); "select" to
        hold out the part of training with which the learning rate is chosen, and to
        evaluate on that.

    Returns:
      The recipe. It starts from the authors' weights where they are published, else
      from the run that the pretraining recipe leaves in runs/.

    Raises:
      ValueError: an unknown word, or words that exclude each other.
    """
    others = ["448", "resize_crop", "select"]
    given = words(argument, [*TOKENS_MLP_DIM, *PRETRAINED, *others])
    model = _one_of(TOKENS_MLP_DIM, given, "b16")
    upstream = _one_of(PRETRAINED, given, "imagenet21k")
    data, config = FINETUNING[name], base()
    select = "select" in given
    train, count, test = data["select" if select else "final"]
    config.dataset.name = name
    config.dataset.split = train
    config.dataset.num_examples = count
    config.dataset.num_classes = data["num_classes"]
    config.input.crop = "resize_crop"
    config.loss = "softmax_xent"

    config.model.name = f"mixer_{model}"
    if model in PUBLISHED and upstream != "jft300m":
        config.init_from = f"{upstream}/{PUBLISHED[model]}"
    else:
        config.init_from = f"runs/mixer_{model}{PRETRAINED[upstream]}"
    config.init_head = "zero"
    if "448" in given:
        config.model.image_size = (448, 448)
        config.model.tokens_mlp_dim = 4 * TOKENS_MLP_DIM[model]

    config.batch_size = 512
    config.total_steps, config.optim.warmup_steps = data["steps"]
    config.optim.name = "momentum"
    config.optim.momentum_dtype = "bfloat16"
    # The last but one of the grid; vision_transformer's own choice is 0.03.
    config.optim.learning_rate = data["learning_rates"][-2]
    config.optim.decay = "cosine"
    config.optim.end_learning_rate = 0.0

    watched = "minival" if select else "val" if test == "validation" else "test"
    config.evals[watched] = evaluation(
        test,
        every_steps=config.total_steps // 5,
        preprocess=(
            "paper-resize-crop" if "resize_crop" in given else "paper-resmall-crop"
        ),
    )
    return config


def _one_of(table: Mapping[str, Any], given: Sequence[str], standard: str) -> str:
    """The word that is a key of `table`."""
    found = [word for word in given if word in table] or [standard]
    if len(found) > 1:
        raise ValueError(
            f"The words {','.join(found)} exclude each other: name at most one of "
            f"{', '.join(table)} ({standard} if there is none)."
        )
    return found[0]


def words(argument: str, known: Sequence[str]) -> list[str]:
    """The words of a recipe's argument ("imagenet21k,short").

    Raises:
      ValueError: a word that the recipe does not know.
    """
    given = split(argument or "")
    for word in given:
        if word not in known:
            tries = ", ".join(_nearest(word, known)) or "none"
            raise ValueError(
                f"The recipe does not know the word {word!r}; it knows: {tries}."
            )
    return given


def split(argument: str) -> list[str]:
    """The words of "imagenet21k, short", each once."""
    return [*dict.fromkeys(w.strip() for w in argument.split(",") if w.strip())]


def total_steps(config: ConfigDict) -> int:
    """Updates of the whole run: round(epochs · N / batch_size), at least 1."""
    if config.total_steps is not None:
        return config.total_steps
    if config.dataset.num_examples is None:
        raise ValueError(
            "Without config.total_steps, config.dataset.num_examples is needed to "
            "turn epochs into steps."
        )
    examples = config.epochs * config.dataset.num_examples
    return max(round(examples / config.batch_size), 1)


MOST_NAMED = 15


def check(config: ConfigDict) -> None:
    """Passes if every field is there, alone, and has a value that it may have.

    Raises:
      ValueError: names each field, what it is and what it may be.
    """
    wrong = fields.problems(config.to_dict()) or _contradictions(config)
    if more := len(wrong) - MOST_NAMED:
        wrong[MOST_NAMED:] = [f"... and {more} more."] * (more > 0)
    if wrong:
        raise ValueError("\n".join(wrong))


def _contradictions(config: ConfigDict) -> list[str]:
    """Lines for people: the fields that fit each by itself, and not together."""
    found = []
    optim, augment = config.optim, config.input
    if (optim.end_learning_rate is None) == (optim.end_factor is None):
        found.append(
            f"config.optim.end_learning_rate is {optim.end_learning_rate} and "
            f"config.optim.end_factor is {optim.end_factor}; set exactly one of them "
            "and the other to None."
        )
    if config.batch_size % config.accumulate:
        found.append(
            f"config.batch_size is {config.batch_size}, and config.accumulate, "
            f"{config.accumulate} micro-batches, does not divide it; try a batch_size "
            f"of {config.accumulate * max(config.batch_size // config.accumulate, 1)}."
        )
    if augment.randaugment_layers and not augment.randaugment_magnitude:
        found.append(
            f"config.input.randaugment_layers is {augment.randaugment_layers}, but "
            "config.input.randaugment_magnitude is 0; set it to 1 ... 20, or the "
            "layers to 0."
        )
    if augment.shift >= min(config.model.image_size):
        found.append(
            f"config.input.shift is {augment.shift}; expected less than the sides of "
            f"config.model.image_size, {config.model.image_size}."
        )
    if config.total_steps or config.dataset.num_examples:
        steps = total_steps(config)
        if steps > fields.INT32:
            found.append(
                f"config.epochs is {config.epochs:g}, which makes {steps:,} steps; "
                f"expected at most {fields.INT32:,}."
            )
        if optim.warmup_steps >= steps:
            found.append(
                f"config.optim.warmup_steps is {optim.warmup_steps}, but the run has "
                f"{steps} steps; expected fewer, e.g. {steps // 10}."
            )
    return found


# --- The recipe of a run --------------------------------------------------------------

# What every version has written; any other field has its default where it is missing.
_NEEDED = {
    *("seed", "batch_size", "loss", "model", "optim", "input", "evals", "checkpoint"),
    *("dataset", "dataset.name", "dataset.split", "dataset.num_classes"),
    *("model.name", "model.image_size", "model.gelu"),
}


def read(path: epath.PathLike) -> ConfigDict:
    """Returns the recipe that a run has written, as JSON.

    A field that a version before has not written has its default, which the log says.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or holds no recipe.
    """
    said, tree = printable(os.fspath(path)), files.read_json(path)
    config = base()
    try:
        missing = _take(config, _tuples(tree))
        if wrong := fields.problems(config.to_dict(), others=True):
            raise ValueError(" ".join(wrong))
    except (TypeError, ValueError) as error:
        what = brief(error)
        raise ValueError(f"{said} is no recipe of a run: {what}") from error
    if missing:
        logger.warning(
            "%s does not say %s, as if an older version had written it; taken as in "
            "recipe.base().",
            *(said, brief(", ".join(sorted(missing)))),
        )
    return config


def _take(section: ConfigDict, tree: Mapping[str, Any], where: str = "") -> list[str]:
    """Copies values into the fields of their type; returns the fields without one."""
    known = dict(section.items(preserve_field_references=True))
    missing = [f"{where}{key}" for key in known if key not in tree]
    if lost := sorted(_NEEDED & {*missing}):
        raise ValueError(f"it does not say {', '.join(lost)}.")
    for key, value in tree.items():
        there, field = known.get(key), f"{where}{key}"
        if isinstance(there, ConfigDict):
            if not isinstance(value, dict):
                raise ValueError(f"{field} is {brief(value)}; expected a section.")
            take = _take_evaluators if field == "evals" else _take
            missing += take(there, value, f"{field}.")
            continue
        may_be_none = key not in known or isinstance(there, FieldReference)
        try:
            if value is None and not may_be_none:
                raise TypeError
            section[key] = value
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{field} is {brief(value, 60)}; expected as in recipe.base()."
            ) from error
    return missing


def _take_evaluators(
    section: ConfigDict, tree: Mapping[str, Any], where: str
) -> list[str]:
    known = {"accuracy": lambda: evaluation(""), "fewshot": lambda: fewshot("", "")}
    missing = []
    for name, given in tree.items():
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in known:
            raise ValueError(
                f"{where}{name} is no evaluator of type {' or '.join(known)}."
            )
        section[name] = known[kind]()
        missing += _take(section[name], given, f"{where}{name}.")
    return missing


def _tuples(tree: Any) -> Any:
    """JSON's lists back to tuples."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


# --- Where a recipe is, and where its run goes ----------------------------------------


def find(value: str) -> tuple[str, str | None]:
    """Returns the path of a recipe and its words, of what stands behind `--config=`.

    Shipped recipes are found from any folder, in a clone and in an installed wheel. The
    words follow a colon; None: there is no colon. A path may have colons too.

    Raises:
      FileNotFoundError: there is no such recipe; lists the shipped ones.
    """
    path, words = _split(value)
    if found := _there(path):
        return found, words
    shipped = {p.relative_to(r).as_posix() for r in _roots() for p in _recipes(r)}
    raise FileNotFoundError(
        f"There is no recipe {path!r}; shipped are: "
        f"{', '.join(_nearest(path, sorted(shipped)))}."
    )


def _split(value: str) -> tuple[str, str | None]:
    """The path of a recipe and its words; at the first colon if no such file exists."""
    for at in [i for i, letter in enumerate(value) if letter == ":"]:
        if _there(value[:at]):
            return value[:at], value[at + 1 :]
    path, colon, words = value.partition(":")
    return (value, None) if _there(value) or not colon else (path, words)


def _there(path: str) -> str | None:
    """Where the file of a recipe is, if it is anywhere."""
    path = os.path.expanduser(path)
    for root in (pathlib.Path(), PACKAGE.parent, PACKAGE):
        if path and os.path.isfile(root / path):
            return path if root == pathlib.Path() else str(root / path)
    return None


def load(value: str) -> ConfigDict:
    """Returns the recipe `configs/x.py:words`.

    Raises:
      FileNotFoundError: there is no such recipe.
      ValueError: the file is no recipe, or what it says is no value of a field.
    """
    path, argument = find(value)
    make = run_file(path).get("get_config")
    if make is None:
        raise ValueError(f"{path} is no recipe: it defines no get_config(argument).")
    try:
        config = make() if argument is None else make(argument)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # ml_collections knows the field, and not where it was set.
        if not frames[-1].filename.startswith(_ML_COLLECTIONS):
            raise
        lines = [frame.lineno for frame in frames if frame.filename == path]
        said = str(error).strip("'\"")
        raise ValueError(f"{path}, line {lines[-1]}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path} is no recipe: its get_config returns {type(config).__name__}, not "
            "a ConfigDict of recipe.base()."
        )
    return config


_ML_COLLECTIONS = os.path.dirname(ml_collections.__file__)


def run_file(path: str) -> dict[str, Any]:
    """Returns what the file of a recipe defines.

    Raises:
      ValueError: it is not Python.
    """
    try:
        return runpy.run_path(path)
    except SyntaxError as error:
        raise ValueError(
            f"{error.filename}, line {error.lineno}: {error.msg}."
        ) from error


def _roots() -> list[pathlib.Path]:
    return [r for r in (PACKAGE.parent, PACKAGE) if (r / "configs").is_dir()]


def _recipes(root: pathlib.Path) -> Iterable[pathlib.Path]:
    return (p for p in (root / "configs").rglob("*.py") if p.stem != "__init__")


# Bytes: a file system allows 255, and a sweep adds some.
LONGEST_NAME = 200


def default_workdir(argv: Sequence[str]) -> str:
    """Where a run lives if nothing else is said: `runs/<run_name>`."""
    value = ""
    for i, word in enumerate(argv):
        flag, equals, rest = word.partition("=")
        if flag in ("--config", "-config"):
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    # Runs from before a word's slash was replaced lie further below.
    nested = os.path.join("runs", _name(value))
    if os.path.isfile(os.path.join(nested, "config.json")):
        return nested
    return os.path.join("runs", run_name(value))


def run_name(value: str) -> str:
    """What a run of `--config=value` is called: `finetune-cifar10-l16`.

    From the recipe's place in its configs/ (a recipe elsewhere: its file's name) and
    the words of its argument. It is the name of one folder, whatever the words are.
    """
    name = re.sub(r"[/\x00-\x1f\x7f]", "_", _name(value))
    encoded = os.fsencode(name)
    if len(encoded) > LONGEST_NAME:
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        name = f"{encoded[:LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name


def _name(value: str) -> str:
    path, words = _split(value)
    *folders, name = pathlib.PurePath(os.path.splitext(path)[0]).parts or ("",)
    if "configs" in folders:
        last = len(folders) - folders[::-1].index("configs")
        name = "-".join([*folders[last:], name])
    return "-".join([name, *split(words or "")])


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, max(len(known), 1), 0)
