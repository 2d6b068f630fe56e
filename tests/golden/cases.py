"""What is recorded, for the recorders and for the tests that compare. No TensorFlow."""

import collections
import io
import json
import pathlib
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image

FOLDER = pathlib.Path(__file__).parent
PHOTOS = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("photos/*.jpg"))}

DCTS = {"fast": "", "accurate": "INTEGER_ACCURATE"}  # ours: TensorFlow's dct_method

# Of a photo, or of a part of astronaut.jpg as (height, width): bilinear to a height and
# width, and area to a shorter side.
BILINEAR: list[tuple[str | tuple[int, int], list[tuple[int, int]]]] = [
    ("astronaut", [(224, 224), (256, 273), (120, 128), (61, 97), (448, 448)]),
    ("chelsea-progressive", [(256, 331), (224, 224), (157, 100), (31, 203), (1, 1)]),
    ("rocket-422-restart", [(131, 97), (65, 48), (262, 194), (17, 300)]),
    ((1, 200), [(1, 31), (7, 50), (224, 224)]),
    ((200, 1), [(31, 1), (50, 7), (224, 224)]),
    ((3, 250), [(3, 224), (256, 256), (2, 500)]),
    ((5, 4), [(224, 224), (3, 3)]),
    ((1, 1), [(9, 5)]),
]
AREA: list[tuple[str | tuple[int, int], list[int]]] = [
    ("astronaut", [256, 512, 120, 61, 97]),
    ("chelsea-progressive", [256, 157, 100, 31, 1]),
    ("rocket-422-restart", [256, 97, 48, 17]),
    ((1, 200), [1, 3, 50]),
    ((200, 1), [1, 3, 50]),
    ((3, 250), [2, 5, 32]),
    ((5, 4), [3, 224]),
    ((1, 1), [9]),
]

PROTOCOL_PHOTOS = [
    "astronaut",
    "chelsea-progressive",
    "coffee-444",
    "rocket-grey",
    "coffee-cmyk",
]
PROTOCOL_SIZES = [224, 448, 96]

CROP_SHAPES = [(375, 500), (500, 333), (97, 1024)]
CROP_DRAWS = 50_000

# What timm records. Of a CMYK photograph Pillow's colours are others than ours.
TIMM_PHOTOS = [name for name in PROTOCOL_PHOTOS if name != "coffee-cmyk"]
TIMM_PROTOCOLS = {"timm": 0.875, "timm-0.9": 0.9, "timm-1.0": 1.0}  # crop_pct
TIMM_RECTANGLES = [(192, 256), (160, 96)]
# Of the last, a line, ten attempts fail mostly, and the middle is taken.
TIMM_CROP_SHAPES = [(375, 500), (97, 1024), (30, 2000)]
TIMM_MAGNITUDES = [0.0, 1.3, 5.0, 8.6, 9.0, 9.7, 10.0]
TIMM_DRAWS = 50_000

MAGNITUDES = [0, 10, 15, 20]
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
CUTOUT_CENTRE = (50, 200)


def checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def grid(array: np.ndarray) -> np.ndarray:
    """At most 6x6 pixels, from edge to edge."""
    y, x = (np.linspace(0, n - 1, min(n, 6)).astype(int) for n in array.shape[:2])
    return array[np.ix_(y, x)]


def part(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Of astronaut.jpg, where the face is."""
    return image[20 : 20 + height, 2 : 2 + width]


AUGMENTED = ["astronaut", "coffee-444"]


def augmented_images(astronaut: np.ndarray, coffee: np.ndarray) -> dict[str, Any]:
    """What RandAugment is recorded on: decoded photos, and what is made from them."""
    photo = astronaut[8:232, 16:240]
    noise = np.random.RandomState(0).randint(0, 256, (224, 224, 3)).astype(np.uint8)
    one_level = photo.copy()
    one_level[..., 1] = 7
    return {
        "astronaut": photo,
        "coffee, not square": coffee,
        "noise": noise,
        "constant": np.full((224, 224, 3), 77, np.uint8),
        "one channel constant": one_level,
        "two levels": np.where(photo > 120, 200, 30).astype(np.uint8),
        "dark": photo // 8,
        "tiny": photo[:2, :3],
    }


def png(
    samples: np.ndarray,
    colour_type: int,
    transparency: bytes = b"",
    stated_size: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of 8 or 16 bits a sample, in kinds that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    height, width = stated_size or samples.shape[:2]
    bits = 8 * samples.itemsize
    big_endian = samples.astype(samples.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(
            b"IHDR", struct.pack(">2I5B", width, height, bits, colour_type, 0, 0, 0)
        )
        + (chunk(b"tRNS", transparency) if transparency else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encode(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def odd_images() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Odd but valid files, and the pixels that were written; None: of a JPEG."""
    rng = np.random.RandomState(0)
    deep = rng.randint(0, 65536, (20, 31, 4)).astype(np.uint16)
    high = (deep >> 8).astype(np.uint8)
    flat = rng.randint(0, 256, (20, 31, 4)).astype(np.uint8)
    line = rng.randint(0, 256, (1, 20_000, 3)).astype(np.uint8)
    rgb, grey = flat[..., :3], flat[..., :1].repeat(3, axis=2)
    colours = rng.randint(0, 256, (256, 3)).astype(np.uint8)
    palette = PIL.Image.fromarray(flat[..., 0]).convert("P")
    palette.putpalette(colours.tobytes())
    frames = [PIL.Image.fromarray(rgb), PIL.Image.fromarray(255 - rgb)]
    animated = {"save_all": True, "append_images": frames[1:]}
    other = palette.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    bits = flat[..., :1] > 127
    jpeg = PHOTOS["astronaut"]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    head = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    turned = b"\xff\xe1" + struct.pack(">H", len(head) + 2) + head
    at = len(jpeg) - 2
    return {
        "1x1": (png(rgb[:1, :1], 2), rgb[:1, :1]),
        "1x1 grey": (png(flat[:1, :1, 0], 0), grey[:1, :1]),
        "20000 wide": (png(line, 2), line),
        "20000 high": (png(line.reshape(-1, 1, 3), 2), line.reshape(-1, 1, 3)),
        "16-bit grey": (png(deep[..., 0], 0), high[..., :1].repeat(3, axis=2)),
        "16-bit grey with a transparent level": (
            png(deep[..., 0], 0, struct.pack(">H", deep[3, 4, 0])),
            high[..., :1].repeat(3, axis=2),
        ),
        "16-bit RGB": (png(deep[..., :3], 2), high[..., :3]),
        "16-bit grey with alpha": (
            png(deep[..., [0, 3]], 4),
            high[..., :1].repeat(3, axis=2),
        ),
        "16-bit RGB with alpha": (png(deep, 6), high[..., :3]),
        "grey with alpha": (png(flat[..., [0, 3]], 4), grey),
        "grey with a transparent level": (
            png(flat[..., 0], 0, struct.pack(">H", flat[3, 4, 0])),
            grey,
        ),
        "RGB with a transparent colour": (
            png(rgb, 2, struct.pack(">3H", *rgb[3, 4])),
            rgb,
        ),
        "1 bit": (
            encode(PIL.Image.fromarray(bits[..., 0]), "PNG"),
            np.uint8(255) * bits.repeat(3, axis=2),
        ),
        "palette": (encode(palette, "PNG"), colours[flat[..., 0]]),
        "palette with transparency": (
            encode(palette, "PNG", transparency=bytes(range(256))),
            colours[flat[..., 0]],
        ),
        "GIF": (
            encode(palette, "GIF", save_all=True, append_images=[other]),
            colours[flat[..., 0]],
        ),
        "GIF with a transparent colour, seen as black": (
            encode(palette, "GIF", transparency=int(flat[3, 4, 0])),
            colours[flat[..., 0]] * (flat[..., :1] != flat[3, 4, 0]),
        ),
        "WebP": (encode(frames[0], "WEBP", lossless=True), rgb),
        "WebP with alpha": (
            encode(PIL.Image.fromarray(flat), "WEBP", lossless=True, exact=True),
            rgb,
        ),
        "animated WebP": (encode(frames[0], "WEBP", lossless=True, **animated), rgb),
        "animated PNG": (encode(frames[0], "PNG", **animated), rgb),
        "BMP": (encode(frames[0], "BMP"), rgb),
        "BMP of grey": (encode(PIL.Image.fromarray(flat[..., 0]), "BMP"), grey),
        "turned by Exif": (jpeg[:2] + turned + jpeg[2:], None),
        "bytes after the end": (jpeg + bytes(9), None),
        "stray bytes in the scan": (jpeg[:at] + bytes(9) + jpeg[at:], None),
        "CMYK without Adobe's marker": (
            PHOTOS["coffee-cmyk"].replace(b"\xff\xee\x00\x0e", b"\xff\xe5\x00\x0e"),
            None,
        ),
    }


def crop_histograms(boxes: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of the rows (y, x, height, width): how often each value came, and each area."""
    y, x, height, width = boxes.T
    share = height * width * 2000 // (shape[0] * shape[1])
    bins = {"y": shape[0], "x": shape[1], "height": shape[0], "width": shape[1]}
    values = {"y": y, "x": x, "height": height, "width": width}
    counts = {k: np.bincount(v, minlength=bins[k] + 1) for k, v in values.items()}
    counts["area"] = np.bincount(share, minlength=2001)
    return {k: v.astype(np.uint16) for k, v in counts.items()}


def law(counts: list[int], drawn: list[tuple[str, Any, Any]]) -> dict[str, Any]:
    """Of what timm's RandAugment drew: how often what came.

    Args:
      counts: for each image the number of ops that were applied.
      drawn: for each of these its name, its argument or None, its filter.
    """
    largest = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}
    largest |= {"TranslateXRel": 0.45, "TranslateYRel": 0.45}
    shares = [a / largest[name] for name, a, _ in drawn if name in largest]
    bins = np.linspace(-1.001, 1.001, 401)
    return {
        "applied": np.bincount(counts, minlength=3).tolist(),
        "ops": dict(sorted(collections.Counter(name for name, *_ in drawn).items())),
        "filters": dict(sorted(collections.Counter(f for *_, f in drawn).items())),
        "strengths": np.histogram(shares, bins)[0].tolist(),
    }


def load() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The recorded checksums and arrays, of TensorFlow and of timm."""
    checksums: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in ("golden", "timm_augment"):
        recorded = json.loads((FOLDER / f"{name}.json").read_text())
        recorded["protocol"] |= checksums.get("protocol", {})
        checksums |= recorded
        with np.load(FOLDER / f"{name}.npz") as file:
            arrays |= file
    return checksums, arrays
