"""safetensors files, with a checksum of every array among their metadata.

The format itself notices a file that was cut, but no flipped bit.
"""

import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from mlp_mixer import files
from mlp_mixer.pretrained import damage
from mlp_mixer.text import brief

CHECKSUMS = "crc32"


def read(
    path: str | os.PathLike[str],
    refuse: Callable[[dict[str, np.ndarray], dict[str, str]], object] = lambda *_: None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns ({name: array}, metadata); bfloat16 stays what it is.

    Args:
      path: the file.
      refuse: raises if such arrays, with such metadata, are not wanted. They are
        stand-ins, from the header alone, and no other array is read before.

    Raises:
      ValueError: it is damaged. In files that others have written, without checksums,
        a flipped bit passes unnoticed.
    """
    from safetensors import SafetensorError, safe_open

    whole = functools.partial(
        damage.reported, path, "safetensors file", SafetensorError
    )
    with whole():
        _check_header(path)
        with safe_open(path, "np") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            declared = {k: np.broadcast_to(np.float32(0), x) for k, x in shapes.items()}
    refuse(declared, metadata)
    with whole(), safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in names}
    damaged = f"{path} is damaged: its checksums"
    sums = files.parse_json(metadata.pop(CHECKSUMS, "{}"), damaged)
    found = checksums(arrays, metadata)
    if wrong := [name for name in sums if sums[name] != found.get(name)]:
        raise ValueError(
            f"{path} is damaged: wrong bits in {brief(', '.join(wrong))}; copy it "
            "again."
        )
    return arrays, metadata


def _check_header(path: str | os.PathLike[str]) -> None:
    """Sees what the library does not: a name that stands there twice."""
    with open(path, "rb") as file:
        if len(start := file.read(8)) < 8:
            raise ValueError(f"it has {len(start)} bytes")
        (size,) = struct.unpack("<Q", start)
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"its header says that it has {size:,} bytes")
        if size > files.MAX_BYTES:
            raise ValueError(f"a header of {size:,} bytes is none of weights")
        files.parse_json(file.read(size), "its header")


def checksums(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> dict[str, int]:
    """CRC-32 of each array, its dtype and shape included, and of the metadata."""
    sums = {
        name: zlib.crc32(f"{x.dtype} {x.shape}".encode(), zlib.crc32(x.tobytes()))
        for name, x in arrays.items()
    }
    text = json.dumps(dict(metadata), sort_keys=True)
    return sums | {"its metadata": zlib.crc32(text.encode())}


def to_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file of {name: array}, with their checksums beside `metadata`."""
    from safetensors import numpy

    sums = json.dumps(checksums(arrays, metadata))
    # In one piece and in their own order: the library writes the bytes as they lie.
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return numpy.save(whole, {**metadata, CHECKSUMS: sums})
