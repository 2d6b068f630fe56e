import math
import zlib

import numpy as np
import pytest
from golden import cases

from mlp_mixer.data import decoding, randaugment

F = np.float32
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


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


def one_level():
    image = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    image[..., 1] = 7  # one channel without contrast, next to two with all of it
    image[..., 2] //= 2
    return image


PORTRAIT = decoding.decode(cases.PHOTOS["astronaut"])[40:72, 100:128]  # eyes, hair

# Of the 2^24 colours, some whose grey depends on the order of its float32 operations:
# 47 in all on that of the sum, 71 on dividing by 255 in place of multiplying.
EDGES = [
    [(5, 49, 41), (50, 205, 39), (118, 127, 96), (153, 185, 12), (212, 121, 3)],
    [(11, 169, 99), (91, 117, 157), (134, 90, 122), (193, 159, 41), (252, 95, 32)],
    [(5, 171, 227), (70, 105, 90), (170, 219, 55), (235, 50, 247), (249, 96, 96)],
]

IMAGES = {
    "photo": photo(32, 32),
    "wide": photo(25, 38),
    "tall": photo(41, 22),
    "noise": np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8),
    "constant": np.full((24, 24, 3), 77, np.uint8),
    "one level": one_level(),
    "portrait": PORTRAIT,
    "grey": decoding.decode(cases.PHOTOS["rocket-grey"])[60:84, 60:90],
    "two levels": np.where(PORTRAIT > 110, 200, 30).astype(np.uint8),
    "tiny": photo(2, 3),
    "line": photo(1, 6),
    "edges": np.array(EDGES, np.uint8),
}


# --- the slow reference: the published formulas, value by value -----------------------


def blend(a, b, f):
    if f == 0:
        return a
    if f == 1:
        return b
    value = F(a) + F(f) * (F(b) - F(a))
    if not 0 < f < 1:
        value = min(max(value, F(0)), F(255))
    return int(value)


def pointwise(image, function):
    out = np.empty_like(image)
    for at in np.ndindex(image.shape):
        out[at] = function(int(image[at]))
    return out


def by_channel(image, make):
    channels = [
        pointwise(image[..., c : c + 1], make(image[..., c].ravel().tolist()))
        for c in range(3)
    ]
    return np.concatenate(channels, axis=2)


def half_away(value):
    value = float(value)
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def projected(image, a, b, c, d, e, f):
    a, b, c, d, e, f = map(F, (a, b, c, d, e, f))
    height, width = image.shape[:2]
    out = np.full_like(image, 128)
    for y in range(height):
        for x in range(width):
            column = half_away(a * F(x) + b * F(y) + c)
            row = half_away(d * F(x) + e * F(y) + f)
            if 0 <= row < height and 0 <= column < width:
                out[y, x] = image[row, column]
    return out


def slow_auto_contrast(image):
    def make(values):
        low, high = F(min(values)), F(max(values))
        if high == low:
            return lambda x: x
        scale = F(255) / (high - low)
        return lambda x: int(min(max(F(x) * scale - low * scale, F(0)), F(255)))

    return by_channel(image, make)


def slow_equalize(image):
    def make(values):
        histogram = [values.count(level) for level in range(256)]
        last = [count for count in histogram if count][-1]
        step = (len(values) - last) // 255
        if step == 0:
            return lambda x: x
        table = [0]
        for i in range(1, 256):
            table.append(min(255, (sum(histogram[:i]) + step // 2) // step))
        return lambda x: table[x]

    return by_channel(image, make)


def slow_rotate(image, degrees):
    height, width = F(image.shape[0] - 1), F(image.shape[1] - 1)
    radians = F(degrees) * F(math.pi / 180)
    cos, sin = F(math.cos(radians)), F(math.sin(radians))
    x = (width - (cos * width - sin * height)) / F(2)
    y = (height - (sin * width + cos * height)) / F(2)
    return projected(image, cos, -sin, x, sin, cos, y)


def slow_color(image, factor):
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        r, g, b = (F(v) * F(1 / 255) for v in image[y, x])
        grey = int((r * F(0.2989) + g * F(0.5870) + b * F(0.1140)) * F(255.5))
        out[y, x] = [blend(grey, int(v), factor) for v in image[y, x]]
    return out


def slow_sharpness(image, factor):
    out = np.empty_like(image)
    height, width = image.shape[:2]
    for y, x, c in np.ndindex(image.shape):
        smooth = int(image[y, x, c])
        if 0 < y < height - 1 and 0 < x < width - 1:
            total = F(0)
            for dy, dx in np.ndindex(3, 3):
                weight = F(5 if dy == dx == 1 else 1) / F(13)
                total += F(image[y + dy - 1, x + dx - 1, c]) * weight
            smooth = int(min(max(total, F(0)), F(255)))
        out[y, x, c] = blend(smooth, int(image[y, x, c]), factor)
    return out


def slow_cutout(image, q, centre):
    out = image.copy()
    for y, x in np.ndindex(image.shape[:2]):
        if centre[0] - q <= y < centre[0] + q and centre[1] - q <= x < centre[1] + q:
            out[y, x] = 128
    return out


def slow(name, image, magnitude, negate, centre):
    level = magnitude / 10
    sign = -1 if negate else 1
    f = 1.8 * level + 0.1
    pixels = image.shape[0] * image.shape[1]
    shift = min(8 - int(4 * level), 7)
    threshold = int(256 * level) % 256
    return {
        "AutoContrast": lambda: slow_auto_contrast(image),
        "Equalize": lambda: slow_equalize(image),
        "Invert": lambda: pointwise(image, lambda x: 255 - x),
        "Rotate": lambda: slow_rotate(image, sign * 30 * level),
        "Posterize": lambda: pointwise(image, lambda x: x >> shift << shift),
        "Solarize": lambda: pointwise(image, lambda x: x if x < threshold else 255 - x),
        "SolarizeAdd": lambda: pointwise(
            image, lambda x: min(255, x + int(110 * level)) if x < 128 else x
        ),
        "Color": lambda: slow_color(image, f),
        "Contrast": lambda: pointwise(
            image, lambda x: blend(int(min(255, pixels / 256)), x, f)
        ),
        "Brightness": lambda: pointwise(image, lambda x: blend(0, x, f)),
        "Sharpness": lambda: slow_sharpness(image, f),
        "ShearX": lambda: projected(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
        "ShearY": lambda: projected(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
        "TranslateX": lambda: projected(image, 1, 0, sign * 100 * level, 0, 1, 0),
        "TranslateY": lambda: projected(image, 1, 0, 0, 0, 1, sign * 100 * level),
        "Cutout": lambda: slow_cutout(image, int(40 * level), centre),
    }[name]()


# Besides the swept 0, 10, 15 and 20: 0.25 shifts by half pixels and cuts out one, 1 and
# 2 translate within the image, 5 gives the blends the factor 1.
@pytest.mark.parametrize("magnitude", [0, 0.25, 1, 2, 5, 10, 15, 20])
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("name", randaugment.OPS)
def test_an_op_equals_its_formula(name, image, magnitude):
    where = {"centre": (3, 1)} if name == "Cutout" else {}
    for negate in (False, True) if name in SIGNED else (False,):
        result = randaugment.OPS[name](image, magnitude, negate=negate, **where)
        expected = slow(name, image, magnitude, negate, (3, 1))
        np.testing.assert_array_equal(result, expected)


# Checksums of what big_vision's pp/archive/autoaugment.py (at 0127fb6) gives on
# TensorFlow 2.21, ImageProjectiveTransformV3 standing in for tensorflow_addons.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AutoContrast", 0xC3685B6C),
        ("Equalize", 0x6AD1300B),
        ("Invert", 0x8117D96B),
        ("Rotate", 0x333908F1),
        ("Posterize", 0x5D0CBE6B),
        ("Solarize", 0xD14D4F4C),
        ("Color", 0x88187D0B),
        ("Contrast", 0x72AF8A4C),
        ("Brightness", 0x15269264),
        ("Sharpness", 0x936209F1),
        ("ShearX", 0xEF67CF64),
        ("ShearY", 0x3313D87C),
        ("TranslateX", 0x06B4AEB2),
        ("TranslateY", 0x791F3E12),
        ("SolarizeAdd", 0x39026490),
    ],
)
def test_an_op_equals_the_reference_code(name, expected):
    result = randaugment.OPS[name](photo(180, 224), 15, negate=True)
    assert zlib.crc32(result.tobytes()) == expected


def test_the_ops_are_the_sixteen_in_the_reference_order():
    assert ", ".join(randaugment.OPS) == (
        "AutoContrast, Equalize, Invert, Rotate, Posterize, Solarize, Color, Contrast, "
        "Brightness, Sharpness, ShearX, ShearY, TranslateX, TranslateY, Cutout, "
        "SolarizeAdd"
    )


@pytest.mark.parametrize(
    ("magnitude", "degrees", "shear", "pixels", "factor", "bits", "t", "add", "q"),
    [
        (0, 0, 0, 0, 0.1, 0, 0, 0, 0),
        (10, 30, 0.30, 100, 1.9, 4, 256, 110, 40),
        (15, 45, 0.45, 150, 2.8, 6, 384, 165, 60),
        (20, 60, 0.60, 200, 3.7, 8, 512, 220, 80),
    ],
)
def test_the_arguments_are_the_published_numbers(
    magnitude, degrees, shear, pixels, factor, bits, t, add, q
):
    expected = {
        "Rotate": degrees,
        "ShearX": pytest.approx(shear),
        "ShearY": pytest.approx(shear),
        "TranslateX": pixels,
        "TranslateY": pixels,
        "Color": pytest.approx(factor),
        "Contrast": pytest.approx(factor),
        "Brightness": pytest.approx(factor),
        "Sharpness": pytest.approx(factor),
        "Posterize": bits,
        "Solarize": t,
        "SolarizeAdd": add,
        "Cutout": q,
    }
    level = magnitude / 10
    arguments = {
        name: op.argument(level) for name, op in randaugment.OPS.items() if op.argument
    }
    assert arguments == expected


@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (10, 0), (15, 128), (20, 0)]
)
def test_the_solarize_threshold_wraps(magnitude, threshold):
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = np.where(levels < threshold, levels, 255 - levels)
    result = randaugment.OPS["Solarize"](levels, magnitude)
    np.testing.assert_array_equal(result, expected)


def test_posterize_to_0_bits_keeps_one():
    result = randaugment.OPS["Posterize"](photo(30, 40), 0)
    assert set(np.unique(result)) == {0, 128}


def test_posterize_to_8_bits_keeps_all():
    result = randaugment.OPS["Posterize"](photo(30, 40), 20)
    np.testing.assert_array_equal(result, photo(30, 40))


@pytest.mark.parametrize(
    ("shape", "grey"), [((224, 224), 196), ((16, 16), 1), ((300, 300), 255)]
)
def test_contrast_turns_about_a_constant_that_ignores_the_image(shape, grey):
    for level in (0, 100, 255):
        image = np.full((*shape, 3), level, np.uint8)
        result = randaugment.OPS["Contrast"](image, 0)
        assert (result == blend(grey, level, 0.1)).all()


def test_geometric_ops_fill_with_grey_128():
    image = np.zeros((20, 30, 3), np.uint8)
    for name in SIGNED:
        for negate in (False, True):
            result = randaugment.OPS[name](image, 10, negate=negate)
            assert set(np.unique(result)) <= {0, 128}
            assert (result == 128).any()


@pytest.mark.parametrize("name", sorted(SIGNED))
def test_negating_flips_the_direction(name):
    # At 0 there is nothing to flip; elsewhere the signs differ.
    op, image = randaugment.OPS[name], photo(32, 32)
    np.testing.assert_array_equal(op(image, 0, negate=True), image)
    assert (op(image, 1, negate=True) != op(image, 1)).any()


def test_translations_move_left_and_up():
    image = photo(120, 130)
    left = randaugment.OPS["TranslateX"](image, 10)
    np.testing.assert_array_equal(left[:, :30], image[:, 100:])
    up = randaugment.OPS["TranslateY"](image, 10)
    np.testing.assert_array_equal(up[:20], image[100:])
    down = randaugment.OPS["TranslateY"](image, 10, negate=True)
    np.testing.assert_array_equal(down[100:], image[:20])


@pytest.mark.parametrize("name", sorted(set(randaugment.OPS) - SIGNED))
def test_the_other_ops_have_no_sign(name):
    op, image = randaugment.OPS[name], photo(32, 32)
    np.testing.assert_array_equal(op(image, 15, negate=True), op(image, 15))


@pytest.mark.parametrize("centre", [(0, 0), (99, 0), (50, 119), (99, 119), (40, 60)])
def test_cutout_is_clipped_at_the_border(centre):
    image = photo(100, 120)
    result = randaugment.OPS["Cutout"](image, 5, centre=centre)
    np.testing.assert_array_equal(result, slow_cutout(image, 20, centre))


@pytest.mark.parametrize("name", randaugment.OPS)
def test_an_op_leaves_its_input_alone(name):
    image = photo(32, 40)[:, ::-1]  # a view, as a flip may give, and read-only
    image.setflags(write=False)
    result = randaugment.OPS[name](image, 15)
    assert result.dtype == np.uint8
    assert result.shape == image.shape
    assert not np.shares_memory(result, image)
    np.testing.assert_array_equal(result, randaugment.OPS[name](image.copy(), 15))


# --- the control flow -----------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Replaces the ops by ones that do nothing but note how they were called."""
    calls = []

    def recorder(name):
        def op(image, magnitude, negate=False, **where):
            calls.append((name, magnitude, negate, where.get("centre")))
            return image

        return op

    for name in randaugment.OPS:
        monkeypatch.setitem(randaugment.OPS, name, recorder(name))
    return calls


def chi_square(counts):
    counts = np.asarray(counts)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_every_op_is_drawn_alike_and_always_applied(drawn):
    rng = np.random.default_rng(0)
    image = photo(3, 5)
    for _ in range(8000):
        randaugment.randaugment(image, rng, 2, 15)
    assert len(drawn) == 16_000
    names = list(randaugment.OPS)
    pairs = np.zeros((16, 16))
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        pairs[names.index(first[0]), names.index(second[0])] += 1
    # Exceeded once in about 3,000: 15 degrees of freedom, and 255 for the pairs, which
    # the same op twice in a row belongs to.
    assert chi_square(pairs.sum(axis=0)) < 41
    assert chi_square(pairs.sum(axis=1)) < 41
    assert chi_square(pairs.ravel()) < 340
    assert {call[1] for call in drawn} == {15}


def test_each_sign_has_probability_one_half(drawn):
    rng = np.random.default_rng(1)
    image = photo(3, 5)
    for _ in range(16_000):
        randaugment.randaugment(image, rng, 1, 15)
    for name in SIGNED:
        signs = [call[2] for call in drawn if call[0] == name]
        # About 1000 draws: four standard deviations are 0.063.
        assert np.mean(signs) == pytest.approx(0.5, abs=0.063)


def test_the_cutout_centre_is_uniform_over_the_pixels(drawn):
    rng = np.random.default_rng(2)
    image = photo(3, 5)
    for _ in range(24_000):
        randaugment.randaugment(image, rng, 1, 15)
    counts = np.zeros((3, 5))
    for name, _, _, centre in drawn:
        assert (centre is not None) == (name == "Cutout")
        if centre is not None:
            counts[centre] += 1
    assert counts.sum() > 1000
    assert chi_square(counts.ravel()) < 40  # 14 degrees of freedom, once in 4,000


def test_layers_are_applied_one_after_the_other(monkeypatch):
    calls = []

    def recorder(op):
        def wrapped(image, magnitude, **options):
            calls.append((op, magnitude, options))
            return op(image, magnitude, **options)

        return wrapped

    for name, op in list(randaugment.OPS.items()):
        monkeypatch.setitem(randaugment.OPS, name, recorder(op))
    image = photo(40, 50)
    for seed in range(20):
        calls.clear()
        result = randaugment.randaugment(image, np.random.default_rng(seed), 3, 10)
        expected = image
        for op, magnitude, options in calls:
            expected = op(expected, magnitude, **options)
        assert len(calls) == 3
        np.testing.assert_array_equal(result, expected)


def test_the_same_seed_gives_the_same_image():
    results = [
        randaugment.randaugment(photo(40, 50), np.random.default_rng(seed), 2, 15)
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()


def test_no_layers_is_the_identity():
    result = randaugment.randaugment(photo(9, 9), np.random.default_rng(0), 0, 15)
    np.testing.assert_array_equal(result, photo(9, 9))


@pytest.mark.parametrize("magnitude", [-1, 20.5, 150])
def test_a_magnitude_off_the_scale_is_refused(magnitude):
    with pytest.raises(ValueError, match=rf"magnitude is {magnitude}; .*0\.\.20"):
        randaugment.randaugment(photo(9, 9), np.random.default_rng(0), 2, magnitude)


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"num_layers is -1; .*at least 0"):
        randaugment.randaugment(photo(9, 9), np.random.default_rng(0), -1, 15)
