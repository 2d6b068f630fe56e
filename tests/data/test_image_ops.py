import base64
import collections
import io
import math
import zlib

import numpy as np
import PIL.Image
import pytest
import simplejpeg

from mlp_mixer.data import decoding, image_ops


def photo(height, width):
    """Smooth slopes plus noise, in integers only: the same on every machine."""
    y, x, c = np.ogrid[:height, :width, :3]
    smooth = [
        40 + (150 * x + 60 * y) // (height + width),
        200 - 150 * y // height + 0 * x,
        60 + (480 * x * (width - x)) // (width * width) + y // 4,
    ]
    noise = ((x * 73856093) ^ (y * 19349663) ^ (c * 83492791)) // 8 % 25 - 12
    return np.clip(np.concatenate(smooth, axis=2) + noise, 0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pillow(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


# --- decode ---------------------------------------------------------------------------

JPEGS = {
    "4:2:0": dict(quality=80),
    "4:2:2": dict(subsampling=1),
    "4:4:4": dict(quality=95, subsampling=0),
    "progressive": dict(progressive=True),
}

# photo(16, 24) as a 4:2:0 JPEG, and the checksums of what TensorFlow 2.21 decodes from
# it with its default DCT and with INTEGER_ACCURATE.
TINY_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwz"
    "Oko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAARCAAQABgDASIAAhEBAxEB/8QA"
    "GAAAAwEBAAAAAAAAAAAAAAAAAAQFAQb/xAAfEAACAgEEAwAAAAAAAAAAAAAAAQQRAgMUITEygaH/xAAV"
    "AQEBAAAAAAAAAAAAAAAAAAAEBf/EABwRAAIBBQEAAAAAAAAAAAAAAAAEIgECAxEhMf/aAAwDAQACEQMR"
    "AD8A3Sk31lQxhKVW3RzujJ47Q1hKteXoUuvABYn0uOSuaySAjbr6BOZXmUcaddeH/9k="
)


@pytest.mark.parametrize(
    ("dct", "expected"), [("fast", 0x7129CEF7), ("accurate", 0x45E4C3E3)]
)
def test_decoded_pixels_are_tensorflows(dct, expected):
    assert crc(decoding.decode(TINY_JPEG, dct)) == expected


def test_fast_is_the_default_dct():
    assert crc(decoding.decode(TINY_JPEG)) == 0x7129CEF7


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_the_accurate_dct_equals_pillow(options):
    data = encode(photo(71, 53), **options)
    np.testing.assert_array_equal(decoding.decode(data, "accurate"), pillow(data))


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_the_fast_dct_stays_within_18_levels_of_pillow(options):
    data = encode(photo(71, 53), **options)
    gap = np.abs(decoding.decode(data).astype(int) - pillow(data))
    assert 0 < gap.max() <= 18


def test_an_unknown_dct_lists_both():
    with pytest.raises(ValueError, match=r"'slow'.*'fast' or 'accurate'"):
        decoding.decode(TINY_JPEG, "slow")


@pytest.mark.parametrize("dct", ["fast", "accurate"])
def test_a_grey_jpeg_has_three_equal_channels(dct):
    data = encode(photo(40, 30)[..., 0])
    image = decoding.decode(data, dct)
    assert image.shape == (40, 30, 3)
    assert np.abs(image.astype(int) - pillow(data)).max() <= (2 if dct == "fast" else 0)
    np.testing.assert_array_equal(image, image[..., :1].repeat(3, axis=2))


def test_a_cmyk_jpeg_is_within_one_level_of_pillow():
    data = encode(PIL.Image.fromarray(photo(40, 30)).convert("CMYK"), quality=95)
    gap = decoding.decode(data, "accurate").astype(int) - pillow(data)
    assert np.abs(gap).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_content_decides_the_format(kind):
    # Nothing but the bytes is known: a PNG named .JPEG reads as what it is.
    image = photo(40, 30)
    data = encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoding.decode(data), image)


def test_a_16_bit_png_keeps_the_high_byte():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = decoding.decode(encode(levels, "PNG"))
    np.testing.assert_array_equal(image[..., 1], (levels >> 8).astype(np.uint8))


def test_alpha_is_dropped():
    image = photo(40, 30)
    rgba = np.dstack([image, image[..., 0]])
    np.testing.assert_array_equal(decoding.decode(encode(rgba, "PNG")), image)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_a_palette_gives_its_colours(transparency):
    image = PIL.Image.fromarray(photo(40, 30)).convert("P")
    options = {} if transparency is None else {"transparency": transparency}
    data = encode(image, "PNG", **options)
    np.testing.assert_array_equal(decoding.decode(data), image.convert("RGB"))


def test_an_animation_gives_its_first_frame():
    frames = [PIL.Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decoding.decode(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("kept", [30, 0.5, -5, -2, -1])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_raises(kind, kept):
    data = encode(photo(71, 53), kind)
    if kind == "PNG" and kept in (-5, -2, -1):
        kept -= 40  # the end chunk holds no pixels, and Pillow does not ask for it
    cut = data[: int(len(data) * kept) if kept == 0.5 else kept]
    with pytest.raises(
        ValueError, match=rf"^cannot decode {len(cut)} bytes.*$"
    ) as info:
        decoding.decode(cut)
    assert "\n" not in str(info.value)


def test_a_jpeg_with_lost_scan_data_raises():
    with pytest.raises(ValueError, match="premature end of data segment"):
        decoding.decode(TINY_JPEG[:-20] + b"\xff\xd9")


def test_stray_bytes_between_jpeg_segments_are_read_over():
    at = TINY_JPEG.index(b"\xff\xdb")
    data = TINY_JPEG[:at] + b"\x00" * 3 + TINY_JPEG[at:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    expected = decoding.decode(TINY_JPEG, "accurate")
    np.testing.assert_array_equal(decoding.decode(data, "accurate"), expected)


def test_bytes_after_the_end_of_a_jpeg_change_nothing():
    assert crc(decoding.decode(TINY_JPEG + b"\x00" * 9)) == 0x7129CEF7


@pytest.mark.parametrize("data", [b"", b"hello world", b"\xff\xd8\xff"])
def test_what_is_no_image_raises(data):
    with pytest.raises(ValueError, match=f"cannot decode {len(data)} bytes"):
        decoding.decode(data)


# --- resize ---------------------------------------------------------------------------

# The checksums are of what tf.image.resize of TensorFlow 2.21 gives on a CPU, clipped
# and cast to uint8.


@pytest.mark.parametrize(
    ("size", "expected"), [((96, 120), 0xBB3AFE15), ((257, 320), 0x016FD2F5)]
)
def test_bilinear_equals_tensorflow(size, expected):
    assert crc(image_ops.resize(photo(180, 224), size)) == expected


@pytest.mark.parametrize(("size", "expected"), [(96, 0xDD39237E), (257, 0x3AB54E75)])
def test_area_equals_tensorflow(size, expected):
    assert crc(image_ops.resize_small(photo(180, 224), (size, size))) == expected


@pytest.mark.parametrize("size", [(5, 40), (31, 9), (17, 23), (1, 1), (50, 60)])
def test_bilinear_equals_a_loop_over_pixels(size):
    image = photo(17, 23).astype(np.float32)
    expected = np.zeros((*size, 3))
    for y, x in np.ndindex(size):
        fy = np.clip((y + 0.5) * 17 / size[0] - 0.5, 0, 16)
        fx = np.clip((x + 0.5) * 23 / size[1] - 0.5, 0, 22)
        y0, x0 = math.floor(fy), math.floor(fx)
        for dy in (0, 1):
            for dx in (0, 1):
                weight = abs(1 - dy - (fy - y0)) * abs(1 - dx - (fx - x0))
                expected[y, x] += weight * image[min(y0 + dy, 16), min(x0 + dx, 22)]
    result = image_ops.resize(image, size)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("size", [5, 13, 17, 30])
def test_area_equals_a_loop_over_overlaps(size):
    image = photo(17, 23).astype(np.float32)
    result = image_ops.resize_small(image, (size, size))
    height, width = result.shape[:2]
    expected = np.zeros(result.shape)
    for y, x in np.ndindex(height, width):
        for i, j in np.ndindex(17, 23):
            down = min(i + 1, (y + 1) * 17 / height) - max(i, y * 17 / height)
            across = min(j + 1, (x + 1) * 23 / width) - max(j, x * 23 / width)
            expected[y, x] += max(down, 0) * max(across, 0) * image[i, j]
    expected /= 17 / height * 23 / width
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_area_is_the_box_average_for_integer_factors(factor):
    image = photo(64, 96)
    boxes = image.reshape(64 // factor, factor, 96 // factor, factor, 3)
    # A power of two divides exactly: the integer division truncates alike.
    expected = boxes.sum(axis=(1, 3), dtype=int) // factor**2
    result = image_ops.resize_small(image, (64 // factor,) * 2)
    np.testing.assert_array_equal(result, expected)


METHODS = {
    "bilinear": image_ops.resize,
    "area": image_ops.resize_small,
}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_its_own_size_leaves_an_image_alone(method, dtype):
    image = photo(31, 47).astype(dtype)
    result = method(image, (31, 47))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize("size", [(7, 9), (40, 60), (31, 80)])
def test_bilinear_keeps_a_constant_image(size):
    image = np.full((31, 47, 3), 201, np.uint8)
    expected = np.full((*size, 3), 201)
    np.testing.assert_array_equal(image_ops.resize(image, size), expected)


@pytest.mark.parametrize("size", [7, 40, 95])
def test_area_keeps_a_constant_image(size):
    image = np.full((31, 47, 1), 201, np.float32)
    result = image_ops.resize_small(image, (size, size))
    np.testing.assert_allclose(result, 201, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_uint8_is_the_truncated_float(method):
    image = photo(31, 47)
    exact = method(image.astype(np.float32), (20, 50))
    assert np.any(exact % 1 > 0.5)
    np.testing.assert_array_equal(method(image, (20, 50)), exact.astype(np.uint8))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((375, 500), (256, 256), (256, 341)),  # 341.33
        ((500, 375), (256, 256), (341, 256)),
        ((2, 3), (1, 1), (1, 2)),  # 1.5: half to even
        ((2, 5), (1, 1), (1, 2)),  # 2.5: half to even
        ((100, 400), (30, 160), (40, 160)),
        ((100, 400), (50, 160), (50, 200)),
    ],
)
def test_the_shorter_side_gets_the_size(shape, size, expected):
    image = np.zeros((*shape, 3), np.uint8)
    assert image_ops.resize_small(image, size).shape[:2] == expected


def test_an_empty_size_is_refused():
    with pytest.raises(ValueError, match=r"size is \(0, 0\); each side must"):
        image_ops.resize(photo(9, 9), (0, 0))


# --- crop, flip, shift ----------------------------------------------------------------


def test_a_crop_that_leaves_the_image_says_what_to_do():
    size = (3, 3)
    with pytest.raises(ValueError, match=r"16x16.*image of 10x20.*resize it first"):
        image_ops.crop_and_resize(photo(10, 20), (0, 0, 16, 16), size)
    with pytest.raises(ValueError, match=r"5x5 at \(6, 0\) from an image of 10x20"):
        image_ops.crop_and_resize(photo(10, 20), (6, 0, 5, 5), size)
    with pytest.raises(ValueError, match=r"5x5 at \(-1, 0\)"):
        image_ops.crop_and_resize(photo(10, 20), (-1, 0, 5, 5), size)


def test_crop_and_resize_sees_only_the_crop():
    image = photo(40, 60)
    box, crop = (3, 11, 20, 31), image[3:23, 11:42]
    np.testing.assert_array_equal(
        image_ops.crop_and_resize(image, box, (9, 13)),
        image_ops.crop_and_resize(crop.copy(), (0, 0, 20, 31), (9, 13)),
    )
    np.testing.assert_array_equal(image_ops.crop_and_resize(image, box, (20, 31)), crop)


@pytest.mark.parametrize(("size", "share"), [((224, 224), 5e-4), ((60, 90), 1e-2)])
def test_the_fast_crop_is_a_rare_level_off(size, share):
    rng, image = np.random.default_rng(0), photo(375, 500)
    differing = total = 0
    for _ in range(60):
        box = image_ops.inception_crop_box(rng, 375, 500)
        y, x, height, width = box
        crop = image[y : y + height, x : x + width]
        exact = image_ops.resize(crop, size).astype(int)
        fast = image_ops.crop_and_resize(image, box, size)
        assert fast.shape == exact.shape
        assert fast.dtype == np.uint8
        assert np.abs(fast - exact).max() <= 1
        differing, total = differing + (fast != exact).sum(), total + exact.size
    assert differing < share * total


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (224, 224), (3, 2000)])
@pytest.mark.parametrize("level", [0, 93, 255])
def test_the_fast_crop_keeps_a_constant_image(shape, level):
    image = np.full((*shape, 3), level, np.uint8)
    out = image_ops.crop_and_resize(image, (0, 0, *shape), (224, 224))
    assert out.shape == (224, 224, 3)
    assert (out == level).all()


def test_a_flip_mirrors_columns():
    image = photo(5, 8)
    flipped = image_ops.flip_lr(image)
    for x in range(8):
        np.testing.assert_array_equal(flipped[:, x], image[:, 7 - x])


@pytest.mark.parametrize("dy", [-9, -1, 0, 1, 2, 5])
@pytest.mark.parametrize("dx", [-8, -7, -2, 0, 1, 8])
def test_a_shift_is_a_pad_with_zeros_and_a_crop(dy, dx):
    image = photo(5, 7)
    padded = np.pad(image, ((9, 9), (9, 9), (0, 0)))
    expected = padded[9 - dy : 14 - dy, 9 - dx : 16 - dx]
    np.testing.assert_array_equal(image_ops.shift(image, dy, dx), expected)


# --- the inception crop ---------------------------------------------------------------


@pytest.fixture(scope="module")
def boxes():
    rng = np.random.default_rng(0)
    return np.array(
        [image_ops.inception_crop_box(rng, 375, 500) for _ in range(40_000)]
    )


def test_the_crop_area_has_the_reference_statistics(boxes):
    area = boxes[:, 2] * boxes[:, 3] / (375 * 500)
    # Of TensorFlow's op for 500x375; an area-uniform crop has 42, 43 and 8.7 %.
    assert np.median(area) == pytest.approx(0.30, abs=0.01)
    assert area.mean() == pytest.approx(0.34, abs=0.01)
    assert np.quantile(area, 0.05) == pytest.approx(0.065, abs=0.003)


def test_every_crop_is_legal(boxes):
    y, x, h, w = boxes.T
    assert h.min() > 0
    assert w.min() > 0
    assert y.min() >= 0
    assert x.min() >= 0
    assert (y + h).max() <= 375
    assert (x + w).max() <= 500
    assert (h * w).min() >= 0.05 * 375 * 500
    # The aspect is drawn in [0.75, 1.33); only the rounding of w can leave it.
    assert np.abs(w - np.clip(w, h * 0.75, h * 1.33)).max() <= 0.5


def test_the_crop_height_is_uniform():
    # 1000x1000: the ends depend on the drawn ratio, but heights from 258, that is
    # √(0.05·A/0.75), to 750, 1000/1.33, are open to every ratio: the law is flat there.
    rng = np.random.default_rng(0)
    heights = [image_ops.inception_crop_box(rng, 1000, 1000)[2] for _ in range(20_000)]
    counts, _ = np.histogram(heights, bins=np.linspace(260, 750, 15))
    expected = counts.mean()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 38  # 13 degrees of freedom: exceeded once in 3,000


def test_the_crop_height_reaches_both_ends():
    rng = np.random.default_rng(0)
    draws = {image_ops.inception_crop_box(rng, 8, 8)[2] for _ in range(3000)}
    # √(0.05·64/1.33) = 1.55, so 2, up to the whole height.
    assert draws == {2, 3, 4, 5, 6, 7, 8}


def test_the_last_crop_offset_is_never_drawn():
    rng = np.random.default_rng(0)
    boxes = [image_ops.inception_crop_box(rng, 12, 9) for _ in range(20_000)]
    y, x, h, w = np.array(boxes).T
    assert (y[h < 12] < 12 - h[h < 12]).all()
    assert (x[w < 9] < 9 - w[w < 9]).all()
    # The last but one is, and so is the first.
    assert (y[h == 6].min(), y[h == 6].max()) == (0, 5)
    assert (x[w == 5].min(), x[w == 5].max()) == (0, 3)


def law_of_the_sides(height, width):
    """The probabilities of TensorFlow's GenerateRandomCrop, over a grid of ratios."""
    law: collections.Counter = collections.Counter()
    least, most = 0.05 * height * width, 1.0 * height * width
    ratios = 0.75 + 0.58 * (np.arange(4000) + 0.5) / 4000
    for ratio in ratios:
        low = int(np.rint(np.sqrt(least / ratio)))
        high = int(np.rint(np.sqrt(most / ratio)))
        if np.rint(high * ratio) > width:
            high = int((width + 0.5 - 1e-7) / ratio)
            if np.rint(high * ratio) > width:
                high -= 1
        high = min(high, height)
        low = min(low, high)
        for drawn in range(low, high + 1):
            h = drawn
            if h * np.rint(h * ratio) < least:
                h += 1
            if h * np.rint(h * ratio) > most:
                h -= 1
            w = int(np.rint(h * ratio))
            if least <= h * w <= most and 0 < h <= height and 0 < w <= width:
                law[h, w] += 1 / (high - low + 1)
    total = sum(law.values())
    return {sides: weight / total for sides, weight in law.items()}


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (6, 9), (11, 6), (3, 12)])
def test_the_rounding_of_tiny_crops_is_tensorflows(shape):
    rng = np.random.default_rng(0)
    draws = 20_000
    boxes = [image_ops.inception_crop_box(rng, *shape) for _ in range(draws)]
    counts = collections.Counter((h, w) for _, _, h, w in boxes)
    law = law_of_the_sides(*shape)
    # A cell seldom drawn may be missed by the grid of ratios, or by the draws.
    distance = sum(
        abs(counts[sides] / draws - law.get(sides, 0)) for sides in counts | law
    )
    assert distance / 2 < 0.02


@pytest.mark.parametrize("shape", [(400, 1), (1, 400), (2, 100)])
def test_an_impossible_crop_is_the_whole_image(shape):
    box = image_ops.inception_crop_box(np.random.default_rng(0), *shape)
    assert box == (0, 0, *shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 2), (7, 5), (30, 11)])
def test_tiny_images_give_legal_crops(shape):
    rng = np.random.default_rng(0)
    for _ in range(500):
        y, x, h, w = image_ops.inception_crop_box(rng, *shape)
        assert 0 <= y < y + h <= shape[0]
        assert 0 <= x < x + w <= shape[1]


# --- protocols ------------------------------------------------------------------------


def test_the_protocols_are_the_published_seven():
    assert list(image_ops.PROTOCOLS) == [
        "big_vision",
        "vision_transformer",
        "paper-resize-crop",
        "paper-resmall-crop",
        "timm",
        "timm-0.9",
        "timm-1.0",
    ]


@pytest.mark.parametrize("protocol", image_ops.PROTOCOLS)
@pytest.mark.parametrize("size", [(224, 224), (100, 100), (64, 128), (128, 64)])
def test_a_protocol_gives_the_size_asked_for(protocol, size):
    result = image_ops.preprocess(photo(90, 131), protocol, size)
    assert result.shape == (*size, 3)
    floating = protocol == "vision_transformer"
    assert result.dtype == (np.float32 if floating else np.uint8)


def test_big_vision_is_area_256_then_centre_224():
    small = image_ops.resize_small(photo(375, 500), (256, 256))
    assert small.shape == (256, 341, 3)
    expected = small[16:240, 58:282]
    result = image_ops.preprocess(photo(375, 500), "big_vision", (224, 224))
    np.testing.assert_array_equal(result, expected)


def test_vision_transformer_squashes_and_keeps_the_float():
    result = image_ops.preprocess(photo(90, 131), "vision_transformer", (224, 224))
    expected = image_ops.resize(photo(90, 131).astype(np.float32), (224, 224))
    np.testing.assert_array_equal(result, expected)
    assert np.any(result % 1)


def test_resize_crop_squashes_to_256():
    small = image_ops.resize(photo(300, 400), (256, 256))
    result = image_ops.preprocess(photo(300, 400), "paper-resize-crop", (224, 224))
    np.testing.assert_array_equal(result, small[16:240, 16:240])


def test_resmall_crop_keeps_the_aspect():
    small = image_ops.resize(photo(300, 400), (256, 341))
    result = image_ops.preprocess(photo(300, 400), "paper-resmall-crop", (224, 224))
    np.testing.assert_array_equal(result, small[16:240, 58:282])


def test_timm_is_pillows_bicubic_then_a_rounded_centre():
    image = photo(375, 500)
    small = PIL.Image.fromarray(image).resize((341, 256), PIL.Image.Resampling.BICUBIC)
    # (341 - 224)/2 = 58.5 goes to the even 58; (343 - 224)/2 = 59.5 would go to 60.
    expected = np.asarray(small)[16:240, 58:282]
    result = image_ops.preprocess(image, "timm", (224, 224))
    np.testing.assert_array_equal(result, expected)
    wide = photo(256, 343)
    result = image_ops.preprocess(wide, "timm", (224, 224))
    np.testing.assert_array_equal(result, wide[16:240, 60:284])


@pytest.mark.parametrize("protocol", ["big_vision", "paper-resmall-crop", "timm"])
def test_448_goes_through_512(protocol):
    image = photo(512, 700)
    result = image_ops.preprocess(image, protocol, (448, 448))
    np.testing.assert_array_equal(result, image[32:480, 126:574])


def test_384_goes_through_439_but_in_timm_through_438():
    # 384·256/224 = 438.86: ours rounds, timm takes the floor.
    image = photo(439, 439)
    result = image_ops.preprocess(image, "big_vision", (384, 384))
    np.testing.assert_array_equal(result, image[27:411, 27:411])
    image = photo(438, 438)
    np.testing.assert_array_equal(
        image_ops.preprocess(image, "timm", (384, 384)), image[27:411, 27:411]
    )


@pytest.mark.parametrize("protocol", ["big_vision", "paper-resmall-crop", "timm"])
def test_a_rectangle_is_covered(protocol):
    # (112, 224) passes through a box of (128, 256).
    image = photo(128, 300)
    np.testing.assert_array_equal(
        image_ops.preprocess(image, protocol, (112, 224)), image[8:120, 38:262]
    )
    image = photo(160, 256)
    np.testing.assert_array_equal(
        image_ops.preprocess(image, protocol, (112, 224)), image[24:136, 16:240]
    )


def test_an_unknown_protocol_lists_the_names_nearest_first():
    with pytest.raises(ValueError, match=r"'tim' is unknown; try timm, .*big_vision"):
        image_ops.preprocess(photo(9, 9), "tim", (224, 224))
