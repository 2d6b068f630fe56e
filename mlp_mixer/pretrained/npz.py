"""The published files: flat npz archives, in both of the authors' layouts.

The current one has the names of our tree, `MixerBlock_0/token_mixing/Dense_0/kernel`.
The older one, from before Flax's Linen, says `Mixer/encoderblock_0/
token_mixing_phase_0/kernel1`; big_vision's loader is the source of how the two
correspond. Whole training checkpoints prefix either with `params/` or `opt/target/`.
"""

import io
import math
import os
import re
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from mlp_mixer.files import MAX_BYTES
from mlp_mixer.pretrained import damage
from mlp_mixer.text import brief

Flat = dict[str, np.ndarray]

PREFIXES = ("opt/target/", "params/")
# Of a member's beginning that is read for its header; NumPy's own limit is 10,000.
HEADER_BYTES = 2**16
NUMBER_BYTES = 64  # Of one element: more is text, or made up.
# Trained weights deflate to nine tenths, zeros to a thousandth. What inflates more is
# no weights, unless it is small: the largest published file has 0.9 GB.
MAX_RATIO, SMALL_BYTES = 20, 2**30


def read(
    path: str | os.PathLike[str],
    refuse: Callable[[Flat, dict[str, str]], object] = lambda *_: None,
) -> tuple[Flat, dict[str, str]]:
    """Returns ({name in our tree: array}, metadata).

    bfloat16, which npz does not know, is found. Metadata are texts without
    a "/" in their name, which no published file has.

    Args:
      path: the file.
      refuse: raises if arrays of these names, shapes and dtypes, with such metadata,
        are not wanted. They are stand-ins, from the headers alone, and no other array
        is read before.

    Raises:
      ValueError: it is damaged, or two arrays claim one name.
    """
    # Of a header that is no Python NumPy raises the other two.
    errors = ("npz file", tokenize.TokenError, SyntaxError)
    with open(path, "rb") as file:
        with damage.reported(path, *errors):
            archive = zipfile.ZipFile(file)
            members = _parameter_members(archive)
            declared = {k: _stand_in(archive, x) for k, x in members.items()}
            size = sum(x.nbytes for x in declared.values())
            packed = os.fstat(file.fileno()).st_size
            if size > max(SMALL_BYTES, MAX_RATIO * packed):
                raise ValueError(
                    f"{packed:,} bytes that declare {size:,} are no weights"
                )
            given = [
                k for k, x in declared.items() if x.dtype == np.uint8 and "/" not in k
            ]
            if sum(declared.pop(name).nbytes for name in given) > MAX_BYTES:
                raise ValueError(f"{', '.join(given)} have too many bytes")
            texts = {k: _read_array(archive, members.pop(k)).tobytes() for k in given}
            metadata = {k: text.decode() for k, text in texts.items()}
        refuse(with_current_names(declared, path), metadata)
        with damage.reported(path, *errors):
            arrays = {k: _read_array(archive, x) for k, x in members.items()}
    return with_current_names(arrays, path), metadata


def _parameter_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """{name: member} without what is the optimiser's."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"two members are called {name}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed as no npz file is")
        members[name] = info
    prefix = _prefix_of_parameters(members) or "/"
    return {
        name: info
        for name, info in members.items()
        if name.startswith(prefix) or not name.startswith("opt/")
    }


def _stand_in(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of one element's memory with the shape and dtype of a header."""
    with archive.open(info) as member:
        start = io.BytesIO(member.read(HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(start)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(start)
    if dtype.hasobject or dtype.itemsize > NUMBER_BYTES:
        raise ValueError(f"{info.filename} holds no numbers, but {dtype}")
    expected = start.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or info.file_size != expected:
        raise ValueError(
            f"{info.filename} has {info.file_size:,} bytes; its header says "
            f"{expected:,}"
        )
    return _with_bfloat16(np.broadcast_to(np.zeros((), dtype), shape))


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        # Not read(): that inflates what is there, and not what the member declares.
        # After the last byte all are compared with the CRC-32.
        data = io.BytesIO(member.read(info.file_size))
    return _with_bfloat16(np.lib.format.read_array(data, allow_pickle=False))


def _with_bfloat16(array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def with_current_names(arrays: Mapping[str, np.ndarray], path: object) -> Flat:
    """{name in our tree: array} of either layout, with or without prefix."""
    prefix = _prefix_of_parameters(arrays)
    inner: Flat = {}
    for name, array in arrays.items():
        bare = name.removeprefix(prefix)
        if bare in inner:
            raise ValueError(
                f"{path} has two arrays for {brief(bare)}, one of them with {prefix!r}."
            )
        inner[bare] = array
    if not any(re.match("(Mixer|embedding)/", name) for name in inner):
        return inner
    places = _norm_places(inner)
    flat: Flat = {}
    for name, array in inner.items():
        new = _current_name(name, places)
        if new in flat:
            raise ValueError(
                f"{path} has two arrays for {brief(new)}, the second is {brief(name)}."
            )
        flat[new] = _without_ones(new, array)
    return flat


def _prefix_of_parameters(names: Iterable[str]) -> str:
    """What the parameters of a whole checkpoint start with."""
    stems = tuple(f"{p}{stem}/" for p in PREFIXES for stem in ("stem", "embedding"))
    found = [name for name in names if name.startswith(stems)]
    return next((p for p in PREFIXES if found and found[0].startswith(p)), "")


def _norm_places(names: Iterable[str]) -> dict[str, int]:
    """ "encoderblock_3/LayerNorm_2" → 1: old blocks count them 0, 1 or 0, 2."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := re.search(r"(encoderblock_\d+)/LayerNorm_(\d{1,9})/", name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return {
        f"{block}/LayerNorm_{number}": place
        for block, numbers in found.items()
        for place, number in enumerate(sorted(numbers))
    }


def _current_name(name: str, places: Mapping[str, int]) -> str:
    name = re.sub(
        r"(encoderblock_\d+/)(LayerNorm_\d{1,9})(?=/)",
        lambda m: f"{m[1]}LayerNorm_{places[m[1] + m[2]]}",
        name,
    )
    name = re.sub(
        r"(token|channel)_mixing_phase_0/(kernel|bias)([12])$",
        lambda m: f"{m[1]}_mixing/Dense_{int(m[3]) - 1}/{m[2]}",
        name,
    )
    name = re.sub("^embedding/", "stem/", name)
    name = re.sub("^Mixer/encoder_norm/", "pre_head_layer_norm/", name)
    return re.sub(r"^Mixer/encoderblock_(\d+)/", r"MixerBlock_\1/", name)


def _without_ones(name: str, array: np.ndarray) -> np.ndarray:
    """Without the axes of size one that old mixing parameters may carry."""
    if "_mixing/" not in name:
        return array
    ndim = 2 if name.endswith("kernel") else 1
    ones = [axis for axis, size in enumerate(array.shape) if size == 1]
    surplus = ones[: max(array.ndim - ndim, 0)]
    return array.squeeze(tuple(surplus))
