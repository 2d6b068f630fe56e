"""timm's `mixer_*` models: their names and ours, array by array.

timm computes the exact GELU, whatever the weights were trained with; Google's, which
it ships, were trained with the tanh approximation.
"""

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mlp_mixer.text import brief

Flat = dict[str, np.ndarray]

# Their module, ours; {} is the number of the block.
MODULES = (
    ("stem.proj", "stem"),
    ("blocks.{}.norm1", "MixerBlock_{}/LayerNorm_0"),
    ("blocks.{}.mlp_tokens.fc1", "MixerBlock_{}/token_mixing/Dense_0"),
    ("blocks.{}.mlp_tokens.fc2", "MixerBlock_{}/token_mixing/Dense_1"),
    ("blocks.{}.norm2", "MixerBlock_{}/LayerNorm_1"),
    ("blocks.{}.mlp_channels.fc1", "MixerBlock_{}/channel_mixing/Dense_0"),
    ("blocks.{}.mlp_channels.fc2", "MixerBlock_{}/channel_mixing/Dense_1"),
    ("norm", "pre_head_layer_norm"),
    ("head", "head"),
)
# Axes of our array in theirs, by rank: LayerNorms and biases, torch's Linear (out, in)
# and Conv2d (out, in, height, width).
AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
# Around the model itself, or its weights, in files that training programs have written.
WRAPPERS = r"^(?:module\.|model\.|_orig_mod\.)+"
NESTS = ("state_dict_ema", "state_dict", "model_ema", "model")


def our_name(name: str) -> str | None:
    """The name in our tree of an array of timm's, in whichever wrapper; None: no such.

    Of a Mixer of any depth: also a block that there is not has a name.
    """
    module, _, kind = re.sub(WRAPPERS, "", name).rpartition(".")
    number = re.search(r"\.([0-9]+)\.", module)
    home = dict(MODULES).get(re.sub(r"\.[0-9]+\.", ".{}.", module))
    if home is None or kind not in ("weight", "bias"):
        return None
    norm = module.rpartition(".")[2].startswith("norm")
    leaf = "bias" if kind == "bias" else "scale" if norm else "kernel"
    return f"{home.format(number and number[1])}/{leaf}"


def their_name(name: str) -> str:
    """The name in timm of an array of our tree; any other stays as it is."""
    home, _, leaf = name.rpartition("/")
    number = re.match(r"MixerBlock_([0-9]+)/", home)
    homes = {home: module for module, home in MODULES}
    module = homes.get(re.sub(r"^MixerBlock_[0-9]+/", "MixerBlock_{}/", home))
    if module is None:
        return name
    kind = "bias" if leaf == "bias" else "weight"
    return f"{module.format(number and number[1])}.{kind}"


def is_timm(names: Iterable[str]) -> bool:
    """Whether any of these is the name of an array of a timm Mixer."""
    return any(our_name(name) is not None for name in names)


def ours(arrays: Mapping[str, np.ndarray]) -> Flat:
    """{name in our tree: array} of {name in timm: array}.

    Names that timm's Mixer does not have (ResMLP's, gMLP's) stay as they are, for the
    caller to refuse, and so do arrays of a rank that none has.

    Raises:
      ValueError: two arrays claim one name.
    """
    flat: Flat = {}
    first: dict[str, str] = {}
    for name, array in arrays.items():
        new = our_name(name) or name
        if new in first:
            raise ValueError(
                f"there are two arrays for {brief(new)}: {brief(first[new])} and "
                f"{brief(name)}"
            )
        first[new] = name
        axes = AXES.get(array.ndim) if new != name else None
        flat[new] = array if axes is None else array.transpose(axes)
    return flat


def theirs(params: Mapping[str, np.ndarray]) -> Flat:
    """{name in timm: array} of {name in our tree: array}."""
    return {
        their_name(name): array.transpose(np.argsort(AXES[array.ndim]))
        for name, array in params.items()
    }


def read_torch(
    path: str | os.PathLike[str], check: Callable[[Flat], None] = lambda flat: None
) -> Flat:
    """{name: array} of a torch state dict, bare or beside plain values.

    Args:
      path: the file.
      check: raises if arrays of these names and shapes are not wanted. They are
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
    try:
        if zipfile.is_zipfile(path):
            _check_zip(path)
        # Never unpickles code.
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} is not a whole torch file of weights alone: "
            f"{brief((str(error).splitlines() or [type(error).__name__])[0])}"
        ) from error
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
    check(
        {k: np.broadcast_to(np.float32(0), tuple(x.shape)) for k, x in content.items()}
    )
    size = sum(x.nbytes for x in content.values())
    if size > os.path.getsize(path):  # one number, expanded to any shape
        raise ValueError(
            f"{path} declares {size:,} bytes of tensors, which it has not."
        )
    return {name: _numpy(tensor) for name, tensor in content.items()}


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


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
