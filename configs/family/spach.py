"""SPACH of one stage on ImageNet-1k, as in arXiv 2108.13002, section 4.

Options after a colon: the model, a size (xxs, xs, s) and a form (mlp, conv, attn), e.g.
  s_attn (default: xxs_mlp).

Expected: unknown; the figures for one stage were not at hand. The released weights are
  those of four stages: spach_ms.py.
Cost: 375,350 steps of 1024; 2 EFLOP with xxs_attn, 4 with xxs_mlp, 18 with s_mlp.
Source: microsoft/SPACH, commit dcede1e, whose defaults are DeiT's recipe with a warm-up
  of 20 epochs, stochastic depth of 0.1 in every block and a moving average of 0.99996.
  Its learning rate, 5e-4, is for 512 images.

    python -m mlp_mixer.train --config=configs/family/spach.py:s_attn
"""

from mlp_mixer import deit, recipe

NAMES = [
    f"{size}_{form}" for size in ("xxs", "xs", "s") for form in ("mlp", "conv", "attn")
]


def get_config(argument: str = ""):
    """The recipe for the model in `argument`."""
    words = recipe.words(argument, NAMES) or ["xxs_mlp"]
    if len(words) > 1:
        raise ValueError(f"These are several models: {', '.join(words)}; name one.")
    return deit.training(
        f"spach_{words[0]}", warmup_epochs=20, drop_path=0.1, ema=0.99996
    )
