"""Where examples come from: TFDS data at random positions, image folders, noise.

Nothing here needs TensorFlow or the network. TFDS data is read in both of its formats,
array_record and TFRecord (a file of records, each `u64 length, u32 crc, data, u32 crc`,
which one pass over the lengths makes randomly accessible).
"""

import contextlib
import dataclasses
import difflib
import mmap
import os
import pathlib
import re
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.utils import file_utils

from mlp_mixer.data import preparation

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm")
_WELL_KNOWN = (  # only for the hint at a misspelt name
    "imagenet2012",
    "cifar10",
    "cifar100",
    "oxford_iiit_pet",
    "oxford_flowers102",
)


@runtime_checkable
class Source(Protocol):
    """Randomly accessible, picklable examples.

    `source[i]` is `{"image": ..., "label": int}`, the image as encoded bytes or as a
    uint8 array (h, w, c). `class_names` is None where classes have no names.
    """

    @property
    def num_classes(self) -> int:
        """Labels are below it."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name_of(self, index: int) -> str:
        """What a person would call example `index`."""


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    num_examples: int | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Source:
    """Opens a split by name, e.g. `open_source("imagenet2012", "train[:99%]")`.

    Args:
        name: "digits" (embedded), "synthetic", "folder:/path/to/images", or a prepared
            TFDS data set ("imagenet2012", "cifar10:3.0.2").
        split: in TFDS's notation: "train", "train[:99%]", "train+validation". In a
            folder, "train" means `<path>/train/<class>/*`, and "all" means
            `<path>/<class>/*`. Synthetic images are the same in every split.
        data_dir: where TFDS data lives; None is TFDS's own default (TFDS_DATA_DIR, or
            ~/tensorflow_datasets).
        num_examples: what the recipe states; checked. For "synthetic", what to make
            (None: 1,024).
        num_classes: the same (synthetic: 1,000).
        image_size: size of synthetic images in pixels (None: 224); else unused.

    Raises:
        FileNotFoundError: there is no such data set on this machine.
        ValueError: it has no such split, or is not what the recipe states.
    """
    kind, _, argument = name.partition(":")
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
        source = _TfdsSource(name, _find_builder(name, data_dir), split)
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


class _TfdsSource:
    """A split of a prepared TFDS data set, its images left encoded."""

    def __init__(self, name: str, builder: tfds.core.DatasetBuilder, split: str):
        info = builder.info
        features = dict(info.features)
        image, label = features.get("image"), features.get("label")
        if not (
            isinstance(image, tfds.features.Image)
            and isinstance(label, tfds.features.ClassLabel)
        ):
            found = {k: type(v).__name__ for k, v in features.items()}
            raise ValueError(
                f"{name} needs the features 'image' (Image) and 'label' (ClassLabel);"
                f" it has {found}."
            )
        formats = {f.value for f in info.available_file_formats()}
        if not formats & {"array_record", "tfrecord"}:
            raise ValueError(
                f"{name} is stored as {sorted(formats)}; prepare it again with"
                " file_format='array_record'."
            )
        random_access = "array_record" in formats
        if random_access and info.file_format.value != "array_record":
            builder = tfds.builder_from_directory(builder.data_dir, "array_record")
        try:
            files = builder.info.splits[split].file_instructions
        except (KeyError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{name} cannot be read as split {split!r} ({error}). Its splits are"
                f" {', '.join(info.splits)}; a part is written like 'train[:99%]'."
            ) from error
        files = [file for file in files if file.take > 0]  # not so in "train[10:5]"
        self._prefix = f"{name} {split}"
        # Only these are parsed: a segmentation mask, say, costs nothing.
        self._features = tfds.features.FeaturesDict({"image": image, "label": label})
        self._id_features = tfds.features.FeaturesDict(
            {k: features[k] for k in ("file_name", "id") if k in features}
        )
        read = grain.sources.ArrayRecordDataSource if random_access else _TFRecords
        self._records = read(files) if files else ()
        self.num_classes = int(label.num_classes)
        self.class_names = tuple(label.names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self._features.deserialize_example_np(
                self._records[index], decoders={"image": tfds.decode.SkipDecoding()}
            )
        except DecodeError as error:
            raise ValueError(f"{self._prefix}[{index}]: {error}") from error
        return {"image": example["image"], "label": int(example["label"])}

    def name_of(self, index: int) -> str:
        name = f"{self._prefix}[{index}]"
        if not self._id_features:
            return name
        try:
            ids = self._id_features.deserialize_example_np(self._records[index])
        except DecodeError:
            return name
        ids = (v.decode() if isinstance(v, bytes) else str(v) for v in ids.values())
        return f"{name} ({', '.join(ids)})"


class _TFRecords:
    """Random access to the records of TFRecord files, as TFDS's instructions cut them.

    Args:
        files: objects with `filename, skip, take, examples_in_shard`.
    """

    def __init__(self, files: Sequence[Any]):
        self._paths = [file.filename for file in files]
        self._maps: dict[int, mmap.mmap] = {}
        offsets, counts = [], []
        for file in files:
            starts = _record_offsets(file.filename)
            if len(starts) != file.examples_in_shard:
                raise ValueError(
                    f"{file.filename} holds {len(starts)} records, but its"
                    f" dataset_info.json says {file.examples_in_shard}; copy or"
                    " prepare it again."
                )
            offsets.append(starts[file.skip : file.skip + file.take])
            counts.append(file.take)
        self._offsets = np.concatenate(offsets)
        self._file_of = np.repeat(np.arange(len(files)), counts)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> bytes:
        file, start = int(self._file_of[index]), int(self._offsets[index])
        if file not in self._maps:
            with open(self._paths[file], "rb") as opened:
                self._maps[file] = mmap.mmap(
                    opened.fileno(), 0, access=mmap.ACCESS_READ
                )
        (length,) = struct.unpack_from("<Q", self._maps[file], start)
        return self._maps[file][start + 12 : start + 12 + length]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # A worker process opens its own.


def _record_offsets(filename: str) -> np.ndarray:
    """Where each record of a TFRecord file starts, in bytes; cached beside the file."""
    path = pathlib.Path(filename)
    cache = path.with_name(f".{path.name}.index.npy")
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or damaged
        cached = np.load(cache)
        if cached[:2].tolist() == stamp:
            return cached[2:]
    offsets, position = [], 0
    with open(path, "rb", buffering=0) as file:
        while position + 16 <= stat.st_size:
            file.seek(position)
            offsets.append(position)
            position += 16 + struct.unpack("<Q", file.read(8))[0]
    if position != stat.st_size:
        raise ValueError(
            f"{path} has {stat.st_size} bytes, but its last record ends at {position};"
            " it is cut off or damaged: copy or prepare it again."
        )
    index = np.asarray([*stamp, *offsets], np.int64)
    partial = cache.with_name(f".{uuid.uuid4().hex}.npy")
    with contextlib.suppress(OSError):  # a read-only data set: the next start scans
        try:
            np.save(partial, index)
            os.replace(partial, cache)
        finally:
            partial.unlink(missing_ok=True)
    return index[2:]


def _find_builder(
    name: str, data_dir: str | os.PathLike | None
) -> tfds.core.DatasetBuilder:
    """The prepared TFDS data set of this name. Looks at files only, never at code."""
    folder = os.path.expanduser(os.fspath(data_dir)) if data_dir else None
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(
            f"{name!r} is neither one of {', '.join(DATASETS)} nor a TFDS name like"
            f" 'cifar10' or 'cifar10:3.0.2' ({error})."
        ) from error
    folders = [pathlib.Path(f) for f in file_utils.list_data_dirs(folder)]
    present = {e for f in folders if f.is_dir() for e in _subfolders(f)}
    kind = re.split("[:/]", name)[0]
    hint = ""
    if versions := [
        e for f in folders if (f / kind).is_dir() for e in _subfolders(f / kind)
    ]:
        hint = f" Of {kind!r} there is only {', '.join(versions)}."
    elif kind not in _WELL_KNOWN and (
        close := difflib.get_close_matches(kind, {*DATASETS, *present, *_WELL_KNOWN}, 1)
    ):
        hint = f" Did you mean {close[0]!r}?"
    manual = (
        "  put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into"
        f" {folders[0]}/downloads/manual/\n"
    )
    raise FileNotFoundError(
        f"No prepared data set {name!r} in {', '.join(map(str, folders))}.{hint}"
        " Nothing is downloaded during training; prepare it once:\n"
        + (manual if kind == "imagenet2012" else "")
        + "  pip install 'mlp-mixer[prepare]'\n"
        '  python -c "import tensorflow_datasets as tfds;'
        f" tfds.builder('{name}', data_dir='{folders[0]}',"
        " file_format='array_record').download_and_prepare()\""
    )


@dataclasses.dataclass(frozen=True)
class _FolderSource:
    """Image files, one sub-folder per class."""

    paths: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = pathlib.Path(self.paths[index]).read_bytes()
        return {"image": image, "label": int(self.labels[index])}

    def name_of(self, index: int) -> str:
        return self.paths[index]


@dataclasses.dataclass(frozen=True)
class _SyntheticSource:
    """Noise that is a function of the index, for smoke tests and benchmarks."""

    num_examples: int
    num_classes: int
    size: tuple[int, int]
    class_names: None = None

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_examples:
            raise IndexError(index)
        shape = (*self.size, 3)
        noise = np.random.default_rng(index).bytes(int(np.prod(shape)))
        image = np.frombuffer(noise, np.uint8).reshape(shape)
        return {"image": image, "label": index % self.num_classes}

    def name_of(self, index: int) -> str:
        return f"synthetic[{index}]"


def _open_digits(_: str, split: str, **options: Any) -> Source:
    builder = preparation.prepare_digits(options["data_dir"])
    return _TfdsSource("digits", builder, split)


def _open_synthetic(_: str, split: str, **options: Any) -> Source:
    size = options["image_size"] or 224
    return _SyntheticSource(
        options["num_examples"] or 1024,
        options["num_classes"] or 1000,
        (size, size) if isinstance(size, int) else size,
    )


def _open_folder(path: str, split: str, **_: Any) -> Source:
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
                f" folders {_subfolders(root)}. Write 'train' for train/<class>/*, and"
                " 'all' or 'all[:90%]' for <class>/*. Images end in"
                f" {', '.join(IMAGE_SUFFIXES)}."
            )
    if "all" not in classes and (root / "train").is_dir():
        classes["train"] = _subfolders(root / "train")
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
    return _FolderSource(paths, np.asarray(labels, np.int32), classes[reference])


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return tuple(sorted(names))


def _list_images(folder: pathlib.Path) -> tuple[list[str], tuple[str, ...]]:
    """Sorted `class/file` of a folder, and its classes."""
    classes = _subfolders(folder) if folder.is_dir() else ()
    files = [
        f"{name}/{file}"
        for name in classes
        for file in os.listdir(folder / name)
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
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


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": _open_digits,
    "folder": _open_folder,
    "synthetic": _open_synthetic,
}
