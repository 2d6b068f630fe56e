"""The embedded digits: what they are, and that preparing them survives anything."""

import gzip
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from mlp_mixer.data import decoding, preparation, sources
from mlp_mixer.data.preparation import digits

PREPARE = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from mlp_mixer.data import sources
print(len(sources.open_source("digits", "train", data_dir=sys.argv[1])))
"""
DIE_HALF_WAY = """
import os, signal, sys
from mlp_mixer.data.preparation import digits
generate = digits.MixerDigits._generate_examples

def die(self, rows):
    for i, example in enumerate(generate(self, rows)):
        if len(rows) == 297 and i == 100:  # train is complete, test is not
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

digits.MixerDigits._generate_examples = die
digits.prepare_digits(sys.argv[1])
"""


def start(program, data_dir):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=pathlib.Path(preparation.__file__).parents[3],
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def read(split, data_dir):
    source = sources.open_source("digits", split, data_dir=data_dir)
    images = [decoding.decode(source[i]["image"]) for i in range(len(source))]
    return np.stack(images), np.array([source[i]["label"] for i in range(len(source))])


def test_splits_are_a_partition_of_the_embedded_file(data_dir):
    (images, labels), (test_images, test_labels) = (
        read(split, data_dir) for split in ("train", "test")
    )
    assert images.shape == (1500, 8, 8, 3)
    assert test_images.shape == (297, 8, 8, 3)
    assert (images == images[..., :1]).all()

    with gzip.open(digits._CSV) as f:
        rows = np.loadtxt(f, delimiter=",")
    rows[:, :64] = (rows[:, :64] * 255 / 16).round()
    grey = np.concatenate([images, test_images])[..., 0].reshape(1797, 64)
    prepared = np.column_stack([grey, np.concatenate([labels, test_labels])])
    assert sorted(map(tuple, prepared)) == sorted(map(tuple, rows))

    held_out = rows[np.random.default_rng(0).permutation(1797)][-297:]
    found = np.column_stack([grey[1500:], test_labels])
    assert sorted(map(tuple, found)) == sorted(map(tuple, held_out))


def test_classes_are_balanced_and_named(data_dir):
    source = sources.open_source("digits", "train", data_dir=data_dir)
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    for split, least in (("train", 130), ("test", 20)):
        counts = np.bincount(read(split, data_dir)[1], minlength=10)
        assert counts.min() >= least


def test_order_is_the_recorded_one(data_dir):
    # Another order would be another training run under the same seed. Recorded with
    # tensorflow-datasets 4.9.10, whose hash of the key decides the order in a split.
    for split, labels in (
        ("train", [5, 2, 8, 9, 2, 0, 5, 1, 6, 3, 0, 5]),
        ("test", [5, 5, 1, 5, 1, 6, 7, 8, 5, 0, 2, 3]),
    ):
        assert read(split, data_dir)[1][:12].tolist() == labels


def test_processes_that_start_together_prepare_once(tmp_path):
    processes = [start(PREPARE, tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == ["1500"] * 3
    assert "".join(outputs).count("Preparing digits in") == 1


def test_a_killed_preparation_is_done_again(tmp_path):
    killed = start(DIE_HALF_WAY, tmp_path)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "mixer_digits"
    assert list(folder.glob("*incomplete*"))
    assert len(sources.open_source("digits", "train", data_dir=tmp_path)) == 1500
    assert len(sources.open_source("digits", "test", data_dir=tmp_path)) == 297
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_preparing_asks_no_network_and_prints_nothing(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(
        "tensorflow_datasets.core.utils.gcs_utils.gcs_dataset_info_files", refuse
    )
    monkeypatch.setattr(
        "tensorflow_datasets.core.utils.gcs_utils.is_dataset_on_gcs", refuse
    )
    preparation.prepare_digits(tmp_path)
    assert capfd.readouterr().out == ""
