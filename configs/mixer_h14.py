"""Mixer-H/14, pretrained from scratch as in arXiv 2105.01601, Table 4.

Options, comma-separated after a colon: imagenet21k or jft300m, the data set (default:
  ImageNet-1k); short, 60 epochs of ImageNet-1k; gpu8, for one host with 8 GPUs (batch
  4096 in 16 micro-batches).

Expected:
  ImageNet-1k    not trained in the paper; the settings are Mixer-L's
  imagenet21k    not trained in the paper; the settings are Mixer-L's
  jft300m        86.32 % on ImageNet after fine-tuning at 224 (Table 3)
Cost: jft300m 1.01k TPUv3 core-days (Table 3); ImageNet-1k: 92,897 steps, not known.
Mesh: all devices on `data`, parameters replicated: for v3-512 (8 images a device take
  12 of 16 GiB) and v5e-256, and with gpu8 for eight GPUs of 80 GB or more. On v3-128
  it fits with --config.sharding=fsdp --config.mesh.data=1 --config.mesh.fsdp=128. For
  other devices ask mlp_mixer.plan.

    python -m mlp_mixer.train --config=configs/mixer_h14.py:jft300m
"""

from mlp_mixer import paper


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    return paper.pretraining(
        "mixer_h14", argument, imagenet2012="L", imagenet21k="L", jft300m="H", gpu8=16
    )
