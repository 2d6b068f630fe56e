"""Recipes: every field of a run, with its unit and meaning.

`base` has every field but the model's own, with its default. A recipe is a file with
`get_config(argument)` that starts from `base`, or from the recipes in `mlp_mixer.paper`
and `mlp_mixer.deit`, and states the differences. It imports nothing but these modules,
so it works wherever it lies. Each section holds the arguments of exactly one function.
"""

import json
import logging
import os
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import ConfigDict, FieldReference, config_dict

from mlp_mixer import fields, models, shipped
from mlp_mixer.fields import MOVED
from mlp_mixer.known import nearest
from mlp_mixer.text import brief

logger = logging.getLogger(__name__)


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
    # ε: a label is (1 − ε) of its class and ε of all classes alike.
    config.label_smoothing = 0.0
    # p of mixup's Beta(p, p); 0 does not mix.
    config.mixup = 0.0
    # p of CutMix's Beta(p, p); 0 does not cut. Each step draws one of the two if both
    # are on.
    config.cutmix = 0.0
    # Probability with which random erasing fills a box of an image with noise.
    config.erasing = 0.0
    # Weights to start from: a run's folder, a file or a published name such as
    # "imagenet21k/Mixer-B_16"; None, or nothing on the command line: random ones.
    config.init_from = config_dict.placeholder(str)
    # "match" keeps the weights' head if it has as many classes, else starts from zeros;
    # "zero" always starts from zeros.
    config.init_head = "match"
    # If they are for another grid of patches: "grow" (the paper's) or "interpolate".
    config.init_resize = "grow"
    # Micro-batches per update: 1/accumulate of the activations, the same update, but
    # dropout and stochastic depth draw anew in each, and BatchNorm normalises each by
    # itself.
    config.accumulate = 1
    # Where parameters and moments live: "replicated" or "fsdp".
    config.sharding = "replicated"
    # Updates between two records of training metrics.
    config.log_every_steps = 50

    # sharding.make_mesh
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that cut the batch; -1: as many as there are
    config.mesh.fsdp = 1  # times so many, which with sharding="fsdp" cut parameters
    config.mesh.model = 1  # devices that share rows, and cut hidden units and classes

    # data.sources.open_source, for training; evaluators have their own
    config.dataset = ConfigDict()
    # "digits", "synthetic", "folder:/path/to/images" or any TFDS name.
    config.dataset.name = "imagenet2012"
    config.dataset.split = "train"
    # The feature of TFDS data that holds an image's class, or its classes.
    config.dataset.label = "label"
    # What the recipe was computed for, so that its steps are known without the data;
    # compared with the data at the start. None: what the data has.
    config.dataset.num_examples = config_dict.placeholder(int)
    config.dataset.num_classes = config_dict.placeholder(int)

    # data.pipeline.train_batches
    config.input = ConfigDict()
    config.input.crop = "inception"  # or "timm", "resize_crop", "resize"
    config.input.min_area = 0.08  # least share of an image's that timm's crop takes
    # Of timm's crop and RandAugment, or "random": bilinear or bicubic, drawn each time.
    config.input.interpolation = "bicubic"
    config.input.flip = True  # horizontally, with probability 1/2
    config.input.shift = 0  # pad by so many pixels and crop at random
    # Whose: "big_vision", magnitudes to 20, or "timm", to 10 (rand-m9-mstd0.5-inc1).
    config.input.randaugment = "big_vision"
    config.input.randaugment_layers = 0
    config.input.randaugment_magnitude = 0
    config.input.randaugment_std = 0.0  # of timm's magnitudes
    # Times that an image is shown in a row, each augmented anew; epochs keep their
    # length, so each shows so many times fewer images.
    config.input.repeats = 1
    config.input.workers = 0  # processes that decode, also in evaluations; 0: threads
    config.input.max_broken_images = 10  # distinct; one more ends the run

    # models.create, with dataset.num_classes. A recipe may add any field of the model's
    # class, e.g. `config.model.num_blocks = 4`; without it, or if it is None, the value
    # is that of the paper's table or of the class.
    config.model = ConfigDict()
    config.model.name = "mixer_b16"
    config.model.image_size = (224, 224)  # height, width in pixels

    # models.Run.choose: how the model is computed; None: as is fastest on the devices
    config.run = ConfigDict()
    config.run.dtype = "float32"  # of activations and products, or "bfloat16"
    config.run.scan = config_dict.placeholder(bool)  # compile one block, not all
    # Computed again for the backward pass: "none", "pre_gelu" (what is cheap), "full".
    config.run.remat = config_dict.placeholder(str)
    # Images that each device computes at a time. It changes no draws: where training
    # draws noise or normalises over the batch, it concerns evaluation alone.
    config.run.images_at_once = config_dict.placeholder(int)

    # optim.create
    config.optim = ConfigDict()
    config.optim.name = "adam"  # or "momentum", "lamb"
    config.optim.learning_rate = 0.001  # the peak
    config.optim.warmup_steps = 10_000
    config.optim.warmup_learning_rate = 0.0  # where the warm-up begins
    config.optim.cooldown_steps = 0  # the last ones, at the last learning rate
    config.optim.decay = "linear"  # or "cosine", "staircase"
    # The last learning rate: either absolute, or a fraction of the peak.
    config.optim.end_learning_rate = FieldReference(1e-5)
    config.optim.end_factor = config_dict.placeholder(float)
    config.optim.weight_decay = 0.0  # decoupled; times the learning rate
    # "kernels" of products and of the stem; "matrices", arrays of two or more axes; or
    # "all".
    config.optim.decayed = "kernels"
    # Times the learning rate, once for each layer between a parameter and the head.
    config.optim.layer_decay = 1.0
    # Factors of the learning rate by parameter, e.g. ("head/*=10", "stem/*=0").
    config.optim.rates = ()
    config.optim.clip_norm = FieldReference(1.0)  # global norm; None: no clipping
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9
    config.optim.momentum_dtype = "float32"
    # Decay of the moving average of the parameters, e.g. 0.9999; 0 keeps none.
    config.optim.ema = 0.0

    # evaluators.sections: {name: evaluation(...) or fewshot(...)}
    config.evals = ConfigDict()

    # checkpoint.Checkpointer; the last step is kept in any case
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    # Also once so many minutes have passed since a save, after a step that is logged.
    config.checkpoint.every_minutes = config_dict.placeholder(float)
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
    # Of the averaged parameters, where optim.ema keeps them; else of the last ones.
    section.ema = True
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
    section.ema = True
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


def completed(
    config: ConfigDict, num_examples: int | None = None, num_classes: int | None = None
) -> ConfigDict:
    """Returns the recipe with every field of its model, and what its data set has.

    What the recipe says itself stays.
    """
    config = config.copy_and_resolve_references()
    found = {"num_examples": num_examples, "num_classes": num_classes}
    for field, value in found.items():
        if config.dataset[field] is None:
            config.dataset[field] = value
    own = config.model.to_dict()
    plain = {field: own.pop(field) for field in ("name", "image_size")}
    config.model = ConfigDict(plain | models.fields(plain["name"], **own))
    return config


def words(argument: str, known: Sequence[str]) -> list[str]:
    """The words of a recipe's argument ("imagenet21k,short").

    Raises:
      ValueError: a word that the recipe does not know.
    """
    given = shipped.split(argument or "")
    for word in given:
        if word not in known:
            tries = nearest(word, known) or "none"
            raise ValueError(
                f"The recipe does not know the word {word!r}; it knows: {tries}."
            )
    return given


def option_of(table: Iterable[str], given: Sequence[str], standard: str) -> str:
    """Returns the word that is in `table`, `standard` if none is.

    Raises:
      ValueError: several are.
    """
    found = [word for word in given if word in table] or [standard]
    if len(found) > 1:
        raise ValueError(
            f"The options {','.join(found)} exclude each other: name at most one of "
            f"{', '.join(table)} (default: {standard})."
        )
    return found[0]


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


def check_fields(config: ConfigDict) -> None:
    """Passes if every field is there, alone, and has a value that it may have.

    Raises:
      ValueError: names each field, what it is and what it may be.
    """
    wrong = fields.problems(config.to_dict()) or _contradictions(config)
    if more := len(wrong[MOST_NAMED:]):
        wrong = [*wrong[:MOST_NAMED], f"... and {more} more."]
    if wrong:
        raise ValueError("\n".join(wrong))


def _contradictions(config: ConfigDict) -> list[str]:
    """Lines for people: the fields that fit each by itself, and not together."""
    found = []
    try:
        completed(config)
    except ValueError as error:  # a size that neither a table nor the recipe says
        found.append(f"config.model.name: {error}")
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
    found += _contradictions_of_randaugment(augment)
    if augment.shift >= min(config.model.image_size):
        found.append(
            f"config.input.shift is {augment.shift}; expected less than the sides of "
            f"config.model.image_size, {config.model.image_size}."
        )
    alpha = config.model.get("alpha")
    is_imlp = models.family(config.model.name) is models.imlp
    if is_imlp and alpha and not config.init_from:
        found.append(
            f"config.model.alpha is {alpha:g}, but config.init_from names no prior to "
            "interpolate with; set it to the run of a Mixer of the same sizes, or "
            "alpha to 0, which is the MLP alone."
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
        elif optim.cooldown_steps >= steps - optim.warmup_steps:
            found.append(
                f"config.optim.cooldown_steps is {optim.cooldown_steps}, but the run "
                f"has {steps - optim.warmup_steps} steps after its warm-up; expected "
                "fewer, or 0."
            )
    return found


def _contradictions_of_randaugment(section: ConfigDict) -> list[str]:
    whose, layers = section.randaugment, section.randaugment_layers
    magnitude, std = section.randaugment_magnitude, section.randaugment_std
    largest = 10 if whose == "timm" else 20
    found = []
    if layers and not 0 < magnitude <= largest:
        found.append(
            f"config.input.randaugment_layers is {layers}, but "
            f"config.input.randaugment_magnitude is {magnitude}; set it to 1 ... "
            f"{largest} for {whose}, or the layers to 0."
        )
    if std and (whose != "timm" or not layers):
        found.append(
            f"config.input.randaugment_std is {std}, which only timm's RandAugment "
            f"reads, but config.input.randaugment is {whose!r} with {layers} layers; "
            "set randaugment='timm' and its layers, or the std to 0."
        )
    if section.min_area != 0.08 and section.crop != "timm":
        found.append(
            f"config.input.min_area is {section.min_area}, which only timm's crop "
            f"reads, but config.input.crop is {section.crop!r}; set it to 'timm', or "
            "the area to 0.08."
        )
    if section.interpolation != "bicubic" and "timm" not in (section.crop, whose):
        found.append(
            f"config.input.interpolation is {section.interpolation!r}, which only "
            "timm's crop and RandAugment read; set config.input.crop or "
            "config.input.randaugment to 'timm', or the interpolation to 'bicubic'."
        )
    return found


# --- The recipe of a run --------------------------------------------------------------

# The format of config.json. 1, which it did not say: the fields of `config.run` were in
# `config.model`, where None stood for a value of Table 1.
FORMAT = 2
# What every version has written; any other field has its default where it is missing.
_NEEDED = {
    *("seed", "batch_size", "loss", "model", "optim", "input", "evals", "checkpoint"),
    *("dataset", "dataset.name", "dataset.split", "dataset.num_classes"),
    *("model.name", "model.image_size", "model.gelu"),
}


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the recipe in what JSON has, with every field of its model."""
    return {"format": FORMAT} | json.loads(completed(config).to_json_best_effort())


def from_json(tree: dict[str, Any], origin: str) -> ConfigDict:
    """Returns the recipe that `to_json` of this or of an older version gave.

    Every field of the model is in it. A field that an older version has not written has
    its default, which the log says.

    Args:
      tree: what JSON has.
      origin: where it comes from, for messages.

    Raises:
      ValueError: it is no recipe, or has a later format.
    """
    tree = _with_tuples(tree)
    number = tree.pop("format", 1)
    if number not in range(1, FORMAT + 1):
        raise ValueError(
            f"{origin} has the format {brief(number, 60)}, and this version reads the "
            f"formats 1 to {FORMAT}; open it with the version that wrote it."
        )
    try:
        rename(tree)
        tree, missing = _with_defaults(tree, base().to_dict())
        _check_needed(missing)
        if wrong := fields.problems(tree, others=True):
            raise ValueError(" ".join(wrong))
        unsaid = models.declared(tree["model"]["name"]).keys() - tree["model"].keys()
        missing += [f"model.{field}" for field in unsaid]
        _check_needed(missing)
        config = completed(ConfigDict(tree))
    except (TypeError, ValueError) as error:
        what = brief(error)
        raise ValueError(f"{origin} is no recipe of a run: {what}") from error
    if missing:
        logger.warning(
            "%s does not say %s, as if an older version had written it; each has its "
            "default.",
            origin,
            brief(", ".join(sorted(missing))),
        )
    return config


def rename(tree: Any) -> list[str]:
    """Gives fields with an old name their new one, and returns the old ones.

    Args:
      tree: a recipe or, of the same structure, dicts.
    """
    found = []
    for old, new in MOVED.items():
        section, field = old.split(".")
        to, name = new.split(".")
        if hasattr(tree.get(section), "keys") and field in tree[section]:
            if to not in tree:
                tree[to] = {}
            tree[to][name] = tree[section][field]
            del tree[section][field]
            found.append(old)
    return found


def _check_needed(missing: Iterable[str]) -> None:
    if lost := sorted(_NEEDED.intersection(missing)):
        raise ValueError(f"it does not say {', '.join(lost)}.")


def _with_defaults(
    tree: Mapping[str, Any], defaults: Mapping[str, Any], where: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Returns the tree with what only the defaults have, and the names of that."""
    if where == "evals.":
        defaults = {name: _evaluator_defaults(name, tree[name]) for name in tree}
    found = {**defaults, **tree}
    missing = [f"{where}{key}" for key in defaults if key not in tree]
    for key, default in defaults.items():
        if isinstance(default, dict) and key in tree:
            if not isinstance(tree[key], dict):
                value = brief(tree[key])
                raise ValueError(f"{where}{key} is {value}; expected a section.")
            found[key], more = _with_defaults(tree[key], default, f"{where}{key}.")
            missing += more
    return found, missing


def _evaluator_defaults(name: str, section: Any) -> dict[str, Any]:
    known = {"accuracy": evaluation(""), "fewshot": fewshot("", "")}
    kind = section.get("type") if isinstance(section, dict) else None
    if kind not in known:
        raise ValueError(f"evals.{name} is no evaluator of type {' or '.join(known)}.")
    return known[kind].to_dict()


def _with_tuples(tree: Any) -> Any:
    """JSON's lists back to tuples."""
    if isinstance(tree, dict):
        return {key: _with_tuples(value) for key, value in tree.items()}
    return tuple(map(_with_tuples, tree)) if isinstance(tree, list) else tree


# --- The file of a recipe -------------------------------------------------------------


def load(value: str) -> ConfigDict:
    """Returns the recipe `configs/x.py:words`.

    Raises:
      FileNotFoundError: there is no such recipe.
      ValueError: the file is no recipe, or what it says is no value of a field.
    """
    path, argument = shipped.find(value)
    make = run_file(path).get("get_config")
    if make is None:
        raise ValueError(f"{path} is no recipe: it defines no get_config(argument).")
    try:
        config = make() if argument is None else make(argument)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        # ml_collections knows the field, and not where it was set.
        if not lines or not frames[-1].filename.startswith(_ML_COLLECTIONS):
            raise
        message = str(error).strip("'\"")
        raise ValueError(f"{path}, line {lines[-1]}: {message}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path} is no recipe: its get_config returns {type(config).__name__}, not "
            "a ConfigDict of recipe.base()."
        )
    with config.unlocked(), config.ignore_type():  # for `check_fields` to tell
        for old in rename(config):
            logger.warning("%s: config.%s is now config.%s.", path, old, MOVED[old])
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


# --- Names that this module had -------------------------------------------------------

_MOVED_TO = {
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

if not TYPE_CHECKING:  # which would take any name to be here

    def __getattr__(name: str) -> Any:
        if name not in _MOVED_TO:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Of an AttributeError `from mlp_mixer.recipe import …` hides the message.
        place = _MOVED_TO[name]
        raise ImportError(
            f"recipe.{name} is now {place}; "
            f"`from mlp_mixer import {place.partition('.')[0]}`, and see there for its "
            "arguments."
        )
