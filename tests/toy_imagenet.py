"""ImageNet's files in their true layout, with a few classes and small real images."""

import io
import json
import pathlib
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

FOLDER = tfds.core.tfds_path("datasets/imagenet2012")
WNIDS = (FOLDER / "labels.txt").read_text().split()
VAL_WNIDS = (FOLDER / "validation_labels.txt").read_text().split()
CLASSES = ("n01440764", "n01751748", "n02105855", "n09193705")
REAL_LENGTH = 1000


def photo(seed, height=60, width=80, mode="RGB", form="JPEG"):
    """A smooth picture, encoded."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.convert(mode).save(out, form, **({"quality": 90} if form == "JPEG" else {}))
    return out.getvalue()


def class_images(wnid, count):
    """File name → bytes; the first three are as odd as ImageNet's oddest."""
    images = {}
    for i in range(count):
        seed = 1000 * WNIDS.index(wnid) + i
        odd = [{"mode": "CMYK"}, {"mode": "L"}, {"form": "PNG"}]
        height, width = [(60, 80), (75, 50), (48, 48)][i % 3]
        options = odd[i] if i < 3 else {}
        images[f"{wnid}_{10 * i + 3}.JPEG"] = photo(seed, height, width, **options)
    return images


def tar(files, form=tarfile.GNU_FORMAT):
    """The bytes of an uncompressed tar of {name or tarfile.TarInfo: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_macos_packs(files):
    """The files, each with a twin, in which macOS keeps what is not in the file."""
    twin = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    return {
        name: data
        for real, image in files.items()
        for name, data in ((f"._{real}", twin), (real, image))
    }


def val_numbers(classes=CLASSES, count=3):
    """Numbers of validation images whose true labels are among the classes."""
    first = VAL_WNIDS[:REAL_LENGTH]
    return sorted(
        number
        for wnid in classes
        for number in [i for i, w in enumerate(first, 1) if w == wnid][:count]
    )


def write_imagenet(folder, *, classes=CLASSES, per_class=6, per_class_val=3):
    """Writes both ImageNet 2012 tars and real.json; returns {file name: bytes}."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_class = {wnid: class_images(wnid, per_class) for wnid in classes}
    train = tar({f"{wnid}.tar": tar(images) for wnid, images in by_class.items()})
    (folder / "ILSVRC2012_img_train.tar").write_bytes(train)
    numbers = val_numbers(classes, per_class_val)
    val = {
        f"ILSVRC2012_val_{n:08}.JPEG": photo(
            10**6 + n, mode="CMYK" if i == 0 else "RGB"
        )
        for i, n in enumerate(numbers)
    }
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    real = [[WNIDS.index(wnid)] for wnid in VAL_WNIDS[:REAL_LENGTH]]
    real[numbers[0] - 1] = []  # unlabelled
    real[numbers[1] - 1] = sorted({*real[numbers[1] - 1], 0, 999})
    (folder / "real.json").write_text(json.dumps(real))
    return {
        name: data for images in by_class.values() for name, data in images.items()
    } | val


def write_imagenet21k(
    folder, *, classes=("n00004475", "n00006024", "n15300051"), count=20
):
    """Writes class tars; returns {file name: bytes}."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, bytes] = {}
    for k, wnid in enumerate(classes):
        images = {f"{wnid}_{i}.JPEG": photo(100 * k + i, 32, 32) for i in range(count)}
        (folder / f"{wnid}.tar").write_bytes(tar(images))
        everything |= images
    return everything
