"""The same seed, the same pixels: on photographs, all augmentation included."""

import itertools

import numpy as np
import pytest
import set_up
from golden import cases

from mlp_mixer.data import sources

EVERYTHING = {
    "image_size": (48, 48),
    "batch_size": 8,
    "crop": "inception",
    "flip": True,
    "randaugment_layers": 2,
    "randaugment_magnitude": 15,
}
STEPS = 5  # four epochs of 11 photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Real files, CMYK, grey, progressive and a broken one among them."""
    root = tmp_path_factory.mktemp("photos")
    for i, (name, data) in enumerate(cases.PHOTOS.items()):
        (root / f"{i}").mkdir()
        (root / f"{i}" / f"{name}.jpg").write_bytes(data)
    for i, name in enumerate(["16-bit RGB", "20000 wide", "palette"]):
        (root / f"{i}" / f"{name}.png").write_bytes(cases.odd_images()[name][0])
    (root / "3" / "cut off.jpg").write_bytes(cases.PHOTOS["coffee-444"][:2000])
    return sources.open_source(f"folder:{root}", "all")


def batches(source, seed=7, **kwargs):
    stream = set_up.train_batches(source, seed=seed, **(EVERYTHING | kwargs))
    taken = list(itertools.islice(stream, STEPS))
    return {k: np.stack([batch[k] for batch in taken]) for k in taken[0]}


@pytest.fixture(scope="module")
def reference(photos):
    return batches(photos)


def assert_same(found, expected):
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize(("count", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_batches_do_not_depend_on_processes_and_workers(
    count, workers, photos, reference
):
    parts = [
        batches(photos, workers=workers, rows=set_up.share(8, i, count))
        for i in range(count)
    ]
    rows = {k: np.concatenate([part[k] for part in parts], axis=1) for k in reference}
    assert_same(rows, reference)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_late_start_gives_the_same_rows_to_each_process(workers, photos, reference):
    late = batches(photos, workers=workers, start_step=2, rows=set_up.share(8, 1, 2))
    assert_same(
        {k: v[: STEPS - 2] for k, v in late.items()},
        {k: v[2:, 4:] for k, v in reference.items()},
    )


def test_another_seed_gives_other_batches(photos, reference):
    other = batches(photos, seed=8)
    assert (other["label"] != reference["label"]).any()
    for label in range(4, 8):  # classes of one photograph
        here, there = (
            {image.tobytes() for image in rows["image"][rows["label"] == label]}
            for rows in (reference, other)
        )
        assert here
        assert there - here


@pytest.mark.parametrize("only", ["crop", "flip", "randaugment"])
def test_each_epoch_augments_anew(only, tmp_path):
    plain = EVERYTHING | {"crop": "resize", "flip": False, "randaugment_layers": 0}
    key = {"randaugment": "randaugment_layers"}.get(only, only)
    # Of one photograph each row is another epoch.
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "photo.jpg").write_bytes(cases.PHOTOS["astronaut"])
    one = sources.open_source(f"folder:{tmp_path}", "all")
    found = batches(one, **(plain | {key: EVERYTHING[key]}))["image"]
    distinct = len(np.unique(found.reshape(STEPS * 8, -1), axis=0))
    # A magnitude of 15 moves 48 pixels out of sight, and many pairs of ops are alike.
    least = {"crop": 39, "flip": 2, "randaugment": 20}[only]
    assert least <= distinct <= (2 if only == "flip" else STEPS * 8)


def test_without_augmentation_epochs_are_alike(photos):
    plain = EVERYTHING | {"crop": "resize", "flip": False, "randaugment_layers": 0}
    found = batches(photos, **plain)
    images = found["image"].reshape(STEPS * 8, -1)
    labels = found["label"].ravel()
    for label in range(4, 8):  # classes of one photograph
        assert len(np.unique(images[labels == label], axis=0)) == 1
