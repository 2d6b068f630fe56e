"""Image files: folders with one sub-folder per class, and files without labels."""

import contextlib
import dataclasses
import glob
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mlp_mixer.data import decoding

logger = logging.getLogger(__name__)

LOOKED_AT = 200  # files of a folder, for an Exif orientation
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files with labels; a `sources.Source`."""

    paths: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = pathlib.Path(self.paths[index]).read_bytes()
        return {"image": image, "label": self.label(index)}

    def label(self, index: int) -> int:
        """By the folder it lies in."""
        return int(self.labels[index])

    def name_of(self, index: int) -> str:
        """The path."""
        return self.paths[index]


def open_folder(path: str, split: str) -> FolderSource:
    """Opens `<path>/train/<class>/*` for split "train", `<path>/<class>/*` for "all".

    Slices ("all[:90%]") are of a fixed permutation, so that each has all classes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no such split, or splits with different classes.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise FileNotFoundError(
            f"No folder {path!r}; write folder:/path/to/images, with one sub-folder of"
            " images per class."
        )
    files, classes = {}, {}
    for name in {part.partition("[")[0].strip() for part in split.split("+")}:
        folder = root if name == "all" else root / name
        files[name], classes[name] = _list_images(folder)
        if not files[name]:
            raise ValueError(
                f"No images {folder}/<class>/* for split {split!r}; {path} holds the"
                f" folders {subfolders(root)}. Write 'train' for train/<class>/*, and"
                " 'all' or 'all[:90%]' for <class>/*. Images end in"
                f" {', '.join(IMAGE_SUFFIXES)}."
            )
    if "all" not in classes and (root / "train").is_dir():
        classes["train"] = subfolders(root / "train")
    reference, *others = sorted(classes, key=lambda name: name != "train")
    for other in others:
        if different := sorted({*classes[reference]} ^ {*classes[other]}):
            raise ValueError(
                f"Classes of {root / other} and {root / reference} differ, so labels"
                f" would too: {len(different)} are in one only, e.g. {different[:5]}."
            )
    label_of = {name: label for label, name in enumerate(classes[reference])}
    paths, labels = [], []
    for name, start, stop in _slices(split, {k: len(v) for k, v in files.items()}):
        folder = root if name == "all" else root / name
        # A slice of a sorted list would lack classes.
        order = np.random.default_rng(0).permutation(len(files[name]))[start:stop]
        paths += [f"{folder}/{files[name][i]}" for i in order]
        labels += [label_of[files[name][i].partition("/")[0]] for i in order]
    _say_what_is_turned(path, split, paths)
    return FolderSource(paths, np.asarray(labels, np.int32), classes[reference])


def _say_what_is_turned(path: str, split: str, paths: list[str]) -> None:
    looked_at = paths[:: -(-len(paths) // LOOKED_AT) or 1]
    turned = 0
    for name in looked_at:
        with contextlib.suppress(OSError):  # named when it is read
            turned += decoding.orientation(pathlib.Path(name).read_bytes()) != 1
    if turned:
        logger.info(
            "folder:%s %s: %d of %d images looked at are turned by Exif; they are read "
            "as they are stored, unrotated, as the authors do.",
            *(path, split, turned, len(looked_at)),
        )


def open_files(paths: Iterable[str]) -> FolderSource:
    """Image files without labels: the label of each is 0, of one nameless class."""
    paths = list(paths)
    return FolderSource(paths, np.zeros(len(paths), np.int32), ("",))


def find_images(path: str) -> list[str]:
    """The image files that a path stands for, sorted.

    Args:
        path: a file of any name; a folder, for the images in it and below it; or a
            glob ("photos/**/*.jpg"), for the images and folders that match, each file
            once. What there is is a path: a folder "a[1]" in "a[1]/*.jpg" too. What is
            hidden (".git", "._0.png") is passed by, and in a folder what lies in
            folders behind links.

    Raises:
        FileNotFoundError: nothing is there or matches.
        ValueError: there is no image in it.
    """
    if not os.path.exists(path):
        path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(_below(path))
    elif os.path.exists(path):
        return [path]
    elif matches := _matches(path):
        files = {m for m in matches if _is_image(m) and not os.path.isdir(m)}
        inside = {f for m in matches if os.path.isdir(m) for f in _below(m)}
        # Each file once: links may lead to it on many ways.
        ways = {os.path.realpath(f): f for f in sorted(files | inside, reverse=True)}
        found = sorted(ways.values())
    else:
        kind, hint = "file or folder", ""
        if glob.has_magic(path):
            kind, hint = "match for", " (a name with a bracket is written [[])"
        raise FileNotFoundError(f"There is no {kind} {path}{hint}.")
    if not found:
        raise ValueError(
            f"There is no image in {path}; images end in {', '.join(IMAGE_SUFFIXES)}."
        )
    return found


def _matches(path: str) -> list[str]:
    """What matches a glob, whose beginning is a path as far as there is one."""
    folder = os.path.dirname(path)
    while not os.path.isdir(folder or os.curdir):
        folder = os.path.dirname(folder)
    return glob.glob(glob.escape(folder) + path[len(folder) :], recursive=True)


def _below(folder: str) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _is_image(name) and not name.startswith("."):
                yield os.path.join(root, name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    """Sorted names, without hidden ones."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return tuple(sorted(names))


def _list_images(folder: pathlib.Path) -> tuple[list[str], tuple[str, ...]]:
    """Sorted `class/file` of a folder, and its classes."""
    classes = subfolders(folder) if folder.is_dir() else ()
    files = [
        f"{name}/{file}"
        for name in classes
        for file in os.listdir(folder / name)
        if _is_image(file) and not file.startswith(".")
    ]
    return sorted(files), classes


def _slices(split: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """TFDS's reading of `split` over plain counts, as (name, start, stop)."""
    # TFDS's word "all" (every split there is) cannot be cut into slices; ours can.
    infos = {
        f"{name}_": tfds.core.SplitInfo(f"{name}_", [count], 0)
        for name, count in counts.items()
    }
    spec = re.sub(r"(^|\+)\s*(\w+)", r"\1\2_", split)
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    return [
        (
            part.splitname[:-1],
            part.from_ or 0,
            counts[part.splitname[:-1]] if part.to is None else part.to,
        )
        for part in parts
    ]
