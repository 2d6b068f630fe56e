"""Reading files that anything may have happened to, and saying what is wrong with them.

Of JSON is refused, besides what is none: keys that stand twice, numbers that JSON does
not have, nesting that no file of ours has, and more bytes than any file of ours has.
"""

import json
import math
import os
from typing import Any

from etils import epath

from mlp_mixer.text import brief, printable

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 50  # A recipe has five levels.
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_json(path: epath.PathLike, *kinds: type) -> Any:
    """Returns what the JSON file holds.

    Args:
      path: the JSON file.
      *kinds: what it may be: dict, list, …, type(None); an object if none is named.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, e.g. since it is a folder.
      ValueError: it holds anything else.
    """
    said = printable(os.fspath(path))
    return parse_json(read_bytes(path, MAX_BYTES), said, *kinds)


def read_bytes(path: epath.PathLike, most: int) -> bytes:
    """Returns the content of a file.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, e.g. since it is a folder.
      ValueError: it has more than `most` bytes.
    """
    said = printable(os.fspath(path))
    try:
        with epath.Path(path).open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {said}.") from error
    except OSError as error:
        raise OSError(f"{said} cannot be read: {error.strerror}.") from error
    if len(data) > most:
        raise ValueError(f"{said} has more than {most:,} bytes; that is none of ours.")
    return data


def parse_json(data: bytes | str, said: str, *kinds: type, finite: bool = True) -> Any:
    """Returns the value that JSON text stands for.

    Args:
      data: the text; bytes are UTF-8.
      said: where it is from, for the message of an error.
      *kinds: what it may be: dict, list, …, type(None); an object if none is named.
      finite: whether NaN and Infinity are refused.

    Raises:
      ValueError: it is damaged, or another kind of value.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object)
        _check(value, finite, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        what = brief(error)
        raise ValueError(f"{said} is no JSON that can be read: {what}.") from error
    if not isinstance(value, kinds or (dict,)):
        expected = " or ".join(_NAMES[kind] for kind in kinds or (dict,))
        raise ValueError(f"{said} holds {kind_of(value)}; expected {expected}.")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value, for messages: "a list"."""
    return _NAMES[type(value)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _check(value: object, finite: bool, depth: int) -> None:
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON's")
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ValueError(f"its values are nested deeper than {MAX_DEPTH}")
    for inner in value.values() if isinstance(value, dict) else value:
        _check(inner, finite, depth - 1)
