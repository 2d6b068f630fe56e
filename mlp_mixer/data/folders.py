"""Image files: folders with one sub-folder per class, and files without labels.

Files that are left out are counted by kind, and the log says the counts in one line.
"""

import collections
import contextlib
import dataclasses
import difflib
import glob
import logging
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlp_mixer.data import decoding
from mlp_mixer.data.decoding import SUFFIXES
from mlp_mixer.text import printable, quoted

logger = logging.getLogger(__name__)

EXIF_SAMPLES = 200  # files of a folder whose Exif orientation is read
# Files and folders of operating systems and servers that do not begin with a dot.
SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("$recycle.bin", "system volume information", "lost+found"),
        *("@eadir", "#recycle", "#snapshot", "__pycache__"),
    )
)
HIDDEN = "hidden or of the system"
_DEEPER = "image(s) in folders of a class"
_BESIDE = "image(s) beside the folders of classes"
_SPLITS = ("train", "val", "valid", "validation", "test")
_ENDINGS = f"images end in {', '.join(SUFFIXES[:11])}, or as others that Pillow reads"
# Kind of file → number of files.
LeftOut = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files with labels; a `sources.Source`."""

    paths: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = pathlib.Path(self.paths[index]).read_bytes()
        return {"image": image, "label": self.label(index)}

    def label(self, index: int) -> int:
        """The label of the folder in which the image lies."""
        return int(self.labels[index])

    def name_of(self, index: int) -> str:
        """The path of the file."""
        return self.paths[index]


def open_folder(path: str, split: str) -> FolderSource:
    """Opens `<path>/train/<class>/*` for split "train", `<path>/<class>/*` for "all".

    A slice ("all[:90%]") is taken from a fixed permutation, so that it has all classes.

    Raises:
      FileNotFoundError: there is no such folder, or a class is a broken link.
      OSError: a folder cannot be read.
      ValueError: there is no such split, its classes differ from those of "train", a
        class has no images, or two folders are the same class.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise FileNotFoundError(
            f"No folder {path!r}; write folder:/path/to/images, with one sub-folder of"
            " images per class."
        )
    contents = {
        name: _list_split(root, name)
        for name in sorted({p.partition("[")[0].strip() for p in split.split("+")})
    }
    classes = {name: tuple(content.images) for name, content in contents.items()}
    if "all" not in classes and (train := _train_folder(root)):
        classes.setdefault(train, subfolders(root / train))
    reference, *others = sorted(classes, key=lambda name: name.lower() != "train")
    for name, content in contents.items():
        content.check_all_have_images(may_be_empty=name != reference)
    for other in others:
        _check_same(root / reference, classes[reference], root / other, classes[other])
    for content in contents.values():
        content.log_left_out()
    label_of = {name: label for label, name in enumerate(classes[reference])}
    files = {name: content.files() for name, content in contents.items()}
    paths, labels = [], []
    for name, start, stop in _slices(split, {k: len(v) for k, v in files.items()}):
        # A slice of a sorted list would lack classes.
        order = np.random.default_rng(0).permutation(len(files[name]))[start:stop]
        paths += [f"{contents[name].folder}/{files[name][i]}" for i in order]
        labels += [label_of[files[name][i].partition("/")[0]] for i in order]
    _log_exif_orientations(path, split, paths)
    return FolderSource(paths, np.asarray(labels, np.int32), classes[reference])


def _log_exif_orientations(path: str, split: str, paths: list[str]) -> None:
    samples = paths[:: -(-len(paths) // EXIF_SAMPLES) or 1]
    turned = 0
    for name in samples:
        with contextlib.suppress(OSError):  # named when it is read
            turned += decoding.orientation(pathlib.Path(name).read_bytes()) != 1
    if turned:
        logger.info(
            "folder:%s %s: %d of %d images looked at are turned by Exif; they are read "
            "as they are stored, unrotated, as the authors do.",
            path,
            split,
            turned,
            len(samples),
        )


def open_files(paths: Iterable[str]) -> FolderSource:
    """Opens image files without labels: all have label 0, a class without a name."""
    paths = list(paths)
    return FolderSource(paths, np.zeros(len(paths), np.int32), ("",))


def find_images(path: str) -> list[str]:
    """The image files that a path stands for, sorted.

    Args:
      path: a file of any name; a folder, which stands for the images in it and below
        it; or a glob ("photos/**/*.jpg"), which stands for the images and folders that
        match. A folder that exists is no pattern, such as "a[1]" in "a[1]/*.jpg".
        Hidden files (".git", "._0.png") and links to folders are left out.

    Raises:
      FileNotFoundError: nothing is there or matches.
      OSError: a folder cannot be read.
      ValueError: there is no image in it.
    """
    if not os.path.exists(path):
        path = os.path.expanduser(path)
    if os.path.isdir(path):
        seen = dict(_files_below(path))
    elif os.path.exists(path):
        return [path]
    elif matches := _glob(path):
        seen = dict(_files_of_matches(path, matches))
        # Each file once, also where links give it several paths.
        unique = {os.path.realpath(f): f for f in sorted(seen, reverse=True)}
        seen = {file: seen[file] for file in unique.values()}
    else:
        kind, hint = "file or folder", ""
        if glob.has_magic(path):
            kind, hint = "match for", " (a name with a bracket is written [[])"
        raise FileNotFoundError(f"There is no {kind} {path}{hint}.")
    left_out = LeftOut(kind for kind in seen.values() if kind)
    found = sorted(file for file, kind in seen.items() if not kind)
    if not found:
        holds = f", only {listed(left_out)}" if left_out else ""
        raise ValueError(f"There is no image in {path}{holds}; {_ENDINGS}.")
    log_left_out(path, left_out)
    return found


def _glob(path: str) -> list[str]:
    """Returns what matches a glob; the folders that it begins with are no patterns."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder or os.curdir):
        folder = os.path.dirname(folder)
    return glob.glob(glob.escape(folder) + path[len(folder) :], recursive=True)


def _files_of_matches(
    pattern: str, matches: Iterable[str]
) -> Iterator[tuple[str, str | None]]:
    """Yields files that match or lie below a folder that does, as `_files_below`."""
    named = pathlib.PurePath(pattern).parts
    for match in matches:
        parts = {*pathlib.PurePath(match).parts} - {*named}
        if any(part.lower() in SYSTEM_NAMES for part in parts):
            yield match, HIDDEN
        elif os.path.isdir(match):
            yield from _files_below(match)
        else:
            yield match, _kind_of_ending(match)


def _files_below(folder: str) -> Iterator[tuple[str, str | None]]:
    """Yields each file in and below a folder, and why it is left out; None: it is not.

    A link to a folder counts as one file, and so does a hidden folder.
    """
    waiting = [folder]
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name):
                waiting.append(entry.path)
            else:
                yield entry.path, _why_left_out(entry)


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise OSError(
            f"The folder {printable(os.fspath(folder))} cannot be read"
            f" ({error.strerror}), so what is in it would be missing; change its"
            " permissions, or move it elsewhere."
        ) from error


# --- Which files are images -----------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def why_left_out(name: str) -> str | None:
    """Returns the kind under which a file is left out; None for an image."""
    return HIDDEN if is_hidden(name) else _kind_of_ending(name)


def _kind_of_ending(name: str) -> str | None:
    ending = os.path.splitext(name)[1].lower()
    return None if ending in SUFFIXES else printable(ending) or "without an ending"


def _why_left_out(entry: os.DirEntry) -> str | None:
    kind = why_left_out(entry.name)
    if entry.is_symlink():
        # A link with an image's name is not followed: that is slow on some disks, and
        # a link to nothing is named as a broken image when it is read.
        return "linked folder(s)" if kind and os.path.isdir(entry.path) else kind
    if kind != HIDDEN and not entry.is_file():  # a pipe would be read for ever
        return "folder(s)" if entry.is_dir() else "neither file nor folder"
    return kind


def listed(left_out: LeftOut) -> str:
    """The kinds with their counts, the most common first: "3 .txt, 1 .json"."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind}" for kind, count in kinds[:8]]
    if rest := sum(count for _, count in kinds[8:]):
        parts.append(f"{rest:,} of other kinds")
    return ", ".join(parts)


def log_left_out(where: str | os.PathLike[str], left_out: LeftOut) -> None:
    """Logs the counts in one line, as a warning unless all are hidden files."""
    if left_out:
        level = logging.INFO if left_out.keys() == {HIDDEN} else logging.WARNING
        where = printable(os.fspath(where))
        logger.log(level, "Left out of %s: %s.", where, listed(left_out))


# --- Folders of classes ---------------------------------------------------------------


@dataclasses.dataclass
class _Contents:
    """The contents of a folder with a folder for each class.

    Attributes:
      folder: the folder with a folder for each class.
      images: class → names of its image files, sorted.
      left_out: class → kinds of other files in its folder; "" → those beside the
        folders of classes.
      deeper: class → an image that lies in a folder of its folder.
    """

    folder: pathlib.Path
    images: dict[str, list[str]]
    left_out: dict[str, LeftOut]
    deeper: dict[str, str]

    def files(self) -> list[str]:
        """All `class/image`, sorted."""
        return sorted(
            f"{k}/{file}" for k, files in self.images.items() for file in files
        )

    def log_left_out(self) -> None:
        """Logs in one line what is not among the images."""
        total = sum(self.left_out.values(), LeftOut())
        if deeper := total.pop(_DEEPER, 0):
            example = printable(next(iter(self.deeper.values())))
            total[f"{_DEEPER} ({example})"] = deeper
        log_left_out(self.folder, total)

    def check_all_have_images(self, *, may_be_empty: bool) -> None:
        """Raises ValueError if classes have no images; says which, and why.

        Args:
          may_be_empty: whether a folder may be empty; data that is evaluated need not
            have all classes.
        """
        without = [name for name, files in self.images.items() if not files]
        if may_be_empty:
            empty = [k for k in without if not self.left_out[k].keys() - {HIDDEN}]
            without = sorted({*without} - {*empty})
            if empty:
                logger.warning(
                    "%s has no image of %d of its %d classes: %s.",
                    printable(str(self.folder)),
                    len(empty),
                    len(self.images),
                    quoted(empty),
                )
        if not without:
            return
        reasons = "; ".join(map(self._reason, without[:3]))
        advice = "move images into <class>/ itself, or remove what is no class"
        if any(name.lower() in _SPLITS for name in self.deeper):
            advice += "; if these are splits, name one: 'train' for train/<class>/*"
        raise ValueError(
            printable(
                f"No images in {len(without):,} of {len(self.images):,} classes of"
                f" {self.folder}: {reasons}{'; …' * (len(without) > 3)}. Expected"
                f" <class>/<image>, where {_ENDINGS}: {advice}."
            )
        )

    def _reason(self, name: str) -> str:
        if name in self.deeper:
            count = self.left_out[name][_DEEPER]
            return f"{name!r} ({count:,} lie deeper, such as {self.deeper[name]})"
        held = self.left_out[name]
        return f"{name!r} ({f'only {listed(held)}' if held else 'empty'})"


def _list_split(root: pathlib.Path, split: str) -> _Contents:
    """Lists the folder of a split; raises as `open_folder` does."""
    folder = root if split == "all" else root / split
    found = _Contents(folder, {}, {"": LeftOut()}, {})
    beside = found.left_out[""]
    for entry in _entries(folder) if folder.is_dir() else ():
        _check_link(entry)
        if is_hidden(entry.name) or not entry.is_dir():
            beside[_why_left_out(entry) or _BESIDE] += 1
        else:
            _add_class(found, entry)
    if not found.images:
        raise _no_classes(root, split, beside)
    found.images = dict(sorted(found.images.items()))
    _check_distinct(folder, [*found.images])
    return found


def _add_class(found: _Contents, of_class: os.DirEntry) -> None:
    """Adds what is in the folder of a class."""
    images, left_out = [], LeftOut()
    for entry in _entries(of_class.path):
        kind = _why_left_out(entry)
        if kind == "folder(s)":
            for path, inner in _files_below(entry.path):
                left_out[inner or _DEEPER] += 1
                if not inner and of_class.name not in found.deeper:
                    found.deeper[of_class.name] = os.path.relpath(path, found.folder)
        elif kind:
            left_out[kind] += 1
        else:
            images.append(entry.name)
    found.images[of_class.name] = images
    found.left_out[of_class.name] = left_out


def _no_classes(root: pathlib.Path, split: str, beside: LeftOut) -> ValueError:
    holds = f" It holds {listed(beside)}." if beside else ""
    names = subfolders(root)
    others = {name.lower(): name for name in names if name not in (split, "train")}
    near = difflib.get_close_matches(split.lower(), others, 1, 0.5)
    hint = "".join(f"{others[name]!r}, " for name in near)
    return ValueError(
        printable(
            f"No images {root / split if split != 'all' else root}/<class>/* for split"
            f" {split!r}.{holds} {root} holds the folders {quoted(names) or '(none)'}."
            f" Write {hint}'train' for train/<class>/*, 'train[90%:]' for a part of"
            " it, and 'all' or 'all[:90%]' for <class>/*."
        )
    )


def _check_link(entry: os.DirEntry) -> None:
    if entry.is_symlink() and not is_hidden(entry.name) and not os.path.exists(entry):
        raise FileNotFoundError(
            f"{printable(entry.path)} is a link to {os.readlink(entry.path)!r}, where"
            " nothing can be reached; mend the link, or remove it if it is no class."
        )


def _check_distinct(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Raises if two folders are the same class, and warns of two that may be."""
    linked = any((folder / name).is_symlink() for name in names)
    for same in _duplicates(
        names if linked else (), lambda name: os.path.realpath(folder / name)
    ):
        raise ValueError(
            f"The classes {quoted(same)} of {folder} are one folder, by links;"
            " remove all but one."
        )
    for same in _duplicates(names, lambda name: unicodedata.normalize("NFC", name)):
        raise ValueError(
            f"The classes {', '.join(map(ascii, same))} of {folder} are one name in two"
            " Unicode spellings; move the images into one of these folders."
        )
    for same in _duplicates(names, str.casefold):
        logger.warning(
            "The classes %s of %s differ in upper and lower case only.",
            quoted(same),
            printable(str(folder)),
        )


def _duplicates(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """The groups of names that have the same key."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _check_same(
    folder: pathlib.Path,
    names: Sequence[str],
    other: pathlib.Path,
    theirs: Sequence[str],
) -> None:
    if different := sorted({*names} ^ {*theirs}):
        hint = ""
        for same in _duplicates(
            different, lambda name: unicodedata.normalize("NFC", name)
        ):
            hint = f" {' and '.join(map(ascii, same))} are one name in two spellings."
        raise ValueError(
            f"Classes of {other} and {folder} differ, so labels would too:"
            f" {len(different)} are in one only, e.g. {quoted(different)}.{hint}"
        )


def _train_folder(root: pathlib.Path) -> str | None:
    """Returns the name of the folder of the split train: "train", "Train", …"""
    names = [name for name in subfolders(root) if name.lower() == "train"]
    return max(names, default=None)  # "train" rather than "Train"


def subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    """The names of its sub-folders, sorted, without hidden ones."""
    names = [e.name for e in _entries(folder) if e.is_dir() and not is_hidden(e.name)]
    return tuple(sorted(names))


def _slices(split: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Parses `split` as TFDS does, over plain counts, to (name, start, stop)."""
    import tensorflow_datasets as tfds  # slow, and not needed for files

    # TFDS reserves "all" for every split there is, and cuts no slices from it.
    infos = {
        f"{name}_": tfds.core.SplitInfo(f"{name}_", [count], 0)
        for name, count in counts.items()
    }
    spec = re.sub(r"(^|\+)\s*(\w+)", r"\1\2_", split)
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    except (AssertionError, KeyError, ValueError, NotImplementedError) as error:
        sizes = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        raise ValueError(
            f"The split {split!r} cannot be read of so many images ({sizes}): {error}"
            " A part is written like 'train[:99%]'."
        ) from error
    return [
        (
            part.splitname[:-1],
            part.from_ or 0,
            counts[part.splitname[:-1]] if part.to is None else part.to,
        )
        for part in parts
    ]
