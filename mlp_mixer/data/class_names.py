"""What classes are called: ImageNet-1k's names, and names from a file."""

import collections
import functools
import logging
import os
import pathlib
from collections.abc import Sequence

from etils import epath

from mlp_mixer import files
from mlp_mixer.text import printable

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
        data = files.read_bytes(path, files.MAX_BYTES)
        text = data.decode("utf-8-sig").replace("\r\n", "\n").rstrip()
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


def of_run(path: epath.PathLike, count: int | None = None) -> list[str] | None:
    """Names from a run's class_names.json; None if its data set has none.

    Args:
      path: of the file.
      count: of the model's classes, if it is known.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or has other than `count` names.
    """
    names = files.read_json(path, list, type(None))
    if names is None:
        return None
    said = printable(os.fspath(path))
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"{said} holds {files.kind_of(wrong[0])} among the names of classes; "
            "expected strings alone."
        )
    if count is not None and len(names) != count:
        raise ValueError(
            f"{said} has {len(names):,} names, but the model {count:,} classes."
        )
    return names
