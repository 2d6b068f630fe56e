"""ConvMLP on ImageNet-1k from scratch, as in arXiv 2109.04454 and its authors' code.

Options after a colon: s, m or l, the size (default: s).

Expected: 76.8 % top-1 (s), 79.0 % (m), 80.2 % (l), of the middle 0.9 of the resized
  image.
Cost: 387,853 steps of 1024; 5.7, 9.4 and 23.6 EFLOP in products and convolutions.
Source: configs/classification of SHI-Labs/Convolutional-MLPs, commit 092bf71: 128
  images per GPU, on the 8 GPUs of its README; AdamW at 5e-4, from 1e-4 in 5 epochs to
  1e-5 after 300, decay 0.05, then 10 epochs of cool-down; erasing, no repeated
  augmentation; stochastic depth 0.1; a moving average of 0.99996; images normalised by
  ImageNet's mean and deviation.
Unknown: whether the published numbers are of the averaged parameters; both are
  measured here: val, and last of those that are not averaged.
Differs: BatchNorm's statistics are of the global batch, there of a GPU's 128 images.

    python -m mlp_mixer.train --config=configs/family/convmlp.py:m
"""

from mlp_mixer import deit, recipe


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, ["s", "m", "l"]) or ["s"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    config = deit.training(
        f"convmlp_{words[0]}",
        learning_rate=5e-4,
        cooldown_epochs=10,
        repeats=1,
        ema=0.99996,
        protocol="timm-0.9",
    )
    config.optim.warmup_learning_rate = 1e-4
    config.evals.last = config.evals.val.copy_and_resolve_references()
    config.evals.last.ema = False
    return config
