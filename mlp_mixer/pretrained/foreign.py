"""The names that others give the arrays of a model: timm, and the model's authors.

A model's file has tables of pairs, `TIMM` and `AUTHORS`: a module or a single array of
theirs, and ours, with {} for the number of a block; {3}, if theirs of our block 0 is 3.
A model with a `FORM` may have such a table for each form, {form: pairs}. Where several
pairs have the same name of theirs, their blocks are numbered through all stages, which
the pairs name in order; where a stage begins is what the shapes say, or such a 3.

A kernel is torch's Linear (out, in) or Conv2d (out, in, height, width); any other array
is the same there and here. A third entry says it otherwise:

* a number: how many axes theirs has, of which the first are of size one;
* "their axes -> our axes", a pattern of einops; a patch that is flattened there,
  (x ph pw), is square and has three channels x, or one;
* a function that makes theirs from ours: a buffer that training does not move. It is
  written, for torch loads strictly, and compared when it is read.

Where ours is None there is nothing like it here: theirs is neither read nor written.

A norm that is a BatchNorm here has its `running_mean` and `running_var` too, as `mean`
and `var` of the collection `batch_stats`. Its `num_batches_tracked` is neither read,
for a momentum that is a number does not use it, nor written, for torch loads a state
dict without it, and strictly: it began to count in the second version of the layer.

timm and the authors compute the exact GELU, whatever the weights were trained with;
Google's Mixers, which timm ships, were trained with the tanh approximation.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from einops import EinopsError, rearrange

from mlp_mixer import models
from mlp_mixer.models.model import axes_by_form, form_of
from mlp_mixer.pretrained import tree
from mlp_mixer.text import brief

Flat = dict[str, np.ndarray]

# The table of a model's file, by whose names are in it.
TABLES = {"timm": "TIMM", "authors": "AUTHORS"}
# torch's Linear and Conv2d, by the number of axes of their weight.
KERNELS = {2: "o i -> i o", 4: "o i h w -> h w i o"}
# Around the model itself, in files that training programs have written.
WRAPPER = r"(?:module|model|_orig_mod)\."
PATCH = "(x ph pw)"


class Entry(NamedTuple):
    """One array of theirs.

    Attributes:
      theirs: its name there.
      ours: its path in `AXES`; None: it is not here.
      how: how theirs becomes ours.
      stage: stage of its block, where they number blocks through all stages.
      first: number there of our block 0, as the table states it.
    """

    theirs: str
    ours: str | None
    how: Any
    stage: int = 0
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Names:
    """One program's names of the arrays of an architecture.

    Attributes:
      file: the architecture's.
      whose: a key of `TABLES`.
      form: value of the field `FORM` of the architecture, if it has one.
      first_blocks: number there of each stage's first block, where they number blocks
        through all stages.
    """

    file: ModuleType
    whose: str
    form: Any = None
    first_blocks: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return "timm's names" if self.whose == "timm" else "its authors' names"

    def find(self, name: str) -> tuple[Entry, int | None] | None:
        """The entry of an array of theirs, in any wrapper, and the number of its block.

        Of any depth: also a block that is not there has a name. None: there is no such
        array.
        """
        if (found := self._find_theirs(name)) is None:
            return None
        entries, number = found
        if number is None:
            return entries[0], None
        firsts = self._firsts(entries)
        stage = bisect.bisect_right(firsts, number) - 1
        return (entries[stage], number - firsts[stage]) if stage >= 0 else None

    def _firsts(self, entries: tuple[Entry, ...]) -> Sequence[int]:
        """The number there of the first block of each of the entries of one name."""
        stated = [entry.first for entry in entries]
        return stated if len(entries) == 1 or any(stated) else self.first_blocks

    def _find_theirs(self, name: str) -> tuple[tuple[Entry, ...], int | None] | None:
        """All entries of that name, and the number of the block there."""
        entries, bare = _entries(self), None
        while name != bare:
            if name in entries:
                return entries[name], None
            for number in re.finditer(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)", name):
                unnumbered = f"{name[: number.start()]}{{}}{name[number.end() :]}"
                if unnumbered in entries:
                    return entries[unnumbered], int(number[0])
            name, bare = re.sub(f"^{WRAPPER}", "", name), name
        return None

    def numbered(self, arrays: Mapping[str, np.ndarray]) -> "Names":
        """Returns these names with the `first_blocks` of a file.

        A stage begins where most arrays have another shape than in the block before.

        Args:
          arrays: {name there: array} of the file.
        """
        blocks: dict[tuple[Entry, ...], dict[int, tuple[int, ...]]] = {}
        for name, array in arrays.items():
            entries, number = self._find_theirs(name) or ((), None)
            if len(entries) > 1 and number is not None:
                blocks.setdefault(entries, {})[number] = array.shape
        votes = Counter[tuple[int, ...]]()
        for entries, shapes in blocks.items():
            order = sorted(shapes)
            pairs = itertools.pairwise(order)
            starts = 0, *(b for a, b in pairs if shapes[a] != shapes[b])
            if len(starts) == len(entries):
                votes[starts] += 1
        if not votes:
            return self
        return dataclasses.replace(self, first_blocks=votes.most_common(1)[0][0])

    def their_name(self, name: str) -> str:
        """The name there of an array of our tree, or its own if it has none."""
        found = self._find_ours(name)
        return name if found is None else self._in_block(*found)

    def for_people(self, name: str) -> str:
        """The name of an array of our tree, behind theirs if it has one."""
        theirs = self.their_name(name)
        return name if theirs == name else f"{theirs} as {name}"

    def _in_block(self, entry: Entry, number: int | None) -> str:
        """The name there of an array of a block, by its number here."""
        if number is not None:
            number += self._firsts(_entries(self)[entry.theirs])[entry.stage]
        return entry.theirs.format(number)

    def _find_ours(self, name: str) -> tuple[Entry, int | None] | None:
        path, number = tree.matches([name], self.file).get(name, (None, None))
        for entry in _all_entries(self) if path else ():
            if entry.ours == path and not callable(entry.how):
                return entry, number
        return None

    def with_our_names(self, arrays: Mapping[str, np.ndarray]) -> Flat:
        """{name in our tree: array} of {name there: array}.

        Names that are not there stay as they are, for the caller to refuse, and so do
        arrays of another shape than theirs has.

        Raises:
          ValueError: two arrays claim one name.
        """
        flat: Flat = {}
        first: dict[str, str] = {}
        for name, array in arrays.items():
            entry, number = self.find(name) or (None, None)
            if entry and (entry.ours is None or callable(entry.how)):
                continue
            new = name
            if entry and entry.ours:
                new = entry.ours.replace("*", str(number))
            if new in first:
                raise ValueError(
                    f"there are two arrays for {brief(new)}: {brief(first[new])} and "
                    f"{brief(name)}"
                )
            first[new] = name
            flat[new] = _turned(array, self._pattern(entry, array.ndim))
        return flat

    def with_their_names(self, params: Mapping[str, np.ndarray]) -> Flat:
        """{name there: array} of {name in our tree: array}, buffers included.

        Raises:
          ValueError: an array has no name there, or two arrays have the same.
        """
        flat: Flat = {}
        for name, array in params.items():
            found = self._find_ours(name)
            if found is None:
                raise ValueError(f"{name} has no name among {self}")
            entry, number = found
            # Ours has as many axes as a Linear or a Conv2d there.
            there, _, here = (self._pattern(entry, array.ndim) or "").partition("->")
            theirs = self._in_block(entry, number)
            if theirs in flat:
                raise ValueError(
                    f"{name} would be {theirs} among {self}, and so is another array: "
                    "blocks are counted there as in the published models"
                )
            flat[theirs] = _turned(array, f"{here} -> {there}" if here else None)
        return flat | dict(self.buffers(params))

    def buffers(
        self, params: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(name there, array) of each buffer, made from the arrays of our tree."""
        for name, (path, number) in tree.matches(params, self.file).items():
            for entry in _all_entries(self):
                if callable(entry.how) and entry.ours == path:
                    yield self._in_block(entry, number), entry.how(params[name])

    def check_buffers(
        self, arrays: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]
    ) -> None:
        """Raises ValueError if a buffer of a file is not what the model computes with.

        Args:
          arrays: {name there: array} of the file.
          params: {name in our tree: array} of the same.
        """
        expected = dict(self.buffers(params))
        for name, array in arrays.items():
            entry, number = self.find(name) or (None, None)
            if entry is None or not callable(entry.how):
                continue
            wanted = expected.get(self._in_block(entry, number))
            if wanted is not None and not (
                array.shape == wanted.shape and np.allclose(array, wanted, atol=1e-6)
            ):
                raise ValueError(
                    f"{brief(name)} is not the constant that the model computes with: "
                    f"got {brief(str(array.ravel()[:4]), 60)} …, expected "
                    f"{brief(str(wanted.ravel()[:4]), 60)} …. It was moved in "
                    "training, which this model does not do"
                )

    def _pattern(self, entry: Entry | None, rank: int) -> str | None:
        """How their array becomes ours; None: as it is."""
        if entry is None or entry.ours is None:
            return None
        if isinstance(entry.how, str):
            return entry.how
        if entry.how is not None:
            letters = _axes(self)[entry.ours]
            return f"{'1 ' * (entry.how - len(letters.split()))}{letters} -> {letters}"
        return KERNELS.get(rank) if entry.ours.endswith("/kernel") else None


def tables(file: ModuleType, whose: str) -> dict[Any, tuple[Any, ...]]:
    """{form: table} of the names that an architecture has there; empty if none."""
    table = getattr(file, TABLES[whose], {})
    return (
        table if isinstance(table, dict) else dict.fromkeys(axes_by_form(file), table)
    )


def all_names(file: ModuleType | None = None) -> Iterator[Names]:
    """The names of an architecture, or of all, that others give their arrays."""
    for each in models.FAMILIES if file is None else [file]:
        for whose in TABLES:
            for form in tables(each, whose):
                yield Names(each, whose, form)


def find(
    arrays: Mapping[str, np.ndarray], file: ModuleType | None = None
) -> Names | None:
    """The names that the most arrays of a file have; None: none has any.

    Of names that know as many, those of which the file lacks the fewest, and then those
    that tell more arrays from each other.

    Args:
      arrays: {name: array} of a file.
      file: the architecture, if it is known.
    """
    best: tuple[tuple[int, int, int], Names] | None = None
    for candidate in all_names(file):
        candidate = candidate.numbered(arrays)
        found = [match[0] for x in arrays if (match := candidate.find(x))]
        lacking = _required(candidate).difference(found)
        score = len(found), -len(lacking), len({*found})
        if found and (best is None or score > best[0]):
            best = score, candidate
    return best and best[1]


def names_of(file: ModuleType, whose: str, model: Mapping[str, Any]) -> Names:
    """The names that timm or the authors have for a model.

    Args:
      file: its architecture.
      whose: a key of `TABLES`.
      model: its fields.

    Raises:
      ValueError: they have none.
    """
    form = form_of(file, model)
    if form not in tables(file, whose):
        who = "timm has" if whose == "timm" else "its authors have"
        raise ValueError(
            f"{who} no names for {tree.describe(model)}; leave --names={whose} out."
        )
    depths = model.get("num_blocks")
    if not isinstance(depths, tuple):
        return Names(file, whose, form)
    first_blocks = (0, *itertools.accumulate(depths[:-1]))
    return Names(file, whose, form, first_blocks)


def _axes(names: Names) -> Mapping[str, str]:
    return tree.with_statistics(axes_by_form(names.file)[names.form])


@functools.cache
def _required(names: Names) -> frozenset[Entry]:
    """The entries of parameters: a norm has no statistics, unless it is a BatchNorm."""
    starts = f"{tree.STATISTICS}/"
    entries = _all_entries(names)
    return frozenset(x for x in entries if x.ours and not x.ours.startswith(starts))


def _all_entries(names: Names) -> Iterator[Entry]:
    return itertools.chain.from_iterable(_entries(names).values())


@functools.cache
def _entries(names: Names) -> dict[str, tuple[Entry, ...]]:
    """{name there: its entries, of several stages}, with {} for a block.

    Of a module, the arrays in `AXES`.
    """
    axes, entries = _axes(names), dict[str, tuple[Entry, ...]]()
    for theirs, ours, *rest in tables(names.file, names.whose)[names.form]:
        path, how = ours and ours.replace("{}", "*"), rest[0] if rest else None
        theirs, first = _with_first(theirs)
        pairs = [(theirs, path, how)]
        if path is not None and path not in axes:
            statistics = f"{tree.STATISTICS}/{path}"
            pairs = [
                (f"{theirs}.weight", f"{path}/kernel", how),
                (f"{theirs}.weight", f"{path}/scale", how),
                (f"{theirs}.bias", f"{path}/bias", None),
                (f"{theirs}.running_mean", f"{statistics}/mean", None),
                (f"{theirs}.running_var", f"{statistics}/var", None),
            ]
            if f"{statistics}/mean" in axes:
                pairs.append((f"{theirs}.num_batches_tracked", None, None))
        for name, path, how in pairs:
            if path is None or path in axes:
                before = entries.get(name, ())
                entry = Entry(name, path, how, len(before), first)
                entries[name] = (*before, entry)
    return entries


def _with_first(theirs: str) -> tuple[str, int]:
    """A name with {} for the number of a block, and the number there of our block 0."""
    first = re.search(r"\{(\d+)\}", theirs)
    return (theirs.replace(first[0], "{}"), int(first[1])) if first else (theirs, 0)


def _turned(array: np.ndarray, pattern: str | None) -> np.ndarray:
    """The array in another order of its axes; as it is, if it has not these axes."""
    if pattern is None:
        return array
    try:
        return rearrange(array, pattern, **_patch_lengths(pattern, array.shape))
    except EinopsError:
        return array


def _patch_lengths(pattern: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The sides of a patch that is flattened there."""
    axes = re.findall(r"\([^)]*\)|[^\s()]+", pattern.partition("->")[0])
    if PATCH not in axes or len(axes) != len(shape):
        return {}
    size = shape[axes.index(PATCH)]
    # Three times a square is none.
    side = math.isqrt(size if math.isqrt(size) ** 2 == size else size // 3)
    return {"ph": side, "pw": side}
