"""config.json beside weights, as timm and the hub have it: what no array says.

    {"architecture": "mixer_b16_224", "num_classes": 1000, "model_args": {…},
     "pretrained_cfg": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], …}}

An older form has the fields of `pretrained_cfg` at the top.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlp_mixer import files, models
from mlp_mixer.pretrained.normalisation import Normalisation, normalisation

NAME = "config.json"
JSON = (dict, list, str, int, float, bool, type(None))  # of any other program
GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}  # by the name that timm knows it by


class Config(NamedTuple):
    """What a config.json says of the weights beside it; None where it says nothing."""

    path: pathlib.Path
    architecture: str | None = None
    num_classes: int | None = None
    images: Normalisation | None = None
    gelu: str | None = None
    image_size: tuple[int, int] | None = None  # (height, width) in pixels
    class_names: tuple[str, ...] | None = None

    def is_of(self, family: str) -> bool:
        """Whether it is for an architecture of that name, as far as it says."""
        return self.architecture is None or family in self.architecture.lower()


def read_config_beside(weights: str | os.PathLike[str]) -> Config | None:
    """Returns what the config.json in the folder of a weight file says, if one is.

    One that is not timm's, a run's recipe say, says nothing.

    Raises:
      ValueError: it is not JSON, or a field has no sense; names file and field.
    """
    path = pathlib.Path(weights).with_name(NAME)
    if not path.is_file():
        return None
    content = files.parse_json(
        files.read_bytes(path, files.MAX_BYTES), f"{path}, beside the weights,", *JSON
    )
    if not isinstance(content, dict):
        return Config(path)
    inner = _inner_table(content, "pretrained_cfg", path)
    if not inner and not {"architecture", "mean", "std"} & content.keys():
        return Config(path)
    fields = {**inner, **content}
    if not isinstance(architecture := fields.get("architecture"), str | None):
        raise _wrong_field(
            path, "architecture", architecture, "a name such as mixer_b16_224"
        )
    config = Config(path, architecture)
    if not any(map(config.is_of, models.families())):
        return config
    arguments = _inner_table(content, "model_args", path)
    if not isinstance(classes := fields.get("num_classes"), int | None):
        raise _wrong_field(path, "num_classes", classes, "a whole number")
    # As timm reads it: `pretrained_cfg` says how images are prepared, if it is there.
    prepared = {**content, **inner}
    mean, std = prepared.get("mean"), prepared.get("std")
    images = None
    if mean is not None or std is not None:
        images = normalisation(mean, std, path)
    return config._replace(
        num_classes=classes,
        images=images,
        gelu=_gelu_of(arguments.get("act_layer", fields.get("act_layer")), path),
        image_size=_image_size(
            arguments.get("img_size"), prepared.get("input_size"), path
        ),
        class_names=_class_names(fields.get("label_names", fields.get("labels")), path),
    )


def _wrong_field(
    path: pathlib.Path, field: str, value: Any, expected: str
) -> ValueError:
    return ValueError(
        f"{path} says {field} {str(value)[:80]}; expected {expected}. Correct it, or "
        "move it away from the weights."
    )


def _inner_table(content: Mapping[str, Any], field: str, path: pathlib.Path) -> Any:
    table = content.get(field) or {}
    if not isinstance(table, dict):
        raise _wrong_field(path, field, table, "a table of fields")
    return table


def _gelu_of(layer: Any, path: pathlib.Path) -> str | None:
    if layer is None:
        return None
    if not isinstance(layer, str) or layer.lower() not in GELUS:
        raise _wrong_field(path, "act_layer", layer, " or ".join(GELUS))
    return GELUS[layer.lower()]


def _image_size(given: Any, whole: Any, path: pathlib.Path) -> tuple[int, int] | None:
    """Of timm's img_size, a side or (height, width), or its input_size, with RGB."""
    if given is None and whole is None:
        return None
    size = whole[1:] if given is None and isinstance(whole, list) else given
    size = [size, size] if isinstance(size, int) else size
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(x, int) and x > 0 for x in size)
    ):
        field, value = ("input_size", whole) if given is None else ("img_size", given)
        expected = "[3, 224, 224]" if given is None else "224 or [224, 224]"
        raise _wrong_field(path, field, value, f"e.g. {expected}")
    return size[0], size[1]


def _class_names(labels: Any, path: pathlib.Path) -> tuple[str, ...] | None:
    """By class, of a list or {number: name}; None if classes are left out."""
    if isinstance(labels, dict):
        by_number = {str(number): name for number, name in labels.items()}
        labels = [by_number.get(str(i)) for i in range(len(by_number))]
        if None in labels:
            return None
    if not labels:
        return None
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise _wrong_field(path, "label_names", labels, "a list of names, by class")
    return tuple(labels)
