"""config.json beside weights, as timm and the hub have it: what no array says.

    {"architecture": "mixer_b16_224", "num_classes": 1000, "model_args": {…},
     "pretrained_cfg": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], …}}

An older form has the fields of `pretrained_cfg` at the top.
"""

import functools
import logging
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from mlp_mixer import files
from mlp_mixer.pretrained import tree
from mlp_mixer.pretrained.normalisation import Normalisation, normalisation

logger = logging.getLogger(__name__)

NAME = "config.json"
JSON = (dict, list, str, int, float, bool, type(None))  # of any other program
# Protocols of `data.image_ops` by timm's crop_pct, where it resizes bicubically.
PROTOCOLS = {0.875: "timm", 0.9: "timm-0.9", 1.0: "timm-1.0"}
GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}  # by the name that timm knows it by


class Config(NamedTuple):
    """What a config.json says of the weights beside it; None where it says nothing."""

    path: pathlib.Path
    why_silent: str  # why it might not say more
    num_classes: int | None = None
    images: Normalisation | None = None
    gelu: str | None = None
    image_size: tuple[int, int] | None = None  # (height, width) in pixels
    class_names: tuple[str, ...] | None = None
    preprocess: str | None = None  # a key of data.image_ops.PROTOCOLS


def read_config_beside(weights: str | os.PathLike[str], file: ModuleType) -> Config:
    """Returns what the config.json in the folder of a weight file says, if one is.

    One that is not timm's, a run's recipe say, says nothing.

    Args:
      weights: the weight file.
      file: the architecture's file; a config.json of another one says nothing.

    Raises:
      ValueError: it is not JSON, or a field has no sense; names file and field.
    """
    path = pathlib.Path(weights).with_name(NAME)
    if not path.is_file():
        return Config(path, f"no {NAME} is beside it")
    content = files.parse_json(
        files.read_bytes(path, files.MAX_BYTES), f"{path}, beside the weights,", *JSON
    )
    silent = Config(path, f"nor does {path}")
    if not isinstance(content, dict):
        return silent
    check_field, table = functools.partial(_check_field, path), "a table of fields"
    inner = content.get("pretrained_cfg") or {}
    check_field("pretrained_cfg", inner, isinstance(inner, dict), table)
    if not inner and not {"architecture", "mean", "std"} & content.keys():
        return silent
    fields = {**inner, **content}
    name, classes = fields.get("architecture"), fields.get("num_classes")
    fits = isinstance(name, str | None)
    check_field("architecture", name, fits, "a name such as mixer_b16_224")
    words = {x.partition("_")[0] for x in file.SIZES} | {tree.family_name(file)}
    if name is not None and not any(word in name.lower() for word in words):
        return Config(path, f"{path} is of a {name}")
    fits = isinstance(classes, int | None)
    check_field("num_classes", classes, fits, "a whole number")
    arguments = content.get("model_args") or {}
    check_field("model_args", arguments, isinstance(arguments, dict), table)
    layer, gelu = arguments.get("act_layer", fields.get("act_layer")), None
    if layer is not None:
        gelu = GELUS.get(str(layer).lower())
        check_field("act_layer", layer, gelu is not None, " or ".join(GELUS))
    # As timm reads it: `pretrained_cfg` says how images are prepared, if it is there.
    prepared = {**content, **inner}
    return silent._replace(
        num_classes=classes,
        images=normalisation(prepared.get("mean"), prepared.get("std"), path),
        gelu=gelu,
        image_size=_image_size(arguments, prepared, path),
        class_names=_class_names(fields.get("label_names", fields.get("labels")), path),
        preprocess=_protocol(prepared, path),
    )


def _check_field(
    path: pathlib.Path, field: str, value: Any, fits: bool, expected: str
) -> None:
    if not fits:
        raise ValueError(
            f"{path} says {field} {str(value)[:80]}; expected {expected}. Correct it, "
            "or move it away from the weights."
        )


def _image_size(
    arguments: Mapping[str, Any], prepared: Mapping[str, Any], path: pathlib.Path
) -> tuple[int, int] | None:
    """Of timm's img_size, a side or (height, width), or its input_size, with RGB."""
    field, expected = "img_size", "e.g. 224 or [224, 224]"
    value: Any = arguments.get(field)
    size = [value, value] if isinstance(value, int) else value
    if value is None:
        field, expected = "input_size", "e.g. [3, 224, 224]"
        value = prepared.get(field)
        size = value[1:] if isinstance(value, list) else value
    if value is None:
        return None
    two = isinstance(size, list) and len(size) == 2
    fits = two and all(isinstance(x, int) and x > 0 for x in size)
    _check_field(path, field, value, fits, expected)
    return size[0], size[1]


def _protocol(prepared: Mapping[str, Any], path: pathlib.Path) -> str | None:
    """The protocol that images are prepared by; None if there is none like it here."""
    share = prepared.get("crop_pct")
    if share is None:
        return None
    numeric = isinstance(share, int | float) and not isinstance(share, bool)
    _check_field(path, "crop_pct", share, numeric, "a number, e.g. 0.875")
    how = (prepared.get("interpolation"), prepared.get("crop_mode"))
    if (
        share in PROTOCOLS
        and how[0] in (None, "bicubic")
        and how[1] in (None, "center")
    ):
        return PROTOCOLS[share]
    logger.warning(
        "%s says crop_pct %s, interpolation %s and crop_mode %s, for which there is no "
        "protocol here; --preprocess names one.",
        *(path, share, *how),
    )
    return None


def _class_names(labels: Any, path: pathlib.Path) -> tuple[str, ...] | None:
    """By class, of a list or {number: name}; None if classes are left out."""
    if isinstance(labels, dict):
        by_number = {str(number): name for number, name in labels.items()}
        labels = [by_number.get(str(i)) for i in range(len(by_number))]
        if None in labels:
            return None
    if not labels:
        return None
    fits = isinstance(labels, list) and all(isinstance(x, str) for x in labels)
    _check_field(path, "label_names", labels, fits, "a list of names, by class")
    return tuple(labels)
