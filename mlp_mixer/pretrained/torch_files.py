"""torch's files of weights: a state dict, alone or among what a training program saves.

Such a file is a pickle, and torch is told to unpickle no code.
"""

import argparse
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mlp_mixer.pretrained import damage
from mlp_mixer.text import brief

logger = logging.getLogger(__name__)

Flat = dict[str, np.ndarray]

# Where training programs keep the weights in what they save; the first that is there.
NESTS = ("state_dict_ema", "state_dict", "model_ema", "model")


def read(
    path: str | os.PathLike[str], refuse: Callable[[Flat], object] = lambda flat: None
) -> Flat:
    """Returns {name: array} of a torch state dict, bare or beside plain values.

    What training programs save beside it may be plain values and their arguments (an
    `argparse.Namespace`). Averaged weights are preferred to the last step's.

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
        # Never unpickles code: a Namespace is no more than a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    held = content if isinstance(content, dict) else {}
    nests = [nest for nest in NESTS if isinstance(held.get(nest), dict)]
    if nests:
        content = held[nests[0]]
    if len(nests) > 1:
        logger.info("%s: read %s; it holds %s too.", path, nests[0], nests[1:])
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
