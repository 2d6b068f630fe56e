"""Records timm_mixer.safetensors and timm_mixer.npz from timm; see README.md.

A small Mixer of timm's with random parameters, all of them (timm starts biases at
zero, which would hide a wrong one), images, and what it makes of them.
"""

import pathlib

import numpy as np
import safetensors.torch
import torch
from timm.models.mlp_mixer import MlpMixer

HERE = pathlib.Path(__file__).parent

torch.manual_seed(0)
model = MlpMixer(
    num_classes=10, img_size=(32, 48), patch_size=8, num_blocks=3, embed_dim=32
)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    features = model.forward_features(image)
    pre_logits = model.forward_head(features, pre_logits=True)
    logits = model(image)
safetensors.torch.save_file(model.state_dict(), HERE / "timm_mixer.safetensors")
np.savez(
    HERE / "timm_mixer.npz",
    image=image.permute(0, 2, 3, 1).numpy(),
    pre_logits=pre_logits.numpy(),
    logits=logits.numpy(),
)
