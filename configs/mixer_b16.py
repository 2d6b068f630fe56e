"""Mixer-B/16, pretrained from scratch as in arXiv 2105.01601, Table 4.

Options, comma-separated after a colon: imagenet21k or jft300m, the data set (default:
  ImageNet-1k); short, 60 epochs of ImageNet-1k; gpu8, for one host with 8 GPUs (batch
  4096 in 4 micro-batches).

Expected:
  ImageNet-1k    76.3 % top-1 (big_vision's run of this recipe; the paper: 76.44 %)
  short          70.5 % top-1 (big_vision, the same recipe for 60 epochs)
  imagenet21k    80.64 % on ImageNet after fine-tuning at 224 (Table 3)
  jft300m        80.00 % on ImageNet after fine-tuning at 224 (Table 3)
Cost: 0.01k, 0.15k and 0.08k TPUv3 core-days (Table 3). ImageNet-1k: 92,897 steps;
  big_vision needed 2 h 11 min on a TPU v3-128, evaluations included; short: 18,579
  steps in 27 min.

    python -m mlp_mixer.train --config=configs/mixer_b16.py
    python -m mlp_mixer.train --config=configs/mixer_b16.py:imagenet21k
    python -m mlp_mixer.train --config=configs/mixer_b16.py:short,gpu8
"""

from mlp_mixer import paper


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    return paper.pretraining(
        "mixer_b16",
        argument,
        imagenet2012="B",
        imagenet21k="B",
        jft300m="B",
        gpu8=4,
        # The run that is known to reach 76.3 % ends at 1e-5 of the peak; the authors'
        # other code reads the same number as a learning rate.
        end_factor=1e-5,
    )
