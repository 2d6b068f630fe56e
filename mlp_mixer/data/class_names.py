"""What classes are called: ImageNet-1k's names, and names from a file."""

import collections
import contextlib
import functools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet() -> dict[str, str]:
    """{synset id: WordNet's words} of ImageNet-1k, in the order of its labels.

    Every name is another one: where two synsets have the same words, the id follows.
    """
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    words = dict(line.split(" ", 1) for line in lines)
    times = collections.Counter(words.values())
    return {k: w if times[w] == 1 else f"{w} ({k})" for k, w in words.items()}


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """The names; WordNet's words if all of them are synset ids of ImageNet-1k.

    Such are those of TFDS's imagenet2012, of its official folders, and of subsets.
    """
    words = imagenet()
    if all(name in words for name in names):
        return tuple(words[name] for name in names)
    return tuple(names)


def canonical(name: str) -> str:
    """The name in one spelling, however a file system or a locale spells it.

    macOS may give "é" as "e" and an accent, and without a UTF-8 locale Python gives its
    bytes as surrogates.
    """
    if name.isascii():
        return name
    with contextlib.suppress(UnicodeError):  # surrogates that stand for no bytes
        data = name.encode("utf-8", "surrogateescape")
        name = data.decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", name)


def choose(
    known: Sequence[str] | None,
    count: int,
    *,
    labels: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """The names of a model's classes, for people; a guess is said in the log.

    Args:
      known: what the weights say they are, if they do.
      count: of classes.
      labels: a file to `read` instead.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has other than `count` names.
    """
    if labels is not None:
        return readable(read(labels, count))
    if known:
        return readable(known)
    if count == len(imagenet()):
        logger.info(
            "The weights do not name their %d classes: taken to be ImageNet-1k's; "
            "--labels=FILE names them otherwise.",
            count,
        )
        return tuple(imagenet().values())
    return tuple(f"class {i}" for i in range(count))


def read(path: str | os.PathLike[str], count: int) -> tuple[str, ...]:
    """Names from a text file, one a line, in the order of the labels.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has other than `count` names, or an empty one.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path} with the names of classes.")
    try:
        text = file.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    names = tuple(line.strip() for line in text.splitlines())
    if len(names) != count:
        raise ValueError(
            f"{path} has {len(names)} names, but the model {count} classes; expected "
            "one name a line, in the order of the labels."
        )
    if "" in names:
        raise ValueError(f"Line {names.index('') + 1} of {path} is empty.")
    return names
