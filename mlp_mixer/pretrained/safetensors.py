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
    try:
        sums = dict(json.loads(metadata.pop(CHECKSUMS, "{}")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: wrong bits in its checksums.") from error
    found = checksums(arrays, metadata)
    if wrong := [name for name in sums if sums[name] != found.get(name)]:
        raise ValueError(
            f"{path} is damaged: wrong bits in {', '.join(wrong)}; copy it again."
        )
    return arrays, metadata


def checksums(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> dict[str, int]:
    """CRC-32 of each array, its dtype and shape included, and of the metadata."""
    sums = {
        name: zlib.crc32(f"{x.dtype} {x.shape}".encode(), zlib.crc32(x.tobytes()))
        for name, x in arrays.items()
    }
    said = json.dumps(dict(metadata), sort_keys=True)
    return sums | {"its metadata": zlib.crc32(said.encode())}


def dumps(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file of {name: array}, with their checksums beside `metadata`."""
    sums = json.dumps(checksums(arrays, metadata))
    # In one piece and in their own order: the library writes the bytes as they lie.
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return numpy.save(whole, {**metadata, CHECKSUMS: sums})
