"""ConvMLP on ImageNet-1k, or fine-tuned on CIFAR, as in arXiv 2109.04454 and its code.

Options, comma-separated after a colon: s (default), m or l, the size; imagenet2012
  (default), from scratch, or cifar10 or cifar100, from the authors' weights.

Expected: top-1 in percent, on ImageNet of the middle 0.9 of the resized image:

         ImageNet  CIFAR-10  CIFAR-100
      s      76.8      98.0       87.4
      m      79.0      98.6       89.1
      l      80.2      98.6       88.6

Cost: on ImageNet 387,853 steps of 1024; 5.7, 9.4 and 23.6 EFLOP in products and
  convolutions. On CIFAR 2,930 steps of 1024 (l: 5,859 of 512); 0.04, 0.07, 0.18 EFLOP.
Source: configs/classification of SHI-Labs/Convolutional-MLPs, commit 092bf71: 128
  images per GPU, on the 8 GPUs of its README; AdamW at 5e-4, from 1e-4 in 5 epochs to
  1e-5 after 300, decay 0.05, then 10 epochs of cool-down; erasing, no repeated
  augmentation; stochastic depth 0.1; a moving average of 0.99996. On CIFAR, resized to
  224 px: 3e-4, from 1e-6 in 10 epochs to 1e-5 after 50, then 10 of cool-down; crops of
  80 % and more; no average; images normalised by CIFAR's own mean and deviation.
Unknown: whether ImageNet's published numbers are of the averaged parameters; both are
  measured here: val, and last of those that are not averaged. On how many GPUs CIFAR
  was trained; 8 are taken here too, of 128 images (l: of 64).
Differs: BatchNorm's statistics are of the global batch, there of a GPU's images. A new
  head begins with zeros, there as in training from scratch.
Left out: Flowers-102 (99.5 %), of which the authors' code does not say the splits.

    python -m mlp_mixer.train --config=configs/family/convmlp.py:m
    python -m mlp_mixer.train --config=configs/family/convmlp.py:m,cifar100
"""

from typing import Any

from mlp_mixer import deit, recipe

SIZES = ("s", "m", "l")
# Classes, and the mean and the deviation of levels.
FINETUNING: dict[str, tuple[int, dict[str, Any]]] = {
    "cifar10": (
        10,
        {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    ),
    "cifar100": (
        100,
        {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
    ),
}


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    words = recipe.words(argument, [*SIZES, "imagenet2012", *FINETUNING])
    size = recipe.option_of(SIZES, words, "s")
    data = recipe.option_of(["imagenet2012", *FINETUNING], words, "imagenet2012")
    if data in FINETUNING:
        return finetuning(size, data)
    config = deit.training(
        f"convmlp_{size}",
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


def finetuning(size: str, data: str):
    """The recipe that goes on from the authors' weights."""
    num_classes, normalisation = FINETUNING[data]
    batch_size, num_examples = 8 * (64 if size == "l" else 128), 50_000
    config = deit.training(
        f"convmlp_{size}",
        batch_size=batch_size,
        learning_rate=3e-4,
        epochs=50,
        repeats=1,
        **normalisation,
    )
    config.init_from = f"convmlp/convmlp_{size}_imagenet"
    config.dataset.name = data
    config.dataset.num_classes = num_classes
    config.dataset.num_examples = num_examples
    config.epochs = 60.0
    config.optim.warmup_steps = config.optim.cooldown_steps = (
        10 * num_examples // batch_size
    )
    config.input.min_area = 0.8
    config.input.interpolation = "random"
    config.evals = {
        "test": recipe.evaluation(
            "test", every_steps=num_examples // batch_size, preprocess="timm-1.0"
        )
    }
    return config
