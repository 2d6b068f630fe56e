"""Fine-tuning on CIFAR-10, as in arXiv 2105.01601, Appendix C.

Words: s32, s16, b32, b16 (without a word), l32, l16, h14; imagenet21k (without a
  word), imagenet1k or jft300m: what the model was pretrained on; 448: at twice the
  resolution; resize_crop: Table 2's test images instead of Table 3's; select: train on
  98 % and evaluate on the rest.

Expected: the paper gives no figure for this set alone. It is one of five (ImageNet,
  CIFAR-10, CIFAR-100, Pets, Flowers) whose mean "Avg 5" is, in Table 3, 92.50 % for
  b16, 93.63 % for l16, 93.86 % for l16,448, 88.33 % for b16,imagenet1k and 87.25 % for
  l16,imagenet1k.
  vision_transformer's README has 96.82 % for b16, 98.34 % for l16, 96.72 % for
  b16,imagenet1k and 96.59 % for l16,imagenet1k, of another pipeline: Inception crops,
  test images straight to 224, rate 0.03, 98 % of the training images.
  Which learning rate won, the paper does not say; scripts/sweep.py finds out.
Cost: 10,000 steps of 512, 5.1 million images or 102 epochs; 0.4 EFLOP with B/16, 1.4
  with L/16, 5.3 times that at 448. On few devices, e.g. --config.accumulate=8.
Weights: the authors' B/16 and L/16 of ImageNet-21k and ImageNet-1k by name; of other
  models the run of configs/mixer_*.py in runs/, or --config.init_from.

    python -m mlp_mixer.train --config=configs/finetune/cifar10.py:l16
    python scripts/sweep.py --config=configs/finetune/cifar10.py
"""

from mlp_mixer import recipe

LEARNING_RATES = recipe.FINETUNING["cifar10"]["learning_rates"]


def get_config(argument: str = ""):
    """The recipe for the words in `argument`."""
    return recipe.finetuning("cifar10", argument)
