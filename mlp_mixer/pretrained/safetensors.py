"""safetensors files, with a checksum of every array among their metadata.

The format itself notices a file that was cut, but no flipped bit.
"""

import json
import os
import zlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, numpy, safe_open

CHECKSUMS = "crc32"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns ({name: array}, metadata); bfloat16 stays what it is.

    Raises:
      ValueError: it is damaged. In files that others have written, without checksums,
        a flipped bit passes unnoticed.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or download it "
            "again."
        ) from error
    sums = _sums(path, metadata)
    wrong = [name for name in sums if sums[name] != checksum(arrays.get(name))]
    if wrong:
        raise ValueError(
            f"{path} is damaged: wrong bits in {', '.join(wrong)}; copy it again."
        )
    return arrays, metadata


def _sums(path: object, metadata: Mapping[str, str]) -> dict[str, int]:
    try:
        return dict(json.loads(metadata.get(CHECKSUMS, "{}")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: wrong bits in its metadata.") from error


def checksum(array: np.ndarray | None) -> int | None:
    """CRC-32 of its bytes; None of nothing."""
    return None if array is None else zlib.crc32(np.ascontiguousarray(array).tobytes())


def dumps(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file of {name: array}, with their checksums beside `metadata`."""
    sums = json.dumps({name: checksum(array) for name, array in arrays.items()})
    return numpy.save(dict(arrays), {**metadata, CHECKSUMS: sums})
