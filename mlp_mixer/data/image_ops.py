"""Pure image functions: crop, resize, flip, evaluation protocols.

They follow big_vision's `pp/ops_image.py` (the input code of arXiv 2105.01601) and
equal its TensorFlow kernels bit for bit, without TensorFlow, except `crop_and_resize`,
whose docstring says the difference. What is called after timm equals timm 1.0.31 bit
for bit, which computes with Pillow. Images are (height, width, channels), uint8 or
float32 in levels 0..255; the device maps them to [-1, 1].
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, Int64, UInt8

from mlp_mixer import known

# Grain processes many images at once, one thread each.
cv2.setNumThreads(1)

Image = UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]
Resized = UInt8[np.ndarray, "height width c"] | Float32[np.ndarray, "height width c"]
Size = tuple[int, int]  # (height, width)

Filter = PIL.Image.Resampling
# timm's name of the interpolation in training → the filters of which one is drawn.
INTERPOLATIONS = {
    "bicubic": (Filter.BICUBIC,),
    "random": (Filter.BILINEAR, Filter.BICUBIC),
}


def resize(image: Image, size: Size) -> Resized:
    """Resizes bilinearly: half-pixel centres, no antialiasing, aspect not kept.

    Equals `tf.image.resize(image, size, antialias=False)` bit for bit, then for uint8
    clip and truncation, as in big_vision `pp/ops_image.py`; float32 stays unrounded.

    Args:
      image: uint8 or float32.
      size: (height, width) of the result.
    """
    _check_size(size)
    return _bilinear(image, size, size)


def _bilinear(image: Image, sides: tuple[int, int], crop: tuple[int, int]) -> Resized:
    """The central `crop` of the image resized to `sides`; the rest is not computed."""
    y0, y1, t = _centre(crop[0], *_neighbours(image.shape[0], sides[0]))
    x0, x1, u = _centre(crop[1], *_neighbours(image.shape[1], sides[1]))
    rows = np.union1d(y0, y1)
    band = image[rows]
    # Columns first, then rows, each as a + (b - a)·t: TensorFlow's order of rounding.
    band = _lerp(np.take(band, x0, axis=1), np.take(band, x1, axis=1), u[:, None])
    top, bottom = band[np.searchsorted(rows, y0)], band[np.searchsorted(rows, y1)]
    return _as_dtype(_lerp(top, bottom, t[:, None, None]), image.dtype)


def _centre(n: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """The central n elements of each array along its last axis."""
    start = (arrays[0].shape[-1] - n) // 2
    return [array[..., start : start + n] for array in arrays]


def _neighbours(
    n_in: int, n_out: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """The two inputs between which each output lies, and the weight of the second."""
    half = np.float32(0.5)
    scale = np.float32(n_in / n_out)
    place = (np.arange(n_out, dtype=np.float32) + half) * scale - half
    low = np.floor(place)
    i = low.astype(np.int64)
    return np.clip(i, 0, n_in - 1), np.clip(i + 1, 0, n_in - 1), place - low


def _lerp(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    a, out = a.astype(np.float32), b.astype(np.float32)
    out -= a
    out *= t
    out += a
    return out


def resize_small(image: Image, size: Size) -> Resized:
    """Resizes so that the image just covers `size`; the aspect ratio is kept.

    Averages boxes: equals `tf.image.resize(method="area")` bit for bit, then rounds as
    `resize` does. Sides are rounded half to even, from a float32 ratio as in big_vision
    `pp/ops_image.py`.

    Args:
      image: uint8 or float32.
      size: (height, width) to cover.
    """
    sides = _covering(image, size)
    return _area(image, sides, sides)


def _covering(image: Image, size: Size) -> tuple[int, int]:
    """The sides of the image scaled so that it just covers `size`."""
    sides = np.array(image.shape[:2], np.float32)
    ratio = np.max(np.array(size, np.float32) / sides)
    height, width = np.rint(sides * ratio)
    return int(height), int(width)


def _area(image: Image, sides: tuple[int, int], crop: tuple[int, int]) -> Resized:
    """The central `crop` of the image resized to `sides`; the rest is not computed."""
    iy, wy, sy = _overlaps(image.shape[0], sides[0])
    ix, wx, sx = _overlaps(image.shape[1], sides[1])
    iy, wy = _centre(crop[0], iy, wy)
    ix, wx = _centre(crop[1], ix, wx)
    x = image.astype(np.float32)
    rows = np.zeros((image.shape[0], crop[1], image.shape[2]), np.float32)
    for cell, weight in zip(ix, wx, strict=True):
        rows += np.take(x, cell, axis=1) * weight[:, None]
    out = np.zeros((*crop, image.shape[2]), np.float32)
    for cell, weight in zip(iy, wy, strict=True):
        out += rows[cell] * weight[:, None, None]
    return _as_dtype(out * (np.float32(1) / (sy * sx)), image.dtype)


def _overlaps(
    n_in: int, n_out: int
) -> tuple[Int64[np.ndarray, "k n"], Float32[np.ndarray, "k n"], np.float32]:
    """The input cells that each output cell overlaps, their weights, and the scale."""
    scale = np.float32(n_in) / np.float32(n_out)
    o = np.arange(n_out, dtype=np.float32)
    low, high = o * scale, (o + 1) * scale
    first = np.floor(low).astype(np.int64)
    count = np.ceil(high).astype(np.int64) - first
    k = np.arange(count.max())[:, None]
    cell = (first + k).astype(np.float32)
    weight = np.minimum(high, cell + 1) - np.maximum(low, cell)
    # TensorFlow's weight where an output cell lies inside one input cell.
    weight = np.where((cell < low) & (cell + 1 > high), scale, weight)
    weight = np.where(k >= count, np.float32(0), weight)
    return np.minimum(first + k, n_in - 1), weight, scale


def crop_and_resize(
    image: UInt8[np.ndarray, "h w 3"], box: tuple[int, int, int, int], size: Size
) -> UInt8[np.ndarray, "height width 3"]:
    """Cuts out `box` = (y, x, height, width) and resizes it, for training.

    OpenCV does it in an eighth of the time of `resize`. It is within about 0.01 levels
    of that before truncation: of 224x224 pixels one value in five thousand differs, by
    one level.

    Raises:
      ValueError: the box leaves the image.
    """
    height, width = size
    levels = cv2.resize(_cut(image, box).astype(np.float32), (width, height))
    # Without this, rounding errors would lower flat areas by a level.
    return np.add(levels, np.float32(2**-15), out=levels).astype(np.uint8)


def _cut(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    y, x, height, width = box
    if min(y, x) < 0 or y + height > image.shape[0] or x + width > image.shape[1]:
        raise ValueError(
            f"cannot crop {height}x{width} at ({y}, {x}) from an image of "
            f"{image.shape[0]}x{image.shape[1]}; crop less, or resize it first."
        )
    return image[y : y + height, x : x + width]


def inception_crop_box(
    rng: np.random.Generator, height: int, width: int
) -> tuple[int, int, int, int]:
    """Draws the random crop of training, as (y, x, height, width).

    Area 5 to 100 % of the image, aspect 0.75 to 1.33 (width/height), 100 attempts, else
    the whole image (big_vision `pp/ops_image.py`). The distribution is that of
    TensorFlow's `sample_distorted_bounding_box`: the height is uniform, not the area,
    so small crops are more frequent than in PyTorch's libraries, and the last offset is
    never drawn.
    """
    smallest, largest = 0.05 * height * width, 1.0 * height * width
    for _ in range(100):
        ratio = rng.uniform(0.75, 1.33)
        h_max = round(math.sqrt(largest / ratio))
        if round(h_max * ratio) > width:
            h_max = math.floor((width + 0.5 - 1e-7) / ratio)
            h_max -= round(h_max * ratio) > width
        h_max = min(h_max, height)
        h_min = min(round(math.sqrt(smallest / ratio)), h_max)
        h = int(rng.integers(h_min, h_max, endpoint=True))
        # Rounding may leave the range of areas; one row more or less corrects that.
        h += h * round(h * ratio) < smallest
        h -= h * round(h * ratio) > largest
        w = round(h * ratio)
        if smallest <= h * w <= largest and 0 < h <= height and 0 < w <= width:
            y = int(rng.integers(height - h)) if h < height else 0
            x = int(rng.integers(width - w)) if w < width else 0
            return y, x, h, w
    return 0, 0, height, width


def timm_crop_box(
    rng: np.random.Generator, height: int, width: int, min_area: float = 0.08
) -> tuple[int, int, int, int]:
    """Draws timm's and torchvision's random resized crop, as (y, x, height, width).

    Area `min_area` to 1 of the image's, uniform; aspect 3/4 to 4/3 (width/height),
    uniform in its logarithm; 10 attempts, else the largest central part of such an
    aspect.
    """
    least, most = 3 / 4, 4 / 3
    for _ in range(10):
        area = rng.uniform(min_area, 1.0) * (height * width)
        ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return y, x, h, w
    h, w = min(height, round(width / least)), min(width, round(height * most))
    return (height - h) // 2, (width - w) // 2, h, w


def timm_crop_and_resize(
    image: UInt8[np.ndarray, "h w 3"],
    box: tuple[int, int, int, int],
    size: Size,
    interpolation: Filter,
) -> UInt8[np.ndarray, "height width 3"]:
    """Cuts out `box` = (y, x, height, width) and resizes it, antialiased, with Pillow.

    Raises:
      ValueError: the box leaves the image.
    """
    height, width = size
    part = PIL.Image.fromarray(np.ascontiguousarray(_cut(image, box)))
    return np.array(part.resize((width, height), interpolation))


def draw_filter(rng: np.random.Generator, interpolation: str) -> Filter:
    """Draws one of the filters of a key of `INTERPOLATIONS`."""
    filters = INTERPOLATIONS[interpolation]
    return filters[rng.integers(len(filters))]


def flip_lr(image: Image) -> Image:
    """Mirrors left and right."""
    return cv2.flip(image, 1).reshape(image.shape)


def shift(image: Image, dy: int, dx: int, fill: int = 0) -> Image:
    """Moves the content down by `dy` and right by `dx` pixels; `fill` comes in."""
    h, w = image.shape[:2]
    out = np.full_like(image, fill)
    out[max(dy, 0) : max(h + dy, 0), max(dx, 0) : max(w + dx, 0)] = image[
        max(-dy, 0) : max(h - dy, 0), max(-dx, 0) : max(w - dx, 0)
    ]
    return out


def _big_vision(image: UInt8[np.ndarray, "h w 3"], size: Size) -> Resized:
    """big_vision's ImageNet configs: resize_small(256), central_crop(224)."""
    # Only the part that is kept: a line of pixels resized in full takes gigabytes.
    return _area(image, _covering(image, margin(size)), size)


def _vision_transformer(image: UInt8[np.ndarray, "h w 3"], size: Size) -> Resized:
    """vision_transformer `input_pipeline.py`: the whole image to 224, not rounded."""
    return resize(image.astype(np.float32), size)


def _paper_resize_crop(image: UInt8[np.ndarray, "h w 3"], size: Size) -> Resized:
    """arXiv 2105.01601 Appendix C, `resize-crop`; bilinear is our choice."""
    return _bilinear(image, margin(size), size)


def _paper_resmall_crop(image: UInt8[np.ndarray, "h w 3"], size: Size) -> Resized:
    """arXiv 2105.01601 Appendix C, `resmall-crop`; bilinear is our choice."""
    return _bilinear(image, _covering(image, margin(size)), size)


def _timm(image: UInt8[np.ndarray, "h w 3"], size: Size, crop_pct: float) -> Resized:
    """timm's `transforms_imagenet_eval`: Pillow's antialiased bicubic, then the centre.

    The image is scaled so that it just covers floor(size / crop_pct). Of a square's
    sides the longer is truncated, as in torchvision; a rectangle's are rounded, as in
    timm's ResizeKeepRatio. Offsets are rounded half to even.
    """
    height, width = size
    box_h, box_w = math.floor(height / crop_pct), math.floor(width / crop_pct)
    h, w = image.shape[:2]
    if box_h == box_w:
        new_h, new_w = max(box_h, int(box_w * h / w)), max(box_w, int(box_h * w / h))
    else:
        ratio = min(h / box_h, w / box_w)
        new_h, new_w = round(h / ratio), round(w / ratio)
    y, x = round((new_h - height) / 2), round((new_w - width) / 2)
    if new_h * new_w < 2**26:
        resized = PIL.Image.fromarray(image).resize((new_w, new_h), Filter.BICUBIC)
        return _cut(np.array(resized), (y, x, height, width))
    # A line of pixels resized in full takes gigabytes. The middle alone is within one
    # level of that, because Pillow keeps the box in float32.
    top, bottom, y0, y1 = _span(y, height, h / new_h, h)
    left, right, x0, x1 = _span(x, width, w / new_w, w)
    near = PIL.Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    box = left - x0, top - y0, right - x0, bottom - y0
    return np.array(near.resize((width, height), Filter.BICUBIC, box=box))


def _span(start: int, n: int, scale: float, n_in: int) -> tuple[float, float, int, int]:
    """The range of the input under n output pixels, and the one that bicubic reads."""
    low, high = start * scale, (start + n) * scale
    around = 3 * max(1, math.ceil(scale))
    return low, high, max(0, int(low) - around), min(n_in, math.ceil(high) + around)


PROTOCOLS: dict[str, Callable[[UInt8[np.ndarray, "h w 3"], Size], Resized]] = {
    "big_vision": _big_vision,
    "vision_transformer": _vision_transformer,
    "paper-resize-crop": _paper_resize_crop,
    "paper-resmall-crop": _paper_resmall_crop,
    "timm": functools.partial(_timm, crop_pct=0.875),
    "timm-0.9": functools.partial(_timm, crop_pct=0.9),
    "timm-1.0": functools.partial(_timm, crop_pct=1.0),
}


def dct_of(name: str) -> str:
    """Returns how JPEGs are decoded for a protocol, or for a crop of training.

    timm's models saw Pillow's pixels, which are of the accurate DCT, the others
    TensorFlow's.
    """
    return "accurate" if name.startswith("timm") else "fast"


def preprocess(image: UInt8[np.ndarray, "h w 3"], protocol: str, size: Size) -> Resized:
    """Resizes and crops a decoded image to `size` as an evaluation protocol does.

    At another resolution R the intermediate 256 becomes round(R·256/224), in timm's
    floor(R/crop_pct); for a rectangle, on each side. The protocols that keep the aspect
    ratio scale the image so that it just covers that box, then crop the middle.

    Args:
      image: decoded as `dct_of` says.
      protocol: a key of `PROTOCOLS`.
      size: (height, width) of the result.

    Returns:
      uint8, or for "vision_transformer" float32, in levels 0..255.

    Raises:
      ValueError: the protocol is unknown.
    """
    _check_size(size)
    return known.pick("protocol", protocol, PROTOCOLS)(image, size)


def margin(size: Size) -> tuple[int, int]:
    """Returns the sides to resize to before `size` is cut out: 256 for 224.

    For other sides R it is round(R·256/224), our choice: 512 for 448.
    """
    height, width = size
    return round(height * 256 / 224), round(width * 256 / 224)


def _check_size(size: Size) -> None:
    if min(size) < 1:
        raise ValueError(f"size is {size}; each side must be at least 1 pixel.")


def _as_dtype(levels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.uint8:
        return np.clip(levels, 0, 255).astype(np.uint8)
    return levels
