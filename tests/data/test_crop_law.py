"""Our random crops have the distributions recorded in tests/golden.

TensorFlow's, of the Inception crop, and timm's.
"""

import collections
import functools
import math

import numpy as np
import pytest
from golden import cases

from mlp_mixer.data import image_ops

_, ARRAYS = cases.load()


def limit(n):
    """By more than this n draws of ours differ from the recorded once in 10^6 times.

    2·exp(-2·d²·n·m/(n + m)) is Kolmogorov's tail.
    """
    return math.sqrt(math.log(2e6) * (1 / n + 1 / cases.CROP_DRAWS) / 2)


LIMIT = limit(cases.CROP_DRAWS)


def distances(boxes, shape, kind="crop"):
    """The Kolmogorov-Smirnov distances to recorded draws, quantity by quantity.

    Args:
      boxes: our draws.
      shape: height and width of the image.
      kind: "crop", TensorFlow's draws, or "timm_crop".
    """
    found = {}
    for name, counts in cases.crop_histograms(np.array(boxes), shape).items():
        recorded = ARRAYS[f"{kind}/{shape}/{name}"].astype(int)
        assert recorded.sum() == cases.CROP_DRAWS
        assert counts.sum(dtype=int) == len(boxes)
        gap = np.cumsum(counts) / len(boxes) - np.cumsum(recorded) / cases.CROP_DRAWS
        found[name] = np.abs(gap).max()
    return found


@functools.cache
def drawn(shape):
    rng = np.random.default_rng(2021)
    return [image_ops.inception_crop_box(rng, *shape) for _ in range(cases.CROP_DRAWS)]


@pytest.mark.parametrize("shape", cases.CROP_SHAPES)
def test_crops_are_distributed_as_tensorflows(shape):
    found = distances(drawn(shape), shape)
    assert found.keys() == {"y", "x", "height", "width", "area"}
    assert max(found.values()) < LIMIT, found


def area_uniform_box(rng, height, width):
    """The crop of PyTorch's libraries, with our ranges: the area is uniform."""
    while True:
        area = rng.uniform(0.05, 1) * height * width
        ratio = math.exp(rng.uniform(math.log(0.75), math.log(1.33)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return (
                int(rng.integers(height - h + 1)),
                int(rng.integers(width - w + 1)),
                h,
                w,
            )


@pytest.mark.parametrize("shape", cases.CROP_SHAPES[:2])
def test_an_area_uniform_crop_would_be_noticed(shape):
    rng = np.random.default_rng(2021)
    boxes = [area_uniform_box(rng, *shape) for _ in range(cases.CROP_DRAWS)]
    found = distances(boxes, shape)
    assert min(found["height"], found["width"], found["area"]) > 8 * LIMIT, found


def test_a_height_off_by_two_percent_would_be_noticed():
    shape = cases.CROP_SHAPES[0]
    wrong = [(y, x, min(h + h // 50, shape[0]), w) for y, x, h, w in drawn(shape)]
    assert distances(wrong, shape)["height"] > LIMIT


@pytest.mark.parametrize(
    ("shape", "draws"),
    [*zip(cases.TIMM_CROP_SHAPES, (20_000, 20_000, 4000), strict=True)],
)
def test_timms_crops_are_distributed_as_timms(shape, draws):
    rng = np.random.default_rng(2021)
    boxes = [image_ops.timm_crop_box(rng, *shape) for _ in range(draws)]
    found = distances(boxes, shape, "timm_crop")
    assert max(found.values()) < limit(draws), found


def test_the_inception_crop_is_not_timms():
    shape = cases.CROP_SHAPES[0]
    found = distances(drawn(shape), shape, "timm_crop")
    assert min(found["height"], found["width"], found["area"]) > 8 * LIMIT, found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((30, 2000), (0, 980, 30, 40)), ((2000, 30), (980, 0, 40, 30))],
)
def test_of_a_line_timms_crop_is_the_middle(shape, expected):
    counts = collections.Counter(
        image_ops.timm_crop_box(np.random.default_rng(seed), *shape)
        for seed in range(200)
    )
    assert counts.most_common(1)[0][0] == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 2), (7, 5), (1, 300)])
def test_tiny_images_give_legal_crops_of_timm(shape):
    rng = np.random.default_rng(0)
    for _ in range(300):
        y, x, h, w = image_ops.timm_crop_box(rng, *shape)
        assert 0 <= y < y + h <= shape[0]
        assert 0 <= x < x + w <= shape[1]


def test_timms_crops_have_at_least_the_area_that_is_asked_for():
    rng = np.random.default_rng(0)
    areas = [
        h * w / 400**2
        for _, _, h, w in (
            image_ops.timm_crop_box(rng, 400, 400, 0.6) for _ in range(900)
        )
    ]
    assert 0.595 < min(areas) < 0.61


def test_timms_crops_reach_every_edge():
    rng = np.random.default_rng(0)
    boxes = [image_ops.timm_crop_box(rng, 9, 11) for _ in range(300)]
    for start, n, side in ((0, 2, 9), (1, 3, 11)):
        parts = [box for box in boxes if box[n] < side]
        assert min(box[start] for box in parts) == 0
        assert max(box[start] + box[n] for box in parts) == side
