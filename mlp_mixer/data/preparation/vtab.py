"""The 19 tasks of VTAB-1k (arXiv 1910.04867) from their TFDS data sets.

Splits and labels are those of google-research/task_adaptation (`data/*.py`, tasks as in
`scripts/run_all_tasks.sh`): 800 examples to train on, 200 to choose with, and the full
test split. Only the preparation of the base needs TensorFlow.
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import read_only_builder

from mlp_mixer.data.preparation import writing
from mlp_mixer.data.preparation.writing import Job, Split
from mlp_mixer.data.tfrecords import TFRecords

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is made from a data set.

    Attributes:
      base: the TFDS data set, with its config.
      val200: the 200 examples: "validation[:200]", or, written "90%", the first 200
        after 90 % of the split train.
      test: split for testing, in TFDS's notation; "80%:" is the rest of train.
      feature: name of the feature with the label.
      num_classes: number of classes of a derived label; None if `feature` is a
        ClassLabel.
      label: value of `feature` → label.
      image: encoded image → encoded image.
    """

    base: str
    val200: str
    test: str = "test"
    feature: str = "label"
    num_classes: int | None = None
    label: Callable[[Any], int] = int
    image: Callable[[bytes], bytes] = bytes

    def splits(self, num_train: int) -> dict[str, str]:
        """TFDS's names for this task's splits, given the size of the base's train."""
        val = self.val200
        if val.endswith("%"):
            start = int(val[:-1]) * num_train // 100
            val = f"train[{start}:{start + 200}]"
        test = self.test
        if test.endswith("%:"):
            # Percentages, each rounded down before they are added, as task_adaptation.
            parts = map(int, test[:-2].split("+"))
            test = f"train[{sum(part * num_train // 100 for part in parts)}:]"
        return {
            "train800": "train[:800]",
            "val200": val,
            "train800val200": f"train[:800]+{val}",
            "test": test,
        }


def _bin(value: float, borders: Sequence[float]) -> int:
    """The last border that is below `value`."""
    return int(np.flatnonzero(np.asarray(borders) < value)[-1])


Objects = Mapping[str, Sequence]  # feature → its value for each object


def clevr_distance(objects: Objects) -> int:
    """Depth of the closest object, in six bins."""
    depth = min(float(z) for _, _, z in objects["pixel_coords"])
    return _bin(depth, [0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])


def clevr_count(objects: Objects) -> int:
    """Number of objects, 3 to 10, counted from 0."""
    return len(objects["size"]) - 3


def kitti_distance(objects: Objects) -> int:
    """Distance of the closest car, van or truck, in three bins; 3 if there is none."""
    pairs = zip(objects["type"], objects["location"], strict=True)
    depths = [float(z) for kind, (_, _, z) in pairs if kind < 3]
    return _bin(min(depths, default=1000.0), [-100.0, 8.0, 20.0, 999.0])


def _sixteenths(num_original: int) -> Callable[[Any], int]:
    return lambda label: int(label * 16 // num_original)


def _brighten(image: bytes) -> bytes:
    """Maps the levels 0 and 1 of dSprites' images to 0 and 255."""
    levels = np.where(np.asarray(Image.open(io.BytesIO(image))), 255, 0)
    out = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(out, "png")
    return out.getvalue()


_DSPRITES: dict[str, Any] = {
    "base": "dsprites",
    "val200": "80%",
    "test": "80+10%:",
    "num_classes": 16,
    "image": _brighten,
}
_CLEVR: dict[str, Any] = {
    "base": "clevr",
    "val200": "90%",
    "test": "validation",
    "feature": "objects",
}
_VALIDATION = "validation[:200]"
TASKS = {
    "caltech101": Task("caltech101", "90%"),
    "cifar100": Task("cifar100", "90%"),
    "clevr_count": Task(**_CLEVR, num_classes=8, label=clevr_count),
    "clevr_distance": Task(**_CLEVR, num_classes=6, label=clevr_distance),
    "diabetic_retinopathy": Task(
        "diabetic_retinopathy_detection/btgraham-300", _VALIDATION
    ),
    "dmlab": Task("dmlab", _VALIDATION),
    "dsprites_location": Task(
        **_DSPRITES, feature="label_x_position", label=_sixteenths(32)
    ),
    "dsprites_orientation": Task(
        **_DSPRITES, feature="label_orientation", label=_sixteenths(40)
    ),
    "dtd": Task("dtd", _VALIDATION),
    "eurosat": Task("eurosat/rgb", "60%", "60+20%:"),
    "kitti_distance": Task(
        "kitti", _VALIDATION, feature="objects", num_classes=4, label=kitti_distance
    ),
    "oxford_flowers102": Task("oxford_flowers102", _VALIDATION),
    "oxford_iiit_pet": Task("oxford_iiit_pet", "80%"),
    "patch_camelyon": Task("patch_camelyon", _VALIDATION),
    "resisc45": Task("resisc45", "60%", "60+20%:"),
    "smallnorb_azimuth": Task(
        "smallnorb", "test[:200]", "test[50%:]", feature="label_azimuth"
    ),
    "smallnorb_elevation": Task(
        "smallnorb", "test[:200]", "test[50%:]", feature="label_elevation"
    ),
    "sun397": Task("sun397/tfds", _VALIDATION),
    "svhn": Task("svhn_cropped", "90%"),
}


def prepare_vtab(job: Job, task: Task) -> None:
    """Writes a task's splits train800, val200, train800val200 and test.

    Args:
      job: `vtab_<task>`.
      task: one of TASKS, whose base is in `job.data_dir`.
    """
    base = read_only_builder.builder_from_files(task.base, data_dir=job.data_dir)
    info = base.info
    folder = pathlib.Path(base.data_dir)
    features = dict(info.features)
    label = features.get(task.feature)
    if task.num_classes:
        label = tfds.features.ClassLabel(num_classes=task.num_classes)
    if not isinstance(label, tfds.features.ClassLabel) or "image" not in features:
        raise ValueError(
            f"{job.name} needs the features 'image' and {task.feature!r} of"
            f" {folder}; it has {', '.join(features)}."
        )
    read = tfds.features.FeaturesDict(
        {key: features[key] for key in ("image", task.feature)}
    )
    sizes = {name: split.num_examples for name, split in info.splits.items()}
    names = task.splits(sizes.get("train", 0))
    splits = {name: _split(task, info, read, spec) for name, spec in names.items()}
    needed = sum(split.num_bytes for split in splits.values())
    writing.begin(job, [folder / "dataset_info.json"], needed)
    writing.write_splits(
        job,
        {"image": tfds.features.Image(), "label": label},
        splits,
        description=f"A task of VTAB-1k, from {task.base} {info.version}.",
        homepage="https://google-research.github.io/task_adaptation/",
        supervised_keys=("image", "label"),
    )


def _split(
    task: Task, info: Any, features: tfds.features.FeaturesDict, spec: str
) -> Split:
    try:
        parts = info.splits[spec].file_instructions
    except (KeyError, ValueError) as error:
        sizes = ", ".join(f"{k}: {v.num_examples:,}" for k, v in info.splits.items())
        raise ValueError(
            f"{task.base} has no {spec} ({error}); its splits are {sizes}. Prepare it"
            " again, whole."
        ) from error
    files = [file for file in parts if file.take > 0]
    array_record = info.file_format.value == "array_record"
    source = grain.sources.ArrayRecordDataSource if array_record else TFRecords
    records = source(files)
    decoders = {"image": tfds.decode.SkipDecoding()}

    def read(start: int, stop: int) -> Iterator[dict[str, Any]]:
        for i in range(start, stop):
            example = features.deserialize_example_np(records[i], decoders=decoders)
            yield {
                "image": task.image(example["image"]),
                "label": task.label(example[task.feature]),
            }

    total = sum(split.num_examples for split in info.splits.values())
    num_bytes = sum(split.num_bytes for split in info.splits.values())
    return Split(len(records), num_bytes * len(records) // total, read)
