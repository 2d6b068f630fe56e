"""ImageNet 2012 and its ReaL labels from the official tars, without TensorFlow.

Names, features, labels and order are those of TFDS's `imagenet2012` 5.1.0 and
`imagenet2012_real` 1.0.0, so either tree serves. One thing differs: images are the
files' own bytes, where TFDS encodes 22 CMYK files and one PNG of `train` anew.
"""

import hashlib
import http.client
import logging
import pathlib
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from mlp_mixer import files
from mlp_mixer.data import folders
from mlp_mixer.data.folders import LeftOut
from mlp_mixer.data.preparation import tars, writing
from mlp_mixer.data.preparation.writing import Job, Split
from mlp_mixer.text import brief

logger = logging.getLogger(__name__)

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# Size in bytes and md5, as image-net.org publishes them.
_PUBLISHED = {
    TRAIN: (147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
    VAL: (6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
}
_IMAGES = {"train": 1_281_167, "validation": 50_000}
_WHERE_FROM = "https://image-net.org/download-images (free, with a login)"
REAL_URL = (
    "https://raw.githubusercontent.com/google-research/reassessed-imagenet/"
    "master/real.json"
)
_REAL_SHA256 = "d83e9bff374c631aae8439eb064c7019acc56e1b3bc3f56b8380c2a710b0220b"
_SECONDS = 600  # for its 7 MB
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def prepare_imagenet(job: Job) -> None:
    """Writes `imagenet2012` with its splits train and validation."""
    train, val = job.manual_dir / TRAIN, job.manual_dir / VAL
    _begin_with_tars(job, [train, val])
    label_of = {wnid: label for label, wnid in enumerate(_wnids())}
    archives = []
    left_out = LeftOut()
    members = tars.list_members(tars.Archive(train), left_out, _hidden_kind)
    folders.log_left_out(train, left_out)
    for member in members:
        wnid = member.name.removesuffix(".tar")
        if wnid not in label_of:
            raise ValueError(
                f"{train} holds {member.name}; expected the tars of ImageNet's 1,000"
                f" classes, such as {next(iter(label_of))}.tar."
            )
        span = member.offset, member.offset + member.size
        archives.append(tars.Archive(train, label_of[wnid], member.name, *span))
    images = {
        "train": tars.index(job, "train", archives),
        "validation": _validation(job, val),
    }
    _warn_of_counts(job, images)
    splits = {
        name: Split(len(part), part.num_bytes, part.read)
        for name, part in images.items()
    }
    features = _features() | {"label": tfds.features.ClassLabel(names=_wnids())}
    writing.write_splits(
        job,
        features,
        splits,
        description="ILSVRC 2012, the files' own bytes.",
        homepage="https://image-net.org/",
        supervised_keys=("image", "label"),
    )


def prepare_real(job: Job) -> None:
    """Writes `imagenet2012_real`: the validation images with their ReaL labels.

    The labels (arXiv 2006.07159) are real.json of `job.manual_dir`, or downloaded.
    """
    val = job.manual_dir / VAL
    _begin_with_tars(job, [val])
    real = _real_labels(job)
    images = _validation(job, val)
    _warn_of_counts(job, {"validation": images})
    numbers = [_number(name.decode()) for name in images.name]
    if max(numbers, default=0) > len(real):
        raise ValueError(
            f"real.json holds {len(real):,} lists, but there is an image number"
            f" {max(numbers):,}."
        )

    def read(start: int, stop: int) -> Iterator[dict[str, Any]]:
        for example in images.read(start, stop):
            number = _number(example["file_name"])
            example["original_label"] = example.pop("label")
            yield example | {"real_label": real[number - 1]}

    wnids = _wnids()
    features = _features() | {
        "original_label": tfds.features.ClassLabel(names=wnids),
        "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=wnids)),
    }
    writing.write_splits(
        job,
        features,
        {"validation": Split(len(images), images.num_bytes, read)},
        description="ILSVRC 2012 validation with ReaL labels (arXiv 2006.07159).",
        homepage="https://github.com/google-research/reassessed-imagenet",
        supervised_keys=("image", "real_label"),
    )


def _hidden_kind(name: str) -> str | None:
    return folders.HIDDEN if folders.is_hidden(name) else None


def _begin_with_tars(job: Job, paths: Sequence[pathlib.Path]) -> None:
    tars.require(paths, _WHERE_FROM)
    writing.begin(job, paths, sum(path.stat().st_size for path in paths))
    tars.verify(job, {path: _PUBLISHED[path.name] for path in paths})


def _features() -> dict[str, tfds.features.FeatureConnector]:
    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "file_name": tfds.features.Text(),
    }


def _wnids() -> list[str]:
    """The classes' synset ids by label, from TFDS's package."""
    return _words_of_tfds("labels.txt")


def _words_of_tfds(name: str) -> list[str]:
    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()


def _validation(job: Job, path: pathlib.Path) -> tars.TarImages:
    label_of = {wnid: label for label, wnid in enumerate(_wnids())}
    labels = [label_of[wnid] for wnid in _words_of_tfds("validation_labels.txt")]

    def label(_: tars.Archive, member: tars.Member) -> int:
        return labels[_number(member.name) - 1]

    return tars.index(job, "validation", [tars.Archive(path)], label)


def _number(name: str) -> int:
    match = _VAL_NAME.fullmatch(name)
    if not match or not 1 <= int(match[1]) <= _IMAGES["validation"]:
        raise ValueError(
            f"{VAL} holds {name!r}; expected ILSVRC2012_val_00000001.JPEG to"
            " ILSVRC2012_val_00050000.JPEG."
        )
    return int(match[1])


def _warn_of_counts(job: Job, images: dict[str, tars.TarImages]) -> None:
    for split, part in images.items():
        if len(part) != (expected := _IMAGES[split]):
            logger.warning(
                "%s %s has %s images, but ImageNet 2012 has %s.",
                job.name,
                split,
                f"{len(part):,}",
                f"{expected:,}",
            )


def _real_labels(job: Job) -> list[list[int]]:
    path = job.manual_dir / "real.json"
    if not path.exists():
        path = job.data_dir / "downloads" / "real.json"
    if not path.exists():
        _download(REAL_URL, path, _REAL_SHA256 if job.verify else None)
    data = files.read_bytes(path, files.MAX_BYTES)
    if job.verify and hashlib.sha256(data).hexdigest() != _REAL_SHA256:
        raise ValueError(
            f"{path} is not the published real.json (sha256): remove it and start"
            " again, or pass --noverify if it is meant to be another."
        )
    real = files.parse_json(data, f"{path} is damaged, remove it: it", list)
    for number, labels in enumerate(real, 1):
        if not isinstance(labels, list) or not all(
            type(label) is int and 0 <= label < 1000 for label in labels
        ):
            raise ValueError(
                f"{path} is damaged, remove it: image {number} has the labels "
                f"{brief(labels, 60)}; expected a list of numbers from 0 to 999."
            )
    return real


def _download(url: str, path: pathlib.Path, sha256: str | None) -> None:
    """Downloads a file and checks its sum.

    Raises:
      OSError: it cannot be downloaded within `_SECONDS`, or is another file.
    """
    logger.info("Downloading %s", url)
    by_hand = f"put {path.name} into the manual folder by hand."
    try:
        data = _fetched(url)
    except (OSError, http.client.HTTPException) as error:
        message = f"{url} cannot be downloaded ({error}); {by_hand}"
        raise OSError(message) from error
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(
            f"{url} gave {len(data):,} bytes that are not the published {path.name}"
            f" (sha256), and nothing was kept: try again later, or {by_hand}"
        )
    with files.writing(path) as file:
        file.write(data)


def _fetched(url: str) -> bytes:
    end = time.monotonic() + _SECONDS
    data = bytearray()
    with urllib.request.urlopen(url, timeout=60) as response:
        while block := response.read1(1 << 20):
            data += block
            # The timeout above is for a single read.
            if time.monotonic() > end:
                raise TimeoutError(f"{len(data):,} bytes in {_SECONDS} seconds")
        if response.length:
            raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)
