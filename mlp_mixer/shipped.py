"""Where recipes are found, and what a run of one is called.

A recipe is named by its path and, after a colon, its words: `configs/x.py:l16,448`.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

from mlp_mixer.known import nearest

PACKAGE = pathlib.Path(__file__).parent
# Bytes: a file system allows 255, and a sweep adds some.
LONGEST_NAME = 200


def find(value: str) -> tuple[str, str | None]:
    """Returns the path of a recipe and its words, of what stands behind `--config=`.

    Shipped recipes are found from any folder, in a clone and in an installed wheel. The
    words follow a colon; None: there is no colon. A path may have colons too.

    Raises:
      FileNotFoundError: there is no such recipe; lists the shipped ones.
    """
    path, words = _path_and_words(value)
    if found := _file_of(path):
        return found, words
    shipped = {
        file.relative_to(root).as_posix()
        for root in (PACKAGE.parent, PACKAGE)
        for file in (root / "configs").rglob("*.py")
        if file.stem != "__init__"
    }
    raise FileNotFoundError(
        f"There is no recipe {path!r}; shipped are: {nearest(path, sorted(shipped))}."
    )


def _path_and_words(value: str) -> tuple[str, str | None]:
    """The path of a recipe and its words; at the first colon if no such file exists."""
    for at in [i for i, letter in enumerate(value) if letter == ":"]:
        if _file_of(value[:at]):
            return value[:at], value[at + 1 :]
    path, colon, words = value.partition(":")
    return (value, None) if _file_of(value) or not colon else (path, words)


def _file_of(path: str) -> str | None:
    """Where the file of a recipe is, if it is anywhere."""
    path = os.path.expanduser(path)
    for root in (pathlib.Path(), PACKAGE.parent, PACKAGE):
        if path and os.path.isfile(root / path):
            return path if root == pathlib.Path() else str(root / path)
    return None


def split(argument: str) -> list[str]:
    """The words of "imagenet21k, short", each once."""
    return [*dict.fromkeys(w.strip() for w in argument.split(",") if w.strip())]


def default_workdir(argv: Sequence[str]) -> str:
    """Where a run lives unless another place is named: `runs/<run_name>`."""
    value = ""
    for i, word in enumerate(argv):
        flag, equals, rest = word.partition("=")
        if flag in ("--config", "-config"):
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    # Runs from before a word's slash was replaced lie further below.
    nested = os.path.join("runs", _full_name(value))
    if os.path.isfile(os.path.join(nested, "config.json")):
        return nested
    return os.path.join("runs", run_name(value))


def run_name(value: str) -> str:
    """What a run of `--config=value` is called: `finetune-cifar10-l16`.

    From the recipe's place in its configs/ (a recipe elsewhere: its file's name) and
    the words of its argument. It is the name of one folder, whatever the words are.
    """
    name = re.sub(r"[/\x00-\x1f\x7f]", "_", _full_name(value))
    encoded = os.fsencode(name)
    if len(encoded) > LONGEST_NAME:
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        name = f"{encoded[:LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return name


def _full_name(value: str) -> str:
    path, words = _path_and_words(value)
    *folders, name = pathlib.PurePath(os.path.splitext(path)[0]).parts or ("",)
    if "configs" in folders:
        last = len(folders) - folders[::-1].index("configs")
        name = "-".join([*folders[last:], name])
    return "-".join([name, *split(words or "")])
