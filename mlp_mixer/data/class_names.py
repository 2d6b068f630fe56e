"""Names of classes: matched between two sides, ImageNet-1k's, and read from files."""

import collections
import contextlib
import functools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

from etils import epath

from mlp_mixer import files
from mlp_mixer.text import printable, quoted

logger = logging.getLogger(__name__)

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet() -> dict[str, str]:
    """{synset id: WordNet's words} of ImageNet-1k, in the order of its labels.

    Names are unique: the synset id is appended where two synsets share their words.
    """
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    words = dict(line.split(" ", 1) for line in lines)
    times = collections.Counter(words.values())
    return {k: w if times[w] == 1 else f"{w} ({k})" for k, w in words.items()}


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Returns WordNet's words if all names are ImageNet-1k's synset ids, else `names`.

    TFDS's imagenet2012, the official folders and subsets of them use synset ids.
    """
    words = imagenet()
    if all(name in words for name in names):
        return tuple(words[name] for name in names)
    return tuple(names)


def assumed(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """Returns ImageNet-1k's names for a model whose classes have no names, or None.

    Args:
      names: names of the data's classes; all must be ImageNet-1k's.
      count: number of the model's classes; it must be ImageNet-1k's.
    """
    known = imagenet()
    if (
        not names
        or count != len(known)
        or not {*_comparison_keys(names)} <= known.keys()
    ):
        return None
    return tuple(known)


def canonical(name: str) -> str:
    """Returns a name in the one spelling that is compared.

    File systems and locales spell "é" differently: macOS as "e" and an accent, Python
    without a UTF-8 locale as surrogates that stand for its bytes.
    """
    if name.isascii():
        return name
    with contextlib.suppress(UnicodeError):  # other surrogates stay
        data = name.encode("utf-8", "surrogateescape")
        name = data.decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", name)


def places(
    names: Sequence[str] | None,
    known: Sequence[str] | None,
    *,
    of: str,
    to: str,
    hint: str = "",
) -> tuple[int, ...] | None:
    """Returns the position of each class of `names` among those of `known`.

    The spelling of accents does not matter, and ImageNet-1k's synset ids equal its
    words. Numbers ("0", "1", "10", "2", … of folders) are labels rather than names:
    each is the class with that label, whatever its name.

    Args:
      names: names by label, perhaps of a part of the classes; None if they have none.
      known: names of all classes, by label; None if they have none.
      of: name of the owner of `names`, for messages.
      to: name of the owner of `known`, for messages.
      hint: advice at the end of the message about different names.

    Returns:
      The positions; None if each class has the same position in `known`, or if a side
      has no names.

    Raises:
      ValueError: `known` lacks some of them; lists the names that only one side has.
        Or the order differs and a name is there twice.
    """
    theirs, ours = _comparison_keys(names or ()), _comparison_keys(known or ())
    numbers, known_numbers = _numbers(names), _numbers(known)
    as_many = not names or not known or len(names) == len(known)
    if names and known and {*theirs} <= {*ours}:
        if theirs == ours:
            return None
        if twice := _repeated(theirs) or _repeated(ours):
            raise ValueError(
                f"The classes of {of} and of {to} are in another order, and cannot be "
                f"told apart by name: {quoted(twice)} is there more than once."
            )
        place = {name: i for i, name in enumerate(ours)}
        found = [place[name] for name in theirs]
    elif as_many and (numbers or known_numbers) and not _other_digits(names, known):
        labels = range(len(names or known or ()))
        places_of = {label: i for i, label in enumerate(known_numbers or labels)}
        found = [places_of[label] for label in numbers or labels]
    elif names and known:
        raise ValueError(
            f"The classes of {of} and of {to} differ."
            + _only_in(of, names, ours)
            + _only_in(to, known, theirs)
            + (f"\n{hint}" if hint else "")
        )
    else:
        return None
    if found == list(range(len(found))):
        return None
    moved = next(i for i, place in enumerate(found) if i != place)
    has = f"the classes of {to} in another order"
    if known and len(found) < len(known):
        has = f"{len(found)} of the {len(known)} classes of {to}"
    logger.info(
        "%s has %s: they are mapped by name, e.g. %s, %d there, to %d.",
        of,
        has,
        quoted([names[moved] if names else str(moved)]),
        moved,
        found[moved],
    )
    return tuple(found)


def _comparison_keys(names: Iterable[str]) -> list[str]:
    """The keys by which names are compared: equal for two names of one class."""
    ids = _synset_ids()
    return [ids.get(name, name) for name in map(canonical, names)]


@functools.cache
def _synset_ids() -> dict[str, str]:
    return {canonical(words): synset for synset, words in imagenet().items()}


def _numbers(names: Sequence[str] | None) -> list[int] | None:
    """The names as numbers if these are 0, 1, 2, … in any order, else None."""
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if sorted(numbers) == list(range(len(numbers))) else None


def _other_digits(names: Sequence[str] | None, known: Sequence[str] | None) -> bool:
    """Whether both are numbers, but others: "1" to "10" are not "0" to "9"."""
    both = [*(names or [""]), *(known or [""])]
    return all(name.isdigit() for name in both) and (
        _numbers(names) is None or _numbers(known) is None
    )


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, n in collections.Counter(names).items() if n > 1]


def _only_in(side: str, names: Sequence[str], others: Iterable[str]) -> str:
    known = {*others}
    pairs = zip(names, _comparison_keys(names), strict=True)
    only = [name for name, key in pairs if key not in known]
    return f"\n  Only {side}: {quoted(only)}." if only else ""


def choose(
    known: Sequence[str] | None,
    count: int,
    *,
    labels: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """Returns the names of a model's classes, for people; logs whether it guesses.

    Args:
      known: names that the weights hold, or None.
      count: number of classes.
      labels: file to `read` instead, with other words for the same classes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the number of names is not `count`; or the file gives a class the name
        that another class has in `known`.
    """
    if known and len(known) != count:
        raise ValueError(
            f"The weights name {len(known)} classes, but their head has {count}."
        )
    if labels is not None:
        words = read(labels, count)
        if known:
            _check_same_classes(words, known, labels)
        return readable(words)
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


def _check_same_classes(
    words: Sequence[str], known: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Raises if a word is another class's name; logs which classes are renamed."""
    given, ours = _comparison_keys(words), _comparison_keys(known)
    place = {name: i for i, name in enumerate(ours)}
    other = [i for i, name in enumerate(given) if name != ours[i]]
    wrong = [i for i in other if given[i] in place]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"Line {i + 1} of {path} is {quoted([words[i]])}, but by the weights this "
            f"is the name of class {place[given[i]]}, and class {i} is "
            f"{quoted([known[i]])} ({len(wrong)} such lines). Order the lines as the "
            "weights do, or leave --labels out: the weights name their classes."
        )
    if other:
        i = other[0]
        logger.info(
            "%s has other words than the weights for %d of %d classes, e.g. %s for %s.",
            path,
            len(other),
            len(words),
            quoted([words[i]]),
            quoted([known[i]]),
        )


def read(path: str | os.PathLike[str], count: int) -> tuple[str, ...]:
    """Returns names from a text file, one a line, in the order of the labels.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the number of names is not `count`, or one is empty.
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
    """Returns names from a run's class_names.json; None if its data set has none.

    Args:
      path: path of class_names.json.
      count: number of the model's classes, if it is known.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or the number of names is not `count`.
    """
    names = files.read_json(path, list, type(None))
    if names is None:
        return None
    where = printable(os.fspath(path))
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"{where} holds {files.kind_of(wrong[0])} among the names of classes; "
            "expected strings alone."
        )
    if count is not None and len(names) != count:
        raise ValueError(
            f"{where} has {len(names):,} names, but the model {count:,} classes."
        )
    return names
