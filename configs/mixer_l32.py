"""Mixer-L/32, pretrained from scratch as in arXiv 2105.01601, Table 4.

Options, comma-separated after a colon: imagenet21k or jft300m, the data set (default:
  ImageNet-1k); short, 60 epochs of ImageNet-1k; gpu8, for one host with 8 GPUs (batch
  4096 in 4 micro-batches).

Expected:
  ImageNet-1k    not trained in the paper; Table 4 says Mixer-L of any patch size
  imagenet21k    not trained in the paper; Table 4 says Mixer-L of any patch size
  jft300m        80.67 % on ImageNet after fine-tuning at 224 (Table 3, 7 epochs)
Cost: jft300m 0.12k TPUv3 core-days (Table 3); ImageNet-1k: 92,897 steps, not known.
Mesh: all devices on `data`, parameters replicated: for v3-128 and larger pods. For
  other devices ask mlp_mixer.plan.

    python -m mlp_mixer.train --config=configs/mixer_l32.py:jft300m
"""

from mlp_mixer import paper


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    return paper.pretraining(
        "mixer_l32", argument, imagenet2012="L", imagenet21k="L", jft300m="L", gpu8=4
    )
