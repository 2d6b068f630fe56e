"""Circulant token mixing on ImageNet-1k from scratch, as in arXiv 2106.14882.

Options after a colon: mixer_b16, resmlp_36, resmlp_36_g1, resmlp_36_g4 or
  resmlp_36_g384, the base and, if it is not 8, the number of groups (default:
  mixer_b16).

Expected: 79.8 % top-1 (mixer_b16; with its own token mixing 77.2 % in the same
  training), 80.6 % (resmlp_36; with its own 79.8 %); with 1, 4 and 384 groups 80.0 %,
  80.4 % and 80.6 %.
Cost: 375,342 steps of 1024; 25 EFLOP (mixer_b16), 21 EFLOP (resmlp_36). What the
  paper's took is unknown.
Source: the paper, which trains as DeiT does.
Unknown: the rates of stochastic depth, which is off here: set
  --config.model.stochastic_depth.

    python -m mlp_mixer.train --config=configs/family/ccs.py:resmlp_36
"""

from mlp_mixer import deit, recipe

SIZES = ("mixer_b16", "resmlp_36", "resmlp_36_g1", "resmlp_36_g4", "resmlp_36_g384")


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, [*SIZES]) or ["mixer_b16"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    return deit.training(f"ccs_{words[0]}")
