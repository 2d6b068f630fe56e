"""Weights from anywhere, as the official parameter tree, and into models.

    params = pretrained.load("imagenet1k/Mixer-B_16")
    model = pretrained.create_model(params)
    logits, out = model.apply({"params": params}, image)   # (n, h, w, 3) in [-1, 1]

A source is a run's folder, a published name, or a file: npz (both published layouts),
safetensors (our names or timm's), or a torch state dict with timm's names. Whatever
normalisation a source is for, what is read is for images in [-1, 1].
"""

from mlp_mixer.pretrained.fitting import create_model, initial, merge
from mlp_mixer.pretrained.normalisation import CENTRED, Normalisation, Stated
from mlp_mixer.pretrained.tree import geometry, square_image, tokens, variant
from mlp_mixer.pretrained.weights import (
    TORCH_SUFFIXES,
    Params,
    Weights,
    cast,
    check,
    load,
    not_finite,
    read,
    write_npz,
    write_safetensors,
)

__all__ = [
    "CENTRED",
    "TORCH_SUFFIXES",
    "Normalisation",
    "Params",
    "Stated",
    "Weights",
    "cast",
    "check",
    "create_model",
    "geometry",
    "initial",
    "load",
    "merge",
    "not_finite",
    "read",
    "square_image",
    "tokens",
    "variant",
    "write_npz",
    "write_safetensors",
]
