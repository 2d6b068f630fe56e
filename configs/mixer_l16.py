"""Mixer-L/16, pretrained from scratch as in arXiv 2105.01601, Table 4.

Options, comma-separated after a colon: imagenet21k or jft300m, the data set (default:
  ImageNet-1k); short, 60 epochs of ImageNet-1k; gpu8, for one host with 8 GPUs (batch
  4096 in 8 micro-batches).

Expected:
  ImageNet-1k    71.76 % top-1 (Table 3)
  imagenet21k    82.89 % on ImageNet after fine-tuning at 224 (Table 3)
  jft300m        84.82 % on ImageNet after fine-tuning at 224 (Table 3, 14 epochs;
                 84.05 % with --config.epochs=7)
Cost: 0.04k, 0.41k and 0.45k TPUv3 core-days (Table 3). ImageNet-1k: 92,897 steps.
Mesh: all devices on `data`, parameters replicated: for v3-128 and larger pods (32
  images a device take 9 of 16 GiB), and with gpu8 for eight GPUs of 80 GB or more. For
  other devices ask mlp_mixer.plan.

    python -m mlp_mixer.train --config=configs/mixer_l16.py:jft300m
"""

from mlp_mixer import paper


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    return paper.pretraining(
        "mixer_l16",
        argument,
        imagenet2012="L",
        imagenet21k="L",
        jft300m="L, 14 epochs",
        gpu8=8,
    )
