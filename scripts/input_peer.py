"""The host path of training written in TensorFlow, for `benchmark.py input` alone.

Inception crop, bilinear resize, flip and RandAugment as tf.data users write them, from
the published formulas (arXiv 2105.01601's code as described in `randaugment.OPS`).
Needs TensorFlow, which the extra `prepare` brings.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# TensorFlow refuses this after its first operation.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

GREY = 128


def batches(
    jpegs: list[bytes], size: int, batch: int, layers: int, magnitude: float
) -> Iterator[Any]:
    """Endless batches of augmented images from one thread of tf.data."""

    def prepare(data):
        image = crop_resize_flip(data, size)
        for _ in range(layers):
            image = randaugment_layer(image, magnitude)
        return image

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    # A batch that is prefetched would not be timed.
    options.experimental_optimization.inject_prefetch = False
    data = tf.data.Dataset.from_tensor_slices(jpegs).repeat().map(prepare)
    return iter(data.batch(batch, drop_remainder=True).with_options(options))


def crop_resize_flip(data, size: int):
    """Turns JPEG bytes into a uint8 image (size, size, 3)."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data),
        tf.zeros([0, 0, 4]),
        min_object_covered=0,
        aspect_ratio_range=(0.75, 1.33),
        area_range=(0.05, 1.0),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], extent[:2]], axis=0)
    image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (size, size), "bilinear", antialias=False)
    image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
    return tf.image.random_flip_left_right(image)


def randaugment_layer(image, magnitude: float):
    """Applies one of the 16 ops, drawn uniformly."""
    ops = list(operations(magnitude).values())
    drawn = tf.random.uniform([], 0, len(ops), tf.int32)
    branches = [lambda op=op: op(image) for op in ops]
    return tf.ensure_shape(tf.switch_case(drawn, branches), image.shape)


def operations(magnitude: float) -> dict[str, Callable[[Any], Any]]:
    """The 16 ops on uint8 images (h, w, 3), which draw signs and places themselves."""
    level = magnitude / 10
    factor = level * 1.8 + 0.1
    return {
        "AutoContrast": auto_contrast,
        "Equalize": equalize,
        "Invert": lambda x: 255 - x,
        "Rotate": lambda x: rotate(x, signed(level * 30)),
        "Posterize": lambda x: posterize(x, int(level * 4)),
        "Solarize": lambda x: tf.where(x < int(level * 256) % 256, x, 255 - x),
        "Color": lambda x: color(x, factor),
        "Contrast": lambda x: contrast(x, factor),
        "Brightness": lambda x: blend(0.0, x, factor),
        "Sharpness": lambda x: sharpness(x, factor),
        "ShearX": lambda x: project(x, [1, signed(level * 0.3), 0, 0, 1, 0]),
        "ShearY": lambda x: project(x, [1, 0, 0, signed(level * 0.3), 1, 0]),
        "TranslateX": lambda x: project(x, [1, 0, signed(level * 100), 0, 1, 0]),
        "TranslateY": lambda x: project(x, [1, 0, 0, 0, 1, signed(level * 100)]),
        "Cutout": lambda x: cutout(x, int(level * 40)),
        "SolarizeAdd": lambda x: solarize_add(x, int(level * 110)),
    }


def signed(value: float):
    """`value` or its negative, each half the time."""
    return tf.where(tf.random.uniform([]) < 0.5, value, -value)


def truncated(levels):
    """Clips levels to 0..255 and casts them to uint8."""
    return tf.cast(tf.clip_by_value(levels, 0.0, 255.0), tf.uint8)


def blend(start, image, factor: float):
    """Returns start + factor·(image - start)."""
    end = tf.cast(image, tf.float32)
    return truncated(start + factor * (end - start))


def auto_contrast(image):
    """Stretches each channel to 0..255."""
    x = tf.cast(image, tf.float32)
    low, high = tf.reduce_min(x, axis=[0, 1]), tf.reduce_max(x, axis=[0, 1])
    scale = 255.0 / tf.maximum(high - low, 1.0)
    return tf.where(high > low, truncated(x * scale - low * scale), image)


def equalize(image):
    """Flattens each channel's histogram."""

    def channel(c):
        x = tf.cast(image[..., c], tf.int32)
        histogram = tf.histogram_fixed_width(x, [0, 255], nbins=256)
        last = tf.boolean_mask(histogram, histogram > 0)[-1]
        step = (tf.reduce_sum(histogram) - last) // 255

        def table():
            below = tf.cumsum(histogram, exclusive=True)
            return tf.clip_by_value((below + step // 2) // step, 0, 255)

        return tf.cond(step == 0, lambda: x, lambda: tf.gather(table(), x))

    return tf.cast(tf.stack([channel(c) for c in range(3)], axis=-1), tf.uint8)


def posterize(image, bits: int):
    """Keeps the upper `bits` bits."""
    shift = tf.constant(min(8 - bits, 7), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def solarize_add(image, addition: int):
    """Adds to the levels below 128."""
    added = tf.clip_by_value(tf.cast(image, tf.int32) + addition, 0, 255)
    return tf.where(image < 128, tf.cast(added, tf.uint8), image)


def color(image, factor: float):
    """Blends from greyscale through the image and beyond."""
    return blend(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32), image, factor)


def contrast(image, factor: float):
    """Blends from a constant grey through the image and beyond."""
    pixels = tf.cast(tf.size(image) // 3, tf.float32)
    return blend(tf.floor(tf.minimum(pixels / 256, 255.0)), image, factor)


def sharpness(image, factor: float):
    """Blends from a smoothed image through the image and beyond."""
    x = tf.cast(image, tf.float32)[None]
    taps = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13.0
    kernel = tf.tile(taps[:, :, None, None], [1, 1, 3, 1])
    smooth = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "VALID")
    smooth = tf.floor(tf.clip_by_value(smooth, 0.0, 255.0))
    border = [[0, 0], [1, 1], [1, 1], [0, 0]]
    inside = tf.pad(tf.ones_like(smooth), border)
    return blend(tf.where(inside > 0, tf.pad(smooth, border), x)[0], image, factor)


def rotate(image, degrees):
    """Rotates about the centre."""
    radians = degrees * (math.pi / 180)
    cos, sin = tf.cos(radians), tf.sin(radians)
    height, width, _ = tf.unstack(tf.cast(tf.shape(image), tf.float32))
    x, y = width - 1, height - 1
    at_x, at_y = (x - (cos * x - sin * y)) / 2, (y - (sin * x + cos * y)) / 2
    return project(image, [cos, -sin, at_x, sin, cos, at_y])


def project(image, row):
    """Samples at transformed coordinates, to the nearest pixel; outside is grey."""
    row = tf.stack([tf.cast(value, tf.float32) for value in [*row, 0, 0]])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=row[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(GREY),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def cutout(image, radius: int):
    """Greys a square at a random centre."""
    height, width, _ = tf.unstack(tf.shape(image))

    def covered(length):
        at = tf.range(length) - tf.random.uniform([], 0, length, tf.int32)
        return (at >= -radius) & (at < radius)

    hole = covered(height)[:, None] & covered(width)[None]
    return tf.where(hole[..., None], tf.constant(GREY, tf.uint8), image)
