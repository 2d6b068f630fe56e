"""torch's files of weights: a state dict, alone or among what a training program saves.

Such a file is a pickle, and torch is told to unpickle no code.
"""

import argparse
import collections
import importlib.util
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

SUFFIXES = (".pth", ".pt", ".bin")
# Where training programs keep the weights in what they save; the first that is there.
NESTS = ("state_dict_ema", "state_dict", "model_ema", "model")
# Classes besides tensors that training programs save: their arguments, and settings of
# Swin's program and of those that were made from it, which are dictionaries.
CLASSES = (argparse.Namespace, (collections.OrderedDict, "yacs.config.CfgNode"))


def check_installed(what: object) -> None:
    """Raises ModuleNotFoundError unless torch is installed, which `what` needs."""
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(
            f"{what} is a torch file, and torch is not installed: pip install torch, "
            "or convert it to safetensors where torch is."
        )


def read(
    path: str | os.PathLike[str],
    refuse: Callable[[Flat], object] = lambda flat: None,
    *,
    ema: bool | None = None,
) -> Flat:
    """Returns {name: array} of a torch state dict, bare or beside plain values.

    What training programs save beside it may be plain values and their arguments (an
    `argparse.Namespace`, or the settings of `yacs`).

    Args:
      path: the file.
      refuse: raises if arrays of these names and shapes are not wanted. They are
        stand-ins: a tensor may declare more than the file holds.
      ema: whether averaged weights are read, or the last step's; None: the averaged
        ones, if there are any.

    Raises:
      ModuleNotFoundError: torch is not installed.
      ValueError: it is damaged, or holds more than tensors, which is code to torch; or
        the weights that are wanted are not among them.
    """
    check_installed(path)
    import torch

    with damage.reported(
        path,
        "torch file of weights alone",
        *(pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError),
    ):
        if zipfile.is_zipfile(path):
            _check_zip(path)
        # Never unpickles code.
        with torch.serialization.safe_globals([*CLASSES]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    held = content if isinstance(content, dict) else {}
    nests = [nest for nest in NESTS if isinstance(held.get(nest), dict)]
    wanted = [nest for nest in nests if ema is None or nest.endswith("_ema") == ema]
    if not wanted and (nests or ema):
        raise ValueError(
            f"{path} holds {'no' if ema else 'only'} averaged weights; "
            f"--{'no' if ema else ''}ema reads what it holds."
        )
    if wanted:
        content = held[wanted[0]]
        if others := [nest for nest in nests if nest != wanted[0]]:
            logger.info("%s: read %s; it holds %s too.", path, wanted[0], others)
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
