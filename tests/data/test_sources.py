"""Sources: what they hold, in every format, and what they say when it is not there."""

import errno
import itertools
import json
import os
import pathlib
import pickle
import shutil
import socket
import struct
import time

import coloured
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mlp_mixer import processes, workdir
from mlp_mixer.data import class_names, decoding, folders, prepared, sources
from mlp_mixer.data.preparation import digits


class NamedDigits(digits.MixerDigits):
    """Fifty digits with what real data sets add: a file name, another image."""

    def _info(self):
        features = dict(super()._info().features)
        features |= {"file_name": tfds.features.Text(), "mask": features["image"]}
        return digits._OfflineInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _generate_examples(self, rows):
        for i, example in super()._generate_examples(rows[:50]):
            yield i, example | {"file_name": f"digit_{i}.png", "mask": example["image"]}


@pytest.fixture(scope="module")
def array_record_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("array_record")
    NamedDigits(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False, num_shards=3
        )
    )
    return data_dir


@pytest.fixture
def tfrecord_dir(array_record_dir, tmp_path):
    """The same records in TFRecord framing; readers of TFRecord may skip the crcs."""
    new = tmp_path / "named_digits" / "1.0.0"
    new.mkdir(parents=True)
    for path in (array_record_dir / "named_digits" / "1.0.0").iterdir():
        if "array_record" in path.name:
            records = grain.sources.ArrayRecordDataSource(str(path))
            (new / path.name.replace("array_record", "tfrecord")).write_bytes(
                b"".join(
                    struct.pack("<QI", len(r), 0) + r + bytes(4)
                    for r in (records[i] for i in range(len(records)))
                )
            )
        else:
            text = path.read_text().replace('"array_record"', '"tfrecord"')
            (new / path.name).write_text(text)
    info = json.loads((new / "dataset_info.json").read_text())
    assert info["fileFormat"] == "tfrecord"
    return tmp_path


def everything(source):
    examples = [source[i] for i in range(len(source))]
    return [(example["image"], example["label"]) for example in examples]


SPLITS = ["train", "test", "train[:99%]", "train[30:]", "train[10:20]+test[:7]", "all"]


@pytest.mark.parametrize("split", SPLITS)
def test_tfrecord_equals_array_record(split, array_record_dir, tfrecord_dir):
    expected, found = (
        sources.open_source("named_digits", split, data_dir=data_dir)
        for data_dir in (array_record_dir, tfrecord_dir)
    )
    assert everything(found) == everything(expected)
    assert found.class_names == expected.class_names
    assert found.name_of(3) == expected.name_of(3)
    again = pickle.loads(pickle.dumps(found))
    assert everything(again) == everything(expected)


def test_parts_of_a_split_make_the_whole(array_record_dir, tfrecord_dir):
    for data_dir in (array_record_dir, tfrecord_dir):
        whole, head, tail = (
            everything(sources.open_source("named_digits", split, data_dir=data_dir))
            for split in ("train", "train[:33%]", "train[33%:]")
        )
        assert len(whole) == 50
        assert len(head) == 16
        assert head + tail == whole


def test_images_stay_encoded_and_examples_have_names(array_record_dir):
    source = sources.open_source(
        "named_digits", "train[40:]", data_dir=array_record_dir
    )
    assert isinstance(source, sources.Source)
    assert decoding.decode(source[3]["image"]).shape == (8, 8, 3)
    assert set(source[3]) == {"image", "label"}
    assert source.name_of(3).startswith("named_digits train[40:][3] (digit_")


def test_tfrecord_index_is_cached_and_a_stale_one_is_not_used(
    tfrecord_dir, monkeypatch
):
    def open_train():
        return sources.open_source("named_digits", "train", data_dir=tfrecord_dir)

    expected = everything(open_train())
    folder = tfrecord_dir / "named_digits" / "1.0.0"
    caches = sorted(folder.glob(".*train*.index.npy"))
    assert len(caches) == 3
    assert not [p for p in folder.glob(".*.npy") if "index" not in p.name]

    # Another file of the same size and another time: the cache must not be believed.
    shard = sorted(folder.glob("named*train*"))[0]
    cached = np.load(caches[0])
    cached[3:] += 1
    np.save(caches[0], cached)
    with pytest.raises((ValueError, struct.error)):
        everything(open_train())  # proves that the cache is read
    os.utime(shard, ns=(1, 1))
    assert everything(open_train()) == expected

    # A damaged cache, and a folder that cannot be written.
    for cache in caches:
        cache.write_bytes(b"\x93NUMPY")

    def refuse(*args, **kwargs):
        raise OSError("read-only")

    monkeypatch.setattr(np, "save", refuse)
    assert everything(open_train()) == expected


def test_a_truncated_tfrecord_file_is_named(tfrecord_dir):
    shard = sorted((tfrecord_dir / "named_digits" / "1.0.0").glob("named*train*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} .* cut off or damaged"):
        sources.open_source("named_digits", "train", data_dir=tfrecord_dir)


def test_a_tfrecord_file_with_other_records_is_named(tfrecord_dir):
    shards = sorted((tfrecord_dir / "named_digits" / "1.0.0").glob("named*train*"))
    shards[1].write_bytes(shards[1].read_bytes() * 2)
    with pytest.raises(ValueError, match=r"holds 3\d records, but .* says 1\d"):
        sources.open_source("named_digits", "train", data_dir=tfrecord_dir)


def test_a_damaged_record_is_a_value_error(tfrecord_dir):
    shard = sorted((tfrecord_dir / "named_digits" / "1.0.0").glob("named*train*"))[0]
    data = bytearray(shard.read_bytes())
    data[12:30] = b"\xff" * 18
    shard.write_bytes(data)
    source = sources.open_source("named_digits", "train", data_dir=tfrecord_dir)
    for read in (source.__getitem__, source.label):
        with pytest.raises(ValueError, match=r"named_digits train\[0\]"):
            read(0)
    assert source.name_of(0) == "named_digits train[0]"


class SeveralDigits(digits.MixerDigits):
    """As imagenet2012_real: one original label and any number of others."""

    def _info(self):
        features = dict(super()._info().features)
        one = features.pop("label")
        features |= {"original_label": one, "real_label": tfds.features.Sequence(one)}
        return digits._OfflineInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _generate_examples(self, rows):
        for i, example in super()._generate_examples(rows[:6]):
            label = example.pop("label")
            several = [(label + k) % 10 for k in range(i % 3)]
            yield i, example | {"original_label": label, "real_label": several}


def test_an_image_may_have_several_labels_or_none(tmp_path):
    SeveralDigits(data_dir=tmp_path, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    one, several = (
        sources.open_source("several_digits", "test", label=label, data_dir=tmp_path)
        for label in ("original_label", "real_label")
    )
    assert (one.multi_label, several.multi_label) == (False, True)
    assert one.num_classes == several.num_classes == 10
    counts = []
    for i in range(6):
        first, labels = one.label(i), np.asarray(several.label(i))
        counts.append(len(labels))
        assert labels.tolist() == [(first + k) % 10 for k in range(len(labels))]
        assert one[i]["label"] == first
        np.testing.assert_array_equal(several[i]["label"], labels)
        assert several[i]["image"] == one[i]["image"]
    assert sorted(counts) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"'label' \(ClassLabel\).*dataset.label="):
        sources.open_source("several_digits", "test", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'image' \(Class"):
        sources.open_source("several_digits", "test", label="image", data_dir=tmp_path)


def test_missing_features_are_named(tfrecord_dir):
    path = tfrecord_dir / "named_digits" / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"label"', '"digit"'))
    with pytest.raises(ValueError, match=r"'label' \(ClassLabel\); it has .*digit"):
        sources.open_source("named_digits", "train", data_dir=tfrecord_dir)


@pytest.mark.parametrize(
    "split", ["val", "train[", "train[:5000]", "train[:200%]", "all[:5%]"]
)
def test_an_impossible_split_lists_the_splits(split, array_record_dir):
    with pytest.raises(ValueError, match=r"Its splits are (train, test|test, train)"):
        sources.open_source("named_digits", split, data_dir=array_record_dir)


@pytest.mark.parametrize("split", ["train[:0]", "train[10:5]"])
def test_an_empty_split_is_refused(split, array_record_dir):
    with pytest.raises(ValueError, match="0 examples"):
        sources.open_source("named_digits", split, data_dir=array_record_dir)


@pytest.mark.parametrize("field", ["num_examples", "num_classes"])
def test_what_the_recipe_states_is_checked(field, array_record_dir):
    right = {"num_examples": 50, "num_classes": 10}
    for name, data_dir in (("named_digits", array_record_dir), ("synthetic", None)):
        sources.open_source(name, "train", data_dir=data_dir, **right)
    message = f"{field}={right[field]}, but the recipe states 7.*config.dataset.{field}"
    with pytest.raises(ValueError, match=message):
        sources.open_source(
            "named_digits", "train", data_dir=array_record_dir, **{field: 7}
        )


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_a_missing_data_set_says_how_to_get_it(tmp_path, no_network):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        sources.open_source("imagenet2012", "train", data_dir=tmp_path)
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert f"in {tmp_path}." in message
    assert f"ILSVRC2012_img_val.tar into {tmp_path}/downloads/manual/" in message
    assert f"python -m mlp_mixer.prepare imagenet2012 --data_dir={tmp_path}" in message
    assert "pip install" not in message  # ours needs no TensorFlow

    with pytest.raises(FileNotFoundError) as caught:
        sources.open_source("cifar10:3.0.2", "train", data_dir=tmp_path)
    assert "ILSVRC" not in str(caught.value)
    assert "pip install '.[prepare]'" in str(caught.value)
    assert "mlp_mixer.prepare cifar10 " in str(caught.value)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("digit", "digits"),
        ("imagenet", "imagenet2012"),
        ("name_digits", "named_digits"),
        ("named_digits:2.0.0", "1.0.0"),
    ],
)
def test_a_misspelt_name_is_guessed(name, meant, array_record_dir, no_network):
    with pytest.raises(FileNotFoundError, match=f"(mean|only) '?{meant}"):
        sources.open_source(name, "train", data_dir=array_record_dir)


def test_a_name_that_is_none_lists_what_there_is():
    with pytest.raises(ValueError, match="digits, folder, synthetic") as caught:
        sources.open_source("foo bar", "train")
    assert "\n" not in str(caught.value)


def test_synthetic_images_are_functions_of_the_index():
    source = sources.open_source(
        "synthetic", "train", num_examples=30, num_classes=7, image_size=(4, 6)
    )
    image = source[8]["image"]
    assert (len(source), source.num_classes, source.class_names) == (30, 7, None)
    assert (image.shape, image.dtype, source[8]["label"]) == ((4, 6, 3), np.uint8, 1)
    np.testing.assert_array_equal(image, source[8]["image"])
    assert (image != source[9]["image"]).any()
    default = sources.open_source("synthetic", "test")
    assert (len(default), default.num_classes) == (1024, 1000)
    assert default[0]["image"].shape == (224, 224, 3)


# --- What the data is -----------------------------------------------------------------


def write_class(folder, name, sizes):
    (folder / name).mkdir(parents=True)
    for i, size in enumerate(sizes):
        (folder / name / f"{i}.png").write_bytes(bytes(size))


def rename(folder):
    (folder / "ant").rename(folder / "cow")


def add_image(folder):
    (folder / "bee" / "new.png").write_bytes(bytes(9))


def rewrite_image(folder):
    (folder / "bee" / "0.png").write_bytes(bytes(8))


def rename_image(folder):
    (folder / "bee" / "0.png").rename(folder / "bee" / "zero.png")


def move_image(folder):
    (folder / "bee" / "1.png").rename(folder / "ant" / "7.png")


@pytest.mark.parametrize(
    "change", [rename, add_image, rewrite_image, rename_image, move_image]
)
def test_the_fingerprint_of_a_folder_tells_every_change_of_its_files(change, tmp_path):
    for copy in ("one", "other"):
        for name, sizes in {"ant": (3, 5), "bee": (5, 4, 3)}.items():
            write_class(tmp_path / copy, name, sizes)
    one, other = (
        sources.fingerprint(sources.open_source(f"folder:{tmp_path / copy}", "all"))
        for copy in ("one", "other")
    )
    assert one == other  # it is not of a place
    assert json.loads(json.dumps(one)) == one
    assert one["classes"]["bee"]["images"] == 3
    assert one["classes"]["bee"]["bytes"] == 12
    change(tmp_path / "other")
    changed = sources.open_source(f"folder:{tmp_path / 'other'}", "all")
    assert sources.fingerprint(changed) != one


def test_the_fingerprint_of_a_part_is_not_that_of_the_whole(tmp_path, array_record_dir):
    write_class(tmp_path, "ant", range(9))
    for name, *splits in (
        (f"folder:{tmp_path}", "all", "all[:5]", "all[4:]"),
        ("named_digits", "train", "train[:90%]", "test"),
    ):
        found = [
            sources.fingerprint(
                sources.open_source(name, split, data_dir=array_record_dir)
            )
            for split in splits
        ]
        assert all(one != other for one, other in itertools.combinations(found, 2))


def test_the_fingerprint_of_a_prepared_set_tells_version_shards_and_classes(
    array_record_dir, tmp_path
):
    shutil.copytree(array_record_dir, tmp_path, dirs_exist_ok=True)
    one, other = (
        sources.fingerprint(
            sources.open_source("named_digits", "train", data_dir=folder)
        )
        for folder in (array_record_dir, tmp_path)
    )
    assert one == other
    assert one["version"] == "1.0.0"
    assert one["class_names"] == [*"0123456789"]
    assert sum(shard["examples"] for shard in one["shards"].values()) == 50
    folder = tmp_path / "named_digits" / "1.0.0"
    shard = next(folder.glob("*train.array_record-00001*"))
    shard.write_bytes(shard.read_bytes() + bytes(64))
    source = prepared.PreparedSource(
        "named_digits", tfds.builder_from_directory(folder), "test", "label"
    )
    whole = prepared.PreparedSource(
        "named_digits", tfds.builder_from_directory(folder), "train+test", "label"
    )
    assert sources.fingerprint(whole)["shards"][shard.name] == {
        "examples": one["shards"][shard.name]["examples"],
        "bytes": one["shards"][shard.name]["bytes"] + 64,
    }
    assert shard.name not in sources.fingerprint(source)["shards"]


def test_a_fingerprint_takes_a_name_in_any_spelling(tmp_path):
    """As macOS writes it, as others do, and as Python reads it without UTF-8."""
    spellings = ["Cafe\u0301", "Caf\u00e9", "Caf\udcc3\udca9"]
    found = []
    for i, spelling in enumerate(spellings):
        write_class(tmp_path / str(i), spelling, (3, 5))
        source = sources.open_source(f"folder:{tmp_path / str(i)}", "all")
        found.append(sources.fingerprint(source))
    assert found[0]["class_names"] == ["Caf\u00e9"]
    assert found[1:] == found[:1] * 2


def test_a_file_that_cannot_be_looked_at_has_a_fingerprint_too(tmp_path):
    """Training names it as a broken image, and stands some of them."""
    write_class(tmp_path, "ant", (3,))
    (tmp_path / "ant" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = sources.fingerprint(sources.open_source(f"folder:{tmp_path}", "all"))
    assert found["classes"]["ant"]["images"] == 2


# --- Whose classes --------------------------------------------------------------------


def mapped(source, names, count=None):
    return sources.with_classes(
        source, names, count or len(names), of="the data", to="the model"
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_prepared_set_with_permuted_classes_gets_the_models(several, tmp_path):
    names = ("cat", "ant", "bee")
    name = coloured.write_prepared(tmp_path, "toys", names, several=several)
    source = sources.open_source(name, "test", data_dir=tmp_path)
    found = mapped(source, coloured.NAMES)
    assert (found.num_classes, found.class_names) == (4, coloured.NAMES)
    assert len(found) == len(source)
    assert found.multi_label == several
    for i in range(len(source)):
        before, after = (
            [called[k] for k in np.atleast_1d(s[i]["label"])]
            for s, called in ((source, names), (found, coloured.NAMES))
        )
        assert before == after
        np.testing.assert_array_equal(found.label(i), found[i]["label"])
        assert found[i]["image"] == source[i]["image"]
        assert found.name_of(i) == source.name_of(i)
    again = pickle.loads(pickle.dumps(found))
    assert again.label(1) == found.label(1)
    assert sources.fingerprint(found) == sources.fingerprint(source)


def test_a_label_that_is_no_class_stays_none():
    """An unlabelled split has -1: mapped, it must not become the last class."""

    numbers = np.array([-1, 0, 1, 2], np.int32)
    source = folders.FolderSource([*"wxyz"], numbers, ("bee", "ant"))
    found = mapped(source, ("ant", "bee", "cat"))
    assert [found.label(i) for i in range(4)] == [-1, 1, 0, -1]


def test_without_names_the_number_of_classes_must_be_the_models(tmp_path):
    noise = sources.open_source("synthetic", "train", num_classes=7)
    assert mapped(noise, None, 7) is noise
    assert mapped(noise, [*"abcdefg"]) is noise
    for names, count in ((None, 8), ([*"abcdefgh"], 8), ([*"abc"], 3)):
        with pytest.raises(
            ValueError, match=f"the data has 7 classes, but the model {count}"
        ):
            mapped(noise, names, count)


def test_imagenets_words_as_folders_are_mapped_for_a_thousand_nameless_classes():
    """Published weights name none; sorted, words are in another order than ids."""
    ids = list(class_names.imagenet())
    words = tuple(sorted(class_names.imagenet().values()))[:200]
    source = folders.FolderSource([*"wxyz"], np.arange(4, dtype=np.int32), words)
    found = mapped(source, None, 1000)
    for i in range(4):
        assert class_names.imagenet()[ids[found.label(i)]] == words[i]


def test_changes_are_said_by_class_and_by_shard(array_record_dir, tmp_path):
    coloured.write_folder(tmp_path, coloured.NAMES)
    (name, split) = f"folder:{tmp_path}", "all"

    def told(change):
        before = sources.fingerprint(sources.open_source(name, split))
        change()
        return "\n".join(
            workdir.changes(
                json.loads(json.dumps(before)),
                sources.fingerprint(sources.open_source(name, split)),
            )
        )

    ant, bee = tmp_path / "ant", tmp_path / "bee"
    assert told(lambda: None) == ""
    said = told(lambda: (ant / "0.png").unlink())
    assert said.startswith("num_examples: 16 there, 15 here\nant: 4 images, ")
    assert "there, 3 images" in said
    assert "bee" not in said
    assert told(lambda: (bee / "0.png").rename(bee / "9.png")).count("bee: ") == 1
    assert "dog: 4 images" in told(lambda: shutil.rmtree(tmp_path / "dog"))
    one = sources.fingerprint(
        sources.open_source("named_digits", "train", data_dir=array_record_dir)
    )
    other = json.loads(json.dumps(one)) | {"version": "1.0.1"}
    shard = min(one["shards"])
    other["shards"][shard]["bytes"] += 1
    size = one["shards"][shard]["bytes"]
    version, of_shard = workdir.changes(one, other)
    assert version == "version: 1.0.0 there, 1.0.1 here"
    assert of_shard.startswith(f"{shard}: ")
    assert f"{size} bytes there" in of_shard
    many = {"shards": {f"{i:02}": {"bytes": 1} for i in range(99)}}
    assert workdir.changes(many, {"shards": {}})[11:] == [
        "11: 1 bytes there, nothing here",
        "and 87 more",
    ]
    source = sources.open_source(name, split)
    assert isinstance(source, folders.FolderSource)
    turned = folders.FolderSource(
        source.paths[::-1], source.labels[::-1], source.class_names
    )
    assert workdir.changes(
        sources.fingerprint(source), sources.fingerprint(turned)
    ) == ["the same files, in another order"]
    # Names are compared elsewhere, by name.
    assert workdir.changes({"class_names": ["a"]}, {"class_names": ["b"]}) == []


@pytest.mark.parametrize("readable", [False, True])
def test_data_that_cannot_be_read_is_named_and_one_file_of_it_is_not(
    readable, tmp_path, monkeypatch
):
    """As on a mount whose server is gone: names and sizes are there."""
    for i in range(5):
        path = tmp_path / "all" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"an image")
    read = pathlib.Path.read_bytes

    def broken(self):
        if self.suffix == ".png" and not (readable and self.stem in "12"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read(self)

    monkeypatch.setattr(pathlib.Path, "read_bytes", broken)
    name = f"folder:{tmp_path / 'all'}"
    if readable:
        assert len(sources.open_source(name, "all")) == 5
        return
    with pytest.raises(OSError, match=r"neither .* Input/output error") as error:
        sources.open_source(name, "all")
    assert f"{name} all cannot be read" in str(error.value)


def test_data_on_a_bucket_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"--data_dir is gs://b/d; .* mounted"):
        sources.open_source("digits", "train", data_dir="gs://b/d")


def test_data_on_a_disk_that_hangs_is_named_with_its_host(
    tmp_path, monkeypatch, caplog
):
    def hang(*_, **__):
        while "waits for" not in caplog.text:
            time.sleep(0.01)
        raise FileNotFoundError("none")

    monkeypatch.setattr(processes, "SLOW_SECONDS", 0.02)
    monkeypatch.setitem(sources.DATASETS, "folder", hang)
    with pytest.raises(FileNotFoundError):
        sources.open_source("folder:images", "all", data_dir=tmp_path)
    [line] = caplog.messages
    assert line.startswith(
        f"{socket.gethostname()} (process 0) waits for the data set "
    )
    assert f"folder:images all in {tmp_path} since 0 s" in line
