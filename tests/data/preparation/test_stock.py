"""TFDS's own builders: what is said before one runs. None runs here: no TensorFlow."""

import shutil
import sys
import time

import pytest
import tensorflow_datasets as tfds

from mlp_mixer.data import preparation
from mlp_mixer.data.preparation import stock, writing


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


@pytest.mark.parametrize("name", ["cifar10", "vtab_dtd", "food101"])
def test_without_tensorflow_one_line_says_what_to_install(
    name, tmp_path, no_tensorflow
):
    with pytest.raises(ModuleNotFoundError) as caught:
        preparation.prepare(name, data_dir=tmp_path)
    message = str(caught.value)
    assert "pip install '.[prepare]'" in message
    assert "\n" not in message


def test_an_unknown_name_lists_near_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'cifar1'\. Near names: cifar10"):
        preparation.prepare("cifar1", data_dir=tmp_path)
    with pytest.raises(ValueError, match="prepare list"):
        preparation.prepare("qqqqqqqq", data_dir=tmp_path)


def test_room_is_looked_at_first(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"clevr needs 55\.000 GB in .* 1\.000 GB are"):
        preparation.prepare("clevr", data_dir=tmp_path)
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_val.tar").write_bytes(bytes(10**7))  # not TFDS's
    (tmp_path / "downloads" / "clevr.zip").write_bytes(bytes(2 * 10**7))
    with pytest.raises(OSError, match=r"clevr needs 54\.980 GB"):
        preparation.prepare("clevr", data_dir=tmp_path)


class FakeBuilder:
    """Does to the disk what TFDS's does, or fails as that does."""

    def __init__(self, folder, error=None):
        self.data_dir, self.error = folder / "cifar10" / "3.0.2", error

    def download_and_prepare(self, download_dir, download_config):
        assert download_config.try_download_gcs is False
        if self.error:
            raise self.error
        (download_dir / "x").mkdir(parents=True)
        (download_dir / "x" / "part").write_bytes(bytes(2 * 10**7))
        time.sleep(0.2)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs the stock way with a fake builder."""
    monkeypatch.setattr(stock, "_check_tensorflow", lambda name: None)
    monkeypatch.setattr(stock, "_EVERY_SECONDS", 0.05)

    def run(error=None):
        builder = FakeBuilder(tmp_path, error)
        monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: builder)
        job = writing.Job("cifar10", "3.0.2", tmp_path, tmp_path / "m", True)
        stock.prepare_stock(job)

    return run


def test_a_long_preparation_says_that_it_lives(fake, tmp_path, caplog):
    leftover = tmp_path / "cifar10" / "incomplete.XYZ_3.0.2"
    leftover.mkdir(parents=True)
    caplog.set_level("INFO")
    fake()
    assert "cifar10: 0.02 GB on disk after 00:00:00" in caplog.text
    assert not leftover.exists()


def test_tfds_errors_become_advice(fake, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"needs files in {tmp_path}/m: put x"):
        fake(AssertionError("put x\n  there"))
    with pytest.raises(OSError, match=r"no route\. Start again to go on"):
        fake(OSError("no route"))


def test_every_stock_name_of_the_table_is_tfds_own():
    known = tfds.list_builders(with_community_datasets=False)
    for name, recipe in preparation.PREPARABLE.items():
        if recipe.tensorflow:
            assert name.partition("/")[0] in known, name
