"""Our pixels are the reference's: against tests/golden, of TensorFlow and timm."""

import itertools
from typing import Any

import numpy as np
import PIL.Image
import pytest
from golden import cases

from mlp_mixer.data import decoding, image_ops, randaugment, timm_randaugment

SUMS, ARRAYS = cases.load()


def decoded(name, dct="fast"):
    return decoding.decode(cases.PHOTOS[name], dct)


def assert_recorded(kind, key, image):
    """The recorded sample of pixels names the place; the checksum covers the rest."""
    np.testing.assert_array_equal(cases.grid(image), ARRAYS[f"{kind}/{key}"])
    assert cases.checksum(image) == SUMS[kind][key]


@pytest.mark.parametrize("dct", cases.DCTS)
@pytest.mark.parametrize("name", cases.PHOTOS)
def test_a_photo_decodes_to_tensorflows_pixels(name, dct):
    image = decoded(name, dct)
    np.testing.assert_array_equal(cases.grid(image), ARRAYS[f"decode/{name}/{dct}"])
    assert cases.checksum(image) == SUMS["decode"][name][dct]


def assert_resized(resize, what, size):
    sides = (size, size) if isinstance(size, int) else size
    image = (
        decoded(what)
        if isinstance(what, str)
        else cases.part(decoded("astronaut"), *what)
    )
    method = "bilinear" if resize is image_ops.resize else "area"
    key = f"{method}/{what}/{size}"
    exact = cases.grid(resize(image.astype(np.float32), sides))
    np.testing.assert_allclose(exact, ARRAYS[f"resize/{key}"], rtol=0, atol=0.01)
    assert cases.checksum(resize(image, sides)) == SUMS["resize"][key]


@pytest.mark.parametrize(
    ("what", "size"), [(what, size) for what, sizes in cases.BILINEAR for size in sizes]
)
def test_bilinear_is_tensorflows(what, size):
    assert_resized(image_ops.resize, what, size)


@pytest.mark.parametrize(
    ("what", "side"), [(what, side) for what, sides in cases.AREA for side in sides]
)
def test_area_is_tensorflows(what, side):
    assert_resized(image_ops.resize_small, what, side)


RECORDED = [key.split("/") for key in SUMS["protocol"]]


@pytest.mark.parametrize(("name", "protocol", "size"), RECORDED)
def test_a_protocol_gives_the_recorded_pixels(name, protocol, size):
    image = decoded(name, image_ops.dct_of(protocol))
    sides = [int(side) for side in size.strip("()").split(",")]
    result = image_ops.preprocess(image, protocol, (sides[0], sides[-1]))
    assert_recorded("protocol", f"{name}/{protocol}/{size}", result)


def test_every_protocol_is_recorded_of_photographs_at_each_size():
    for protocol in image_ops.PROTOCOLS:
        sizes = [*cases.PROTOCOL_SIZES]
        photos = cases.PROTOCOL_PHOTOS
        if protocol in cases.TIMM_PROTOCOLS:
            sizes += cases.TIMM_RECTANGLES
            photos = cases.TIMM_PHOTOS
        expected = {(name, protocol, f"{size}") for name in photos for size in sizes}
        assert expected <= set(map(tuple, RECORDED))


@pytest.mark.parametrize("key", SUMS["timm_crop"])
def test_timms_crop_gives_the_recorded_pixels(key):
    name, size, interpolation = key.split("/")
    image = decoded(name, image_ops.dct_of("timm"))
    recorded = SUMS["timm_crop"][key]
    result = image_ops.timm_crop_and_resize(
        image,
        tuple(recorded["box"]),
        (int(size),) * 2,
        PIL.Image.Resampling[interpolation],
    )
    assert cases.checksum(result) == recorded["sum"]


IMAGES = cases.augmented_images(decoded("astronaut"), decoded("coffee-444"))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", randaugment.OPS)
def test_an_op_of_randaugment_gives_tensorflows_pixels(name, image):
    where = {"centre": cases.CUTOUT_CENTRE} if name == "Cutout" else {}
    for magnitude in cases.MAGNITUDES:
        for sign in (1, -1) if name in cases.SIGNED else (1,):
            result = randaugment.OPS[name](
                IMAGES[image], magnitude, negate=sign < 0, **where
            )
            recorded = SUMS["randaugment"][f"{image}/{name}/{magnitude}/{sign}"]
            assert cases.checksum(result) == recorded, (magnitude, sign)


TIMMS = cases.augmented_images(*(decoded(n, "accurate") for n in cases.AUGMENTED))
LEVELS = [(m, sign) for m in cases.TIMM_MAGNITUDES for sign in "+-"]


@pytest.mark.parametrize("name", timm_randaugment.OPS)
def test_an_op_of_timms_randaugment_gives_timms_pixels(name):
    op, sums = timm_randaugment.OPS[name], SUMS["timm_randaugment"]
    for image, (magnitude, sign) in itertools.product(TIMMS, LEVELS):
        if (name, magnitude) == ("PosterizeIncreasing", 10.0):
            continue  # of which timm makes an error
        # What a sign or a filter does not change is there once.
        first = f"{name}/{image}/{magnitude}+/BILINEAR"
        for chosen in ("BILINEAR", "BICUBIC"):
            picture = PIL.Image.fromarray(TIMMS[image])
            made = op(picture, magnitude, sign == "-", PIL.Image.Resampling[chosen])
            where = f"{name}/{image}/{magnitude}{sign}/{chosen}"
            assert cases.checksum(np.array(made)) == sums.get(where, sums[first]), where


def test_timms_levels_are_the_recorded_arguments():
    assert SUMS["arguments"].keys() == {
        name for name, op in timm_randaugment.OPS.items() if op.argument
    }
    for name, recorded in SUMS["arguments"].items():
        argument: Any = timm_randaugment.OPS[name].argument
        found = {
            f"{m}{sign}": argument(m / 10, -1 if sign == "-" else 1)
            for m, sign in LEVELS
        }
        assert found == recorded
