"""Fine-tuning on Oxford-IIIT Pets, as in arXiv 2105.01601, Appendix C.

Options, comma-separated after a colon: see README.md in this folder; select trains on
  90 % and evaluates on the rest.

Expected: the paper gives no figure for this set alone. It is one of five (ImageNet,
  CIFAR-10, CIFAR-100, Pets, Flowers) whose mean "Avg 5" is, in Table 3, 92.50 % for
  b16, 93.63 % for l16, 93.86 % for l16,448, 88.33 % for b16,imagenet1k and 87.25 % for
  l16,imagenet1k.
  Which learning rate won, the paper does not say; scripts/sweep.py finds out.
Cost: 500 steps of 512, 256,000 images or 70 epochs; 19 PFLOP with B/16, 68 with L/16,
  5.3 times that at 448. On few devices, e.g. --config.accumulate=8.

    python -m mlp_mixer.train --config=configs/finetune/pets.py:l16
    python scripts/sweep.py --config=configs/finetune/pets.py
"""

from mlp_mixer import paper

LEARNING_RATES = paper.FINETUNING["oxford_iiit_pet"]["learning_rates"]


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    return paper.finetuning("oxford_iiit_pet", argument)
