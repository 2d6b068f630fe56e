"""Our random crops have the distribution of TensorFlow's, recorded in tests/golden."""

import functools
import math

import numpy as np
import pytest
from golden import cases

from mlp_mixer.data import image_ops

_, ARRAYS = cases.load()

# Two samples of n from one law differ by more than this once in 10^6 times:
# 2·exp(-n·d²) is Kolmogorov's tail for equal sizes.
LIMIT = math.sqrt(math.log(2e6) / cases.CROP_DRAWS)


def distances(boxes, shape):
    """The Kolmogorov-Smirnov distances to TensorFlow's draws, quantity by quantity."""
    found = {}
    for name, counts in cases.crop_histograms(np.array(boxes), shape).items():
        recorded = ARRAYS[f"crop/{shape}/{name}"].astype(int)
        assert recorded.sum() == counts.sum(dtype=int) == cases.CROP_DRAWS
        gap = np.cumsum(counts.astype(int)) - np.cumsum(recorded)
        found[name] = np.abs(gap).max() / cases.CROP_DRAWS
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
