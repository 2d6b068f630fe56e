"""Decodes images to the pixels that TensorFlow gives, bit for bit, or raises.

libjpeg-turbo (simplejpeg) decodes JPEGs, Pillow everything else.
"""

import contextlib
import io
import struct
import zlib

import numpy as np
import PIL.ExifTags
import PIL.Image
import simplejpeg
from jaxtyping import UInt8

from mlp_mixer.text import brief

# The largest image that is decoded: twice what Pillow warns of. Above `PIXELS` the size
# of the file is a limit too: 34 bytes of WebP can declare 169 million pixels (27 s and
# 3.6 GB), and photographs have fewer pixels per byte than that.
MAX_PIXELS = 178_956_970
PIXELS, PIXELS_PER_BYTE = 2**24, 500
# PostScript, which Pillow would pass to Ghostscript to be run.
_PROGRAMS = (b"%!PS", b"\xc5\xd0\xd3\xc6")

# Errors that Pillow's plugins raise about damaged data.
_PILLOWS_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
    PIL.Image.DecompressionBombError,
)

# Endings of files that `decode` reads, the most common first. Formats of Pillow's are
# left out that need another program, have no picture of up to 16 bits, or are
# deprecated.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".avifs", ".dib", ".ico", ".icns", ".cur"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".pnm", ".ppm", ".pgm", ".pbm", ".tga", ".icb", ".vda", ".vst"),
    *(".sgi", ".rgb", ".rgba", ".bw", ".ras", ".pcx", ".dcx", ".psd", ".qoi", ".dds"),
    *(".blp", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".msp"),
    *(".pcd", ".pxr", ".xbm", ".xpm"),
)

# Warnings of libjpeg about a JPEG that are errors here, because it invents the pixels.
# The last one is from `_check_pixels`.
_DAMAGE = (
    "premature end",
    "bad huffman code",
    "bad arithmetic code",
    "instead of rst",
    "inconsistent progression",
    "too many pixels",
)

# Exif's orientation → whether the stored image is transposed, then the steps (1 or -1)
# by which its rows and columns are read. 1 is upright.
_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
# A PNG with an orientation holds one of these. Pillow would have to decode it to tell.
_PNG_EXIF = (b"eXIf", b"type exif", b"tiff:Orientation")


def decode(
    data: bytes, dct: str = "fast", *, exif: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an encoded image to RGB; the content decides the format, not a name.

    As in `tf.io.decode_image(channels=3)` alpha is dropped, 16-bit samples lose their
    low byte, and Exif's orientation is ignored, in every format. An animation gives its
    first frame.

    Args:
      data: the bytes of a JPEG, or of anything that Pillow reads.
      dct: "fast" gives the pixels of TensorFlow's default, on which the published
        models were trained; "accurate" those of Pillow and OpenCV. Only for JPEG.
      exif: whether the image is turned as its Exif orientation says.

    Raises:
      ValueError: `dct` is unknown, or the data are damaged, not an image, or declare
        more pixels than `MAX_PIXELS` or than is plausible for their size.
    """
    if dct not in ("fast", "accurate"):
        raise ValueError(f"dct is {dct!r}; it must be 'fast' or 'accurate'.")
    image = _decode_stored(data, dct)
    turn = _TURNS.get(orientation(data)) if exif else None
    if turn is None:
        return image
    transposed, down, across = turn
    image = image.swapaxes(0, 1) if transposed else image
    return np.ascontiguousarray(image[::down, ::across])


def orientation(data: bytes) -> int:
    """Exif's orientation of an encoded image, 1 ... 8; 1, upright, if it has none.

    Only the header is read, except for a PNG.
    """
    if data[:4] == b"\x89PNG" and not any(mark in data for mark in _PNG_EXIF):
        return 1
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            _check_pixels(data, image.height, image.width)
            found = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except _PILLOWS_ERRORS:  # damaged metadata do not make the image unreadable
        return 1
    return int(found) if found in _TURNS else 1


def _decode_stored(data: bytes, dct: str) -> UInt8[np.ndarray, "h w 3"]:
    if data[:3] != b"\xff\xd8\xff":
        return _decode_with_pillow(data)
    try:
        return _decode_jpeg(data, dct == "fast", strict=True)
    except ValueError as error:
        reason = str(error)
        if any(damage in reason.lower() for damage in _DAMAGE):
            raise _undecodable(data, reason) from error
    # TensorFlow ignores stray bytes. If anything else is wrong, Pillow says it.
    image = _decode_with_pillow(data)
    if "extraneous" in reason:
        with contextlib.suppress(ValueError):  # simplejpeg is strict about headers
            return _decode_jpeg(data, dct == "fast", strict=False)
    return image


def _decode_jpeg(data: bytes, fast: bool, strict: bool) -> UInt8[np.ndarray, "h w 3"]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
    _check_pixels(data, height, width)
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=fast, strict=strict)
    inks = simplejpeg.decode_jpeg(data, "CMYK", fastdct=fast, strict=strict)
    # TensorFlow's integer arithmetic; Adobe stores the complement of each ink.
    light = inks if b"\xff\xee\x00\x0eAdobe" in data else 255 - inks
    light = light.astype(np.uint16)
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)


def _decode_with_pillow(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    if data.startswith(_PROGRAMS):
        raise _undecodable(data, "PostScript is a program, not an image")
    try:
        image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data))
        _check_pixels(data, image.height, image.width)
        if image.format == "TIFF":  # the only format that Pillow turns by itself
            image.getexif().pop(PIL.ExifTags.Base.Orientation, None)
            image.load()
            image = image.copy()  # which has the size that is stored
        image.load()
    except PIL.UnidentifiedImageError as error:
        raise _undecodable(data, "no image format that Pillow knows") from error
    except _PILLOWS_ERRORS as error:
        raise _undecodable(data, str(error)) from error
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit grey to 255; TensorFlow keeps the high byte.
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


def _check_pixels(data: bytes, height: int, width: int) -> None:
    most = min(MAX_PIXELS, max(PIXELS, PIXELS_PER_BYTE * len(data)))
    if height * width > most:
        raise ValueError(f"too many pixels, {height}x{width}, more than {most:,}")


def _undecodable(data: bytes, reason: str) -> ValueError:
    return ValueError(
        f"cannot decode {len(data)} bytes that begin with {data[:8]!r}: "
        f"{brief(reason)}; is the file complete, and an image?"
    )
