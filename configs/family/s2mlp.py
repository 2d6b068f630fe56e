"""S2-MLP on ImageNet-1k from scratch, as in arXiv 2106.07477.

Options after a colon: wide or deep, the size (default: wide).

Expected: 80.0 % top-1 (wide), 80.7 % (deep).
Cost: 375,342 steps of 1024; 32 EFLOP (wide), 24 EFLOP (deep). What the paper's took is
  unknown.
Source: the paper (AdamW, decay 0.05, batch 1024, 0.001 to 1e-5 by a cosine, 300 epochs,
  label smoothing, stochastic depth, repeated augmentation). The rest is DeiT's.
Unknown: the rates of stochastic depth, which is off here: set
  --config.model.stochastic_depth. Also whether the deep model has a layer scale (here
  not), and its initial values (here ResMLP's).

    python -m mlp_mixer.train --config=configs/family/s2mlp.py:deep
"""

from mlp_mixer import deit, recipe


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, ["wide", "deep"]) or ["wide"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    return deit.training(f"s2mlp_{words[0]}")
