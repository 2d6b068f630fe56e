"""The embedded digits, as a TFDS builder that needs no TensorFlow.

`MixerDigits` is UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0; see digits.LICENSE.md), embedded in
the package so that the first run needs neither a download nor TensorFlow.
"""

import contextlib
import gzip
import io
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mlp_mixer import files

logger = logging.getLogger(__name__)

_CSV = pathlib.Path(__file__).parents[1] / "digits.csv.gz"
_TRAIN_EXAMPLES = 1500  # of 1,797; the other 297 are the test split.


class _OfflineInfo(tfds.core.DatasetInfo):
    """Keeps TFDS from asking a Google bucket about data that is not prepared yet."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: this file says everything about the embedded data."""


class MixerDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey 8x8 images of handwritten digits, split 1,500 / 297."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. To find checksums TFDS would import importlib_resources,
    # which it does not declare as a dependency.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return _OfflineInfo(
            builder=self,
            description="UCI handwritten digits, the test set of 1,797 images.",
            homepage="https://doi.org/10.24432/C50P49",
            license="CC BY 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        with gzip.open(_CSV, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
        # The file is ordered by writer: without this, other people would write test.
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
        return {
            "train": self._generate_examples(rows[:_TRAIN_EXAMPLES]),
            "test": self._generate_examples(rows[_TRAIN_EXAMPLES:]),
        }

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict]]:
        for i, row in enumerate(rows):
            grey = (row[:64].reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            # A PIL image, because TFDS encodes an array with TensorFlow.
            yield i, {"image": Image.fromarray(grey), "label": int(row[64])}


def prepare_digits(
    data_dir: str | os.PathLike | None = None,
) -> tfds.core.DatasetBuilder:
    """Returns the digits as a TFDS builder, prepared as array_record on first use.

    Any number of processes may call this at once: one prepares, the others wait.

    Args:
      data_dir: folder of TFDS data; None is TFDS's own default (TFDS_DATA_DIR, or
        ~/tensorflow_datasets).
    """
    builder = MixerDigits(data_dir=data_dir, file_format="array_record")
    if builder.data_path.exists():  # TFDS renames it there when it is complete.
        return builder
    root = pathlib.Path(builder.data_dir_root)
    root.mkdir(parents=True, exist_ok=True)
    with files.locked(root / ".mixer_digits.lock", "prepares the digits"):
        if not builder.data_path.exists():
            _prepare(builder)
    # A new one, because a builder reads at its creation what is prepared.
    return MixerDigits(data_dir=data_dir, file_format="array_record")


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    logger.info("Preparing digits in %s", builder.data_dir)
    folder = pathlib.Path(builder.data_dir).parent
    for leftover in folder.glob("incomplete.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    # It takes a second, so one line of log replaces TFDS's prints and bars.
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
