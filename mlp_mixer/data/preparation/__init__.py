"""Prepares data sets: `prepare(name)` writes one that `data.sources` then reads.

`PREPARABLE` lists those that the project knows; TFDS's own builders prepare any other
data set of TFDS.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.utils import file_utils

from mlp_mixer import files
from mlp_mixer.data.preparation import imagenet, imagenet21k, stock, vtab
from mlp_mixer.data.preparation.digits import prepare_digits
from mlp_mixer.data.preparation.writing import Job

__all__ = [
    "PREPARABLE",
    "Preparable",
    "default_data_dir",
    "default_manual_dir",
    "find",
    "instructions",
    "prepare",
    "prepare_digits",
]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preparable:
    """How a data set is prepared.

    Attributes:
      write_files: function that prepares it; raises as `prepare` does.
      gigabytes: disk space that it needs, with downloads, without the manual folder.
      manual: files that a person has to put into the manual folder.
      base: the TFDS data set that it is made from.
      tensorflow: whether TFDS's own builder prepares it.
      version: version of the data that this project writes itself.
    """

    write_files: Callable[[Job], None]
    gigabytes: float
    manual: str = ""
    base: str = ""
    tensorflow: bool = False
    version: str = "1.0.0"


def _stock(gigabytes: float, manual: str = "") -> Preparable:
    prepare_stock = functools.partial(stock.prepare_stock, gigabytes=gigabytes)
    return Preparable(prepare_stock, gigabytes, manual, tensorflow=True)


# High estimates: the downloads as TFDS's checksum files state them, their contents, and
# the shards.
_STOCK = {
    "cifar10": _stock(0.5),
    "cifar100": _stock(0.5),
    "imagenet_v2": _stock(4.0),
    "oxford_flowers102": _stock(1.0),
    "oxford_iiit_pet": _stock(2.5),
    "caltech101": _stock(0.5),
    "clevr": _stock(55.0),
    "diabetic_retinopathy_detection/btgraham-300": _stock(
        3.0, "the unpacked files of Kaggle's diabetic-retinopathy-detection"
    ),
    "dmlab": _stock(9.0),
    "dsprites": _stock(0.1),
    "dtd": _stock(2.0),
    "eurosat/rgb": _stock(0.3),
    "kitti": _stock(25.0),
    "patch_camelyon": _stock(25.0),
    "resisc45": _stock(0.5, "the folder NWPU-RESISC45"),
    "smallnorb": _stock(1.0),
    "sun397/tfds": _stock(50.0),
    "svhn_cropped": _stock(4.0),
}
_VAL = imagenet.VAL
PREPARABLE: dict[str, Preparable] = {
    "imagenet2012": Preparable(
        imagenet.prepare_imagenet,
        155.0,
        f"{imagenet.TRAIN} and {_VAL}",
        version="5.1.0",
    ),
    "imagenet2012_real": Preparable(imagenet.prepare_real, 7.0, _VAL),
    "imagenet21k": Preparable(
        imagenet21k.prepare_imagenet21k,
        1400.0,
        "imagenet21k/n*.tar, one for each class",
    ),
    **_STOCK,
    **{
        f"vtab_{name}": Preparable(
            functools.partial(vtab.prepare_vtab, task=task),
            _STOCK[task.base].gigabytes,
            base=task.base,
        )
        for name, task in vtab.TASKS.items()
    },
}


def default_data_dir() -> pathlib.Path:
    """TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return pathlib.Path(file_utils.list_data_dirs(None)[0]).expanduser()


def default_manual_dir(data_dir: str | os.PathLike) -> pathlib.Path:
    """The folder in which TFDS looks for files that a person has to download."""
    return pathlib.Path(data_dir) / "downloads" / "manual"


def find(name: str, data_dir: str | os.PathLike) -> pathlib.Path | None:
    """The folder of a prepared data set, in any format; None if there is none."""
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        return None
    return pathlib.Path(builder.data_dir)


def instructions(name: str, data_dir: str | os.PathLike) -> str:
    """The steps that prepare a data set in `data_dir`, one a line."""
    steps, entry = [], PREPARABLE.get(name)
    source = entry and PREPARABLE.get(entry.base, entry)
    if source and source.manual:
        steps.append(f"put {source.manual} into {default_manual_dir(data_dir)}/")
    if not source or source.tensorflow:
        steps.append("pip install '.[prepare]'   # in the clone")
    steps.append(f"python -m mlp_mixer.prepare {name} --data_dir={data_dir}")
    return "\n".join(f"  {step}" for step in steps)


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    verify: bool = True,
) -> pathlib.Path:
    """Prepares a data set unless it is there, or continues a killed preparation.

    Any number of processes may call this at once: one prepares, the others wait.

    Args:
      name: a key of PREPARABLE, or another name of TFDS.
      data_dir: folder of TFDS data; None is TFDS's own default.
      manual_dir: folder of files put there by hand; None is
        `<data_dir>/downloads/manual`.
      verify: whether these are compared with their published checksums.

    Returns:
      The folder of the data set.

    Raises:
      FileNotFoundError: files are missing that a person has to download.
      ModuleNotFoundError: it needs TensorFlow.
      OSError: no room on the disk, or no network.
      ValueError: an unknown name; a damaged or wrong file.
    """
    root = pathlib.Path(data_dir or default_data_dir()).expanduser()
    manual = pathlib.Path(manual_dir or default_manual_dir(root)).expanduser()
    if there := find(name, root):
        logger.info("%s is already there: %s", name, there)
        return there
    entry = PREPARABLE.get(name) or _stock(0.0)
    if entry.base:
        prepare(entry.base, data_dir=root, manual_dir=manual_dir, verify=verify)
    root.mkdir(parents=True, exist_ok=True)
    lock = root / f".{name.replace('/', '_')}.lock"
    with files.locked(lock, f"prepares {name}"):
        if not (there := find(name, root)):
            entry.write_files(Job(name, entry.version, root, manual, verify))
            there = find(name, root)
    if not there:
        raise ValueError(f"{name} was prepared, but cannot be found in {root}.")
    logger.info("%s is ready: %s", name, there)
    return there
