"""ImageNet-21k from its class tars, without TensorFlow; TFDS has no builder for it."""

import logging
import pathlib
import re

import tensorflow_datasets as tfds

from mlp_mixer.data.folders import HIDDEN, LeftOut, is_hidden, listed, log_left_out
from mlp_mixer.data.preparation import tars, writing
from mlp_mixer.data.preparation.writing import Job, Split
from mlp_mixer.text import printable

logger = logging.getLogger(__name__)


def prepare_imagenet21k(job: Job) -> None:
    """Writes `imagenet21k` with one split, `full`, of which recipes take slices.

    Images are shuffled. Labels are the positions of the classes' tars in sorted order.
    """
    paths = class_tars(job.manual_dir)
    wnids = [path.stem for path in paths]
    writing.begin(job, paths, sum(path.stat().st_size for path in paths))
    archives = [tars.Archive(path, label) for label, path in enumerate(paths)]
    images = tars.index(job, "full", archives)
    empty = sorted(set(range(len(wnids))) - set(images.label.tolist()))
    if empty:
        left_out = LeftOut()
        tars.list_members(archives[empty[0]], left_out)
        holds = f", only {listed(left_out)}" if left_out else ""
        raise ValueError(
            f"{paths[empty[0]]} holds no image{holds}, as {len(empty)} of {len(paths)}"
            " tars: download it again, or remove it."
        )
    logger.info("%s: %s images, %s classes.", job.name, f"{len(images):,}", len(wnids))

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=wnids),
        "file_name": tfds.features.Text(),
    }
    writing.write_splits(
        job,
        features,
        {"full": Split(len(images), images.num_bytes, images.read)},
        description="ImageNet-21k, the files' own bytes.",
        homepage="https://image-net.org/",
        supervised_keys=("image", "label"),
    )


def class_tars(manual_dir: pathlib.Path) -> list[pathlib.Path]:
    """The files n*.tar in the sub-folder imagenet21k or else in the folder, sorted.

    The log counts other files there.

    Raises:
      FileNotFoundError: there are none.
    """
    places = (manual_dir / "imagenet21k", manual_dir)
    others = []
    for folder in places:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [file for file in files if _is_class_tar(file)]
        left_out = LeftOut(
            _kind_left_out(file) for file in files if file not in {*found}
        )
        if found:
            log_left_out(folder, left_out)
            return found
        others.append(f"{folder} holds {listed(left_out) or 'nothing'}")
    raise FileNotFoundError(
        f"No class tars such as n01440764.tar in {places[0]}; get them from"
        " https://image-net.org/download-images (free, with a login), or name another"
        f" folder with --manual_dir. {'; '.join(others)}."
    )


def _is_class_tar(path: pathlib.Path) -> bool:
    return bool(re.fullmatch(r"n\d.*\.tar", path.name)) and path.is_file()


def _kind_left_out(path: pathlib.Path) -> str:
    if is_hidden(path.name):
        return HIDDEN
    if path.is_dir():
        return "folder(s)"
    return printable(path.suffix) or "without an ending"
