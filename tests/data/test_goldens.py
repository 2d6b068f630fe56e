"""Our pixels are the reference's: against tests/golden, of TensorFlow and Pillow."""

import numpy as np
import pytest
from golden import cases

from mlp_mixer.data import decoding, image_ops, randaugment

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


@pytest.mark.parametrize("size", cases.PROTOCOL_SIZES)
@pytest.mark.parametrize("protocol", image_ops.PROTOCOLS)
@pytest.mark.parametrize("name", cases.PROTOCOL_PHOTOS)
def test_a_protocol_gives_the_recorded_pixels(name, protocol, size):
    image = decoded(name, "accurate" if protocol == "timm" else "fast")
    sides = (size, size) if isinstance(size, int) else size
    result = image_ops.preprocess(image, protocol, sides)
    assert_recorded("protocol", f"{name}/{protocol}/{size}", result)


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
