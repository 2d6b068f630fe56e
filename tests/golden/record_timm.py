"""Records timm_NAME.safetensors and timm_NAME.npz from timm; see README.md.

A small model of timm's with random parameters, all of them (timm starts biases at
zero, which would hide a wrong one), images, and what it makes of them. And the logits
of a published size, whose parameters are not stored: the test makes them by `seeded`.

    python tests/golden/record_timm.py mixer mixer_s32_224

The first argument is NAME, the second timm's name of the published size; others are
arguments of timm's MlpMixer, e.g. `embed_dim=16 block_layer=ResBlock`. The npz file
holds its command.
"""

import ast
import pathlib
import sys
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
SMALL: dict[str, Any] = {
    "num_classes": 10,
    "img_size": (32, 48),
    "patch_size": 8,
    "num_blocks": 3,
    "embed_dim": 32,
}


def seeded(shapes):
    """{name: array} of {name in timm: shape}: all random, logits of a sensible size."""
    arrays = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng(i)
        matrix = max(shape) < np.prod(shape)
        scale = 1 / np.sqrt(np.prod(shape[1:])) if matrix else 0.5
        arrays[name] = scale * rng.standard_normal(shape, np.float32)
    return arrays


def seeded_image(height, width):
    """One image (1, height, width, 3) in [−1, 1]."""
    rng = np.random.default_rng(0)
    return 2 * rng.random((1, height, width, 3), np.float32) - 1


def main():
    """Records what the command line says."""
    import safetensors.torch
    import timm
    import torch
    from timm.models import mlp_mixer

    name, published, *given = sys.argv[1:]
    options: dict[str, Any] = {}
    for key, _, value in (argument.partition("=") for argument in given):
        layer = getattr(mlp_mixer, value, None)
        options[key] = layer or ast.literal_eval(value)

    torch.manual_seed(0)
    model = mlp_mixer.MlpMixer(**SMALL | options)
    height, width = (SMALL | options)["img_size"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        image = torch.rand(2, 3, height, width) * 2 - 1
        features = model.forward_features(image)
        recorded = {
            "image": image.permute(0, 2, 3, 1).numpy(),
            "pre_logits": model.forward_head(features, pre_logits=True).numpy(),
            "logits": model(image).numpy(),
        }
    safetensors.torch.save_file(model.state_dict(), HERE / f"timm_{name}.safetensors")
    recorded["command"] = np.array(" ".join(["record_timm.py", *sys.argv[1:]]))

    model = timm.create_model(published)
    shapes = {k: tuple(x.shape) for k, x in model.state_dict().items()}
    arrays = {k: torch.from_numpy(x) for k, x in seeded(shapes).items()}
    model.load_state_dict(arrays)
    size = model.pretrained_cfg["input_size"][1:]
    image = torch.from_numpy(seeded_image(*size)).permute(0, 3, 1, 2)
    with torch.no_grad():
        recorded["seeded_logits"] = model(image).numpy()
    recorded["seeded"] = np.array(published)
    np.savez(HERE / f"timm_{name}.npz", **recorded)


if __name__ == "__main__":
    main()
