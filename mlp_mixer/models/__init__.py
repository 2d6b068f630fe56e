"""Models by name: Table 1 of the MLP-Mixer paper (arXiv 2105.01601).

model = models.create("mixer_b16", num_classes=1000)
params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
logits, out = model.apply({"params": params}, image)
"""

import dataclasses
import difflib
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import flax.linen as nn

from mlp_mixer.models.mixer import MlpMixer, check_divisible


def _mixer(patch, blocks, hidden, tokens, channels):
    return MlpMixer, {
        "patch_size": (patch, patch),
        "num_blocks": blocks,
        "hidden_dim": hidden,
        "tokens_mlp_dim": tokens,
        "channels_mlp_dim": channels,
    }


# Table 1, a row per column of the paper's: patch, layers, C, D_S, D_C.
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mixer_s32": _mixer(32, 8, 512, 256, 2048),
    "mixer_s16": _mixer(16, 8, 512, 256, 2048),
    "mixer_b32": _mixer(32, 12, 768, 384, 3072),
    "mixer_b16": _mixer(16, 12, 768, 384, 3072),
    "mixer_l32": _mixer(32, 24, 1024, 512, 4096),
    "mixer_l16": _mixer(16, 24, 1024, 512, 4096),
    "mixer_h14": _mixer(14, 32, 1280, 640, 5120),
}


def create(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] = 224,
    formulation: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Returns the Flax module called `name`, of the sizes that Table 1 gives it.

    Args:
      name: a key of `MODELS`, e.g. "mixer_b16".
      num_classes: size of the head; None returns features instead of logits.
      image_size: side or (height, width) in pixels. Only checked against the patch:
        the model takes its number of tokens from the image at `init`.
      formulation: fields that say how the model is computed, e.g. those of
        `sharding.formulation`; overrides that are not None win.
      **overrides: fields of the module, e.g. `dtype="bfloat16"` or `num_blocks=2`;
        None means the formulation's, the table's or the field's default value.

    Raises:
      ValueError: unknown name or field, or patches do not tile the image.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name).lower(), MODELS, len(MODELS), 0)
        raise ValueError(f"model {name!r} is unknown; try {', '.join(near)}.")
    cls, sizes = MODELS[name]
    known = [
        f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")
    ]
    for field in overrides:
        if field not in known:
            near = difflib.get_close_matches(field, known, len(known), 0)
            raise ValueError(f"{name} has no field {field!r}; try {', '.join(near)}.")
    given = {k: v for k, v in overrides.items() if v is not None}
    fields = sizes | dict(formulation or {}) | given | {"num_classes": num_classes}
    for field in (*sizes, "num_classes"):
        _check_size(field, fields[field])
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_size("image_size", size)
    check_divisible(size, fields["patch_size"])
    return cls(**fields)


def _check_size(field: str, value: Any) -> None:
    """Raises ValueError unless a size has values that a model can be made of."""
    two = field in ("image_size", "patch_size")
    if value is None and field == "num_classes":
        return
    numbers = value if two and isinstance(value, tuple) else (value,)
    if len(numbers) != 1 + two or not all(map(_is_count, numbers)):
        expected = "(height, width), e.g. (16, 16)" if two else "a whole number from 1"
        raise ValueError(f"{field} is {value!r}; expected {expected}.")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and value > 0
