"""Reads files that anything may have happened to; writes files whole or not at all.

Besides what is no JSON, these are refused: a key that stands twice, a number that JSON
does not have, and deeper nesting or more bytes than any file of ours has.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from mlp_mixer.text import brief, printable

logger = logging.getLogger(__name__)

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
    where = printable(os.fspath(path))
    return parse_json(read_bytes(path, MAX_BYTES), where, *kinds)


def read_bytes(path: epath.PathLike, most: int) -> bytes:
    """Returns the content of a file.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, e.g. since it is a folder.
      ValueError: it has more than `most` bytes.
    """
    where = printable(os.fspath(path))
    try:
        with epath.Path(path).open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {where}.") from error
    except OSError as error:
        raise OSError(f"{where} cannot be read: {error.strerror}.") from error
    if len(data) > most:
        raise ValueError(f"{where} has more than {most:,} bytes; that is none of ours.")
    return data


def parse_json(data: bytes | str, where: str, *kinds: type, finite: bool = True) -> Any:
    """Returns the value that JSON text stands for.

    Args:
      data: the text; bytes are UTF-8.
      where: where it is from, for the message of an error.
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
        raise ValueError(f"{where} is no JSON that can be read: {what}.") from error
    if not isinstance(value, kinds or (dict,)):
        expected = " or ".join(_NAMES[kind] for kind in kinds or (dict,))
        raise ValueError(f"{where} holds {kind_of(value)}; expected {expected}.")
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


@contextlib.contextmanager
def draft(path: epath.PathLike) -> Iterator[epath.Path]:
    """A new path beside `path`, which takes its name once the block ends.

    If the block raises, the process is killed or the machine loses power, what was
    there before is still there, whole. A link stays one. The folder is not made.

    Args:
      path: the file that is written or replaced; on a bucket too.
    """
    is_local = "://" not in os.fspath(path)
    path = epath.Path(os.path.realpath(path) if is_local else path)
    # Not the whole name, which may be as long as a name can be.
    unfinished = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        if is_local:
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], mode: str = "wb", **options: Any
) -> Iterator[IO[Any]]:
    """Opens a local file that is written whole or not at all, as `draft` does.

    Args:
      path: the file; its folder is made. What is no file, e.g. /dev/stdout, is written
        to and not replaced.
      mode: "wb" or "w".
      **options: further arguments of `open`.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        with open(path, mode, **options) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft(path) as unfinished, open(unfinished, mode, **options) as file:
        yield file


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes UTF-8 whole or not at all, as `draft` does."""
    with draft(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes indented JSON whole or not at all, as `draft` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Holds a lock until the block ends; the kernel releases it if the process dies.

    Args:
      path: a local file that stands for the lock; it stays.
      busy: what another process does that holds it; logged before waiting for its end.
    """
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process %s; waiting for it.", busy)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_room(folder: pathlib.Path, num_bytes: int, what: str, option: str) -> None:
    """Passes if a folder's disk has so much room.

    Args:
      folder: an existing folder.
      num_bytes: the room that is needed.
      what: name of the thing that needs it.
      option: what chooses another disk, e.g. "--data_dir".

    Raises:
      OSError: there is less room.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{what} needs {num_bytes / 1e9:,.3f} GB in {folder}, where "
            f"{free / 1e9:,.3f} GB are free. Make room, or choose another disk with "
            f"{option}."
        )
