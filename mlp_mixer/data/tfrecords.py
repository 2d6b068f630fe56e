"""Random access to TFRecord files, without TensorFlow.

A file is a sequence of records, each `u64 length, u32 crc, data, u32 crc`; one pass
over the lengths finds them all.
"""

import contextlib
import mmap
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlp_mixer.files import writing


class TFRecords:
    """The records of TFRecord files that TFDS's split instructions select.

    Args:
      files: objects with `filename, skip, take, examples_in_shard`.
    """

    def __init__(self, files: Sequence[Any]):
        self._paths = [file.filename for file in files]
        self._maps: dict[int, mmap.mmap] = {}
        offsets, counts = [], []
        for file in files:
            starts = _record_offsets(file.filename)
            if len(starts) != file.examples_in_shard:
                raise ValueError(
                    f"{file.filename} holds {len(starts)} records, but its"
                    f" dataset_info.json says {file.examples_in_shard}; copy or"
                    " prepare it again."
                )
            offsets.append(starts[file.skip : file.skip + file.take])
            counts.append(file.take)
        self._offsets = np.concatenate(offsets)
        self._file_of = np.repeat(np.arange(len(files)), counts)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> bytes:
        file, start = int(self._file_of[index]), int(self._offsets[index])
        if file not in self._maps:
            with open(self._paths[file], "rb") as opened:
                self._maps[file] = mmap.mmap(
                    opened.fileno(), 0, access=mmap.ACCESS_READ
                )
        (length,) = struct.unpack_from("<Q", self._maps[file], start)
        return self._maps[file][start + 12 : start + 12 + length]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # A worker process opens its own.


def _record_offsets(filename: str) -> np.ndarray:
    """The byte at which each record of the file starts; cached in a file beside it."""
    path = pathlib.Path(filename)
    cache = path.with_name(f".{path.name}.index.npy")
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or damaged
        cached = np.load(cache)
        if cached[:2].tolist() == stamp:
            return cached[2:]
    offsets, position = [], 0
    with open(path, "rb", buffering=0) as file:
        while position + 16 <= stat.st_size:
            file.seek(position)
            offsets.append(position)
            position += 16 + struct.unpack("<Q", file.read(8))[0]
    if position != stat.st_size:
        raise ValueError(
            f"{path} has {stat.st_size} bytes, but its last record ends at {position};"
            " it is cut off or damaged: copy or prepare it again."
        )
    index = np.asarray([*stamp, *offsets], np.int64)
    # Beside read-only data nothing is cached, and the next start scans again.
    with contextlib.suppress(OSError), writing(cache) as unfinished:
        np.save(unfinished, index)
    return index[2:]
