"""Prepares data sets with TFDS's own builders; only this needs TensorFlow."""

import contextlib
import difflib
import logging
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator

import tensorflow_datasets as tfds

from mlp_mixer.data.preparation import writing
from mlp_mixer.data.preparation.writing import Job

logger = logging.getLogger(__name__)
_EVERY_SECONDS = 30.0


def prepare_stock(job: Job, gigabytes: float = 0.0) -> None:
    """Downloads and writes a data set that TFDS knows, as array_record.

    After an interruption downloads are kept; TFDS itself writes all shards or none.

    Args:
      job: the data set.
      gigabytes: size of downloads, their contents and shards; 0 if not known.
    """
    _check_name(job.name)
    if gigabytes:
        writing.check_room(job, int(gigabytes * 1e9) - _downloaded(job))
    _check_tensorflow(job.name)
    builder = tfds.builder(job.name, data_dir=job.data_dir, file_format="array_record")
    for leftover in pathlib.Path(builder.data_dir).parent.glob("incomplete.*"):
        shutil.rmtree(leftover)  # of a process that was killed
    config = tfds.download.DownloadConfig(
        manual_dir=job.manual_dir, try_download_gcs=False
    )
    try:
        with _heartbeat(job):
            builder.download_and_prepare(
                download_dir=job.data_dir / "downloads", download_config=config
            )
    except AssertionError as error:  # which TFDS raises for missing manual files
        message = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{job.name} needs files in {job.manual_dir}: {message}"
        ) from error
    except (OSError, tfds.download.DownloadError) as error:
        raise OSError(
            f"{job.name} could not be prepared: {error}. Start again to go on from"
            " what is downloaded."
        ) from error


def _check_name(name: str) -> None:
    known = tfds.list_builders(with_community_datasets=False)
    kind = name.partition("/")[0].partition(":")[0]
    if kind not in known:
        near = difflib.get_close_matches(kind, known, 3, 0.5)
        raise ValueError(
            f"TFDS knows no data set {kind!r}."
            + (f" Near names: {', '.join(near)}." if near else "")
            + " `python -m mlp_mixer.prepare list` shows what this project knows well."
        )


def _check_tensorflow(name: str) -> None:
    try:
        import importlib_resources  # noqa: F401
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name} is prepared by TFDS's own builder, which needs TensorFlow"
            f" ({error}): pip install '.[prepare]' in the clone"
        ) from error


@contextlib.contextmanager
def _heartbeat(job: Job) -> Iterator[None]:
    """Logs the size on disk every half minute, where TFDS's bars have no terminal."""
    if sys.stderr.isatty():
        yield
        return
    tfds.disable_progress_bar()
    ended, began = threading.Event(), time.monotonic()

    def log_size() -> None:
        while not ended.wait(_EVERY_SECONDS):
            size = _downloaded(job) + _bytes_in(job.data_dir / job.name)
            after = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
            logger.info("%s: %.2f GB on disk after %s", job.name, size / 1e9, after)

    thread = threading.Thread(target=log_size, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _downloaded(job: Job) -> int:
    """Bytes that TFDS has downloaded and unpacked, for all data sets."""
    folder = job.data_dir / "downloads"
    return _bytes_in(folder) - _bytes_in(folder / "manual")


def _bytes_in(folder: pathlib.Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size
