"""Reads files that may be damaged; writes files whole or not at all.

JSON is refused not only if it cannot be parsed, but also if a key is there twice, a
number is not finite, or it has deeper nesting or more bytes than this project writes.
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

# gcsfs keeps what it has listed on a bucket for ever: what other programs write there
# later would be hidden, and what they replace read up to its old size. Its library
# reads this when it is imported.
os.environ.setdefault("FSSPEC_GCS_USE_LISTINGS_CACHE", "false")

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


def default_cache_dir() -> pathlib.Path:
    """$MLP_MIXER_CACHE, or mlp_mixer in $XDG_CACHE_HOME, or in ~/.cache."""
    if chosen := os.environ.get("MLP_MIXER_CACHE"):
        return pathlib.Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(parent).expanduser() / "mlp_mixer"


def read_json(path: epath.PathLike, *kinds: type) -> Any:
    """Returns the value in a JSON file.

    Args:
      path: path of the file.
      *kinds: allowed types: dict, list, …, type(None); dict alone if none is given.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, e.g. because it is a folder.
      ValueError: it is damaged, or its value has another type.
    """
    where = printable(os.fspath(path))
    return parse_json(read_bytes(path, MAX_BYTES), where, *kinds)


def read_bytes(path: epath.PathLike, most: int) -> bytes:
    """Returns the content of a file of at most `most` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, e.g. because it is a folder.
      ValueError: it has more bytes.
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
    """Returns the value of JSON text.

    Args:
      data: the text; bytes are UTF-8.
      where: name of its source, for messages.
      *kinds: allowed types, as in `read_json`.
      finite: whether NaN and Infinity are refused.

    Raises:
      ValueError: it is damaged, or its value has another type.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
        _check_value(value, finite, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        what = brief(error)
        raise ValueError(f"{where} is no JSON that can be read: {what}.") from error
    if not isinstance(value, kinds or (dict,)):
        expected = " or ".join(_NAMES[kind] for kind in kinds or (dict,))
        raise ValueError(f"{where} holds {kind_of(value)}; expected {expected}.")
    return value


def kind_of(value: object) -> str:
    """JSON's word for the type of a value, for messages: "a list"."""
    return _NAMES[type(value)]


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _check_value(value: object, finite: bool, depth: int) -> None:
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON's")
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ValueError(f"its values are nested deeper than {MAX_DEPTH}")
    for inner in value.values() if isinstance(value, dict) else value:
        _check_value(inner, finite, depth - 1)


@contextlib.contextmanager
def draft(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path beside `path`, which is renamed to `path` when the block ends.

    If the block raises, the process is killed or the machine loses power, an older file
    stays whole. A link stays a link. The folder is not made.

    Args:
      path: the file that is written or replaced, local or on a bucket.
    """
    is_local = "://" not in os.fspath(path)
    path = epath.Path(os.path.realpath(path) if is_local else path)
    # Only a part of the name, which may have the greatest length that is allowed.
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
    """Opens a local file that is written whole or not at all, as by `draft`.

    Args:
      path: the file, whose folder is made. A device, e.g. /dev/stdout, is written to
        and not replaced.
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
    """Writes UTF-8 whole or not at all, as by `draft`."""
    with draft(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes indented JSON whole or not at all, as by `draft`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Holds a lock until the block ends; the kernel releases it if the process dies.

    Args:
      path: a local file that is locked, and remains.
      busy: what the holder of the lock does, e.g. "prepares the digits", for the log.
    """
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process %s; waiting for it.", busy)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_room(folder: pathlib.Path, num_bytes: int, what: str, option: str) -> None:
    """Raises OSError if a folder's disk has too little room.

    Args:
      folder: an existing folder.
      num_bytes: number of bytes that are needed.
      what: name of what is to be written, for the message.
      option: the flag that chooses another disk, e.g. "--data_dir".
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{what} needs {num_bytes / 1e9:,.3f} GB in {folder}, where "
            f"{free / 1e9:,.3f} GB are free. Make room, or choose another disk with "
            f"{option}."
        )
