"""The published files: flat npz archives, in both of the authors' layouts.

The current one has the names of our tree, `MixerBlock_0/token_mixing/Dense_0/kernel`.
The older one, from before Flax's Linen, says `Mixer/encoderblock_0/
token_mixing_phase_0/kernel1`; big_vision's loader is the source of how the two
correspond. Whole training checkpoints prefix either with `params/` or `opt/target/`.
"""

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Flat = dict[str, np.ndarray]

PREFIXES = ("opt/target/", "params/")


def read(path: str | os.PathLike[str]) -> Flat:
    """Returns {name in our tree: array}; bfloat16, which npz does not know, is found.

    Raises:
      ValueError: it is damaged, or two arrays claim one name.
    """
    arrays: Flat = {}
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            prefix = _prefix(members)
            for name, member in members.items():
                if name.startswith("opt/") and not name.startswith(prefix or "/"):
                    continue  # of the optimiser
                # Compared with its CRC-32, which np.load does only at the very end.
                data = io.BytesIO(archive.read(member))
                arrays[name] = np.lib.format.read_array(data, allow_pickle=False)
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            EOFError,
            KeyError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{path} is not a whole npz file ({error}); copy or download it again."
            ) from error
    return renamed({name: _typed(array) for name, array in arrays.items()}, path)


def write(file, params: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array} as the published files are: current layout, float32.

    Args:
      file: binary, open for writing.
      params: with the names of our tree.
    """
    arrays: dict[str, Any] = {k: np.asarray(v, np.float32) for k, v in params.items()}
    np.savez(file, **arrays)


def _typed(array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def renamed(arrays: Mapping[str, np.ndarray], path: object) -> Flat:
    """{name in our tree: array} of either layout, with or without prefix."""
    prefix = _prefix(arrays)
    inner = {name.removeprefix(prefix): x for name, x in arrays.items()}
    if not any(re.match("(Mixer|embedding)/", name) for name in inner):
        return inner
    norms = _norms(inner)
    flat: Flat = {}
    for name, array in inner.items():
        new = _modern(name, norms)
        if new in flat:
            raise ValueError(f"{path} has two arrays for {new}, the second is {name}.")
        flat[new] = _fitting(new, array)
    return flat


def _prefix(names: Iterable[str]) -> str:
    """What the parameters of a whole checkpoint start with."""
    stems = tuple(f"{p}{stem}/" for p in PREFIXES for stem in ("stem", "embedding"))
    found = [name for name in names if name.startswith(stems)]
    return next((p for p in PREFIXES if found and found[0].startswith(p)), "")


def _norms(names: Iterable[str]) -> dict[str, int]:
    """ "encoderblock_3/LayerNorm_2" → 1: old blocks count them 0, 1 or 0, 2."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := re.search(r"(encoderblock_\d+)/LayerNorm_(\d+)/", name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return {
        f"{block}/LayerNorm_{number}": place
        for block, numbers in found.items()
        for place, number in enumerate(sorted(numbers))
    }


def _modern(name: str, norms: Mapping[str, int]) -> str:
    name = re.sub(
        r"(encoderblock_\d+/)(LayerNorm_\d+)",
        lambda m: f"{m[1]}LayerNorm_{norms[m[1] + m[2]]}",
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


def _fitting(name: str, array: np.ndarray) -> np.ndarray:
    """Without the axes of size one that old mixing parameters may carry."""
    if "_mixing/" not in name:
        return array
    ndim = 2 if name.endswith("kernel") else 1
    ones = [axis for axis, size in enumerate(array.shape) if size == 1]
    surplus = ones[: max(array.ndim - ndim, 0)]
    return array.squeeze(tuple(surplus))
