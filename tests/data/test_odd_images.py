"""Damaged files are counted and named; odd but valid ones give the right pixels."""

import io
import logging
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import set_up
from golden import cases

from mlp_mixer.data import decoding, image_ops, sources

SUMS, _ = cases.load()
ODD = cases.odd_images()
JPEG = cases.PHOTOS["coffee-444"]
PNG = cases.encode(PIL.Image.open(io.BytesIO(JPEG)).resize((20, 15)), "PNG")

# --- odd but valid --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [k for k, (_, image) in ODD.items() if image is not None]
)
def test_an_odd_image_has_the_pixels_that_were_written(name):
    data, written = ODD[name]
    np.testing.assert_array_equal(decoding.decode(data), written)


@pytest.mark.parametrize(
    "name", ["turned by Exif", "bytes after the end", "stray bytes in the scan"]
)
def test_what_is_not_the_image_changes_no_pixel(name):
    expected = decoding.decode(cases.PHOTOS["astronaut"])
    np.testing.assert_array_equal(decoding.decode(ODD[name][0]), expected)


@pytest.mark.parametrize("name", SUMS["odd"])
def test_an_odd_image_has_tensorflows_pixels(name):
    assert cases.checksum(decoding.decode(ODD[name][0])) == SUMS["odd"][name]


def test_tensorflow_gives_rgb_of_all_but_two():
    assert ODD.keys() - SUMS["odd"].keys() == {"animated WebP", "WebP with alpha"}


class Files:
    """A source of encoded images, each of another class."""

    class_names = None
    multi_label = False

    def __init__(self, images, labels=None):
        self.images = images
        self.labels = list(range(len(images))) if labels is None else labels
        self.num_classes = len(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.label(index)}

    def label(self, index):
        return self.labels[index]

    def name_of(self, index):
        return f"<file {index}>"


EVERYTHING = Files([data for data, _ in ODD.values()] + list(cases.PHOTOS.values()))


def test_odd_images_pass_through_training(caplog):
    batches = set_up.train_batches(
        EVERYTHING,
        image_size=(64, 64),
        batch_size=len(EVERYTHING),
        seed=0,
        shift=2,
        randaugment_layers=2,
        randaugment_magnitude=15,
        max_broken_images=0,
    )
    for _ in range(3):
        batch = next(batches)
        assert sorted(batch["label"]) == EVERYTHING.labels
        assert batch["image"].shape == (len(EVERYTHING), 64, 64, 3)
    assert not caplog.records


@pytest.mark.parametrize("protocol", image_ops.PROTOCOLS)
def test_odd_images_pass_through_evaluation(protocol, caplog):
    (batch,) = set_up.eval_batches(
        EVERYTHING,
        image_size=(224, 224),
        batch_size=len(EVERYTHING),
        preprocess=protocol,
    )
    assert batch["mask"].all()
    assert batch["image"].shape == (len(EVERYTHING), 224, 224, 3)
    np.testing.assert_array_equal(batch["label"], EVERYTHING.labels)
    assert not caplog.records


@pytest.mark.parametrize("protocol", ["big_vision", "paper-resmall-crop", "timm"])
@pytest.mark.parametrize("turned", [False, True])
def test_of_a_line_the_middle_is_seen(protocol, turned):
    # 20,000 pixels, each 256 wide once resized: 224 columns show the middle two.
    line = np.zeros((1, 20_000, 3), np.uint8)
    line[:, 9_998:10_002, 0] = 10, 90, 170, 250
    if turned:
        line = line.swapaxes(0, 1)
    result = image_ops.preprocess(line, protocol, (224, 224)).astype(int)
    if turned:
        result = result.swapaxes(0, 1)
    assert (result == result[:1]).all()
    assert not result[..., 1:].any()
    red = result[0, :, 0]
    assert (np.diff(red) >= 0).all()
    if protocol == "big_vision":  # area: no pixel is a mixture
        assert (red == [90] * 112 + [170] * 112).all()
    else:  # both have 130 half-way
        assert 90 <= red[0] < 129 <= red[111] <= 130 <= red[112] <= 131 < red[-1] <= 170


# --- turned by Exif ---

BLOCKS = np.kron(
    np.random.default_rng(0).integers(0, 256, (3, 5, 3)), np.ones((8, 8, 1))
).astype(np.uint8)
# How each is written, and how far its pixels are off on average.
TURNABLE = {
    "JPEG": ({"quality": 100, "subsampling": 0}, 2),
    "MPO": ({"quality": 100, "subsampling": 0}, 2),
    "PNG": ({}, 0),
    "WEBP": ({"lossless": True}, 0),
    "TIFF": ({}, 0),
    "TIFF, compressed": ({"compression": "tiff_deflate"}, 0),
    "AVIF": ({"quality": 100, "subsampling": "4:4:4"}, 3),
}


def turned_by_exif(kind, orientation, pixels=BLOCKS):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    options, _ = TURNABLE[kind]
    image = PIL.Image.fromarray(pixels)
    image.save(data, kind.partition(",")[0], exif=exif, **options)
    return data.getvalue()


def assert_close(image, expected, off):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() <= off


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", TURNABLE)
def test_no_format_is_turned_unless_asked(kind, orientation):
    data, (_, off) = turned_by_exif(kind, orientation), TURNABLE[kind]
    assert decoding.orientation(data) == orientation
    assert_close(decoding.decode(data), BLOCKS, off)
    upright = PIL.Image.fromarray(BLOCKS)
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(PIL.ImageOps.exif_transpose(upright))
    assert (orientation < 5) == (expected.shape == BLOCKS.shape)
    for dct in ("fast", "accurate"):
        turned = decoding.decode(data, dct, exif=True)
        assert_close(turned, expected, off)
        assert turned.flags.c_contiguous


def test_sixteen_bits_of_a_turned_tiff_are_read_too():
    data = turned_by_exif("TIFF", 6, BLOCKS[..., 0].astype(np.uint16) << 8)
    np.testing.assert_array_equal(decoding.decode(data)[..., 0], BLOCKS[..., 0])
    assert decoding.decode(data, exif=True).shape == (40, 24, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrong", [0, 9, 65535])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_orientation_that_is_none_turns_nothing(kind, wrong):
    data, (_, off) = turned_by_exif(kind, wrong), TURNABLE[kind]
    assert_close(decoding.decode(data, exif=True), BLOCKS, off)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"
)
@pytest.mark.parametrize("kind", [kind for kind in TURNABLE if kind != "TIFF"])
def test_no_damage_of_a_header_is_more_than_a_value_error(kind):
    whole = turned_by_exif(kind, 6)
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(400, len(whole)), 2):
            damaged[at] = rng.integers(256)
        assert 1 <= decoding.orientation(bytes(damaged)) <= 8
        decoded_or_refused(bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"text", JPEG, PNG], ids=len)
def test_what_has_no_exif_is_upright(data):
    assert decoding.orientation(data) == 1


# --- damaged --------------------------------------------------------------------------


def bomb(height, width):
    """A grey JPEG that claims to be larger than it is."""
    data = bytearray(cases.PHOTOS["rocket-grey"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">2H", height, width)
    return bytes(data)


def without_scan_data():
    """Its end is in place, so that nothing looks cut off."""
    return JPEG[: len(JPEG) // 2] + JPEG[-2:]


def bad_restart_marker():
    data = cases.PHOTOS["rocket-422-restart"]
    return data.replace(b"\xff\xd3", b"\xff\xd6", 1)


def bad_huffman_code():
    data = bytearray(cases.PHOTOS["chelsea-progressive"])
    scan = data.rindex(b"\xff\xda") + 10
    data[scan : scan + 40] = b"\xfe" * 40
    return bytes(data)


def webp_of_one_colour(height, width):
    """Lossless: what its pixels are needs no bits at all."""
    data = bytearray(cases.encode(PIL.Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    sizes = data.index(b"VP8L") + 9
    data[sizes : sizes + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


SMALL = PIL.Image.open(io.BytesIO(JPEG)).resize((12, 10))
AVIF, DDS = cases.encode(SMALL, "AVIF"), cases.encode(SMALL, "DDS")

DAMAGED = {
    "truncated JPEG": (JPEG[:-500], "[Pp]remature end"),
    "JPEG header only": (JPEG[:100], "."),
    "half a JPEG with an end": (without_scan_data(), "premature end"),
    "JPEG with a wrong restart marker": (bad_restart_marker(), "instead of RST"),
    "JPEG with impossible codes": (bad_huffman_code(), "bad Huffman code"),
    "truncated progressive JPEG": (
        cases.PHOTOS["chelsea-progressive"][:4000],
        "[Pp]remature end",
    ),
    "truncated arithmetic JPEG": (
        cases.PHOTOS["rocket-arithmetic"][:700],
        "[Pp]remature end",
    ),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "PNG with a flipped bit": (
        PNG[:300] + bytes([PNG[300] ^ 1]) + PNG[301:],
        "broken|CRC|corrupt|checksum",
    ),
    "zero bytes": (b"", "no image format"),
    "text": (b"<html>404: not found</html>\n", "no image format"),
    "JPEG of 4 gigapixels": (bomb(65_000, 65_000), "too many pixels, 65000x65000"),
    "PNG of 10 gigapixels": (
        cases.png(np.zeros((1, 1), np.uint8), 0, stated_size=(100_000, 100_000)),
        "10000000000 pixels",
    ),
    "JPEG of 600 bytes for 81 megapixels": (
        bomb(9000, 9000),
        "too many pixels, 9000x9000, more than 16,777,216",
    ),
    "PNG of 1 pixel for 81 megapixels": (
        cases.png(np.zeros((1, 1), np.uint8), 0, stated_size=(9000, 9000)),
        "too many pixels, 9000x9000",
    ),
    "WebP of 34 bytes for 81 megapixels": (
        webp_of_one_colour(9000, 9000),
        "too many pixels, 9000x9000",
    ),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop\n", "is a program, not an image"),
    "AVIF with a flipped bit": (
        AVIF[:81] + bytes([AVIF[81] ^ 1]) + AVIF[82:],
        "Missing or empty image item",
    ),
    "DDS of unknown pixels": (DDS[:80] + b"\0\x20\0\0" + DDS[84:], "Unknown pixel"),
    "QOI cut off": (cases.encode(PIL.Image.new("RGB", (20, 15)), "QOI")[:15], "."),
    "32-bit samples": (
        cases.encode(PIL.Image.fromarray(np.full((3, 4), 1 << 20, np.int32)), "TIFF"),
        "more than 16 bits",
    ),
    "floating-point samples": (
        cases.encode(PIL.Image.fromarray(np.ones((3, 4), np.float32)), "TIFF"),
        "more than 16 bits",
    ),
}


@pytest.mark.parametrize("dct", ["fast", "accurate"])
@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_says_what_is_wrong(data, reason, dct):
    with pytest.raises(ValueError, match=f"^cannot decode {len(data)} bytes.*{reason}"):
        decoding.decode(data, dct)


def test_a_photograph_may_have_many_pixels():
    tile = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
    image = np.tile(tile, (10, 10, 1))  # 20 megapixels
    data = cases.encode(PIL.Image.fromarray(image), "JPEG", quality=10)
    assert decoding.decode(data).shape == image.shape


@pytest.mark.parametrize("limit", [None, 10**12])
def test_the_number_of_pixels_is_limited_by_ourselves(limit, monkeypatch):
    """Whatever other programs have made of Pillow's limit."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    for data in (bomb(65_000, 65_000), webp_of_one_colour(16_000, 16_000)):
        with pytest.raises(ValueError, match="too many pixels"):
            decoding.decode(data)


def decoded_or_refused(data):
    """The pixels, or None; any error but the documented one is a fault."""
    try:
        return decoding.decode(data)
    except ValueError as error:
        if not str(error).startswith(f"cannot decode {len(data)} bytes"):
            raise
        return None


WHOLE = cases.PHOTOS | {k: ODD[k][0] for k in ("palette", "GIF", "BMP", "16-bit RGB")}


@pytest.mark.parametrize("name", [*WHOLE, "animated WebP", "animated PNG"])
def test_wherever_a_file_is_cut_it_is_refused_or_nothing_is_missing(name):
    whole = WHOLE.get(name) or ODD[name][0]
    expected = decoding.decode(whole)
    for kept in np.random.default_rng(0).integers(0, len(whole), 60):
        image = decoded_or_refused(whole[:kept])
        if image is not None:
            np.testing.assert_array_equal(image, expected)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"
)
@pytest.mark.parametrize("name", [*WHOLE, "animated WebP", "animated PNG"])
def test_no_flipped_bit_is_more_than_a_value_error(name):
    whole = WHOLE.get(name) or ODD[name][0]
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        image = decoded_or_refused(bytes(damaged))
        assert image is None or image.ndim == 3


# --- through the pipeline -------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Ten good photographs of two classes, and each kind of damage named .jpg."""
    for i in range(10):
        (tmp_path / "all" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / f"class{i % 2}" / f"good{i}.jpg").write_bytes(JPEG)
    for name, (data, _) in DAMAGED.items():
        (tmp_path / "all" / "class1" / f"{name}.jpg").write_bytes(data)
    return sources.open_source(f"folder:{tmp_path / 'all'}", "all")


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_training_counts_and_names_every_damaged_file(folder, caplog):
    arguments = {"image_size": (16, 16), "batch_size": 25, "seed": 0, "crop": "resize"}
    batches = set_up.train_batches(
        folder, flip=False, max_broken_images=len(DAMAGED), **arguments
    )
    good = image_ops.resize(decoding.decode(JPEG), (16, 16))
    for _ in range(3):
        assert (next(batches)["image"] == good).all()
    messages = warned(caplog)
    assert len(messages) == len(DAMAGED)  # once each, in three epochs
    for name in DAMAGED:
        assert sum(f"class1/{name}.jpg: cannot decode" in m for m in messages) == 1
    limit = len(DAMAGED) - 1
    with pytest.raises(ValueError, match=f"max_broken_images={limit} ") as caught:
        list(
            zip(
                range(3),
                set_up.train_batches(folder, max_broken_images=limit, **arguments),
                strict=False,
            )
        )
    for name in DAMAGED:
        assert f"class1/{name}.jpg\n" in str(caught.value)


@pytest.mark.parametrize("protocol", ["big_vision", "timm"])
def test_evaluation_counts_and_names_every_damaged_file(folder, protocol, caplog):
    batches = set_up.eval_batches(
        folder, image_size=(16, 16), batch_size=7, preprocess=protocol
    )
    rows = [batch["mask"] for batch in batches]
    assert np.concatenate(rows).sum() == 10
    messages = warned(caplog)
    assert len(messages) == len(DAMAGED)
    for name in DAMAGED:
        assert sum(f"class1/{name}.jpg: cannot decode" in m for m in messages) == 1


@pytest.mark.parametrize("wrong", [-1, 4, 1000])
def test_a_wrong_label_is_counted_and_named(wrong, caplog):
    source = Files([JPEG] * 4, labels=[0, 1, wrong, 3])
    batches = set_up.train_batches(
        source, image_size=(16, 16), batch_size=8, seed=0, max_broken_images=1
    )
    for _ in range(3):
        assert set(next(batches)["label"]) == {0, 1, 3}
    message = f"<file 2>: its label is {wrong}, but there are 4 classes, 0 ... 3"
    assert [message in m for m in warned(caplog)] == [True]

    caplog.clear()
    (batch,) = set_up.eval_batches(source, image_size=(16, 16), batch_size=4)
    assert batch["mask"].tolist() == [True, True, False, True]
    assert batch["label"].tolist() == [0, 1, 0, 3]
    assert [message in m for m in warned(caplog)] == [True]

    with pytest.raises(ValueError, match=r"max_broken_images=0 (.|\n)*<file 2>"):
        list(
            set_up.train_batches(
                source, image_size=(16, 16), batch_size=8, seed=0, max_broken_images=0
            )
        )


def test_unlabelled_data_end_a_training_run():
    source = Files([JPEG] * 4, labels=[-1] * 4)
    with pytest.raises(ValueError, match="wrongly labelled"):
        next(set_up.train_batches(source, image_size=(16, 16), batch_size=4, seed=0))
