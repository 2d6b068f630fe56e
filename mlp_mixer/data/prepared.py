"""TFDS data sets that are prepared, at random positions.

In both of TFDS's formats, array_record and TFRecord. Nothing here needs TensorFlow or
the network. `data.sources` imports this module when such a data set is opened.
"""

import difflib
import os
import pathlib
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.utils import file_utils

from mlp_mixer.data import folders, preparation, sources
from mlp_mixer.data.tfrecords import TFRecords


def open_prepared(
    name: str, split: str, label: str, data_dir: str | os.PathLike | None
) -> sources.Source:
    """Opens a split of a prepared data set.

    Args:
      name: TFDS's name of it, e.g. "cifar10:3.0.2".
      split, label, data_dir: as in `sources.open_source`.

    Raises:
      FileNotFoundError: there is no such data set on this machine.
      ValueError: it has no such split or label.
    """
    return PreparedSource(name, _find_builder(name, data_dir), split, label)


def open_digits(split: str, data_dir: str | os.PathLike | None) -> sources.Source:
    """Opens a split of the embedded digits, which are prepared if need be."""
    builder = preparation.prepare_digits(data_dir)
    return PreparedSource("digits", builder, split, "label")


class PreparedSource:
    """A split of a prepared TFDS data set, its images left encoded."""

    def __init__(
        self,
        name: str,
        builder: tfds.core.DatasetBuilder,
        split: str,
        label: str,
    ):
        info = builder.info
        features = dict(info.features)
        image: Any = features.get("image")
        classes: Any = features.get(label)
        several = isinstance(classes, tfds.features.Sequence)
        one = classes.feature if several else classes
        if not (
            isinstance(image, tfds.features.Image)
            and isinstance(one, tfds.features.ClassLabel)
        ):
            found = {k: type(v).__name__ for k, v in features.items()}
            raise ValueError(
                f"{name} needs the features 'image' (Image) and {label!r} (ClassLabel);"
                f" it has {found}. If another one holds the classes, name it:"
                " dataset.label='...'."
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
        files = [file for file in files if file.take > 0]  # "train[10:5]" has others
        self._prefix = f"{name} {split}"
        self._label = label
        # Only these are parsed; other features, such as a mask, cost nothing.
        self._features = tfds.features.FeaturesDict({"image": image, label: classes})
        self._label_features = tfds.features.FeaturesDict({label: classes})
        self._id_features = tfds.features.FeaturesDict(
            {k: features[k] for k in ("file_name", "id") if k in features}
        )
        read = grain.sources.ArrayRecordDataSource if random_access else TFRecords
        self._records = read(files) if files else ()
        self.version = str(info.version)
        self.shards = [(file.filename, file.examples_in_shard) for file in files]
        self.multi_label = several
        self.num_classes = int(one.num_classes)
        self.class_names = tuple(one.names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._parse(
            self._features, index, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return {"image": example["image"], "label": self._as_label(example)}

    def label(self, index: int) -> sources.Label:
        """As in `sources.Source`."""
        return self._as_label(self._parse(self._label_features, index))

    def _parse(
        self, features: tfds.features.FeaturesDict, index: int, **options: Any
    ) -> dict[str, Any]:
        try:
            return features.deserialize_example_np(self._records[index], **options)
        except DecodeError as error:
            raise ValueError(f"{self._prefix}[{index}]: {error}") from error

    def _as_label(self, example: dict[str, Any]) -> sources.Label:
        label = example[self._label]
        return np.asarray(label, np.int64) if self.multi_label else int(label)

    def name_of(self, index: int) -> str:
        """The split and the position, and what the data set calls the example."""
        name = f"{self._prefix}[{index}]"
        if not self._id_features:
            return name
        try:
            ids = self._id_features.deserialize_example_np(self._records[index])
        except DecodeError:
            return name
        ids = (v.decode() if isinstance(v, bytes) else str(v) for v in ids.values())
        return f"{name} ({', '.join(ids)})"


def _find_builder(
    name: str, data_dir: str | os.PathLike | None
) -> tfds.core.DatasetBuilder:
    """The prepared TFDS data set of this name, found by its files, without code."""
    folder = os.path.expanduser(os.fspath(data_dir)) if data_dir else None
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(
            f"{name!r} is neither one of {', '.join(sources.DATASETS)} nor a TFDS name"
            " like 'cifar10' or 'cifar10:3.0.2'."
        ) from error
    data_dirs = [pathlib.Path(path) for path in file_utils.list_data_dirs(folder)]

    def prepared(path: str = "") -> list[str]:
        existing = [root / path for root in data_dirs if (root / path).is_dir()]
        return [name for root in existing for name in folders.subfolders(root)]

    wanted = name.partition(":")[0]
    kind, known = wanted.partition("/")[0], preparation.PREPARABLE
    hint = ""
    if versions := prepared(kind):
        hint = f" Of {kind!r} there is only {', '.join(versions)}."
    elif not {kind, wanted} & {*known}:
        names = [*sources.DATASETS, *known, *prepared()]
        close = [n for n in names if n.startswith(kind)]
        if close := close or difflib.get_close_matches(kind, names, 1):
            hint = f" Did you mean {close[0]!r}?"
    raise FileNotFoundError(
        f"No prepared data set {name!r} in {', '.join(map(str, data_dirs))}.{hint}"
        " Nothing is downloaded during training; prepare it once:\n"
        + preparation.instructions(wanted, data_dirs[0])
    )


@sources.fingerprint.register
def _(source: PreparedSource) -> dict[str, Any]:
    shards = {
        os.path.basename(path): {
            "examples": examples,
            "bytes": epath.Path(path).stat().length,
        }
        for path, examples in source.shards
    }
    version = {"version": source.version, "shards": shards}
    return sources.common_fields(source, "prepared") | version
