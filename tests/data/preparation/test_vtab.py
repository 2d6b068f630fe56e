"""VTAB-1k on small stand-ins for TFDS's data sets: splits, labels, pictures."""

import io
import json
import shutil
import struct

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mlp_mixer.data import decoding, preparation, sources
from mlp_mixer.data.preparation import vtab, writing

VEHICLES = ["Car", "Van", "Truck", "Pedestrian"]


def picture(seed, levels=256, side=4):
    rng = np.random.default_rng(seed)
    grey = Image.fromarray(rng.integers(0, levels, (side, side), np.uint8))
    out = io.BytesIO()
    grey.save(out, "png")
    return out.getvalue()


GREY = picture(0)  # where only the label matters


def write_base(data_dir, name, version, features, counts, example):
    """A prepared TFDS data set with splits of these sizes, as if by TFDS."""
    tracked = {"image": tfds.features.Image(shape=(None, None, 1))} | features
    job = writing.Job(name, version, data_dir, data_dir, False)
    writing.begin(job, [], 0)

    def reader(split):
        def read(start, stop):
            for i in range(start, stop):
                made = example(split, i)
                yield made if "image" in made else made | {"image": GREY}

        return read

    writing.write_splits(
        job,
        tracked,
        {s: writing.Split(n, 100 * n, reader(s)) for s, n in counts.items()},
    )
    return job.target


def label_feature(num_classes=7):
    return {"label": tfds.features.ClassLabel(num_classes=num_classes)}


SIZES = {"train": 1500, "validation": 300, "test": 260}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Stand-ins; a picture's seed is its place in its split."""
    root = tmp_path_factory.mktemp("vtab")
    offsets = {"train": 0, "validation": 10_000, "test": 20_000}

    def labelled(split, i):
        return {"image": picture(offsets[split] + i), "label": i % 7}

    write_base(root, "dtd", "3.0.1", label_feature(), SIZES, labelled)
    both = {"train": 1500, "test": 260}
    write_base(root, "oxford_iiit_pet", "4.0.0", label_feature(), both, labelled)
    write_base(root, "resisc45", "3.0.0", label_feature(), {"train": 1503}, labelled)

    def norb(split, i):
        labels = {"label_azimuth": i % 18, "label_elevation": i % 9}
        return {"image": picture(offsets[split] + i)} | labels

    turned = {
        "label_azimuth": tfds.features.ClassLabel(num_classes=18),
        "label_elevation": tfds.features.ClassLabel(num_classes=9),
    }
    counts = {"train": 900, "test": 601}
    write_base(root, "smallnorb", "2.1.0", turned, counts, norb)

    def sprite(split, i):
        return {
            "image": picture(i, levels=2),
            "label_x_position": i % 32,
            "label_orientation": i % 40,
        }

    placed = {
        "label_x_position": tfds.features.ClassLabel(num_classes=32),
        "label_orientation": tfds.features.ClassLabel(num_classes=40),
    }
    write_base(root, "dsprites", "2.0.0", placed, {"train": 1300}, sprite)

    def scene(split, i):
        depths = [[0, 0, 8.25 + i % 5]] + [[0, 0, 12.0]] * (2 + i % 8)
        return {"objects": {"size": [0] * len(depths), "pixel_coords": depths}}

    objects = {
        "size": tfds.features.ClassLabel(names=["small", "large"]),
        "pixel_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32),
    }
    features = {"objects": tfds.features.Sequence(objects)}
    counts = {"train": 2100, "validation": 210}
    write_base(root, "clevr", "3.1.0", features, counts, scene)

    def street(split, i):
        walker, vehicle = [0.0, 0.0, 1.0], [0.0, 0.0, 6.0 + 10 * (i % 3)]
        types = ["Pedestrian", VEHICLES[i % 4]]
        return {"objects": {"type": types, "location": [walker, vehicle]}}

    objects = {
        "type": tfds.features.ClassLabel(names=VEHICLES),
        "location": tfds.features.Tensor(shape=(3,), dtype=np.float32),
    }
    features = {"objects": tfds.features.Sequence(objects)}
    write_base(root, "kitti", "3.3.0", features, SIZES, street)
    return root


def opened(task, split, data_dir):
    preparation.prepare(f"vtab_{task}", data_dir=data_dir)
    return sources.open_source(f"vtab_{task}", split, data_dir=data_dir)


def everything(source):
    return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


PARTS = {
    # Base split and first place of the 200, then of test; how many are tested.
    "dtd": (("validation", 0), ("test", 0), 260),
    "oxford_iiit_pet": (("train", 1200), ("test", 0), 260),
    "resisc45": (("train", 901), ("train", 1201), 302),
    "smallnorb_azimuth": (("test", 0), ("test", 300), 301),
    "dsprites_location": (("train", 1040), ("train", 1170), 130),
    "clevr_count": (("train", 1890), ("validation", 0), 210),
    "kitti_distance": (("validation", 0), ("test", 0), 260),
}


@pytest.mark.parametrize("task", ["dtd", "oxford_iiit_pet", "resisc45"])
def test_splits_are_disjoint_800_200_1000_and_the_whole_test(task, data_dir):
    train, val, both, test = (
        everything(opened(task, split, data_dir))
        for split in ("train800", "val200", "train800val200", "test")
    )
    assert (len(train), len(val), len(both)) == (800, 200, 1000)
    assert both == train + val
    assert len({image for image, _ in both + test}) == 1000 + len(test)


@pytest.mark.parametrize("task", PARTS)
def test_splits_are_those_of_task_adaptation(task, data_dir):
    base = tfds.builder_from_directory(
        preparation.find(vtab.TASKS[task].base, data_dir)
    )
    decoders = {"image": tfds.decode.SkipDecoding()}
    (val_split, val_start), (test_split, test_start), num_test = PARTS[task]
    for split, (of, start), count in (
        ("train800", ("train", 0), 800),
        ("val200", (val_split, val_start), 200),
        ("test", (test_split, test_start), num_test),
    ):
        found = opened(task, split, data_dir)
        assert len(found) == count
        original = base.as_data_source(of, decoders=decoders)
        for i in {0, 1, count // 2, count - 1}:
            image, expected = found[i]["image"], original[start + i]["image"]
            if task.startswith("dsprites"):
                image, expected = map(decoding.decode, (image, expected))
                expected = expected * np.uint8(255)
            np.testing.assert_array_equal(image, expected)


LABELS = {
    "smallnorb_azimuth": (18, lambda i: i % 18),
    "smallnorb_elevation": (9, lambda i: i % 9),
    # 32 places and 40 angles, each in 16 groups of neighbours.
    "dsprites_location": (16, lambda i: (i % 32) // 2),
    "dsprites_orientation": (16, lambda i: int((i % 40) / 2.5)),
    "clevr_count": (8, lambda i: i % 8),
    # Depths 8.25, 9.25, 10.25 and 12 between the borders 8, 8.5, 9, 9.5, 10.
    "clevr_distance": (6, lambda i: [1, 3, 5, 5, 5][i % 5]),
    # 6, 16 and 26 metres, borders 8 and 20; a pedestrian is no vehicle.
    "kitti_distance": (4, lambda i: 3 if i % 4 == 3 else i % 3),
    "dtd": (7, lambda i: i % 7),
}


@pytest.mark.parametrize("task", LABELS)
def test_labels_are_those_of_task_adaptation(task, data_dir):
    num_classes, label = LABELS[task]
    source = opened(task, "train800", data_dir)
    assert source.num_classes == num_classes
    found = [source[i]["label"] for i in range(len(source))]
    assert found == [label(i) for i in range(800)]


def test_dsprites_are_black_and_white(data_dir):
    source = opened("dsprites_orientation", "test", data_dir)
    image = decoding.decode(source[5]["image"])
    assert image.shape == (4, 4, 3)
    assert set(image.ravel().tolist()) == {0, 255}


def test_borders_belong_to_the_bin_below():
    """task_adaptation takes the last border that is strictly smaller."""
    for depth, expected in ((8.0, 0), (np.nextafter(8.0, 9), 1), (10.0, 4)):
        assert vtab.clevr_distance({"pixel_coords": [[0, 0, depth]]}) == expected
    for metres, expected in ((8.0, 0), (8.1, 1), (20.0, 1), (20.1, 2), (999.5, 3)):
        car = {"type": [0], "location": [[0, 0, metres]]}
        assert vtab.kitti_distance(car) == expected


def test_there_are_nineteen_tasks_and_tfds_knows_their_bases():
    assert len(vtab.TASKS) == 19
    known = tfds.list_builders(with_community_datasets=False)
    for name, task in vtab.TASKS.items():
        assert task.base.partition("/")[0] in known
        assert preparation.PREPARABLE[f"vtab_{name}"].base == task.base
        assert preparation.PREPARABLE[task.base].tensorflow


def test_a_base_without_the_label_is_named(tmp_path):
    def plain(split, i):
        return {"digit": 1}

    features = {"digit": tfds.features.ClassLabel(num_classes=3)}
    write_base(tmp_path, "dtd", "3.0.1", features, SIZES, plain)
    with pytest.raises(ValueError, match=r"needs the features 'image' and 'label' of"):
        preparation.prepare("vtab_dtd", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            SIZES | {"train": 700},
            r"dtd has no train\[:800\] .*train: 700.*again, whole",
        ),
        (SIZES | {"validation": 100}, r"dtd has no validation\[:200\]"),
        ({"train": 900, "validation": 300}, "dtd has no test .*train: 900, validation"),
        ({"test": 300}, r"dtd has no train\[:800\]"),
    ],
)
def test_a_base_that_is_not_whole_is_named(counts, message, tmp_path):
    write_base(
        tmp_path, "dtd", "3.0.1", label_feature(), counts, lambda s, i: {"label": 1}
    )
    with pytest.raises(ValueError, match=message):
        preparation.prepare("vtab_dtd", data_dir=tmp_path)


def test_a_base_in_tfrecord_format_and_with_a_configuration_serves(tmp_path):
    def labelled(split, i):
        return {"label": i % 10}

    counts = {"train": 1500}
    folder = write_base(
        tmp_path, "eurosat", "2.0.0", label_feature(10), counts, labelled
    )
    new = tmp_path / "eurosat" / "rgb" / "2.0.0"
    new.mkdir(parents=True)
    for path in folder.iterdir():
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
    shutil.rmtree(folder)
    info = json.loads((new / "dataset_info.json").read_text())
    (new / "dataset_info.json").write_text(json.dumps(info | {"configName": "rgb"}))
    source = opened("eurosat", "val200", tmp_path)
    found = [source[i]["label"] for i in range(200)]
    assert found == [i % 10 for i in range(900, 1100)]


def test_a_full_disk_is_said(data_dir, monkeypatch):
    shutil.rmtree(data_dir / "vtab_smallnorb_elevation", ignore_errors=True)
    free = shutil.disk_usage(data_dir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"vtab_smallnorb_elevation needs .* are free"):
        preparation.prepare("vtab_smallnorb_elevation", data_dir=data_dir)
