"""The reference RandAugment (arXiv 1909.13719), op by op, on uint8 images.

A port of big_vision's `pp/archive/autoaugment.py`, which descends from the TPU
EfficientNet code; AugReg (arXiv 2106.10270) stresses that it is not timm's. Its quirks
are kept, because the recipe was tuned with them: every op that is drawn is applied, the
threshold of Solarize wraps around, Contrast blends towards a constant that does not
depend on the image. Magnitude 0 is not the identity.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from mlp_mixer.data import image_ops

Image = UInt8[np.ndarray, "h w 3"]
Number = int | float

_GREY = 128  # the colour outside of the image and of Cutout's square
_LEVELS = np.arange(256, dtype=np.uint8)
_LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)


def randaugment(
    image: Image, rng: np.random.Generator, num_layers: int, magnitude: Number
) -> Image:
    """Applies `num_layers` ops, each drawn uniformly from the 16, with replacement.

    Args:
      image: (height, width, 3), after crop and resize.
      rng: draws the ops, the signs (each with probability 1/2) and Cutout's centre.
      num_layers: number of ops in a row; arXiv 2105.01601 uses 2.
      magnitude: strength of every op, 0 to 20; Table 4 uses 10, 15 and 20.

    Raises:
      ValueError: `magnitude` or `num_layers` is out of range.
    """
    if not 0 <= magnitude <= 20:
        raise ValueError(f"magnitude is {magnitude}; it must be in 0..20, e.g. 15.")
    if num_layers < 0:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 0, e.g. 2.")
    names = list(OPS)
    for _ in range(num_layers):
        name = names[rng.integers(len(names))]
        if name == "Cutout":
            y, x = (int(rng.integers(side)) for side in image.shape[:2])
            image = OPS[name](image, magnitude, centre=(y, x))
        else:
            image = OPS[name](image, magnitude, negate=bool(rng.integers(2)))
    return image


def auto_contrast(image: Image) -> Image:
    """Stretches each channel to 0..255; a constant channel stays."""
    # Rows first: NumPy reduces both axes at once five times slower.
    low = image.min(axis=0).min(axis=0).astype(np.float32)
    high = image.max(axis=0).max(axis=0).astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, np.float32(1))
    tables = _LEVELS[:, None] * scale + -low * scale
    return _look_up(image, np.where(high > low, _truncate(tables), _LEVELS[:, None]))


def equalize(image: Image) -> Image:
    """Flattens each channel's histogram, in Pillow's integer arithmetic."""
    tables = []
    for channel in range(3):
        # Counts in float32, exact up to 2**24 pixels, in a fifth of bincount's time.
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256])
        histogram = counts.ravel().astype(np.int64)
        step = (histogram.sum() - histogram[histogram.nonzero()[0][-1]]) // 255
        if step == 0:
            tables.append(_LEVELS)
            continue
        below = np.cumsum(histogram) - histogram
        table = np.clip((below + step // 2) // step, 0, 255)
        tables.append(table.astype(np.uint8))
    return _look_up(image, np.stack(tables, axis=1))


def invert(image: Image) -> Image:
    """Replaces each level x by 255 - x."""
    return np.uint8(255) - image


def posterize(image: Image, bits: int) -> Image:
    """Keeps the upper `bits` bits."""
    # TensorFlow on the CPU clamps a shift by 8 to 7: with 0 bits one survives.
    shift = min(8 - bits, 7)
    return image & np.uint8(255 >> shift << shift)


def solarize(image: Image, threshold: int) -> Image:
    """Inverts the levels from `threshold` on."""
    # TensorFlow casts the threshold to uint8: 256 and 512 become 0, 384 becomes 128.
    # A mask of 255 where they are inverted: x ^ 255 is 255 - x.
    return image ^ -(image >= np.uint8(threshold % 256)).view(np.uint8)


def solarize_add(image: Image, addition: int) -> Image:
    """Adds to the levels below 128, up to 255."""
    added = np.clip(np.arange(256) + addition, 0, 255)
    return _look_up(image, np.where(_LEVELS < 128, added, _LEVELS).astype(np.uint8))


def color(image: Image, factor: Number) -> Image:
    """Blends from greyscale (factor 0) through the image (1) and beyond."""
    # The order of these float32 operations is tf.image.rgb_to_grayscale's; another
    # order moves single levels.
    levels = np.zeros(image.shape[:2], np.float32)
    for channel, weight in zip(cv2.split(image), _LUMA, strict=True):
        levels += channel * np.float32(1 / 255) * weight
    grey = (levels * np.float32(255.5)).astype(np.uint8)
    return _blend(cv2.merge([grey] * 3), image, factor)


def contrast(image: Image, factor: Number) -> Image:
    """Blends from a constant grey, min(255, h·w/256), through the image and beyond."""
    # The inherited code sums the histogram where it means to average: 196 for 224x224.
    grey = min(255, image.shape[0] * image.shape[1] // 256)
    return _look_up(image, _blend(np.full_like(_LEVELS, grey), _LEVELS, factor))


def brightness(image: Image, factor: Number) -> Image:
    """Blends from black through the image and beyond."""
    return _look_up(image, _blend(np.zeros_like(_LEVELS), _LEVELS, factor))


def sharpness(image: Image, factor: Number) -> Image:
    """Blends from a 3x3 smoothing through the image and beyond; the border stays."""
    h, w = image.shape[:2]
    smooth = image.copy()
    if min(h, w) > 2:
        around = image * (np.float32(1) / np.float32(13))
        centre = image[1:-1, 1:-1] * (np.float32(5) / np.float32(13))
        total = np.zeros((h - 2, w - 2, 3), np.float32)
        for dy in range(3):
            for dx in range(3):
                shifted = around[dy : dy + h - 2, dx : dx + w - 2]
                total += centre if dy == dx == 1 else shifted
        smooth[1:-1, 1:-1] = _truncate(total)
    return _blend(smooth, image, factor)


def rotate(image: Image, degrees: Number) -> Image:
    """Rotates about the centre."""
    radians = np.float32(degrees) * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    y, x = (np.float32(n - 1) for n in image.shape[:2])
    offset_x = (x - (cos * x - sin * y)) / np.float32(2)
    offset_y = (y - (sin * x + cos * y)) / np.float32(2)
    rows = [[cos, -sin, offset_x], [sin, cos, offset_y]]
    return _transform(image, np.array(rows, np.float32))


def shear_x(image: Image, slope: Number) -> Image:
    """Moves row y by `slope`·y pixels to the left; the top row stays."""
    return _transform(image, np.array([[1, slope, 0], [0, 1, 0]], np.float32))


def shear_y(image: Image, slope: Number) -> Image:
    """Moves column x by `slope`·x pixels up; the left column stays."""
    return _transform(image, np.array([[1, 0, 0], [slope, 1, 0]], np.float32))


def translate_x(image: Image, pixels: Number) -> Image:
    """Moves the content to the left."""
    return _translate(image, pixels, 0)


def translate_y(image: Image, pixels: Number) -> Image:
    """Moves the content up."""
    return _translate(image, 0, pixels)


def cutout(image: Image, radius: int, centre: tuple[int, int] | None = None) -> Image:
    """Greys the square of side 2·`radius` at `centre` = (y, x), or at the middle."""
    y, x = centre or (image.shape[0] // 2, image.shape[1] // 2)
    out = image.copy()
    out[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius] = _GREY
    return out


def _look_up(
    image: Image, table: UInt8[np.ndarray, "256"] | UInt8[np.ndarray, "256 3"]
) -> Image:
    return cv2.LUT(image, table.reshape(1, 256, -1))


def _blend(start: np.ndarray, end: np.ndarray, factor: Number) -> np.ndarray:
    """start + factor·(end - start) in float32, clipped and truncated to uint8."""
    a, levels = start.astype(np.float32), end.astype(np.float32)
    levels -= a
    levels *= np.float32(factor)
    levels += a
    return _truncate(levels)


def _truncate(levels: np.ndarray) -> np.ndarray:
    """The levels clipped, in place, and truncated to uint8."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def _translate(image: Image, left: Number, up: Number) -> Image:
    rows = np.array([[1, 0, left], [0, 1, up]], np.float32)
    if (rows % 1).any():
        return _transform(image, rows)
    dx, dy = (-int(pixels) for pixels in rows[:, 2])
    # The same pixels in a tenth of the time.
    return image_ops.shift(image, dy, dx, fill=_GREY)


def _transform(image: Image, rows: Float32[np.ndarray, "2 3"]) -> Image:
    """Samples the input at (x', y') = `rows` · (x, y, 1), to the nearest pixel."""
    h, w = image.shape[:2]
    # A number for each pixel, and a grey one behind them for what is outside: NumPy
    # picks numbers in a third of the time that cv2.remap takes for three bytes.
    pixels = np.full(h * w + 1, int.from_bytes([_GREY] * 4), np.uint32)
    stored = pixels[:-1].view(np.uint8).reshape(h, w, 4)
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=stored)
    picked = pixels.take(_origins(h, w, rows.tobytes()))
    return cv2.cvtColor(picked.view(np.uint8).reshape(h, w, 4), cv2.COLOR_RGBA2RGB)


# A recipe has one magnitude, hence three transforms with two signs each. An entry takes
# 400 kB for 224x224; to compute one takes ten times as long as to apply it.
@functools.lru_cache(maxsize=16)
def _origins(h: int, w: int, rows: bytes) -> Int64[np.ndarray, "h w"]:
    """The number of the input pixel that each output pixel shows; h·w if none does.

    Float32 coordinates, rounded half away from zero, as in tensorflow_addons'
    `transform_ops.py`.
    """
    x = np.arange(w, dtype=np.float32)
    y = np.arange(h, dtype=np.float32)[:, None]
    coefficients = np.frombuffer(rows, np.float32).reshape(2, 3)
    column, row = (_round_half_away(a * x + b * y + c) for a, b, c in coefficients)
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    return np.where(inside, row * w + column, h * w)


def _round_half_away(x: Float32[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    # In float64 adding the half is exact; in float32 0.49999997 would become 1.
    exact = x.astype(np.float64)
    return np.trunc(exact + np.copysign(0.5, exact)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Op:
    """One of the 16 operations, called as `op(image, magnitude, negate=False)`.

    Attributes:
      function: (image) → image, or (image, argument) → image.
      argument: magnitude/10 → argument; None if the function has none.
      signed: whether `negate` changes the argument's sign; other ops ignore it.
    """

    function: Callable[..., Image]
    argument: Callable[[float], Number] | None = None
    signed: bool = False

    def __call__(
        self,
        image: Image,
        magnitude: Number,
        negate: bool = False,
        **where: tuple[int, int],
    ) -> Image:
        """Applies the op at a magnitude from 0 to 20; Cutout takes `centre=(y, x)`."""
        if self.argument is None:
            return self.function(image)
        sign = -1 if negate and self.signed else 1
        return self.function(image, sign * self.argument(magnitude / 10), **where)


def _enhance(level: Number) -> float:
    return level * 1.8 + 0.1


# The order and the constants of big_vision `pp/archive/autoaugment.py`,
# distort_image_with_randaugment (translate 100, cutout 40) and level_to_arg.
OPS: dict[str, Op] = {
    "AutoContrast": Op(auto_contrast),
    "Equalize": Op(equalize),
    "Invert": Op(invert),
    "Rotate": Op(rotate, lambda level: level * 30, signed=True),
    "Posterize": Op(posterize, lambda level: int(level * 4)),
    "Solarize": Op(solarize, lambda level: int(level * 256)),
    "Color": Op(color, _enhance),
    "Contrast": Op(contrast, _enhance),
    "Brightness": Op(brightness, _enhance),
    "Sharpness": Op(sharpness, _enhance),
    "ShearX": Op(shear_x, lambda level: level * 0.3, signed=True),
    "ShearY": Op(shear_y, lambda level: level * 0.3, signed=True),
    "TranslateX": Op(translate_x, lambda level: level * 100, signed=True),
    "TranslateY": Op(translate_y, lambda level: level * 100, signed=True),
    "Cutout": Op(cutout, lambda level: int(level * 40)),
    "SolarizeAdd": Op(solarize_add, lambda level: int(level * 110)),
}
