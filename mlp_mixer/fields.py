"""What each field of a recipe may be: a row for every field, in the recipe's order.

The names of closed sets stand here once more, since most of their tables are in modules
that know recipes; a test holds them equal to the tables that the names are keys of.
A model's own fields have the rows of `MODEL`, or those of their types.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlp_mixer import known, models

# Steps, positions and class numbers are int32 on the device.
INT32 = 2**31 - 1
# Beyond them a number is infinite, or nothing, in float32.
FLOAT32, TINY = 3.0e38, 1.2e-38


_SWITCH_WORDS = ("true", "false", "t", "f", "1", "0")


@dataclasses.dataclass(frozen=True)
class Row:
    """The values that a field may have.

    Attributes:
      values: the values in words.
      types: the types of one value; a bool is not an int here.
      low: the smallest number.
      high: the largest number.
      choices: the strings, where they are a closed set.
      form: a regular expression that strings match as a whole.
      length: how many values a tuple has; 0 for one or more; None for no tuple.
      none: whether the field may be None.
      also: a further value.
      optional: whether a recipe may be without the field.
    """

    values: str
    types: tuple[type, ...]
    low: int | float = -math.inf
    high: int | float = math.inf
    choices: tuple[str, ...] = ()
    form: str = r".*\S.*"
    length: int | None = None
    none: bool = False
    also: int | str | tuple[()] | None = None
    optional: bool = False

    def fits(self, value: Any) -> bool:
        """Whether the field may have this value."""
        if value is None:
            return self.none
        if value == self.also:
            return type(value) is type(self.also)
        if self.length is None:
            return self._fits_one(value)
        return (
            isinstance(value, tuple)
            and len(value) == (self.length or max(len(value), 1))
            and all(map(self._fits_one, value))
        )

    def _fits_one(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.types
        if not isinstance(value, self.types):
            return False
        if isinstance(value, str):
            fits = re.fullmatch(self.form, value, re.DOTALL)
            return value in self.choices if self.choices else bool(fits)
        number: Any = value
        return self.low <= number <= self.high  # nan is not

    def parse(self, words: Sequence[str]) -> Any:
        """Returns the value that words stand for, None for "None"; it may not fit.

        Args:
          words: what a command line gives the field, each time: of a tuple its parts
            or all of it, else the last one counts.

        Raises:
          ValueError: they stand for nothing of the field's type.
        """
        if words[-1] == "None":
            return None
        if self.length is None:
            return self._parse_one(words[-1])
        parts = [part for word in words for part in word.strip("()[] ").split(",")]
        return tuple(self._parse_one(part) for part in parts if part.strip())

    def _parse_one(self, word: str) -> Any:
        if str in self.types:
            return word
        if float in self.types:
            return float(word)
        if int in self.types:
            return int(word, 16 if word.startswith("0x") else 10)
        return _SWITCH_WORDS.index(word.lower()) % 2 == 0

    def expected(self, value: Any) -> str:
        """What the field may be, for people; of a closed set the nearest first."""
        words = self.values
        if self.choices:
            words = known.nearest(value, self.choices)
        return f"{words}; or None" if self.none else words


def _whole(low: int, high: int = INT32, **more: Any) -> Row:
    return Row(f"a whole number from {low:,} to {high:,}", (int,), low, high, **more)


def _real(low: int | float, high: int | float = FLOAT32, **more: Any) -> Row:
    words = f"a number from {low:g}" + (f" to {high:g}" if high < FLOAT32 else "")
    if low == -FLOAT32:
        words = "a number"
    return Row(words, (int, float), low, high, **more)


def _positive(**more: Any) -> Row:
    words = "a number above 0"
    return Row(words, (int, float), TINY, FLOAT32, **more)


def _rate() -> Row:
    """A probability that is not certainty, in which nothing would be left."""
    words = "a number from 0 to below 1"
    return Row(words, (int, float), 0.0, math.nextafter(1.0, 0.0))


def _choice(*choices: str, none: bool = False) -> Row:
    return Row("", (str,), choices=choices, none=none)


def _text(words: str, **more: Any) -> Row:
    return Row(words, (str,), **more)


_SWITCH = Row("true or false", (bool,))
_DTYPE = _choice("float32", "bfloat16")
_COUNT = _whole(1, none=True)
_SHARE = dataclasses.replace(_positive(), values="a number above 0 to 1", high=1.0)
_SIZE = 2**20  # of an axis of a parameter
_SIDES = Row("height and width in pixels, e.g. (16, 16)", (int,), 1, 2**15, length=2)

_DATASET = {
    "name": _text("the name of a data set, e.g. imagenet2012 or folder:/my/images"),
    "split": _text("a split, e.g. train or train[:99%]"),
    "label": _text("the name of a feature, e.g. label"),
    "num_examples": _COUNT,
    "num_classes": _COUNT,
}
# An evaluator's: None follows training's.
_OTHER_DATASET = _DATASET | {
    key: dataclasses.replace(_DATASET[key], none=True) for key in ("name", "label")
}


def _section(name: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    return {f"{name}.{field}": row for field, row in rows.items()}


RECIPE: dict[str, Row] = {
    "seed": _whole(0, 2**32 - 1),
    "batch_size": _whole(1),
    "epochs": _positive(),
    "total_steps": _COUNT,
    "loss": _choice("sigmoid_xent", "softmax_xent"),
    "label_smoothing": _rate(),
    "mixup": _real(0, 1000),
    "cutmix": _real(0, 1000),
    "erasing": _real(0, 1),
    "init_from": _text(
        "weights: a run's folder, a file or a published name", none=True, also=""
    ),
    "init_head": _choice("match", "zero"),
    "init_resize": _choice("grow", "interpolate"),
    "accumulate": _whole(1),
    "sharding": _choice("replicated", "fsdp"),
    "log_every_steps": _whole(1),
    "mesh.data": dataclasses.replace(
        _whole(1), values="a number of devices from 1, or -1 for all", also=-1
    ),
    "mesh.fsdp": _whole(1),
    "mesh.model": _whole(1),
    **_section("dataset", _DATASET),
    "input.crop": _choice("inception", "timm", "resize_crop", "resize"),
    "input.min_area": _SHARE,
    "input.interpolation": _choice("bicubic", "random"),
    "input.flip": _SWITCH,
    "input.shift": _whole(0, 2**15),
    "input.randaugment": _choice("big_vision", "timm"),
    "input.randaugment_layers": _whole(0, 16),  # there are 16 operations
    "input.randaugment_magnitude": _real(0, 20),
    "input.randaugment_std": _real(0, 10),
    "input.repeats": _whole(1, 1000),
    "input.workers": _whole(0, 1024),
    "input.max_broken_images": _whole(0),
    "model.name": _text("the name of a model"),  # `problems` is told which there are
    "model.image_size": _SIDES,
    "run.dtype": _DTYPE,
    "run.scan": dataclasses.replace(_SWITCH, none=True),
    "run.remat": _choice("none", "pre_gelu", "full", none=True),
    "run.images_at_once": _COUNT,
    "optim.name": _choice("adam", "momentum", "lamb"),
    "optim.learning_rate": _real(0),
    "optim.warmup_steps": _whole(0),
    "optim.warmup_learning_rate": _real(0),
    "optim.cooldown_steps": _whole(0),
    "optim.decay": _choice("linear", "cosine", "staircase"),
    "optim.end_learning_rate": _real(0, none=True),
    "optim.end_factor": _real(0, 1, none=True),
    "optim.weight_decay": _real(0),
    "optim.decayed": _choice("kernels", "matrices", "all"),
    "optim.layer_decay": _SHARE,
    "optim.rates": Row(
        "words PATTERN=FACTOR, e.g. (head/*=10, stem/*=0.1); or none",
        (str,),
        form=r"[\w*/]+=(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?",
        length=0,
        also=(),
    ),
    "optim.clip_norm": _positive(none=True),
    "optim.b1": _rate(),
    "optim.b2": _rate(),
    "optim.eps": _positive(),
    "optim.momentum": _rate(),
    "optim.momentum_dtype": _DTYPE,
    "optim.ema": _rate(),
    "checkpoint.every_steps": _whole(1),
    "checkpoint.every_minutes": _positive(none=True),
    "checkpoint.keep_latest": _whole(1),
    "checkpoint.keep_every_steps": _COUNT,
    "checkpoint.keep_best": _text("the name of a metric, e.g. val/top1", none=True),
}

_SHARED = {
    "every_steps": _whole(0),
    "ema": _SWITCH,
    "batch_size": _COUNT,
    "preprocess": _choice(
        *("big_vision", "vision_transformer", "paper-resize-crop"),
        *("paper-resmall-crop", "timm", "timm-0.9", "timm-1.0"),
    ),
}
# type of an evaluator → its fields.
EVALUATORS: dict[str, dict[str, Row]] = {
    "accuracy": {
        **_SHARED,
        "ece_bins": _whole(0, 2**20),
        **_section("dataset", _OTHER_DATASET),
    },
    "fewshot": {
        **_SHARED,
        "shots": Row("whole numbers from 1, e.g. (1, 5)", (int,), 1, INT32, length=0),
        "seeds": _whole(0, 10_000),
        "l2_exponents": Row(
            "whole numbers from -100 to 100, e.g. (10,)", (int,), -100, 100, length=0
        ),
        **_section("train", _OTHER_DATASET),
        **_section("test", _OTHER_DATASET),
    },
}


# Fields that many models have; of several values where a model has them by stage.
MODEL: dict[str, Row] = {
    "patch_size": _SIDES,
    "num_blocks": _whole(1, 10_000),
    "hidden_dim": _whole(1, _SIZE),
    "tokens_mlp_dim": _whole(1, _SIZE),
    "channels_mlp_dim": _whole(1, _SIZE),
    "num_heads": _whole(1, _SIZE),
    "alpha": _real(0, 1),
    "mixing": _choice("mlp", "conv", "attn", "hybrid", "hybrid_late"),
    "stem": _choice("conv1", "conv4"),
    "stem_dim": _whole(1, _SIZE),
    "gelu": _choice("tanh", "exact"),
    "dropout": _rate(),
    "stochastic_depth": _rate(),
}
_BY_TYPE = {
    bool: _SWITCH,
    int: _whole(0),
    float: _real(-FLOAT32),
    str: _text("text"),
}


def of_model(name: str) -> dict[str, Row]:
    """Returns the rows of a model's own fields, which a recipe may leave out.

    None stands for the value that the paper's table or the model's class has.

    Raises:
      TypeError: nothing says what a field of its type may be.
    """
    rows = {}
    for field, declared in models.declared(name).items():
        one, length = kind(declared.type)
        row = MODEL.get(field, _BY_TYPE.get(one))
        if row is None:
            raise TypeError(
                f"{name}'s field {field} is annotated with {declared.type}; expected "
                f"{', '.join(k.__name__ for k in _BY_TYPE)}, or a tuple of one of them."
            )
        if length is not None and row.length is None:
            words = f"values, each {row.values}"
            row = dataclasses.replace(row, values=words, length=length)
        rows[field] = dataclasses.replace(row, none=True, optional=True)
    return rows


def kind(annotation: Any) -> tuple[Any, int | None]:
    """Returns the type of one value and how many there are, None for no tuple.

    >>> kind(tuple[int, int]), kind(tuple[float, ...]), kind(str | None)
    ((<class 'int'>, 2), (<class 'float'>, 0), (<class 'str'>, None))
    """
    parts = [x for x in typing.get_args(annotation) if x is not type(None)]
    if typing.get_origin(annotation) is tuple:
        return parts[0], 0 if parts[1:] == [...] else len(parts)
    return (parts[0], None) if len(parts) == 1 else (annotation, None)


# Old name of a field → the new one.
MOVED = {f"model.{field}": f"run.{field}" for field in ("dtype", "scan", "remat")}


def rows(tree: Mapping[str, Any]) -> dict[str, Row]:
    """Returns the row of each field of a recipe, its model's and evaluators' included.

    Args:
      tree: the recipe as nested dicts. A model or evaluator of no known name has the
        row of that name alone.
    """
    found = RECIPE | {"model.name": _choice(*models.names(), *models.families())}
    name = _section_of(tree, "model").get("name")
    if found["model.name"].fits(name):
        found |= _section("model", of_model(str(name)))
    for evaluator, section in _section_of(tree, "evals").items():
        if isinstance(section, Mapping):
            kinds = {"type": _choice(*EVALUATORS)}
            of_kind = EVALUATORS.get(str(section.get("type")), {})
            found |= _section(f"evals.{evaluator}", kinds | of_kind)
    return found


def _section_of(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


def problems(tree: Mapping[str, Any], *, others: bool = False) -> list[str]:
    """Lines for people: the fields of a recipe that have a value they may not have.

    Args:
      tree: the recipe as nested dicts.
      others: whether there may be fields that are not known, of a later version.
    """
    sections = {"evals": "evaluators", "model": "a model's fields"}
    for name, words in sections.items():
        if not isinstance(tree.get(name), Mapping):
            return [_wrong_value(name, tree.get(name), f"a section of {words}")]
    values, known_rows = dict(flat(tree)), rows(tree)
    words = "a section of recipe.evaluation or recipe.fewshot"
    found = [
        _wrong_value(f"evals.{name}", section, words)
        for name, section in tree["evals"].items()
        if not isinstance(section, Mapping)
    ]
    # Sections of which nothing says what fields they have.
    unclear = ["evals."] if found else []
    for field, row in known_rows.items():
        if field in values and row.fits(values[field]):
            continue
        if field == "model.name" or field.endswith(".type"):
            unclear.append(f"{field.rpartition('.')[0]}.")
        if field in values:
            found.append(
                _wrong_value(field, values[field], row.expected(values[field]))
            )
        elif not row.optional:
            found.append(f"config.{field} is missing; start from recipe.base().")
    for field in () if others else [f for f in values if f not in known_rows]:
        near = known.nearest(field, known_rows, 3)
        if field in MOVED:
            found.append(f"config.{field} is now config.{MOVED[field]}.")
        elif field.startswith("model.") and "model." not in unclear:
            found.append(
                f"config.{field} is no field of {tree['model']['name']}; try {near}, "
                "or take it out (=None on the command line)."
            )
        elif not field.startswith(tuple(unclear)):
            found.append(f"config.{field} is no field of a recipe; try {near}.")
    return found


def _wrong_value(field: str, value: Any, expected: str) -> str:
    return f"config.{field} is {value!r}; expected {expected}."


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a.b", value) of each value in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
