"""Where examples come from: prepared TFDS data, image folders, noise.

Nothing here needs TensorFlow or the network.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from mlp_mixer import processes
from mlp_mixer.data import folders
from mlp_mixer.data.class_names import assumed, canonical, places

Label = int | Int[np.ndarray, " m"]


@runtime_checkable
class Source(Protocol):
    """Randomly accessible, picklable examples.

    `source[i]` is `{"image": ..., "label": ...}`, the image as encoded bytes or as a
    uint8 array (h, w, c), the label as `label(i)` returns it.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of classes instead of one."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, by label; None if they have none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def label(self, index: int) -> Label:
        """The class of example `index`, or its classes; its image is not read."""

    def name_of(self, index: int) -> str:
        """A name of example `index` for people."""


def open_source(
    name: str,
    split: str,
    *,
    label: str = "label",
    data_dir: str | os.PathLike | None = None,
    num_examples: int | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] = (224, 224),
) -> Source:
    """Opens a split by name, e.g. `open_source("imagenet2012", "train[:99%]")`.

    Args:
      name: "digits" (embedded), "synthetic", "folder:/path/to/images", or a prepared
        TFDS data set ("imagenet2012", "cifar10:3.0.2").
      split: in TFDS's notation: "train", "train[:99%]", "train+validation". In a
        folder, "train" means `<path>/train/<class>/*`, and "all" means
        `<path>/<class>/*`. Synthetic images are the same in every split.
      label: feature of TFDS data with the class (a ClassLabel) or the classes (a
        Sequence of it: "real_label" of imagenet2012_real).
      data_dir: where TFDS data lives; None is TFDS's own default (TFDS_DATA_DIR, or
        ~/tensorflow_datasets).
      num_examples: number of examples that the recipe states, which is checked; of
        "synthetic", the number that is made (None: 1,024).
      num_classes: number of classes that the recipe states, which is checked; of
        "synthetic", the number that is made (None: 1,000).
      image_size: (height, width) of synthetic images in pixels; else unused.

    Raises:
      FileNotFoundError: there is no such data set on this machine.
      OSError: it cannot be read.
      ValueError: it has no such split, is not what the recipe states, or lies on a
        bucket.
    """
    if "://" in os.fspath(data_dir or ""):
        raise ValueError(
            f"--data_dir is {data_dir}; expected a folder. Images are read in any "
            "order, for which a bucket must be mounted (gcsfuse) or copied to a disk."
        )
    kind, _, argument = name.partition(":")
    where = f"{name} {split}" + (f" in {data_dir}" if data_dir else "")
    with processes.warn_if_slow(f"the data set {where}"):
        if kind in DATASETS:
            source = DATASETS[kind](
                argument,
                split,
                data_dir=data_dir,
                num_examples=num_examples,
                num_classes=num_classes,
                image_size=image_size,
            )
        else:
            from mlp_mixer.data import prepared  # TFDS is slow to import

            source = prepared.open_prepared(name, split, label, data_dir)
        _check_readable(source, where)
    if not len(source):
        raise ValueError(f"{name} {split} has 0 examples; widen the slice.")
    found = {"num_examples": len(source), "num_classes": source.num_classes}
    stated = {"num_examples": num_examples, "num_classes": num_classes}
    wrong = {k: v for k, v in found.items() if stated[k] not in (None, v)}
    if wrong:
        raise ValueError(
            f"{name} {split} has "
            + " and ".join(
                f"{k}={v}, but the recipe states {stated[k]}" for k, v in wrong.items()
            )
            + ". If the data is right, set "
            + " ".join(f"--config.dataset.{k}={v}" for k, v in wrong.items())
            + "."
        )
    return source


def _check_readable(source: Source, where: str) -> None:
    """Raises OSError if neither the first, nor the middle, nor the last can be read.

    Names and sizes may be there without the contents, as on a mount that has lost its
    server. A single file that cannot be read is left for training to name.
    """
    failed = []
    places = {0, len(source) // 2, len(source) - 1} if len(source) else {}
    for index in sorted(places):
        try:
            source[index]
        except OSError as error:
            failed.append(error)
        except ValueError:  # it was read, and is damaged
            continue
    if failed and len(failed) == len(places):
        raise OSError(
            f"{where} cannot be read, neither at its start nor later: {failed[0]}. Is "
            "its disk mounted, and may this process read it?"
        ) from failed[0]


@dataclasses.dataclass(frozen=True)
class _SyntheticSource:
    """Noise that is a function of the index, for smoke tests and benchmarks."""

    num_examples: int
    num_classes: int
    size: tuple[int, int]
    class_names: None = None
    multi_label: bool = False

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_examples:
            raise IndexError(index)
        shape = (*self.size, 3)
        noise = np.random.default_rng(index).bytes(int(np.prod(shape)))
        image = np.frombuffer(noise, np.uint8).reshape(shape)
        return {"image": image, "label": self.label(index)}

    def label(self, index: int) -> Label:
        return index % self.num_classes

    def name_of(self, index: int) -> str:
        return f"synthetic[{index}]"


# --- The model's classes --------------------------------------------------------------


def with_classes(
    source: Source,
    class_names: Sequence[str] | None,
    num_classes: int,
    *,
    of: str,
    to: str,
    hint: str = "",
) -> Source:
    """Returns the source with its labels mapped by name to a model's classes.

    Args:
      source: data whose classes may be a part of the model's.
      class_names: names of the model's classes, by label; None if they have none, in
        which case `class_names.assumed` may know them.
      num_classes: number of the model's classes.
      of: name of the source, for messages.
      to: name of the model, for messages.
      hint: advice at the end of the message about different names.

    Raises:
      ValueError: the source has other classes; or, where one side has no names,
        another number of them.
    """
    class_names = class_names or assumed(source.class_names, num_classes)
    found = places(source.class_names, class_names, of=of, to=to, hint=hint)
    if source.num_classes == num_classes and found is None:
        return source
    if source.num_classes != num_classes and not (source.class_names and class_names):
        raise ValueError(
            f"{of} has {source.num_classes} classes, but {to} {num_classes}."
        )
    label_of = np.asarray(found or range(source.num_classes))
    names = tuple(class_names) if class_names else None
    return _Relabelled(source, label_of, num_classes, names)


@dataclasses.dataclass(frozen=True)
class _Relabelled:
    """A source with other labels, which `label_of` gives for its own."""

    source: Source
    label_of: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] | None

    @property
    def multi_label(self) -> bool:
        return self.source.multi_label

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        return example | {"label": self._model_label(example["label"])}

    def label(self, index: int) -> Label:
        return self._model_label(self.source.label(index))

    def _model_label(self, label: Label) -> Label:
        label = np.asarray(label)
        # A label that is no class of the source, as in an unlabelled split, becomes -1.
        known = (label >= 0) & (label < len(self.label_of))
        mapped = np.where(known, self.label_of[np.where(known, label, 0)], -1)
        return mapped if self.multi_label else int(mapped)

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)


# --- Fingerprints ---------------------------------------------------------------------


@functools.singledispatch
def fingerprint(source: Source) -> dict[str, Any]:
    """Describes what a source holds, as JSON, to compare it with a later state.

    It looks at names and sizes of files, not at their contents, so it takes seconds. It
    does not depend on the folder of the data: data may be moved, and processes that
    mount the same data elsewhere get the same description.
    """
    return common_fields(source, type(source).__name__)


def common_fields(source: Source, kind: str) -> dict[str, Any]:
    """What the fingerprints of all sources say, with the kind of source."""
    names = source.class_names
    return {
        "kind": kind,
        "num_examples": len(source),
        "num_classes": source.num_classes,
        "class_names": None if names is None else [canonical(name) for name in names],
    }


@fingerprint.register
def _(source: _SyntheticSource) -> dict[str, Any]:
    return common_fields(source, "synthetic") | {"image_size": list(source.size)}


@fingerprint.register
def _(source: folders.FolderSource) -> dict[str, Any]:
    names = [canonical(name) for name in source.class_names]
    of_files = [names[label] for label in source.labels]
    sizes = _sizes(source.paths)
    lines = [
        f"{canonical(os.path.basename(path))}\0{size}\n"
        for path, size in zip(source.paths, sizes, strict=True)
    ]
    of_classes: dict[str, list[tuple[str, int]]] = {name: [] for name in names}
    for name, line, size in zip(of_files, lines, sizes, strict=True):
        of_classes[name].append((line, size))
    classes = {
        name: {
            "images": len(files),
            "bytes": sum(size for _, size in files),
            "files": _digest(sorted(line for line, _ in files)),
        }
        for name, files in of_classes.items()
    }
    order = _digest(f"{k}/{line}" for k, line in zip(of_files, lines, strict=True))
    return common_fields(source, "folder") | {"classes": classes, "order": order}


@fingerprint.register
def _(source: _Relabelled) -> dict[str, Any]:
    return fingerprint(source.source)


def _digest(texts: Iterable[str]) -> str:
    data = "".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


def _sizes(paths: Sequence[str]) -> list[int]:
    """Sizes in bytes, -1 without access; in threads, because disks may be slow."""
    parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
    what = (
        f"the sizes of {len(paths):,} files in {os.path.dirname(next(iter(paths), ''))}"
    )
    with (
        processes.warn_if_slow(what),
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        sizes = pool.map(lambda part: [_size(path) for path in part], parts)
        return [*itertools.chain.from_iterable(sizes)]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # training names it as a broken image
        return -1


def _open_synthetic(_: str, split: str, **options: Any) -> Source:
    return _SyntheticSource(
        options["num_examples"] or 1024,
        options["num_classes"] or 1000,
        options["image_size"],
    )


def _open_digits(_: str, split: str, **options: Any) -> Source:
    from mlp_mixer.data import prepared

    return prepared.open_digits(split, options["data_dir"])


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": _open_digits,
    "folder": lambda path, split, **_: folders.open_folder(path, split),
    "synthetic": _open_synthetic,
}
