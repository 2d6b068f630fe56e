"""Writes a prepared data set shard by shard, so that a killed preparation can go on.

The files are those that TFDS itself would write: `<name>/<version>/` with array_record
shards, features.json and dataset_info.json. Until all are complete they lie in a
hidden folder beside it, where a shard gets its name once it is whole.
"""

import dataclasses
import itertools
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters
from tensorflow_datasets.core.utils import shard_utils

from mlp_mixer import console, files

logger = logging.getLogger(__name__)

SHARDS = shard_utils.ShardConfig()  # TFDS's: 64 MiB to 1 GiB, 1,024 where possible.


@dataclasses.dataclass(frozen=True)
class Job:
    """One data set to prepare.

    Attributes:
      name: name in TFDS, with its config: "eurosat/rgb".
      version: version of the data that is written, e.g. "5.1.0".
      data_dir: folder of TFDS data.
      manual_dir: folder of files that a person has to download.
      verify: whether these are compared with published checksums.
    """

    name: str
    version: str
    data_dir: pathlib.Path
    manual_dir: pathlib.Path
    verify: bool

    @property
    def target(self) -> pathlib.Path:
        """The complete data set."""
        return self.data_dir / self.name / self.version

    @property
    def partial(self) -> pathlib.Path:
        """The folder of a data set that is not complete yet."""
        return self.data_dir / self.name / f".{self.version}.partial"


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split, in order.

    Attributes:
      num_examples: number of examples.
      num_bytes: size of all images together.
      read: (start, stop) → those examples, as the features encode them.
    """

    num_examples: int
    num_bytes: int
    read: Callable[[int, int], Iterable[dict[str, Any]]]


def begin(job: Job, sources: Iterable[pathlib.Path], num_bytes: int) -> None:
    """Makes the partial folder, or continues that of a preparation that was killed.

    Args:
      job: the data set.
      sources: files that it is made from; if one has changed, the work begins again.
      num_bytes: room on the disk that it needs.

    Raises:
      OSError: there is less room.
    """
    stats = [(path, path.stat()) for path in sources]
    stamp = "".join(f"{p}\t{s.st_size}\t{s.st_mtime_ns}\n" for p, s in stats)
    recorded = job.partial / "sources.tsv"
    resumed = recorded.exists() and recorded.read_text() == stamp
    if job.partial.exists() and not resumed:
        shutil.rmtree(job.partial)
    for unfinished in job.partial.glob(".*"):
        unfinished.unlink()
    done = sum(path.stat().st_size for path in job.partial.glob("*array_record*"))
    check_room(job, num_bytes - done)
    if resumed:
        logger.info("%s: going on from %.1f GB.", job.name, done / 1e9)
        return
    job.partial.mkdir(parents=True)
    recorded.write_text(stamp)


def check_room(job: Job, num_bytes: int) -> None:
    """Raises OSError if the disk of the data folder has less room than `num_bytes`."""
    job.data_dir.mkdir(parents=True, exist_ok=True)
    files.check_room(job.data_dir, num_bytes, job.name, "--data_dir")


def write_splits(
    job: Job,
    features: Mapping[str, tfds.features.FeatureConnector],
    splits: Mapping[str, Split],
    **info: Any,
) -> None:
    """Writes missing shards and the description, then gives the folder its name.

    Args:
      job: the data set, after `begin`.
      features: TFDS's features by name.
      splits: splits by name.
      **info: further arguments of `tfds.core.DatasetInfo`, such as the description.

    Raises:
      OSError: a shard could not be written; those before it are kept.
      ValueError: a split is empty.
    """
    feature_dict = tfds.features.FeaturesDict(dict(features))
    shards, infos = [], []
    for name, split in splits.items():
        if not split.num_examples:
            raise ValueError(f"{job.name} {name} has no examples in what was given.")
        count = SHARDS.get_number_shards(split.num_bytes, split.num_examples)
        ends = shard_utils.get_shard_boundaries(split.num_examples, count)
        prefix = f"{job.partial}/{job.name}-{name}.array_record"
        for i, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
            path = pathlib.Path(f"{prefix}-{i:05}-of-{count:05}")
            shards.append((path, split, start, stop))
        lengths = [stop - start for start, stop in itertools.pairwise([0, *ends])]
        infos.append(tfds.core.SplitInfo(name, lengths, split.num_bytes))
    for other in {*job.partial.glob("*array_record*")} - {shard[0] for shard in shards}:
        other.unlink()  # of another number of shards
    total = sum(split.num_examples for split in splits.values())
    missing = [shard for shard in shards if not shard[0].exists()]
    done = total - sum(stop - start for _, _, start, stop in missing)
    with console.counter(job.name, total, "examples", done) as advance:
        for path, split, start, stop in missing:
            _write_shard(path, _records(feature_dict, split, start, stop, advance))
    tfds.folder_dataset.write_metadata(
        data_dir=job.partial,
        features=feature_dict,
        split_infos=infos,
        version=job.version,
        check_data=False,
        **info,
    )
    job.partial.rename(job.target)
    # Only now: without them a killed preparation would begin again.
    for other in job.target.iterdir():
        if other.suffix in (".tsv", ".npz"):
            other.unlink()


def _records(
    features: tfds.features.FeaturesDict,
    split: Split,
    start: int,
    stop: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, bytes]]:
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    for i, example in enumerate(split.read(start, stop), start):
        record = serializer.get_tf_example(features.encode_example(example))
        # Without this, the order of a record's features differs between processes.
        yield i, record.SerializeToString(deterministic=True)
        advance(1)


def _write_shard(path: pathlib.Path, records: Iterator[tuple[int, bytes]]) -> None:
    try:
        with files.draft(path) as unfinished:
            file_adapters.ArrayRecordFileAdapter.write_examples(unfinished, records)
    except RuntimeError as error:  # which array_record raises when the disk is full
        raise OSError(
            f"{path} could not be written: {error}. What was complete is kept: make"
            " room and start again."
        ) from error
