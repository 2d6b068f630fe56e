"""Records golden.json and golden.npz from TensorFlow 2.21 and Pillow; see README.md.

The definitions are written from the published description of the reference (the
paper's code for input, evaluation and RandAugment) in TensorFlow's own ops, as
independently of mlp_mixer as can be: nothing of it is imported here.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import PIL.Image
import tensorflow as tf

F32 = tf.float32


def decode(name: str, dct: str = "fast") -> np.ndarray:
    data = cases.PHOTOS[name]
    return tf.io.decode_jpeg(data, channels=3, dct_method=cases.DCTS[dct]).numpy()


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)


# --- evaluation protocols -------------------------------------------------------------


def resized(image: np.ndarray, size: tuple[int, int], method: str) -> tf.Tensor:
    return tf.image.resize(image, size, method=method, antialias=False)


def shorter_side_to(image: np.ndarray, side: int, method: str) -> tf.Tensor:
    shape = tf.cast(tf.shape(image)[:2], F32)
    ratio = tf.cast(side, F32) / tf.reduce_min(shape)
    height, width = tf.cast(tf.round(shape * ratio), tf.int32).numpy()
    return resized(image, (height, width), method)


def centre(image: tf.Tensor, size: int) -> np.ndarray:
    y, x = ((n - size) // 2 for n in image.shape[:2])
    return tf.image.crop_to_bounding_box(image, y, x, size, size).numpy()


def timm(image: np.ndarray, size: int) -> np.ndarray:
    side = math.floor(size / 0.875)
    height, width = image.shape[:2]
    new = (
        (side, int(side * height / width))
        if width <= height
        else (int(side * width / height), side)
    )
    photo = PIL.Image.fromarray(image).resize(new, PIL.Image.Resampling.BICUBIC)
    left, top = (round((n - size) / 2) for n in new)
    return np.asarray(photo.crop((left, top, left + size, top + size)))


PROTOCOLS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "big_vision": lambda image, size: centre(
        to_uint8(shorter_side_to(image, round(size * 256 / 224), "area")), size
    ),
    "vision_transformer": lambda image, size: resized(
        image, (size, size), "bilinear"
    ).numpy(),
    "paper-resize-crop": lambda image, size: centre(
        to_uint8(resized(image, (round(size * 256 / 224),) * 2, "bilinear")), size
    ),
    "paper-resmall-crop": lambda image, size: centre(
        to_uint8(shorter_side_to(image, round(size * 256 / 224), "bilinear")), size
    ),
    "timm": timm,
}


# --- the crop of training -------------------------------------------------------------


def crops(shape: tuple[int, int]) -> np.ndarray:
    """Rows (y, x, height, width)."""

    @tf.function
    def draw(_: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            (*shape, 3),
            tf.zeros((0, 0, 4), F32),
            area_range=(0.05, 1.0),
            aspect_ratio_range=(0.75, 1.33),
            min_object_covered=0,
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
            seed=2021,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    draws = tf.data.Dataset.range(cases.CROP_DRAWS).map(draw).batch(10_000)
    return np.concatenate([batch.numpy() for batch in draws])


# --- RandAugment ----------------------------------------------------------------------


def per_channel(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable:
    return lambda x: tf.stack([function(c) for c in tf.unstack(x, axis=2)], axis=2)


def blend(start: tf.Tensor, end: tf.Tensor, factor: float) -> tf.Tensor:
    if factor == 0:
        return start
    if factor == 1:
        return end
    start, end = tf.cast(start, F32), tf.cast(end, F32)
    mixed = start + factor * (end - start)
    return tf.cast(mixed, tf.uint8) if 0 < factor < 1 else to_uint8(mixed)


def auto_contrast(channel: tf.Tensor) -> tf.Tensor:
    low, high = (tf.cast(f(channel), F32) for f in (tf.reduce_min, tf.reduce_max))
    if high <= low:
        return channel
    scale = 255.0 / (high - low)
    return to_uint8(tf.cast(channel, F32) * scale - low * scale)


def equalize(channel: tf.Tensor) -> tf.Tensor:
    levels = tf.cast(channel, tf.int32)
    histogram = tf.math.bincount(tf.reshape(levels, [-1]), minlength=256)
    filled = tf.boolean_mask(histogram, histogram > 0)
    step = (tf.reduce_sum(filled) - filled[-1]) // 255
    if step == 0:
        return channel
    table = (tf.cumsum(histogram, exclusive=True) + step // 2) // step
    return tf.cast(tf.gather(tf.clip_by_value(table, 0, 255), levels), tf.uint8)


def smooth(x: tf.Tensor) -> tf.Tensor:
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], F32) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    if min(x.shape[:2]) < 3:
        return x
    inner = tf.nn.depthwise_conv2d(
        tf.cast(x, F32)[None], kernel, [1, 1, 1, 1], "VALID"
    )[0]
    frame = tf.ones(inner.shape[:2], tf.bool)
    frame = tf.pad(frame, [[1, 1], [1, 1]])[..., None]
    inner = tf.pad(to_uint8(inner), [[1, 1], [1, 1], [0, 0]])
    return tf.where(frame, inner, x)


def projected(x: tf.Tensor, *rows: Any) -> tf.Tensor:
    """Takes the output (x, y) from a·x + b·y + c, d·x + e·y + f of the input."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x[None],
        transforms=tf.stack([tf.cast(v, F32) for v in (*rows, 0, 0)])[None],
        output_shape=x.shape[:2],
        fill_value=128.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def rotate(x: tf.Tensor, degrees: float) -> tf.Tensor:
    angle = tf.constant(degrees, F32) * tf.constant(math.pi / 180, F32)
    cos, sin = tf.cos(angle), tf.sin(angle)
    h, w = (tf.constant(n - 1, F32) for n in x.shape[:2])
    at_x = (w - (cos * w - sin * h)) / 2.0
    at_y = (h - (sin * w + cos * h)) / 2.0
    return projected(x, cos, -sin, at_x, sin, cos, at_y)


def cutout(x: tf.Tensor, radius: int) -> tf.Tensor:
    cy, cx = cases.CUTOUT_CENTRE
    y, x_ = tf.range(x.shape[0])[:, None, None], tf.range(x.shape[1])[None, :, None]
    rows = (y >= cy - radius) & (y < cy + radius)
    columns = (x_ >= cx - radius) & (x_ < cx + radius)
    return tf.where(rows & columns, tf.constant(128, tf.uint8), x)


def operations(
    x: tf.Tensor, magnitude: float, sign: int
) -> dict[str, Callable[[], tf.Tensor]]:
    level = magnitude / 10
    factor = 1.8 * level + 0.1
    # The sum of the histogram over 256, where its mean was meant.
    grey = min(255.0, x.shape[0] * x.shape[1] / 256)
    constant = tf.cast(tf.fill(x.shape, grey), tf.uint8)
    return {
        "AutoContrast": lambda: per_channel(auto_contrast)(x),
        "Equalize": lambda: per_channel(equalize)(x),
        "Invert": lambda: 255 - x,
        "Rotate": lambda: rotate(x, sign * 30 * level),
        "Posterize": lambda: tf.bitwise.left_shift(
            tf.bitwise.right_shift(x, tf.constant(8 - int(4 * level), tf.uint8)),
            tf.constant(8 - int(4 * level), tf.uint8),
        ),
        "Solarize": lambda: tf.where(
            x < tf.cast(tf.constant(int(256 * level), tf.int32), tf.uint8), x, 255 - x
        ),
        "Color": lambda: blend(
            tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x)), x, factor
        ),
        "Contrast": lambda: blend(constant, x, factor),
        "Brightness": lambda: blend(tf.zeros_like(x), x, factor),
        "Sharpness": lambda: blend(smooth(x), x, factor),
        "ShearX": lambda: projected(x, 1, sign * 0.3 * level, 0, 0, 1, 0),
        "ShearY": lambda: projected(x, 1, 0, 0, sign * 0.3 * level, 1, 0),
        "TranslateX": lambda: projected(x, 1, 0, sign * 100 * level, 0, 1, 0),
        "TranslateY": lambda: projected(x, 1, 0, 0, 0, 1, sign * 100 * level),
        "Cutout": lambda: cutout(x, int(40 * level)),
        "SolarizeAdd": lambda: tf.where(
            x < 128, to_uint8(tf.cast(x, tf.int32) + int(110 * level)), x
        ),
    }


# --- recording ------------------------------------------------------------------------


def main() -> None:
    sums: dict[str, Any] = {"tensorflow": tf.__version__, "pillow": PIL.__version__}
    arrays: dict[str, np.ndarray] = {}
    sums["decode"] = {
        name: {dct: cases.checksum(decode(name, dct)) for dct in cases.DCTS}
        for name in cases.PHOTOS
    }
    for name in cases.PHOTOS:
        for dct in cases.DCTS:
            arrays[f"decode/{name}/{dct}"] = cases.grid(decode(name, dct))

    sums["odd"] = {}
    for name, (data, _) in cases.odd_images().items():
        try:
            image = tf.io.decode_image(data, channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            print(f"not TensorFlow's: {name}: {error}")
            continue
        sums["odd"][name] = cases.checksum(image.numpy())

    astronaut = decode("astronaut")

    def image_of(what: str | tuple[int, int]) -> np.ndarray:
        return decode(what) if isinstance(what, str) else cases.part(astronaut, *what)

    levels = {
        f"bilinear/{what}/{size}": resized(image_of(what), size, "bilinear")
        for what, sizes in cases.BILINEAR
        for size in sizes
    } | {
        f"area/{what}/{side}": shorter_side_to(image_of(what), side, "area")
        for what, sides in cases.AREA
        for side in sides
    }
    sums["resize"] = {
        key: cases.checksum(to_uint8(value).numpy()) for key, value in levels.items()
    }
    arrays |= {f"resize/{k}": cases.grid(v.numpy()) for k, v in levels.items()}

    sums["protocol"] = {}
    for name in cases.PROTOCOL_PHOTOS:
        for protocol, function in PROTOCOLS.items():
            for size in cases.PROTOCOL_SIZES:
                dct = "accurate" if protocol == "timm" else "fast"
                result = function(decode(name, dct), size)
                key = f"{name}/{protocol}/{size}"
                sums["protocol"][key] = cases.checksum(result)
                arrays[f"protocol/{key}"] = cases.grid(result)

    for shape in cases.CROP_SHAPES:
        counts = cases.crop_histograms(crops(shape), shape)
        arrays |= {f"crop/{shape}/{k}": v for k, v in counts.items()}

    images = cases.augmented_images(astronaut, decode("coffee-444"))
    sums["randaugment"] = {
        f"{image}/{name}/{magnitude}/{sign}": cases.checksum(op().numpy())
        for image, x in images.items()
        for magnitude in cases.MAGNITUDES
        for sign in (1, -1)
        for name, op in operations(tf.constant(x), magnitude, sign).items()
        if sign > 0 or name in cases.SIGNED
    }
    (cases.FOLDER / "golden.json").write_text(json.dumps(sums, indent=0) + "\n")
    np.savez_compressed(cases.FOLDER / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
