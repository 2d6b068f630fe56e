"""sMLPNet on ImageNet-1k from scratch, as in arXiv 2109.05422 and its authors' code.

Options after a colon: t, s, b or t_star, the size (default: t).

Expected: 81.9 % top-1 (t), 83.1 % (s), 83.4 % (b), 81.3 % (t_star).
Cost: 375,342 steps of 1024; what the paper's took is unknown.
Source: the paper (AdamW, decay 0.05, batch 1024, 0.001 to 1e-5, 300 epochs, stochastic
  depth 0, 0.2 and 0.3) and main.py of microsoft/SPACH, commit dcede1e (20 epochs of
  warm-up, erasing, repeated augmentation, an average of the parameters).
Unknown: whether the published numbers are of the averaged parameters; both are
  measured here: val, and last of those that are not averaged.

    python -m mlp_mixer.train --config=configs/family/smlpnet.py:s
"""

from mlp_mixer import deit, recipe


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, ["t", "s", "b", "t_star"]) or ["t"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    config = deit.training(f"smlpnet_{words[0]}", warmup_epochs=20, ema=0.99996)
    config.evals.last = config.evals.val.copy_and_resolve_references()
    config.evals.last.ema = False
    return config
