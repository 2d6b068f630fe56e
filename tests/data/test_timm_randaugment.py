"""What timm's RandAugment draws. Its pixels are compared in test_goldens.py."""

import math

import numpy as np
import PIL.Image
import pytest
from golden import cases

from mlp_mixer.data import image_ops, randaugment, timm_randaugment

RECORDED = cases.load()[0]["draws"]
DRAWS = 10_000
RECIPE = {"num_layers": 2, "magnitude": 9, "std": 0.5, "interpolation": "random"}
# Two samples of n and m from one law differ by more than this once in 10^6 times.
LIMIT = math.sqrt(
    math.log(2e6) * (1 / DRAWS + 1 / cases.TIMM_DRAWS) / 2,
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def recorder(drawn, name):
    op = timm_randaugment.OPS[name]

    def record(picture, magnitude, negate, interpolation):
        sign = -1 if negate else 1
        argument = op.argument and op.argument(magnitude / 10, sign)
        drawn.append((name, argument, int(interpolation)))
        return picture

    return record


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn while nothing is applied: (op, argument, filter) each time."""
    found: list = []
    for name in timm_randaugment.OPS:
        monkeypatch.setitem(timm_randaugment.OPS, name, recorder(found, name))
    return found


def shares(counts):
    return np.array(counts) / np.sum(counts)


def test_ops_strengths_and_filters_are_drawn_as_often_as_by_timm(drawn):
    rng, image, counts = np.random.default_rng(0), noise(2, 2, 3), []
    for _ in range(DRAWS):
        before = len(drawn)
        timm_randaugment.randaugment(image, rng, **RECIPE)
        counts.append(len(drawn) - before)
    found = cases.law(counts, drawn)
    assert found["ops"].keys() == RECORDED["ops"].keys()
    for law in ("applied", "ops", "filters"):
        ours, theirs = (
            shares([*of.values()] if isinstance(of, dict) else of)
            for of in (found[law], RECORDED[law])
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT)
    # About a third of what is drawn has a strength: the geometric ops.
    gap = np.cumsum(shares(found["strengths"]) - shares(RECORDED["strengths"]))
    assert np.abs(gap).max() < math.sqrt(3) * LIMIT


def test_the_ops_are_timms_fifteen_of_increasing_strength():
    assert ", ".join(timm_randaugment.OPS) == (
        "AutoContrast, Equalize, Invert, Rotate, PosterizeIncreasing, "
        "SolarizeIncreasing, SolarizeAdd, ColorIncreasing, ContrastIncreasing, "
        "BrightnessIncreasing, SharpnessIncreasing, ShearX, ShearY, TranslateXRel, "
        "TranslateYRel"
    )


def test_magnitudes_are_clipped_to_ten_and_without_std_they_are_one(drawn):
    rng, image = np.random.default_rng(0), noise(2, 2, 3)
    for magnitude, std, least, most in ((9, 0, 9, 9), (10, 0, 10, 10), (9, 10, 0, 10)):
        drawn.clear()
        for _ in range(1000):
            timm_randaugment.randaugment(image, rng, 2, magnitude, std, "bicubic")
        rotated = [abs(argument) / 3 for name, argument, _ in drawn if name == "Rotate"]
        assert min(rotated) == pytest.approx(least, abs=0.05)
        assert max(rotated) == pytest.approx(most)
        assert {chosen for *_, chosen in drawn} == {image_ops.Filter.BICUBIC}


def test_at_magnitude_ten_posterize_gives_black():
    op = timm_randaugment.OPS["PosterizeIncreasing"]
    picture = PIL.Image.fromarray(noise(5, 4, 3))
    assert not np.array(op(picture, 10.0, False, image_ops.Filter.BICUBIC)).any()


def test_the_same_generator_gives_the_same_pixels_and_leaves_the_image():
    image = noise(20, 30, 3)
    kept = image.copy()
    first, second = (
        [timm_randaugment.randaugment(image, rng, **RECIPE) for _ in range(20)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, kept)
    changed = [(made != image).any() for made in first]
    assert 8 < sum(changed) < 20  # a quarter stays, and what is constant
    assert all(made.dtype == np.uint8 and made.shape == image.shape for made in first)


def test_it_is_another_randaugment_than_the_authors():
    shared = set(timm_randaugment.OPS) & set(randaugment.OPS)
    assert shared == {
        *("AutoContrast", "Equalize", "Invert", "Rotate", "SolarizeAdd"),
        *("ShearX", "ShearY"),
    }
    image = noise(32, 32, 3)
    for name in ("Rotate", "ShearX", "ShearY"):
        picture = PIL.Image.fromarray(image)
        theirs = timm_randaugment.OPS[name](picture, 9, False, image_ops.Filter.BICUBIC)
        assert (np.array(theirs) != randaugment.OPS[name](image, 9)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"magnitude": 10.1}, r"magnitude is 10.1; it must be in 0\.\.10"),
        ({"magnitude": -1}, r"magnitude is -1; it must be in 0\.\.10"),
        ({"std": -0.5}, r"std is -0.5; it must be in 0\.\.10"),
        ({"std": 100}, r"std is 100; it must be in 0\.\.10"),
        ({"num_layers": -1}, "num_layers is -1; it must be at least 0"),
    ],
)
def test_impossible_strengths_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        timm_randaugment.randaugment(
            noise(9, 9, 3), np.random.default_rng(0), **RECIPE | wrong
        )
