"""The pipeline: same rows anywhere, each example once, no image ends a run."""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import set_up
from PIL import Image

from mlp_mixer.data import decoding, image_ops, pipeline, sources


@dataclasses.dataclass
class Listed:
    """A source of given images; label i belongs to image i. None cannot be read."""

    images: list[Any]
    class_names = None
    multi_label = False

    @property
    def num_classes(self):
        return len(self.images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.images[index] is None:
            raise FileNotFoundError(f"nothing at {index}")
        return {"image": self.images[index], "label": self.label(index)}

    def label(self, index):
        return index

    def name_of(self, index):
        return f"<example {index}>"


def noise(n, *shape):
    return Listed(list(np.random.default_rng(0).integers(0, 256, (n, *shape), "uint8")))


def png(image):
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return data.getvalue()


def with_broken(n, *broken):
    """n encoded images; those in `broken` are cut off."""
    images = [png(image) for image in noise(n, 8, 8, 3).images]
    return Listed([d[:50] if i in broken else d for i, d in enumerate(images)])


def train(source, steps, **kwargs):
    """The first batches of a stream, as one dict of rows."""
    kwargs = {"image_size": (8, 8), "batch_size": 8, "seed": 0} | kwargs
    batches = list(itertools.islice(set_up.train_batches(source, **kwargs), steps))
    return {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


PLAIN: dict[str, Any] = {"crop": "resize", "flip": False}
EVERYTHING: dict[str, Any] = {
    "crop": "inception",
    "shift": 2,
    "randaugment_layers": 2,
    "randaugment_magnitude": 15,
}
OF_DEIT: dict[str, Any] = {
    "crop": "timm",
    "interpolation": "random",
    "randaugment": "timm",
    "randaugment_layers": 2,
    "randaugment_magnitude": 9,
    "randaugment_std": 0.5,
    "repeats": 3,
}


@pytest.mark.parametrize("source", [noise(21, 12, 10, 3), with_broken(21, 3, 4)])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("crop", ["inception", "resize_crop", "timm"])
def test_processes_share_the_same_global_batches(source, count, crop):
    steps = 7  # more than two epochs
    whole = list(itertools.islice(stream(source, 1, 0, crop), steps))
    parts = [
        list(itertools.islice(stream(source, count, p, crop), steps))
        for p in range(count)
    ]
    for step in range(steps):
        rows = {
            k: np.concatenate([part[step][k] for part in parts]) for k in whole[step]
        }
        assert_same(rows, whole[step])


def stream(source, count, index, crop):
    return set_up.train_batches(
        source,
        image_size=(8, 8),
        batch_size=8,
        seed=1,
        rows=set_up.share(8, index, count),
        **(OF_DEIT if crop == "timm" else EVERYTHING | {"crop": crop}),
    )


@pytest.mark.parametrize("fields", [EVERYTHING, OF_DEIT], ids=["paper", "DeiT"])
def test_worker_processes_change_nothing_and_report_what_is_broken(
    fields, tmp_path, caplog
):
    for i, data in enumerate(with_broken(12, 5).images):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}" / f"{i:02}.png").write_bytes(data)
    source = sources.open_source(f"folder:{tmp_path}", "all")
    none, two = (train(source, 10, workers=w, **fields) for w in (0, 2))
    assert_same(none, two)
    assert caplog.text.count("Broken image") == 2  # once in each run
    assert caplog.text.count(str(tmp_path / "1" / "05.png")) == 2
    passes = [
        list(set_up.eval_batches(source, image_size=(8, 8), batch_size=5, workers=w))
        for w in (0, 2)
    ]
    for none, two in zip(*passes, strict=True):
        assert_same(none, two)
    assert caplog.text.count(str(tmp_path / "1" / "05.png")) == 4


@pytest.mark.parametrize("fields", [EVERYTHING, OF_DEIT], ids=["paper", "DeiT"])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_starting_at_a_step_is_skipping_the_steps_before(k, fields):
    source = noise(21, 12, 10, 3)
    rows = train(source, 12, **fields)
    late = train(source, 12 - k, start_step=k, **fields)
    assert_same(late, {key: value[8 * k :] for key, value in rows.items()})


def test_an_epoch_has_every_example_once_and_no_two_are_alike():
    rows = train(noise(21, 12, 10, 3), 8, batch_size=8)
    labels = rows["label"][:63].reshape(3, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in labels)
    assert len({tuple(epoch) for epoch in labels}) == 3
    for label in range(21):  # the crops of one image, epoch by epoch
        first, second, third = rows["image"][:63][labels.reshape(-1) == label]
        assert (first != second).any()
        assert (second != third).any()


def test_a_batch_may_be_larger_than_the_data():
    rows = train(noise(5, 8, 8, 3), 1, batch_size=12)
    assert set(Counter(rows["label"].tolist()).values()) == {2, 3}


def test_the_seed_decides_order_and_augmentation():
    source = noise(21, 12, 10, 3)
    zero, again, one = (train(source, 3, seed=seed) for seed in (0, 0, 1))
    assert_same(zero, again)
    assert (zero["label"] != one["label"]).any()
    first = zero["image"][zero["label"] == 7][0]
    assert (first != one["image"][one["label"] == 7][0]).any()


def test_the_stream_is_the_recorded_one():
    # Recorded with grain 0.2.18; another stream would break the resuming of old runs.
    rows = train(noise(21, 8, 8, 3), 2, shift=1, **PLAIN)
    assert rows["label"].tolist() == [
        16,
        2,
        13,
        14,
        9,
        7,
        17,
        6,
        18,
        3,
        20,
        15,
        12,
        11,
        5,
        4,
    ]
    sums = rows["image"].astype(int).sum((1, 2, 3))
    assert sums[:4].tolist() == [22200, 19881, 21248, 18362]


def test_batches_have_the_documented_types():
    rows = train(noise(9, 12, 10, 3), 1, image_size=(6, 4))
    assert (rows["image"].dtype, rows["image"].shape) == (np.uint8, (8, 6, 4, 3))
    assert (rows["label"].dtype, rows["label"].shape) == (np.int32, (8,))
    assert rows.keys() == {"image", "label"}


def test_resize_keeps_an_image_of_the_right_size():
    source = noise(9, 8, 8, 3)
    rows = train(source, 3, **PLAIN)
    expected = np.stack([source.images[i] for i in rows["label"]])
    np.testing.assert_array_equal(rows["image"], expected)


def test_resize_takes_the_whole_image():
    source = noise(9, 12, 10, 3)
    for image, label in zip(*train(source, 1, **PLAIN).values(), strict=True):
        whole = image_ops.resize(source.images[label], (8, 8))
        np.testing.assert_array_equal(image, whole)


def test_a_resize_crop_is_any_part_of_the_resized_image_equally_often():
    # 8 pixels to 32: weights of an eighth, so that nothing is rounded.
    source = noise(2, 8, 8, 3)
    rows = train(source, 125, image_size=(28, 28), crop="resize_crop", flip=False)
    positions = list(itertools.product(range(5), repeat=2))
    drawn = np.zeros(25, int)
    for label in range(2):
        whole = image_ops.resize(source.images[label], (32, 32))
        parts = np.stack([whole[y : y + 28, x : x + 28] for y, x in positions])
        images = rows["image"][rows["label"] == label]
        found = (images[:, None] == parts).all((2, 3, 4))
        assert (found.sum(1) == 1).all()
        drawn += found.sum(0)
    # 1,000 draws, 40 each: chi-squared of 24 degrees exceeds 60 once in 15,000 times.
    assert ((drawn - 40) ** 2 / 40).sum() < 60, drawn


def test_a_resize_crop_is_the_papers_of_224_and_448():
    (image,) = noise(1, 375, 500, 3).images
    for side, square in ((224, 256), (448, 512)):
        whole = image_ops.resize(image, (square, square)).astype(int)
        rng = np.random.default_rng(1)
        found = pipeline.CROPS["resize_crop"](image, rng, (side, side))
        y, x = np.random.default_rng(1).integers(square - side + 1, size=2)
        gap = np.abs(found - whole[y : y + side, x : x + side])
        assert found.dtype == np.uint8
        assert gap.max() <= 1
        assert (gap > 0).mean() < 2e-4
    # A rectangle's box grows on both sides; its crop fills it.
    wide = pipeline.CROPS["resize_crop"](image, rng, (7, 14))
    assert wide.shape == (7, 14, 3)


def test_half_of_the_images_are_flipped():
    source = noise(9, 8, 8, 3)
    rows = train(source, 25, crop="resize")
    plain = np.stack([source.images[i] for i in rows["label"]])
    kept = (rows["image"] == plain).all((1, 2, 3))
    flipped = (rows["image"] == plain[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ flipped).all()
    assert 70 < flipped.sum() < 130


def test_shifts_are_uniform_in_both_directions():
    source = noise(1, 8, 8, 3)
    offsets = list(itertools.product((-1, 0, 1), repeat=2))
    possible = np.stack([image_ops.shift(source.images[0], *o) for o in offsets])
    images = train(source, 60, shift=1, **PLAIN)["image"]
    drawn = (images[:, None] == possible).all((2, 3, 4))
    assert (drawn.sum(1) == 1).all()
    assert drawn.sum(0).min() > 480 / 9 / 2


def test_timms_crop_and_operations_get_what_a_recipe_says(monkeypatch):
    crops, operations = [], []

    def crop(image, rng, **fields):
        crops.append(fields)
        return image

    def operate(image, rng, **fields):
        operations.append(fields)
        return image

    monkeypatch.setitem(pipeline.CROPS, "timm", crop)
    monkeypatch.setitem(pipeline.RANDAUGMENTS, "timm", operate)
    fields: dict[str, Any] = {"randaugment_layers": 3, "randaugment_magnitude": 7}
    fields |= {"randaugment_std": 0.25, "interpolation": "random", "min_area": 0.8}
    train(noise(8, 8, 8, 3), 1, crop="timm", randaugment="timm", **fields)
    assert crops[0] == {"size": (8, 8), "min_area": 0.8, "interpolation": "random"}
    assert operations[0] == {
        **{"num_layers": 3, "magnitude": 7, "std": 0.25},
        "interpolation": "random",
    }


def test_randaugment_is_the_last_step():
    source = noise(9, 8, 8, 3)
    plain = train(source, 2, **PLAIN)
    augmented = train(
        source, 2, randaugment_layers=2, randaugment_magnitude=15, **PLAIN
    )
    np.testing.assert_array_equal(plain["label"], augmented["label"])
    assert (plain["image"] != augmented["image"]).any((1, 2, 3)).sum() > 8


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_grey_images_get_three_channels(shape):
    source = noise(3, *shape)
    rows = train(source, 1, **PLAIN)
    for image, label in zip(rows["image"], rows["label"], strict=True):
        for channel in range(3):
            expected = source.images[label].reshape(8, 8)
            np.testing.assert_array_equal(image[..., channel], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"crop": "center"},
            "crop 'center' is unknown; try inception, timm, resize",
        ),
        ({"randaugment": "tim"}, "randaugment 'tim' is unknown; try timm, big_vision"),
        ({"interpolation": "rand"}, "interpolation 'rand' is unknown; try random, bi"),
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"rows": [7, 8]}, r"rows are \[7, 8\]; of a batch of 8 .* 0 \.\.\. 7"),
        ({"rows": []}, r"rows are \[\]; of a batch of 8 expected some"),
        ({"start_step": -1}, "start_step is -1"),
        ({"shift": -1}, "shift is -1"),
    ],
)
def test_impossible_arguments_are_refused_at_once(wrong, message):
    arguments = {"image_size": (8, 8), "batch_size": 8, "seed": 0} | wrong
    with pytest.raises(ValueError, match=message):
        set_up.train_batches(noise(9, 8, 8, 3), **arguments)


def test_the_next_good_image_stands_in_for_a_broken_one(caplog):
    source = with_broken(9, 3, 4, 8)
    rows = train(source, 9, batch_size=9, max_broken_images=3, **PLAIN)
    for epoch in rows["label"].reshape(9, 9):
        assert Counter(epoch.tolist()) == Counter([0, 0, 1, 2, 5, 5, 5, 6, 7])
    for image, label in zip(rows["image"], rows["label"], strict=True):
        expected = decoding.decode(source.images[label])
        np.testing.assert_array_equal(image, expected)
    assert rows.keys() == {"image", "label"}
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 3  # each once, in nine epochs
    for i in (3, 4, 8):
        assert f"Broken image <example {i}>: cannot decode 50 bytes" in caplog.text


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_more_broken_images_than_allowed_end_the_run_and_are_named(limit):
    source = with_broken(40, *range(0, 2 * limit + 2, 2))
    message = rf"max_broken_images={limit} .*(\n  <example \d>){{{limit + 1}}}\n"
    with pytest.raises(ValueError, match=message) as caught:
        train(source, 100, max_broken_images=limit)
    for i in range(0, 2 * limit + 2, 2):
        assert f"<example {i}>" in str(caught.value)
    train(source, 20, max_broken_images=limit + 1)


def test_a_row_of_broken_images_ends_the_run_too():
    with pytest.raises(ValueError, match="max_broken_images=2 "):
        train(with_broken(9, 3, 4, 5), 9, max_broken_images=2)
    with pytest.raises(ValueError, match="max_broken_images=50 "):
        train(with_broken(2, 0, 1), 1, max_broken_images=50)


def test_a_file_that_vanished_is_broken(caplog):
    source = Listed([*noise(7, 8, 8, 3).images, None])
    rows = train(source, 2, max_broken_images=1, **PLAIN)
    assert 7 not in rows["label"]
    assert "<example 7>: nothing at 7" in caplog.text


class FailsOnce(Listed):
    """Example 2 cannot be read the first time."""

    error: BaseException | None = None

    def __getitem__(self, index):
        if index == 2 and self.error:
            error, self.error = self.error, None
            raise error
        return super().__getitem__(index)


def test_only_unreadable_images_are_broken_not_faults_of_the_program(caplog):
    def train_once(source):
        # Threads read ahead: the first to meet the example may serve batch 4.
        return train(source, 8, **PLAIN)["label"]

    def evaluate_once(source):
        return list(set_up.eval_batches(source, image_size=(8, 8), batch_size=8))

    for run in (train_once, evaluate_once):
        source = FailsOnce(noise(7, 8, 8, 3).images)
        source.error = KeyError("a typo")
        with pytest.raises(KeyError):
            run(source)
        # Another source, as threads of the ended run may still read the first.
        source = FailsOnce(source.images)
        source.error = TimeoutError("the disk is slow")
        run(source)
    assert caplog.text.count("<example 2>: readable at a second try") == 2


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("n", "batch_size"), [(16, 8), (17, 8), (3, 8), (13, 4)])
def test_every_example_is_counted_once(n, batch_size, count):
    source = noise(n, 12, 10, 3)
    parts = [
        list(
            set_up.eval_batches(
                source,
                image_size=(8, 8),
                batch_size=batch_size,
                rows=set_up.share(batch_size, index, count),
            )
        )
        for index in range(count)
    ]
    assert {len(part) for part in parts} == {-(-n // batch_size)}
    seen = []
    for batches in zip(*parts, strict=True):  # one global batch
        batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        assert batch["image"].shape == (batch_size, 8, 8, 3)
        dtypes = {k: v.dtype for k, v in batch.items()}
        assert dtypes == {
            "image": np.uint8,
            "label": np.int32,
            "mask": np.bool_,
            "index": np.int32,
        }
        np.testing.assert_array_equal(batch["mask"], batch["index"] >= 0)
        np.testing.assert_array_equal(
            batch["label"], np.where(batch["mask"], batch["index"], 0)
        )
        assert not batch["image"][~batch["mask"]].any()
        for image, i in zip(batch["image"], batch["index"], strict=True):
            if i >= 0:
                whole = source.images[i]
                expected = image_ops.preprocess(whole, "big_vision", (8, 8))
                np.testing.assert_array_equal(image, expected)
        seen += batch["index"][batch["mask"]].tolist()
    assert seen == list(range(n))


@pytest.mark.parametrize("crop", pipeline.CROPS)
def test_timms_crop_is_of_pillows_pixels_and_the_others_of_tensorflows(
    crop, monkeypatch
):
    asked, decode = set(), decoding.decode
    # Threads of another test's stream may still decode their own images.
    own = [png(image ^ np.uint8(len(crop))) for image in noise(3, 8, 8, 3).images]

    def recorded(data, dct, *, exif):
        if data in own:
            asked.add(dct)
        return decode(data, dct, exif=exif)

    monkeypatch.setattr(decoding, "decode", recorded)
    train(Listed(own), 1, crop=crop)
    assert asked == {"accurate" if crop == "timm" else "fast"}


@pytest.mark.parametrize("protocol", image_ops.PROTOCOLS)
def test_evaluation_follows_its_protocol(protocol):
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), "uint8")
    data = io.BytesIO()
    Image.fromarray(photo).save(data, "jpeg")
    (batch,) = set_up.eval_batches(
        Listed([data.getvalue()]), image_size=(8, 12), batch_size=2, preprocess=protocol
    )
    decoded = decoding.decode(data.getvalue(), image_ops.dct_of(protocol))
    expected = image_ops.preprocess(decoded, protocol, (8, 12))
    assert batch["image"].dtype == expected.dtype
    np.testing.assert_array_equal(batch["image"][0], expected)


@dataclasses.dataclass
class Several(Listed):
    """Image i has the classes below i % 3: none, one or two; of as many as images."""

    multi_label = True

    def label(self, index):
        return np.arange(index % 3)


def test_several_labels_travel_as_one_bool_per_class():
    images = [*noise(7, 8, 8, 3).images, None]
    source = Several(images)
    (batch,) = set_up.eval_batches(source, image_size=(8, 8), batch_size=10)
    assert (batch["label"].dtype, batch["label"].shape) == (np.bool_, (10, 8))
    expected = [np.arange(8) < i % 3 for i in range(7)]
    np.testing.assert_array_equal(batch["label"][:7], expected)
    assert not batch["label"][7:].any()  # broken, and padding
    rows = train(source, 2, max_broken_images=1, **PLAIN)
    assert (rows["label"].dtype, rows["label"].shape) == (np.bool_, (16, 8))
    for image, label in zip(rows["image"], rows["label"], strict=True):
        (i,) = [i for i in range(7) if (images[i] == image).all()]
        np.testing.assert_array_equal(label, expected[i])


def test_an_unknown_protocol_is_refused_at_once():
    with pytest.raises(ValueError, match="big_vision"):
        set_up.eval_batches(
            noise(3, 8, 8, 3), image_size=(8, 8), batch_size=2, preprocess="bigvision"
        )


def test_a_broken_image_is_not_counted_but_reported(caplog):
    source = with_broken(9, 3, 8)
    batches = list(set_up.eval_batches(source, image_size=(8, 8), batch_size=4))
    rows = {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]}
    assert rows["index"].tolist() == [*range(9), -1, -1, -1]
    broken = ~rows["mask"] & (rows["index"] >= 0)
    assert rows["index"][broken].tolist() == [3, 8]
    assert not rows["image"][broken].any()
    assert not rows["label"][broken].any()
    assert caplog.text.count("Broken image") == 2
    assert "<example 3>" in caplog.text
    assert "<example 8>" in caplog.text


# --- Repeated augmentation ------------------------------------------------------------

N, BATCH, STEPS = 22, 10, 9  # four epochs, whose borders are within batches


def labels(repeats, **more):
    """The labels of the first steps, (step, row); label i belongs to image i."""
    fields = {"image_size": (8, 8), "batch_size": BATCH, "seed": 3, "repeats": repeats}
    stream = set_up.train_batches(noise(N, 8, 8, 3), **fields | PLAIN | more)
    steps = STEPS - more.get("start_step", 0)
    return np.stack([batch["label"] for batch in itertools.islice(stream, steps)])


def by_position(batches, repeats):
    """The rows in the order of their positions: row r of a batch is at `order[r]`."""
    order = [p for k in range(repeats) for p in range(k, BATCH, repeats)]
    found = np.empty_like(batches)
    found[:, order] = batches
    return found.ravel()


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_position_p_shows_image_p_over_repeats_of_its_epoch(repeats):
    once = labels(1).ravel()
    found = by_position(labels(repeats), repeats)
    for p, label in enumerate(found):
        epoch, place = divmod(p, N)
        assert label == once[epoch * N + place // repeats]


def test_an_epoch_keeps_its_length_and_the_next_one_is_shuffled_anew():
    found = by_position(labels(3), 3)[: 4 * N].reshape(4, N)
    for epoch in found:
        seen, counts = np.unique(epoch, return_counts=True)
        assert len(seen) == -(-N // 3)
        assert sorted(counts) == [N % 3 or 3] + [3] * (N // 3)
    assert len({tuple(epoch[::3]) for epoch in found}) == 4


@pytest.mark.parametrize("repeats", [2, 3])
def test_within_an_epoch_no_neighbours_of_a_batch_show_the_same_image(repeats):
    """Or mixup, which mixes neighbours, would mix an image with itself."""
    for batch in labels(repeats)[:2]:
        assert (batch != np.roll(batch, 1)).all()


def test_each_time_is_augmented_anew():
    source = noise(N, 40, 40, 3)
    fields = {"image_size": (16, 16), "batch_size": 12, "seed": 3, "repeats": 3}
    batch = next(set_up.train_batches(source, **fields, crop="timm"))
    assert len(np.unique(batch["label"])) == 4
    assert len(np.unique(batch["image"].reshape(12, -1), axis=0)) == 12


# --- Worker processes end with their parent -------------------------------------------

PARENT = """
import multiprocessing, signal, sys, threading, time
from mlp_mixer import recipe
from mlp_mixer.data import pipeline, sources


def tell(count):
    while len(children := multiprocessing.active_children()) < count:
        time.sleep(0.01)
    print(*(child.pid for child in children), flush=True)


def main(folder, when, how):
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    source = sources.open_source(f"folder:{folder}", "all")
    fields = dict(recipe.base().input)
    batches = pipeline.train_batches(
        source, image_size=(8, 8), batch_size=8, seed=0, **fields | {"workers": 2}
    )
    if when == "starting":
        threading.Thread(target=tell, args=[1]).start()
    else:
        next(batches)
        tell(2)
    if how == "raise":
        raise ValueError("an error")
    if how == "worker":
        multiprocessing.active_children()[0].kill()
    while not stop.is_set():
        next(batches)
    for _ in range(30):  # more than lie in buffers
        next(batches)
    # Its threads are at work when the process ends.
    next(pipeline.train_batches(
        source, image_size=(448, 448), batch_size=64, seed=0, **fields
    ))
    print("stopped")


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def end_a_parent(tmp_path, when, how):
    """What a process with workers said until it ended, and its exit status.

    Args:
        when: "running" or "starting", of the workers.
        how: "raise"; "worker", of which one is killed; or a signal: SIGKILL is sent to
            the parent alone, others to all of its processes, as by Ctrl-C and clusters.
    """
    shared = pathlib.Path("/dev/shm")  # of Linux
    before = {*shared.glob("psm_*")}
    for i, data in enumerate(with_broken(12).images):
        (tmp_path / "images" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "one" / f"{i}.png").write_bytes(data)
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path / "images", when, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert workers
        assert all(map(is_running, workers))
        if how == "SIGKILL":
            process.kill()
        elif how.startswith("SIG"):
            os.killpg(process.pid, signal.Signals[how])
        process.wait(60)
        assert wait_until(lambda: not any(map(is_running, workers)), 30)
        # Those of other programs come and go.
        blocks = {*shared.glob("psm_*")} - before
        assert wait_until(lambda: not {*shared.glob("psm_*")} & blocks, 30)
        return process.stdout.read(), process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    _, code = end_a_parent(tmp_path, "running", "SIGKILL")
    assert code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("running", "SIGINT"),
        *(
            pytest.param(when, how, marks=pytest.mark.slow)
            for when, how in [
                ("running", "SIGTERM"),
                ("starting", "SIGINT"),
                ("starting", "SIGTERM"),
            ]
        ),
    ],
)
def test_what_stops_all_processes_leaves_the_parent_its_batches(when, how, tmp_path):
    """And it ends with 0, although threads of its own still decode."""
    said, code = end_a_parent(tmp_path, when, how)
    assert (said, code) == ("stopped\n", 0)


@pytest.mark.slow
def test_workers_that_start_end_when_their_parent_is_killed(tmp_path):
    end_a_parent(tmp_path, "starting", "SIGKILL")


@pytest.mark.slow
def test_an_error_ends_the_workers_and_is_all_that_is_said(tmp_path):
    said, code = end_a_parent(tmp_path, "running", "raise")
    assert code == 1
    assert said.endswith("ValueError: an error\n")
    assert said.count("Traceback") == 1


@pytest.mark.slow
def test_the_end_of_a_worker_alone_is_an_error_that_says_why(tmp_path):
    said, code = end_a_parent(tmp_path, "running", "worker")
    assert code == 1
    assert "ChildProcessError: A process that decodes images ended" in said
    assert "exit code -9" in said
    assert "fewer input.workers" in said
