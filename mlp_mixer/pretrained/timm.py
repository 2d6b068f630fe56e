"""timm's all-MLP models: their names and ours, array by array.

A model's file says in `TIMM` what of it is called how there: pairs of modules, or of
single arrays, theirs first, with {} for the number of a block. A third entry is the
number of an array's axes in timm, where it has more, of size one.

timm computes the exact GELU, whatever the weights were trained with; Google's Mixers,
which it ships, were trained with the tanh approximation.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from mlp_mixer.models.model import all_axes
from mlp_mixer.pretrained import damage, tree
from mlp_mixer.text import brief

Flat = dict[str, np.ndarray]

# Axes of our array in theirs, by rank: LayerNorms and biases, torch's Linear (out, in)
# and Conv2d (out, in, height, width).
AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
# Around the model itself, or its weights, in files that training programs have written.
WRAPPERS = r"^(?:module\.|model\.|_orig_mod\.)+"
NESTS = ("state_dict_ema", "state_dict", "model_ema", "model")


def our_name(name: str, file: ModuleType) -> str | None:
    """The name in our tree of an array of timm's, in whichever wrapper; None: no such.

    Of any depth: also a block that there is not has a name.
    """
    bare = re.sub(WRAPPERS, "", name)
    number = re.search(r"\.([0-9]+)\.", bare)
    bare = re.sub(r"\.[0-9]+\.", ".{}.", bare)
    table = {theirs: ours for theirs, ours, *_ in getattr(file, "TIMM", ())}
    path = table.get(bare)
    if path is None:
        module, _, kind = bare.rpartition(".")
        leaves = {"weight": ("kernel", "scale"), "bias": ("bias",)}.get(kind, ())
        paths = [f"{table.get(module)}/{leaf}" for leaf in leaves]
        known = all_axes(file)
        path = next((p for p in paths if p.replace("{}", "*") in known), None)
    return path and path.format(number and number[1])


def their_name_and_rank(name: str, file: ModuleType) -> tuple[str, int]:
    """The name in timm of an array of our tree, or its own; and its number of axes.

    The number is 0 if there are as many as here.
    """
    path, number = tree.matches([name], file).get(name, (name, None))
    path = path.replace("*", "{}")
    home, _, leaf = path.rpartition("/")
    for theirs, ours, *axes in getattr(file, "TIMM", ()):
        if ours in (path, home):
            kind = "" if ours == path else ".bias" if leaf == "bias" else ".weight"
            return f"{theirs}{kind}".format(number), axes[0] if axes else 0
    return name, 0


def family(names: Collection[str]) -> ModuleType | None:
    """The architecture that has the most arrays of timm's names; None: none has any."""
    return tree.most_known(
        lambda file: sum(our_name(name, file) is not None for name in names)
    )


def with_our_names(arrays: Mapping[str, np.ndarray], file: ModuleType) -> Flat:
    """{name in our tree: array} of {name in timm: array}.

    Names that timm's model does not have stay as they are, for the caller to refuse,
    and so do arrays of a rank that none has.

    Raises:
      ValueError: two arrays claim one name.
    """
    flat: Flat = {}
    first: dict[str, str] = {}
    for name, array in arrays.items():
        new = our_name(name, file) or name
        if new in first:
            raise ValueError(
                f"there are two arrays for {brief(new)}: {brief(first[new])} and "
                f"{brief(name)}"
            )
        first[new] = name
        more = their_name_and_rank(new, file)[1]
        if more and array.ndim == more:
            ones = [axis for axis, size in enumerate(array.shape[:-1]) if size == 1]
            array = array.squeeze(tuple(ones))
        axes = AXES.get(array.ndim) if new != name else None
        flat[new] = array if axes is None else array.transpose(axes)
    return flat


def with_timm_names(params: Mapping[str, np.ndarray], file: ModuleType) -> Flat:
    """{name in timm: array} of {name in our tree: array}."""
    flat: Flat = {}
    for name, array in params.items():
        new, more = their_name_and_rank(name, file)
        array = array.transpose(np.argsort(AXES[array.ndim]))
        flat[new] = array.reshape((1,) * max(0, more - array.ndim) + array.shape)
    return flat


def read_torch(
    path: str | os.PathLike[str], refuse: Callable[[Flat], object] = lambda flat: None
) -> Flat:
    """{name: array} of a torch state dict, bare or beside plain values.

    Args:
      path: the file.
      refuse: raises if arrays of these names and shapes are not wanted. They are
        stand-ins: a tensor may declare more than the file holds.

    Raises:
      ModuleNotFoundError: torch is not installed.
      ValueError: it is damaged, or holds more than tensors, which is code to torch.
    """
    try:
        import torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path} is a torch file, and torch is not installed: pip install torch, "
            "or convert it to safetensors where torch is."
        ) from error
    with damage.reported(
        path,
        "torch file of weights alone",
        *(pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError),
    ):
        if zipfile.is_zipfile(path):
            _check_zip(path)
        # Never unpickles code.
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for nest in NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}.")
    for name, x in content.items():
        if not isinstance(name, str) or not isinstance(x, torch.Tensor):
            raise ValueError(
                f"{path} holds no state dict: {brief(repr(name))} stands for a "
                f"{type(x).__name__}; expected names of tensors."
            )
        if x.layout != torch.strided or x.device.type != "cpu" or x.is_quantized:
            raise ValueError(f"{path}: {brief(name)} holds no plain numbers.")
    refuse(
        {k: np.broadcast_to(np.float32(0), tuple(x.shape)) for k, x in content.items()}
    )
    size = sum(x.nbytes for x in content.values())
    if size > os.path.getsize(path):  # one number, expanded to any shape
        raise ValueError(
            f"{path} declares {size:,} bytes of tensors, which it has not."
        )
    return {name: _to_numpy(tensor) for name, tensor in content.items()}


def _check_zip(path: str | os.PathLike[str]) -> None:
    """torch.save neither compresses nor repeats, and torch.load compares no CRC-32."""
    with zipfile.ZipFile(path) as archive:
        seen: set[str] = set()
        for info in archive.infolist():
            if info.filename in seen:
                raise ValueError(f"two members are called {info.filename}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            if info.external_attr & 0x10:  # torch would read nothing, and say nothing
                raise ValueError(f"{info.filename} is a folder")
            seen.add(info.filename)
        if sum(i.file_size for i in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its members declare more bytes than it has")
        if damaged := archive.testzip():
            raise ValueError(f"wrong bits in {damaged}")


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
