"""ImageNet-21k from its class tars, without TensorFlow; TFDS has no builder for it."""

import logging
import pathlib

import tensorflow_datasets as tfds

from mlp_mixer.data.preparation import tars, writing
from mlp_mixer.data.preparation.writing import Job, Split

logger = logging.getLogger(__name__)


def prepare_imagenet21k(job: Job) -> None:
    """Writes `imagenet21k`: one split `full`, shuffled, for slices as in the recipes.

    Labels are the places of the classes' tars in sorted order.

    Raises:
      FileNotFoundError: there are no tars.
      OSError: there is not enough room.
      ValueError: a tar is damaged, or holds no image.
    """
    paths = class_tars(job.manual_dir)
    wnids = [path.stem for path in paths]
    writing.begin(job, paths, sum(path.stat().st_size for path in paths))
    archives = [tars.Archive(path, label) for label, path in enumerate(paths)]
    images = tars.index(job, "full", archives)
    empty = sorted(set(range(len(wnids))) - set(images.label.tolist()))
    if empty:
        raise ValueError(
            f"{paths[empty[0]]} holds no image, as {len(empty)} of {len(paths)} tars:"
            " download it again, or remove it."
        )
    logger.info("%s: %s images, %s classes.", job.name, f"{len(images):,}", len(wnids))

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=wnids),
        "file_name": tfds.features.Text(),
    }
    writing.write(
        job,
        features,
        {"full": Split(len(images), images.num_bytes, images.read)},
        description="ImageNet-21k, the files' own bytes.",
        homepage="https://image-net.org/",
        supervised_keys=("image", "label"),
    )


def class_tars(manual_dir: pathlib.Path) -> list[pathlib.Path]:
    """n*.tar of the folder or of its sub-folder imagenet21k, sorted.

    Raises:
      FileNotFoundError: there are none.
    """
    folders = (manual_dir / "imagenet21k", manual_dir)
    for folder in folders:
        if found := sorted(folder.glob("n[0-9]*.tar")):
            return found
    raise FileNotFoundError(
        f"No class tars such as n01440764.tar in {folders[0]}; get them from"
        " https://image-net.org/download-images (free, with a login), or name another"
        " folder with --manual_dir."
    )
