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


def is_timm(names: Iterable[str]) -> bool:
    """Whether these are the names of a timm Mixer, of whichever wrapper."""
    return any(re.sub(WRAPPERS, "", name) == "stem.proj.weight" for name in names)


def ours(arrays: Mapping[str, np.ndarray]) -> Flat:
    """{name in our tree: array} of {name in timm: array}.

    Names that timm's Mixer does not have (ResMLP's, gMLP's) stay as they are, for the
    caller to refuse.

    Raises:
      ValueError: two arrays claim one name.
    """
    flat: Flat = {}
    for name, array in arrays.items():
        bare = re.sub(WRAPPERS, "", name)
        module, _, kind = bare.rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        pattern = re.sub(r"\.\d+\.", ".{}.", module)
        home = dict(MODULES).get(pattern)
        if home is None or array.ndim not in AXES or kind not in ("weight", "bias"):
            flat[name] = array
            continue
        leaf = kind if kind == "bias" else "scale" if array.ndim == 1 else "kernel"
        place = home.format(number[1]) if number else home
        if f"{place}/{leaf}" in flat:
            raise ValueError(
                f"There are two arrays for {brief(bare)}, the second is {brief(name)}."
            )
        flat[f"{place}/{leaf}"] = array.transpose(AXES[array.ndim])
    return flat


def theirs(params: Mapping[str, np.ndarray]) -> Flat:
    """{name in timm: array} of {name in our tree: array}."""
    homes = {home: module for module, home in MODULES}
    flat = {}
    for name, array in params.items():
        home, _, leaf = name.rpartition("/")
        number = re.search(r"_(\d+)/", home)
        module = homes[re.sub(r"^MixerBlock_\d+/", "MixerBlock_{}/", home)]
        kind = "bias" if leaf == "bias" else "weight"
        axes = np.argsort(AXES[array.ndim])
        place = module.format(number[1] if number else "")
        flat[f"{place}.{kind}"] = array.transpose(axes)
    return flat


def read_torch(
    path: str | os.PathLike[str], check: Callable[[Flat], None] = lambda flat: None
) -> Flat:
    """{name: array} of a torch state dict, bare or beside plain values.

    Args:
      path: of the file.
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
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor)
        for name, x in content.items()
    ):
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}.")
    for name, x in content.items():
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
