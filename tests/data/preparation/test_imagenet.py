"""ImageNet from toy tars in the true layout: bytes, labels, order, and every fault."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_imagenet
from PIL import Image

from mlp_mixer.data import decoding, preparation, sources
from mlp_mixer.data.preparation import imagenet, tars, writing

ROOT = pathlib.Path(preparation.__file__).parents[3]


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """A folder of toy tars, and the images by file name."""
    folder = tmp_path_factory.mktemp("manual")
    return folder, toy_imagenet.write_imagenet(folder)


@pytest.fixture(scope="module")
def prepared(manual, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    for name in ("imagenet2012", "imagenet2012_real"):
        prepare(name, data_dir, manual[0])
    return data_dir


@pytest.fixture
def copied(manual, tmp_path):
    """The toy tars, to be damaged."""
    return shutil.copytree(manual[0], tmp_path / "manual")


def prepare(name, data_dir, manual_dir, **options):
    return preparation.prepare(
        name, data_dir=data_dir, manual_dir=manual_dir, **{"verify": False} | options
    )


def examples(name, split, data_dir):
    """All features but the image decoded, by file name, in order."""
    builder = tfds.builder_from_directory(preparation.find(name, data_dir))
    source = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return {e["file_name"].decode(): e for e in (source[i] for i in range(len(source)))}


def test_bytes_are_the_files_and_labels_are_tfds(manual, prepared):
    found = {}
    for split in ("train", "validation"):
        source = sources.open_source("imagenet2012", split, data_dir=prepared)
        assert source.num_classes == 1000
        assert source.class_names == tuple(toy_imagenet.WNIDS)
        for name, example in examples("imagenet2012", split, prepared).items():
            assert example["image"] == manual[1][name]
            number = name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
            wnid = (
                name.partition("_")[0]
                if split == "train"
                else toy_imagenet.VAL_WNIDS[int(number) - 1]
            )
            assert toy_imagenet.WNIDS[example["label"]] == wnid
            assert wnid in toy_imagenet.CLASSES
            found[name] = example
    assert found.keys() == manual[1].keys()


class StockLike(tfds.core.GeneratorBasedBuilder):
    """TFDS's own writer, given the same keys as its imagenet2012 gives it."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {"name": tfds.features.Text()}
        return preparation.digits._OfflineInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        names = {
            split: list(examples("imagenet2012", split, self.of)) for split in SPLITS
        }
        return {
            split: ((n, {"name": n}) for n in sorted(names[split])) for split in SPLITS
        }

    def _generate_examples(self):
        raise NotImplementedError


SPLITS = ("train", "validation")


def test_the_order_is_that_of_tfds(prepared, tmp_path):
    StockLike.of = prepared
    builder = StockLike(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    for split in SPLITS:
        source = builder.as_data_source(split)
        theirs = [source[i]["name"].decode() for i in range(len(source))]
        assert list(examples("imagenet2012", split, prepared)) == theirs
        assert theirs != sorted(theirs)


def test_odd_files_decode_right(manual, prepared):
    source = sources.open_source("imagenet2012", "train", data_dir=prepared)
    kinds: dict[tuple, list] = {}
    for i in range(len(source)):
        data = source[i]["image"]
        picture = Image.open(io.BytesIO(data))
        kinds.setdefault((picture.format, picture.mode), []).append(data)
        found = decoding.decode(data, dct="accurate").astype(int)
        expected = np.asarray(picture.convert("RGB")).astype(int)
        assert abs(found - expected).max() <= 1
        assert np.ptp(found) > 50
    assert kinds.keys() == {
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
    }


def test_real_labels_are_the_json_lists(manual, prepared):
    folder, images = manual
    real = json.loads((folder / "real.json").read_text())
    found = examples("imagenet2012_real", "validation", prepared)
    assert list(found) == list(examples("imagenet2012", "validation", prepared))
    lengths = set()
    for name, example in found.items():
        number = int(name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG"))
        assert example["image"] == images[name]
        wnid = toy_imagenet.VAL_WNIDS[number - 1]
        assert toy_imagenet.WNIDS[example["original_label"]] == wnid
        assert list(example["real_label"]) == real[number - 1]
        lengths.add(len(example["real_label"]))
    assert lengths == {0, 1, 3}
    info = tfds.builder_from_directory(
        preparation.find("imagenet2012_real", prepared)
    ).info
    assert info.features["real_label"].feature.names == toy_imagenet.WNIDS


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


KILLED = """
import os, signal, sys
from mlp_mixer.data import preparation
from mlp_mixer.data.preparation import tars, writing
writing.SHARDS = writing.shard_utils.ShardConfig(num_shards=8)
read, left = tars.TarImages._bytes, int(sys.argv[3])

def die(self, i):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, i)

tars.TarImages._bytes = die
preparation.prepare(
    "imagenet2012", data_dir=sys.argv[1], manual_dir=sys.argv[2], verify=False
)
"""


@pytest.mark.slow
def test_killed_and_resumed_is_byte_identical(manual, tmp_path, monkeypatch):
    monkeypatch.setattr(
        writing, "SHARDS", writing.shard_utils.ShardConfig(num_shards=8)
    )
    whole = prepare("imagenet2012", tmp_path / "whole", manual[0])
    assert len(list(whole.glob("*train*"))) == 8
    data_dir = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, data_dir, manual[0], "14"], cwd=ROOT
    )
    assert process.returncode == -signal.SIGKILL
    assert preparation.find("imagenet2012", data_dir) is None
    with pytest.raises(FileNotFoundError, match="No prepared data set"):
        sources.open_source("imagenet2012", "train", data_dir=data_dir)
    partial = data_dir / "imagenet2012" / ".5.1.0.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*-of-*")}
    assert 3 <= len(kept) <= 5

    listed: list[tuple] = []
    monkeypatch.setattr(tars, "list_members", spy(tars.list_members, listed))
    resumed = prepare("imagenet2012", data_dir, manual[0])
    assert len(listed) == 1  # the classes; images were found before
    assert digest(resumed) == digest(whole)
    for name, changed in kept.items():
        assert (resumed / name).stat().st_mtime_ns == changed
    assert [path.name for path in resumed.parent.iterdir()] == ["5.1.0"]
    # Nor does it depend on the process.
    other = tmp_path / "other"
    script = [sys.executable, "-c", KILLED, other, manual[0], "-1"]
    subprocess.run(script, cwd=ROOT, check=True)
    assert digest(other / "imagenet2012" / "5.1.0") == digest(whole)


def spy(function, calls):
    def called(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return called


def test_changed_tars_begin_anew(manual, copied, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"

    def fail(*args):
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            writing.file_adapters.ArrayRecordFileAdapter, "write_examples", fail
        )
        with pytest.raises(OSError, match=r"No space left.*make room and start again"):
            prepare("imagenet2012", data_dir, copied)
    images = toy_imagenet.write_imagenet(copied, classes=("n02105855", "n04258138"))
    prepare("imagenet2012", data_dir, copied)
    found = {n for s in SPLITS for n in examples("imagenet2012", s, data_dir)}
    assert found == images.keys()


def cut(data, where):
    return {
        "the last byte of the last image": data[: -10240 - 1],
        "within a header": data[: 512 * 3 + 100],
        "between two images": data[: data.index(b"n01751748.tar")],
        "everything": b"",
        "a damaged header": data[: data.index(b"n02105855.tar")]
        + b"x" * 512
        + data[data.index(b"n02105855.tar") + 512 :],
    }[where]


@pytest.mark.parametrize(
    "where",
    [
        "the last byte of the last image",
        "within a header",
        "between two images",
        "everything",
        "a damaged header",
    ],
)
def test_a_damaged_tar_is_named(where, copied, tmp_path):
    path = copied / imagenet.TRAIN
    path.write_bytes(cut(path.read_bytes(), where))
    message = f"{path} is cut off or damaged .*download it again"
    with pytest.raises(ValueError, match=message):
        prepare("imagenet2012", tmp_path, copied)
    assert preparation.find("imagenet2012", tmp_path) is None


def test_a_damaged_class_tar_is_named(copied, tmp_path):
    path = copied / imagenet.TRAIN
    data = bytearray(path.read_bytes())
    at = data.index(b"n02105855_13.JPEG")
    data[at : at + 200] = b"x" * 200
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"n02105855\.tar in .*train\.tar is cut off"):
        prepare("imagenet2012", tmp_path, copied)


def test_missing_tars_are_named_with_place_and_source(tmp_path):
    for name in ("imagenet2012", "imagenet2012_real"):
        with pytest.raises(FileNotFoundError) as caught:
            preparation.prepare(name, data_dir=tmp_path)
        message = str(caught.value)
        assert (imagenet.TRAIN in message) == (name == "imagenet2012")
        assert imagenet.VAL in message
        assert f"must lie in {tmp_path}/downloads/manual; get it from https" in message


def test_a_full_disk_is_said_before_any_work(manual, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    needed = sum((manual[0] / t).stat().st_size for t in (imagenet.TRAIN, imagenet.VAL))
    with pytest.raises(OSError, match="GB are free") as caught:
        prepare("imagenet2012", tmp_path / "data", manual[0])
    assert f"needs {needed / 1e9:.3f} GB" in str(caught.value)
    assert not (tmp_path / "data" / "imagenet2012").exists()


def test_toy_tars_are_no_published_ones(manual, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"147,897,477,120: .*--noverify"):
        prepare("imagenet2012", tmp_path, manual[0], verify=True)
    path = manual[0] / imagenet.VAL
    size, md5 = path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()
    real = (manual[0] / "real.json").read_bytes()
    monkeypatch.setitem(imagenet._PUBLISHED, imagenet.VAL, (size, "0" * 32))
    with pytest.raises(ValueError, match=f"has the md5 {md5}, .*--noverify"):
        prepare("imagenet2012_real", tmp_path, manual[0], verify=True)
    monkeypatch.setitem(imagenet._PUBLISHED, imagenet.VAL, (size, md5))
    with pytest.raises(ValueError, match=r"not the published real\.json"):
        prepare("imagenet2012_real", tmp_path, manual[0], verify=True)
    monkeypatch.setattr(imagenet, "_REAL_SHA256", hashlib.sha256(real).hexdigest())
    prepare("imagenet2012_real", tmp_path, manual[0], verify=True)


def test_fewer_images_than_imagenet_has_are_counted(manual, tmp_path, caplog):
    prepare("imagenet2012", tmp_path, manual[0])
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        "imagenet2012 train has 24 images, but ImageNet 2012 has 1,281,167.",
        "imagenet2012 validation has 9 images, but ImageNet 2012 has 50,000.",
    ]


def test_files_that_are_not_imagenets_are_named(copied, tmp_path):
    photo = toy_imagenet.photo(1)
    (copied / imagenet.VAL).write_bytes(toy_imagenet.tar({"cat.JPEG": photo}))
    with pytest.raises(ValueError, match=r"holds 'cat.JPEG'; expected ILSVRC2012_val"):
        prepare("imagenet2012_real", tmp_path, copied)
    (copied / imagenet.TRAIN).write_bytes(toy_imagenet.tar({"cat.tar": photo}))
    with pytest.raises(ValueError, match=r"holds cat.tar; expected the tars of"):
        prepare("imagenet2012", tmp_path, copied)


def test_imagenets_tars_may_come_from_macos(copied, tmp_path, caplog):
    """Twins of the classes' tars, of their images and of those of validation."""
    caplog.set_level("INFO")

    def files(data):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            opened = ((m.name, archive.extractfile(m)) for m in archive)
            return {name: file.read() for name, file in opened if file}

    def packed(data):
        return toy_imagenet.tar(toy_imagenet.as_macos_packs(files(data)))

    train, val = copied / imagenet.TRAIN, copied / imagenet.VAL
    classes = {name: packed(data) for name, data in files(train.read_bytes()).items()}
    train.write_bytes(packed(toy_imagenet.tar(classes)))
    val.write_bytes(packed(val.read_bytes()))
    prepare("imagenet2012", tmp_path, copied)
    for place, count in {
        str(train): 4,
        "the tars of imagenet2012 train": 24,
        "the tars of imagenet2012 validation": 9,
    }.items():
        line = f"Left out of {place}: {count} hidden or of the system."
        assert caplog.text.count(line) == 1
    for split, count in (("train", 24), ("validation", 9)):
        assert len(examples("imagenet2012", split, tmp_path)) == count


def test_a_validation_tar_without_images_has_no_examples(copied, tmp_path):
    (copied / imagenet.VAL).write_bytes(toy_imagenet.tar({"readme.txt": b"x"}))
    with pytest.raises(
        ValueError, match="imagenet2012_real validation has no examples"
    ):
        prepare("imagenet2012_real", tmp_path, copied)


def test_what_is_there_is_left_alone(prepared, manual, caplog, monkeypatch):
    caplog.set_level("INFO")
    before = digest(prepared)
    monkeypatch.setattr(writing, "begin", None)
    # Neither the tars nor room are needed.
    there = prepare("imagenet2012", prepared, "/nowhere", verify=True)
    assert there == prepared / "imagenet2012" / "5.1.0"
    assert f"imagenet2012 is already there: {there}" in caplog.text
    assert digest(prepared) == before


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from mlp_mixer.data import preparation
for name in ("imagenet2012", "imagenet2012_real"):
    preparation.prepare(
        name, data_dir=sys.argv[1], manual_dir=sys.argv[2], verify=False
    )
heavy = {"tensorflow", "importlib_resources", "apache_beam"} & sys.modules.keys()
print("heavy:", sorted(heavy))
"""


def test_processes_that_start_together_prepare_once_without_tensorflow(
    manual, tmp_path
):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path, manual[0]],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [text.splitlines()[-1] for text in said] == ["heavy: []"] * 2
    assert "".join(said).count("train has 24 images") == 1


@pytest.fixture
def server(manual):
    """real.json on this machine; gives its address and counts what is asked for.

    Of cut.json half comes, and slow.json comes a byte at a time.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = (manual[0] / "real.json").read_bytes()
            self.send_response(404 if self.path == "/missing.json" else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            pause = 0.1 if self.path == "/slow.json" else 0
            half = len(data) // 2 if self.path == "/cut.json" else len(data)
            step = 1 if pause else half
            with contextlib.suppress(OSError):  # it was given up
                for start in range(0, half, step):
                    self.wfile.write(data[start : start + step][: half - start])
                    time.sleep(pause)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_real_json_is_downloaded_once(server, copied, prepared, tmp_path, monkeypatch):
    address, asked = server
    (copied / "real.json").unlink()
    monkeypatch.setattr(imagenet, "REAL_URL", f"{address}/missing.json")
    with pytest.raises(OSError, match=r"404.*put real\.json into the manual folder"):
        prepare("imagenet2012_real", tmp_path, copied)
    monkeypatch.setattr(imagenet, "REAL_URL", f"{address}/real.json")
    found = prepare("imagenet2012_real", tmp_path, copied)
    assert digest(found) == digest(prepared / "imagenet2012_real")
    shutil.rmtree(found)
    prepare("imagenet2012_real", tmp_path, copied)
    assert asked == ["/missing.json", "/real.json"]


def test_a_download_that_is_not_the_published_file_is_not_kept(
    server, copied, tmp_path, monkeypatch
):
    address, _ = server
    data = (copied / "real.json").read_bytes()
    tar = (copied / imagenet.VAL).read_bytes()
    published = len(tar), hashlib.md5(tar).hexdigest()
    monkeypatch.setitem(imagenet._PUBLISHED, imagenet.VAL, published)
    (copied / "real.json").unlink()
    for page in ("real.json", "cut.json", "slow.json"):
        monkeypatch.setattr(imagenet, "REAL_URL", f"{address}/{page}")
        monkeypatch.setattr(imagenet, "_SECONDS", 2)
        began = time.monotonic()
        with pytest.raises(OSError, match=rf"{page} .*put real\.json into the manual"):
            prepare("imagenet2012_real", tmp_path, copied, verify=page == "real.json")
        assert time.monotonic() - began < 10
        assert not (tmp_path / "downloads").exists()
    monkeypatch.setattr(imagenet, "REAL_URL", f"{address}/real.json")
    monkeypatch.setattr(imagenet, "_REAL_SHA256", hashlib.sha256(data).hexdigest())
    prepare("imagenet2012_real", tmp_path, copied, verify=True)
    assert (tmp_path / "downloads" / "real.json").read_bytes() == data


def test_a_short_real_json_is_refused(copied, tmp_path):
    (copied / "real.json").write_text("[[1], [2]]")
    with pytest.raises(ValueError, match="holds 2 lists, but there is an image"):
        prepare("imagenet2012_real", tmp_path, copied)
    for content in ("[[1], [2", "{}", "[" * 10**6, "[1, 2]", '[["1"]]', "[[1000]]"):
        (copied / "real.json").write_text(content)
        with pytest.raises(ValueError, match=r"real\.json is damaged"):
            prepare("imagenet2012_real", tmp_path, copied)
    assert os.listdir(tmp_path / "imagenet2012_real") == [".1.0.0.partial"]
