"""Batches for training and evaluation, on the host, through Grain.

Rows of one global stream (shuffled, augmented) → the rows of its batches that this
process needs. A broken image is replaced, and a column of its row says so.

Each row of the stream, its augmentation included, is a function of the seed and of its
position alone. So a run may start at any step, and the global batches are the same, row
for row, for any number of processes and worker processes. The augmentation is
big_vision's `configs/mlp_mixer_i1k.py`: Inception crop, flip, RandAugment, all on
uint8; the device normalises. That of DeiT (arXiv 2012.12877) is there by choice: timm's
crop and RandAugment, repeated augmentation.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from mlp_mixer import known
from mlp_mixer.data import (
    assembly,
    decoding,
    image_ops,
    randaugment,
    timm_randaugment,
)
from mlp_mixer.data.assembly import Batch
from mlp_mixer.data.sources import Label, Source
from mlp_mixer.text import printable

Image = UInt8[np.ndarray, "h w 3"]
Cropped = UInt8[np.ndarray, "height width 3"]
Change = Callable[[Image, np.random.Generator], Image]

logger = logging.getLogger(__name__)


def example(image_size: tuple[int, int]) -> Batch:
    """A batch of one black image: the shapes and dtypes that a model receives."""
    return {"image": np.zeros((1, *image_size, 3), np.uint8)}


def train_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    crop: str,
    min_area: float,
    interpolation: str,
    flip: bool,
    shift: int,
    randaugment: str,
    randaugment_layers: int,
    randaugment_magnitude: int | float,
    randaugment_std: int | float,
    repeats: int,
    workers: int,
    max_broken_images: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields shuffled, augmented batches for ever; each epoch has its own order.

    Args:
      source: examples; they repeat, so a batch may be larger than all of them.
      image_size: (height, width) in pixels.
      batch_size: number of rows of the global batch.
      seed: seed of order and augmentation, 0 ... 2**32 - 1.
      crop: a key of `CROPS`: "inception" (pretraining), "timm" (DeiT's recipe),
        "resize_crop" (fine-tuning, see `_resize_crop`) or "resize" (the whole image).
      min_area: least share of an image's area that timm's crop takes; the others do not
        read it.
      interpolation: a key of `image_ops.INTERPOLATIONS`: how timm's crop and timm's
        RandAugment interpolate; the others do not read it.
      flip: whether images are mirrored with probability 1/2.
      shift: largest number of pixels by which an image is moved each way; uniform, and
        zeros come in.
      randaugment: whose RandAugment, "big_vision" or "timm".
      randaugment_layers: number of random operations that are drawn; big_vision applies
        all of them, timm each with probability 1/2.
      randaugment_magnitude: strength of these, 0 ... 20, timm's 0 ... 10.
      randaugment_std: standard deviation of timm's magnitudes.
      repeats: number of times in a row that an image is shown (repeated augmentation),
        augmented anew each time. An epoch keeps its length: it shows so many times
        fewer images. Rows of the same image are far apart in a batch, since mixup
        mixes neighbours.
      workers: number of processes that decode and augment; 0 does so in threads. The
        batches of all streams with as many workers come from the same processes.
      max_broken_images: number of distinct images in this process that may be broken,
        or have a label that is none of the classes. Each is logged by name and
        replaced by the next good one; one more ends the run.
      start_step: number of batches to skip, at no cost.
      rows: which rows of each global batch to make, of `sharding.process_rows`; all by
        default.

    Returns:
      An iterator of `{"image": uint8 (b, h, w, 3), "label": int32 (b,)}`; labels of a
      source with several classes per image are bool (b, num_classes).

    Raises:
      ValueError: an argument is impossible, at once; or, from `next`, too many
        images are broken.
    """
    _check_least("start_step", start_step, 0)
    _check_least("repeats", repeats, 1)
    changes = augmentation(
        image_size=image_size,
        crop=crop,
        min_area=min_area,
        interpolation=interpolation,
        flip=flip,
        shift=shift,
        randaugment=randaugment,
        randaugment_layers=randaugment_layers,
        randaugment_magnitude=randaugment_magnitude,
        randaugment_std=randaugment_std,
    )
    augment = _TrainingRow(source, image_ops.dct_of(crop), changes, max_broken_images)
    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    if repeats > 1:
        stream = _Repeated(stream, len(source), repeats)
    # Before the share: order and draws follow the global position.
    stream = stream.random_map(augment)
    blank = {
        "image": np.zeros((*image_size, 3), np.uint8),
        "label": _target(source, None),
        "broken": np.int32(-1),
    }
    share = _share(stream, blank, batch_size, rows, start_step, 2**40)
    order = [p for k in range(repeats) for p in range(k, batch_size, repeats)]
    share = dataclasses.replace(share, chosen=[order[row] for row in share.chosen])
    return _name_broken(
        assembly.Batches(share, workers),
        source,
        "the next good one replaces it",
        max_broken_images,
    )


def augmentation(
    *,
    image_size: tuple[int, int],
    crop: str,
    min_area: float,
    interpolation: str,
    flip: bool,
    shift: int,
    randaugment: str,
    randaugment_layers: int,
    randaugment_magnitude: int | float,
    randaugment_std: int | float,
) -> list[Change]:
    """Returns what is done to a decoded image of training, step by step.

    The arguments are those of `train_batches`.

    Raises:
      ValueError: an argument is impossible.
    """
    known.require("crop", crop, CROPS)
    known.require("randaugment", randaugment, RANDAUGMENTS)
    known.require("interpolation", interpolation, image_ops.INTERPOLATIONS)
    _check_least("shift", shift, 0)
    of_timm: dict[str, Any] = {"interpolation": interpolation}
    more = {"min_area": min_area, **of_timm} if crop == "timm" else {}
    changes: list[Change] = [functools.partial(CROPS[crop], size=image_size, **more)]
    if flip:
        changes.append(_flip)
    if shift:
        changes.append(functools.partial(_shift, most=shift))
    if randaugment_layers:
        more = {"std": randaugment_std, **of_timm} if randaugment == "timm" else {}
        more |= {"num_layers": randaugment_layers, "magnitude": randaugment_magnitude}
        changes.append(functools.partial(RANDAUGMENTS[randaugment], **more))
    return changes


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    preprocess: str,
    exif: bool = False,
    workers: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields every example once, over all processes, in the order of the source.

    There are ceil(len(source) / batch_size) batches, for any `rows`; the last one is
    padded with rows of zeros.

    Args:
      source: the examples.
      image_size: (height, width) in pixels.
      batch_size: number of rows of the global batch.
      preprocess: a key of `image_ops.PROTOCOLS`.
      exif: whether images are turned as their Exif orientation says.
      workers: number of processes that decode, the same as training's; 0: threads.
      rows: which rows of each global batch to make, as in `train_batches`.

    Returns:
      An iterator of `{"image": (b, h, w, 3), "label": as in `train_batches`,
      "mask": bool (b,), "index": int32 (b,)}`; images are uint8 or float32, as the
      protocol returns them. The mask is False for padding, whose index is -1, and for
      images that are broken or wrongly labelled, which are logged by name.

    Raises:
      ValueError: an argument is impossible.
    """
    # The image of padding. An unknown protocol is refused here, before any work.
    blank = image_ops.preprocess(np.zeros((8, 8, 3), np.uint8), preprocess, image_size)
    prepare = _EvaluationRow(source, image_size, preprocess, exif, blank)
    steps = math.ceil(len(source) / max(batch_size, 1))
    positions = grain.MapDataset.range(steps * batch_size).map(prepare)
    padding = prepare.map(len(source))
    share = _share(positions, padding, batch_size, rows, 0, steps)
    return _name_broken(assembly.Batches(share, workers), source, "it is not counted")


def _inception(
    image: Image, rng: np.random.Generator, size: tuple[int, int]
) -> Cropped:
    box = image_ops.inception_crop_box(rng, *image.shape[:2])
    return image_ops.crop_and_resize(image, box, size)


def _resize(image: Image, rng: np.random.Generator, size: tuple[int, int]) -> Cropped:
    return image if image.shape[:2] == size else image_ops.resize(image, size)


def _resize_crop(
    image: Image, rng: np.random.Generator, size: tuple[int, int]
) -> Cropped:
    """Resizes (to 256 for 224), then cuts out a random part, as BiT's fine-tuning."""
    sides = image_ops.margin(size)
    y, x = (int(rng.integers(n - m + 1)) for n, m in zip(sides, size, strict=True))
    whole = image_ops.crop_and_resize(image, (0, 0, *image.shape[:2]), sides)
    return whole[y : y + size[0], x : x + size[1]]


def _timm(
    image: Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    min_area: float,
    interpolation: str,
) -> Cropped:
    height, width = image.shape[:2]
    box = image_ops.timm_crop_box(rng, height, width, min_area)
    chosen = image_ops.draw_filter(rng, interpolation)
    return image_ops.timm_crop_and_resize(image, box, size, chosen)


CROPS: dict[str, Callable[..., Cropped]] = {
    "inception": _inception,
    "timm": _timm,
    "resize_crop": _resize_crop,
    "resize": _resize,
}


RANDAUGMENTS: dict[str, Callable[..., Cropped]] = {
    "big_vision": randaugment.randaugment,
    "timm": timm_randaugment.randaugment,
}


def _flip(image: Image, rng: np.random.Generator) -> Image:
    return image_ops.flip_lr(image) if rng.random() < 0.5 else image


def _shift(image: Image, rng: np.random.Generator, most: int) -> Image:
    dy, dx = rng.integers(-most, most, size=2, endpoint=True)
    return image_ops.shift(image, int(dy), int(dx))


class _Repeated(grain.MapDataset):
    """The stream in which each image is there `repeats` times in a row.

    Its epochs are as long as the parent's, of which the first images are shown.
    """

    def __init__(self, parent: grain.MapDataset, epoch: int, repeats: int) -> None:
        super().__init__(parent)
        self._epoch, self._repeats = epoch, repeats

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        place = index % self._epoch
        return self._parent[index - place + place // self._repeats]


@dataclasses.dataclass(frozen=True)
class _TrainingRow(grain.transforms.RandomMap):
    """Turns an index into a row of a training batch."""

    source: Source
    dct: str
    changes: Sequence[Change]
    max_broken_images: int

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        image, label, broken = self._read_good(element)
        for change in self.changes:
            image = change(image, rng)
        # Worker processes share no counter, so each row says what it replaces.
        target = _target(self.source, label)
        return {"image": image, "label": target, "broken": np.int32(broken)}

    def _read_good(self, index: int) -> tuple[Image, Label, int]:
        """Returns the first good example from `index` on, and `index` if it was broken.

        If `index` itself is good, the third value is -1.
        """
        n = len(self.source)
        tried = [(index + k) % n for k in range(min(n, self.max_broken_images + 1))]
        for candidate in tried:
            try:
                image, label = read_image(self.source, candidate, self.dct)
            except (OSError, ValueError):  # `_name_broken` names it
                continue
            return image, label, -1 if candidate == index else index
        raise _too_many(self.source, tried, self.max_broken_images)


@dataclasses.dataclass(frozen=True)
class _EvaluationRow(grain.transforms.Map):
    """Turns a position into a row of an evaluation batch."""

    source: Source
    size: tuple[int, int]
    protocol: str
    exif: bool
    blank: np.ndarray

    def map(self, element: int) -> dict[str, Any]:
        index = element if element < len(self.source) else -1
        row = {
            "image": self.blank,
            "label": _target(self.source, None),
            "mask": np.bool_(False),
            "index": np.int32(index),
            "broken": np.int32(index),
        }
        if index < 0:
            return row
        dct = image_ops.dct_of(self.protocol)
        try:
            image, label = read_image(self.source, index, dct, exif=self.exif)
        except (OSError, ValueError):  # `_name_broken` names it
            return row
        image = image_ops.preprocess(image, self.protocol, self.size)
        row |= {"image": image, "label": _target(self.source, label)}
        return row | {"mask": np.bool_(True), "broken": np.int32(-1)}


def _target(source: Source, label: Label | None) -> np.ndarray | np.generic:
    """Returns a row's label: the class, or a bool for each class; blank for None."""
    if not source.multi_label:
        return np.int32(0 if label is None else label)
    classes = np.zeros(source.num_classes, np.bool_)
    if label is not None:
        classes[label] = True
    return classes


def read_image(
    source: Source, index: int, dct: str = "fast", *, exif: bool = False
) -> tuple[UInt8[np.ndarray, "h w 3"], Label]:
    """The decoded image and the label of one example; a grey image gets 3 channels.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not an image, or damaged, or its label is none of the classes.
    """
    example = source[index]
    classes = np.asarray(example["label"])
    # In one-hot form any other label would be a row of zeros, silently.
    if ((classes < 0) | (classes >= source.num_classes)).any():
        raise ValueError(
            f"its label is {classes}, but there are {source.num_classes} classes,"
            f" 0 ... {source.num_classes - 1}; is this split labelled?"
        )
    image = example["image"]
    if isinstance(image, bytes):
        image = decoding.decode(image, dct, exif=exif)
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return image, example["label"]


@dataclasses.dataclass(frozen=True)
class _Share:
    """Some rows of every batch of the global stream, from `start_step` on.

    A row has the same position whichever process makes it.
    """

    stream: Any
    blank: dict[str, Any]
    batch_size: int
    chosen: Sequence[int]  # positions in a global batch
    start_step: int
    steps: int

    @property
    def rows(self) -> int:
        return len(self.chosen)

    def row(self, step: int, row: int) -> dict[str, Any]:
        first = (step + self.start_step) * self.batch_size
        return self.stream[first + self.chosen[row]]


def _share(
    stream: Any,
    blank: dict[str, Any],
    batch_size: int,
    rows: Sequence[int] | None,
    start_step: int,
    steps: int,
) -> _Share:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    chosen = range(batch_size) if rows is None else rows
    if not chosen or min(chosen) < 0 or max(chosen) >= batch_size:
        raise ValueError(
            f"rows are {list(chosen)[:10]}; of a batch of {batch_size} expected some "
            f"of 0 ... {batch_size - 1}."
        )
    return _Share(stream, blank, batch_size, chosen, start_step, steps)


def _name_broken(
    batches: assembly.Batches,
    source: Source,
    consequence: str,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yields the batches; logs broken images by name, and raises above `limit`."""
    seen: dict[int, None] = {}
    with contextlib.closing(batches):
        for batch in batches:
            broken = batch.pop("broken")
            for index in map(int, broken[broken >= 0]):
                if index not in seen:
                    seen[index] = None
                    _warn_of_broken(source, index, consequence)
            if limit is not None and len(seen) > limit:
                raise _too_many(source, seen, limit)
            yield batch
            del batch  # so that its memory may be used again


def _warn_of_broken(source: Source, index: int, consequence: str) -> None:
    try:
        read_image(source, index)
        reason = "readable at a second try"
    except (OSError, ValueError) as error:
        reason = str(error)
    name = printable(source.name_of(index))
    logger.warning("Broken image %s: %s; %s.", name, reason, consequence)


def _too_many(source: Source, indices: Iterable[int], limit: int) -> ValueError:
    names = "\n  ".join(printable(source.name_of(i)) for i in indices)
    return ValueError(
        f"More than max_broken_images={limit} images are broken or wrongly"
        f" labelled:\n  {names}\nRepair or remove them, or allow more."
    )
