"""What a parameter tree says of its model: every letter of `AXES` stands for a size."""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mlp_mixer import models
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models.model import all_axes, axes_by_form, fields_of_form
from mlp_mixer.text import brief, listed

# The collection of running statistics, BatchNorm's `mean` and `var`.
STATISTICS = "batch_stats"
# The number of a block, in a name: whole, and without zeros before it.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# The field of a model that is a letter's size, the number of its blocks, or a ratio of
# two sizes. In a pyramid the number of a stage is behind each letter.
FIELDS = {
    "*": "num_blocks",
    "c": "hidden_dim",
    "ds": "tokens_mlp_dim",
    "dc": "channels_mlp_dim",
    "e": "stem_dim",
    "dc/c": "mlp_ratio",
    "g": "groups",
    "x": "image_channels",
}


@functools.lru_cache(maxsize=4)
def variables(model: models.Model, image_size: tuple[int, int]) -> Any:
    """Returns the shapes of a model's variables: {"params": …, "batch_stats": …}."""
    image = jnp.zeros((1, *image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image))


def shapes(tree: Any) -> dict[str, Shape]:
    """{path: shape} of arrays, or of what has a shape."""
    return {name: tuple(x.shape) for name, x in leaves(tree)}


def differences(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    called: Callable[[str], str] = str,
) -> list[str]:
    """Lines for people: each array that is unexpected, missing, or of another shape.

    `called` gives the name of an array for people, by that in our tree.
    """
    return [
        f"{called(name)}: got {found.get(name, 'nothing')}, "
        f"expected {expected.get(name, 'nothing')}"
        for name in {**found, **expected}
        if found.get(name) != expected.get(name)
    ]


def most_known(known_in: Callable[[ModuleType], int]) -> ModuleType | None:
    """Returns the architecture that knows the most of some names, if any does."""
    best = max(models.FAMILIES, key=known_in)
    return best if known_in(best) else None


def find_family(names: Collection[str]) -> ModuleType | None:
    """Returns the architecture that has the most arrays of these names, if any has.

    Of several, the one that lacks the fewest: a ResMLP with circulant token mixing has
    the names of a ResMLP, but for its biases.
    """
    given = set(names)

    def likeness(file: ModuleType) -> tuple[int, int]:
        lacking = layout(given, file).keys() - given
        return len(matches(given, file)), -len(lacking)

    best = max(models.FAMILIES, key=likeness)
    return best if likeness(best)[0] else None


def family(names: Collection[str]) -> ModuleType:
    """Returns the architecture that has the most arrays of these names.

    Raises:
      ValueError: none has any.
    """
    if (file := find_family(names)) is None:
        parts = ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))
        raise ValueError(
            f"These are the parameters of no model here ({', '.join(models.families())}"
            f"), but {brief(parts) or 'nothing'}. Try variables['params'] instead of "
            "variables."
        )
    return file


def matches(
    names: Iterable[str], file: ModuleType
) -> dict[str, tuple[str, int | None]]:
    """{name: (its path in `AXES`, the number of its block)} of those that are there."""
    found: dict[str, tuple[str, int | None]] = {}
    paths = _paths(file)
    for name in names:
        if name in paths and "*" not in name:
            found[name] = name, None
        for number in NUMBER.finditer(name):
            path = f"{name[: number.start()]}*{name[number.end() :]}"
            if path in paths:
                found[name] = path, int(number[0])
    return found


def with_statistics(axes: Mapping[str, str]) -> dict[str, str]:
    """`AXES`, and what each norm has besides in the models where it is a BatchNorm."""
    norms = [
        (path.removesuffix("/scale"), letters)
        for path, letters in axes.items()
        if path.endswith("/scale") and path.replace("/scale", "/bias") in axes
    ]
    return {
        **axes,
        **{
            f"{STATISTICS}/{norm}/{name}": letters
            for norm, letters in norms
            for name in ("mean", "var")
        },
    }


@functools.cache
def _paths(file: ModuleType) -> frozenset[str]:
    return frozenset(with_statistics(all_axes(file)))


def layout(names: Iterable[str], file: ModuleType) -> dict[str, tuple[str, ...]]:
    """{name: letters of its axes} of a tree with as many blocks as `names`.

    It has a head if `names` have a part of one, and statistics where they have some.
    """
    return _form_and_layout(names, file)[1]


def _form_and_layout(
    names: Iterable[str], file: ModuleType
) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """The form of which the fewest arrays are missing and unexpected; its `layout`."""
    names = set(names)
    layouts = {
        form: _layout(names, file, axes) for form, axes in axes_by_form(file).items()
    }
    return min(layouts.items(), key=lambda item: len(item[1].keys() ^ names))


def _layout(
    names: Collection[str], file: ModuleType, axes: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    found = matches(names, file)
    there = {path.rpartition("/")[0] for path, _ in found.values()}
    axes = {
        path: letters
        for path, letters in with_statistics(axes).items()
        if path in axes or path.rpartition("/")[0] in there
    }
    has_head = any("k" in axes.get(path, "").split() for path, _ in found.values())
    expected: dict[str, tuple[str, ...]] = {}
    for numbered, paths in itertools.groupby(axes, _before_number):
        group = [*paths]
        for i in range(_num_blocks(found, group) if numbered else 1):
            for path in group:
                letters = tuple(axes[path].split())
                if has_head or "k" not in letters:
                    expected[path.replace("*", str(i))] = letters
    return expected


def _before_number(path: str) -> str:
    """What is before the number of a block, in a path of `AXES`; "" has none."""
    return path.partition("*")[0] if "*" in path else ""


def _num_blocks(
    found: Mapping[str, tuple[str, int | None]], paths: Collection[str]
) -> int:
    """The depth that leaves the fewest arrays missing and unexpected, at least 1.

    One array of a block 99 does not make 99 others missing: it is the stray one.
    """
    size = len(paths)
    arrays = Counter(
        number
        for path, number in found.values()
        if path in paths and number is not None
    )
    depth, there, least = 1, 0, size - 2 * arrays[0]
    for number in sorted(arrays):
        there += arrays[number]
        # Missing below this depth and unexpected above it, less what is constant.
        wrong = (number + 1) * size - 2 * there
        if wrong <= least:
            depth, least = number + 1, wrong
    return depth


def sizes(found: Shapes, file: ModuleType) -> dict[str, int]:
    """What each letter stands for: the size that most arrays give it."""
    votes: dict[str, Counter[int]] = {}
    for name, axes in layout(found, file).items():
        shape = found.get(name, ())
        if len(shape) == len(axes):
            for letter, size in zip(axes, shape, strict=True):
                votes.setdefault(letter, Counter())[size] += 1
    sized = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    return sized | {"rgb": 3}


def problems(
    found: Shapes, file: ModuleType, called: Callable[[str], str] = str
) -> list[str]:
    """What is unexpected, of a shape that contradicts the others, or missing.

    In this order: one stray array stands before all that is missing on its account.
    `called` gives the name of an array for people, by that in our tree.
    """
    expected, sized = layout(found, file), sizes(found, file)
    unexpected = [name for name in found if name not in expected]
    lines = [f"unexpected: {called(name)} {found[name]}" for name in unexpected]
    for name, axes in expected.items():
        if name not in found:
            continue
        fitting = tuple(sized.get(letter, "?") for letter in axes)
        shape = f"shape: {called(name)} is {found[name]}"
        if 0 in found[name]:
            lines.append(f"{shape}, which is empty")
        elif found[name] != fitting:
            sides = ", ".join(f"{a}={n}" for a, n in zip(axes, fitting, strict=True))
            lines.append(f"{shape}, the others say ({sides})")
    return lines + [
        f"missing: {called(name)}" for name in expected if name not in found
    ]


def geometry(found: Shapes, file: ModuleType) -> dict[str, Any]:
    """The fields of a model that follow from the shapes of its parameters.

    What each stage of a pyramid has is a tuple, or the first stage's where the field is
    one number for all.
    """
    sized = sizes(found, file)
    form, _ = _form_and_layout(found, file)
    declared = models.declared(family_name(file))
    by_stage: dict[str, dict[str, int]] = {}
    for letter, size in (sized | _depths(found, file, form) | _ratios(sized)).items():
        if match := re.fullmatch(r"(\D+)(\d*)", letter):
            by_stage.setdefault(match[1], {})[match[2]] = size
    fields: dict[str, Any] = {}
    for letter, of_stages in by_stage.items():
        field = FIELDS.get(letter)
        if field in declared:
            stages = sorted(of_stages, key=lambda number: int(number or 0))
            values = tuple(of_stages[stage] for stage in stages)
            one = "" in of_stages or declared[field].type is int
            fields[field] = values[0] if one else values
    fields |= fields_of_form(file, form)
    if {"ph", "pw"} <= sized.keys():
        fields["patch_size"] = (sized["ph"], sized["pw"])
    return {field: value for field, value in fields.items() if field in declared}


def _depths(found: Shapes, file: ModuleType, form: Any) -> dict[str, int]:
    """{"*": number of blocks}, or {"*0": of the first row of a pyramid, …}.

    A stage may have several rows of blocks, in the order of `AXES`.
    """
    rows: dict[str, list[str]] = {}
    for path in axes_by_form(file)[form]:
        if "*" in path:
            rows.setdefault(_before_number(path), []).append(path)
    names, alone = matches(found, file), len(rows) == 1
    return {
        f"*{'' if alone else i}": _num_blocks(names, paths)
        for i, (row, paths) in enumerate(rows.items())
        if alone or row.startswith("stage")
    }


def _ratios(sized: Mapping[str, int]) -> dict[str, Any]:
    """{"dc/c": hidden units of an MLP per channel}, of each stage."""
    ratios: dict[str, Any] = {}
    for letter, size in sized.items():
        channels = letter.removeprefix("d")
        if re.fullmatch(r"dc\d*", letter) and channels in sized:
            whole, rest = divmod(size, sized[channels])
            ratios[f"dc/{channels}"] = size / sized[channels] if rest else whole
    return ratios


def model_of(params: Any, **given: Any) -> dict[str, Any]:
    """Returns {"name": …} and all fields of the model that the parameters are of.

    Args:
      params: nested dicts of arrays.
      **given: fields that no shape tells.

    Raises:
      ValueError: they are of no model, or a field is told by nothing.
    """
    found = shapes(params)
    file = family(found)
    if wrong := problems(found, file):
        raise ValueError(
            f"These are not the parameters of one {family_name(file)}:\n{listed(wrong)}"
        )
    told, name = geometry(found, file), family_name(file)
    # What no shape tells and has a default, an initial value say, is the paper's of
    # this size.
    row = file.SIZES.get(_first_size_like(file, told) or "", {})
    declared = models.declared(name)
    no_default = {f for f, x in declared.items() if x.default is dataclasses.MISSING}
    usual = {f: value for f, value in row.items() if f not in no_default}
    stated = usual | told | given
    if without := sorted(no_default - stated.keys()):
        raise ValueError(
            f"These are the parameters of a {name}, whose shapes do not say its "
            f"{', '.join(without)}. Give them, or the name of a size "
            f"({', '.join(file.SIZES)}), as arguments of create_model; or read a run's "
            "folder or a file of `mlp_mixer.convert`, which say them."
        )
    return with_name(name, models.fields(name, **stated))


def with_name(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a model with its name: the size's if a paper has them."""
    file = models.family(name)
    return {"name": variant(file, fields) or family_name(file), **fields}


def variant(file: ModuleType, model: Mapping[str, Any]) -> str | None:
    """Returns the name of the size that has the fields of a model, or None.

    Token mixing may be K² times as wide: grown to another resolution.
    """
    name = _first_size_like(file, model)
    return name if name and file.SIZES[name].keys() <= model.keys() else None


def _first_size_like(file: ModuleType, told: Mapping[str, Any]) -> str | None:
    """The name of the first size that contradicts none of the fields."""
    wide = FIELDS["ds"]
    for name, row in file.SIZES.items():
        both = (row.keys() & told.keys()) - {wide}
        if all(row[field] == told[field] for field in both):
            factor, rest = divmod(told.get(wide) or 1, row.get(wide) or 1)
            if not told.get(wide) or (not rest and math.isqrt(factor) ** 2 == factor):
                return name
    return None


def describe(model: Mapping[str, Any]) -> str:
    """Returns the name of a model for people, and the sizes if no paper has them."""
    file = models.family(model["name"])
    return variant(file, model) or f"{family_name(file)} of {sizes_of(model)}"


def sizes_of(model: Mapping[str, Any]) -> str:
    """Returns the fields of a model that its paper's table has, for people."""
    rows = models.family(model["name"]).SIZES.values()

    def in_words(value: Any) -> str:
        if not isinstance(value, tuple):
            return str(value)
        return (" × " if len(value) == 2 else "-").join(map(str, value))

    fields = dict.fromkeys(field for row in rows for field in row)
    return ", ".join(f"{f} {in_words(model[f])}" for f in fields if f in model)


def tokens(params: Any) -> int | None:
    """The number of tokens that the parameters are for; None if they do not say it."""
    found = shapes(params)
    return sizes(found, family(found)).get("s")


def num_classes(params: Mapping[str, Any]) -> int | None:
    """The number of classes, the last axis of each array of the head; None: no head."""
    arrays = leaves(params.get("head", {}))
    return next((x.shape[-1] for _, x in arrays), None)


def told_image_size(params: Any, model: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in pixels that the parameters tell, else None.

    They do where rows and columns are mixed (`h0`, `w0`: positions of the first stage),
    or where tokens (`s`) make a square grid.
    """
    found = shapes(params)
    sized = sizes(found, family(found))
    side = math.isqrt(sized.get("s", 0))
    if side and side**2 == sized["s"]:
        sized |= {"h0": side, "w0": side}
    if not {"h0", "w0"} <= sized.keys():
        return None
    height, width = model["patch_size"]
    return sized["h0"] * height, sized["w0"] * width


def family_name(file: ModuleType) -> str:
    """The name of an architecture, that of its file."""
    return file.__name__.rpartition(".")[2]
