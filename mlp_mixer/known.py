"""Names out of a closed set, and what to say of one that is not in it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: object, names: Iterable[str], most: int | None = None) -> str:
    """The names as a list for people, those most like `name` first.

    Args:
      name: what was asked for instead of one of them.
      names: the closed set.
      most: how many are listed; None lists all.
    """

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, known.lower(), str(name).lower()).ratio()

    return ", ".join(sorted(names, key=likeness, reverse=True)[:most])


def require(what: str, name: object, names: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `names`; lists them, nearest first.

    Args:
      what: what the name stands for, at the start of the message: "loss".
      name: what was asked for.
      names: the closed set.
    """
    known = list(names)
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; try {nearest(name, known)}.")


def pick(what: str, name: object, table: Mapping[str, T]) -> T:
    """Returns the entry of a table, or raises as `require` does."""
    require(what, name, table)
    return table[str(name)]
