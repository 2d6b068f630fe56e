"""Weights from anywhere, as the official parameter tree, and into models.

    weights = pretrained.read("imagenet1k/Mixer-B_16")
    model = pretrained.create_model(weights)
    logits, out = model.apply(weights.variables, image)   # (n, h, w, 3) in [-1, 1]

A source is a run's folder, a published name, or a file: npz (both published layouts),
safetensors (our names, timm's or the authors'), or a torch state dict with theirs.
Weights carry the name and the fields of their model. Whatever normalisation a source
is for, what is read is for images in [-1, 1].
"""

from mlp_mixer.pretrained.fitting import (
    create_model,
    initial,
    merge,
    resized,
    with_fields,
)
from mlp_mixer.pretrained.normalisation import (
    CENTRED,
    Normalisation,
    Stated,
    normalisation,
)
from mlp_mixer.pretrained.tree import (
    describe,
    model_of,
    sizes_of,
    tokens,
    told_image_size,
)
from mlp_mixer.pretrained.weights import (
    DTYPES,
    TORCH_SUFFIXES,
    Params,
    Weights,
    cast,
    checked_image_size,
    load,
    lost_in_npz,
    not_finite,
    read,
    write_npz,
    write_safetensors,
)

__all__ = [
    "CENTRED",
    "DTYPES",
    "TORCH_SUFFIXES",
    "Normalisation",
    "Params",
    "Stated",
    "Weights",
    "cast",
    "checked_image_size",
    "create_model",
    "describe",
    "initial",
    "load",
    "lost_in_npz",
    "merge",
    "model_of",
    "normalisation",
    "not_finite",
    "read",
    "resized",
    "sizes_of",
    "tokens",
    "told_image_size",
    "with_fields",
    "write_npz",
    "write_safetensors",
]
