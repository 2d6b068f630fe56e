"""Encoded images to pixels: TensorFlow's, bit for bit, or an error.

JPEGs by libjpeg-turbo (simplejpeg), everything else by Pillow.
"""

import contextlib
import io
import math

import numpy as np
import PIL.Image
import simplejpeg
from jaxtyping import UInt8

# How files end that `decode` reads, the most common first. Not all that Pillow knows:
# some formats need another program, hold no picture of up to 16 bits, or are leaving.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".avifs", ".dib", ".ico", ".icns", ".cur"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".pnm", ".ppm", ".pgm", ".pbm", ".tga", ".icb", ".vda", ".vst"),
    *(".sgi", ".rgb", ".rgba", ".bw", ".ras", ".pcx", ".dcx", ".psd", ".qoi", ".dds"),
    *(".blp", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".msp"),
    *(".pcd", ".pxr", ".xbm", ".xpm"),
)

# Complaints about a JPEG that end it: libjpeg merely warns, and makes up the pixels.
# The last one is ours.
_DAMAGE = (
    "premature end",
    "bad huffman code",
    "bad arithmetic code",
    "instead of rst",
    "inconsistent progression",
    "too many pixels",
)


def decode(data: bytes, dct: str = "fast") -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an encoded image to RGB; the content decides the format, not a name.

    As in `tf.io.decode_image(channels=3)` alpha is dropped, 16-bit samples lose their
    low byte, and Exif's orientation is ignored. Of an animation the first frame is
    taken.

    Args:
        data: the bytes of a JPEG, or of anything that Pillow reads.
        dct: "fast" gives the pixels of TensorFlow's default, on which the published
            models were trained; "accurate" those of Pillow and OpenCV. Only for JPEG.

    Raises:
        ValueError: `dct` is unknown, or the data are damaged, not an image, or too
            large to be a photograph (Pillow's limit, 179 million pixels).
    """
    if dct not in ("fast", "accurate"):
        raise ValueError(f"dct is {dct!r}; it must be 'fast' or 'accurate'.")
    if data[:3] != b"\xff\xd8\xff":
        return _decode_with_pillow(data)
    try:
        return _decode_jpeg(data, dct == "fast", strict=True)
    except ValueError as error:
        reason = str(error)
        if any(damage in reason.lower() for damage in _DAMAGE):
            raise _undecodable(data, reason) from error
    # TensorFlow reads over stray bytes. What else is wrong Pillow will say.
    image = _decode_with_pillow(data)
    if "extraneous" in reason:
        with contextlib.suppress(ValueError):  # in the header: simplejpeg insists
            return _decode_jpeg(data, dct == "fast", strict=False)
    return image


def _decode_jpeg(data: bytes, fast: bool, strict: bool) -> UInt8[np.ndarray, "h w 3"]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
    if height * width > 2 * (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"too many pixels, {height}x{width}")
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=fast, strict=strict)
    inks = simplejpeg.decode_jpeg(data, "CMYK", fastdct=fast, strict=strict)
    # TensorFlow's integer arithmetic; Adobe stores the complement of each ink.
    light = inks if b"\xff\xee\x00\x0eAdobe" in data else 255 - inks
    light = light.astype(np.uint16)
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)


def _decode_with_pillow(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    try:
        image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data))
        image.load()
    except PIL.UnidentifiedImageError as error:
        raise _undecodable(data, "no image format that Pillow knows") from error
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise _undecodable(data, str(error)) from error
    if image.mode.startswith(("I", "F")):
        # Pillow clips 16-bit grey to 255 where everyone else keeps the high byte.
        samples = np.asarray(image)
        if image.mode == "F" or samples.min() < 0 or samples.max() > 65535:
            raise _undecodable(data, "its samples have more than 16 bits")
        image = PIL.Image.fromarray((samples >> 8).astype(np.uint8))
    elif "transparency" in image.info:
        # A palette's transparency cannot be dropped in one step without a warning.
        seen = image.convert("RGBA")
        if image.format == "GIF":
            # TensorFlow ignores it in a PNG, but sees black through a GIF.
            black = PIL.Image.new("RGBA", image.size, "black")
            seen = PIL.Image.alpha_composite(black, seen)
        image = seen
    return np.array(image.convert("RGB"))


def _undecodable(data: bytes, reason: str) -> ValueError:
    return ValueError(
        f"cannot decode {len(data)} bytes that begin with {data[:8]!r}: {reason}; "
        "is the file complete, and an image?"
    )
