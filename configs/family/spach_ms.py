"""SPACH of four stages on ImageNet-1k, as in arXiv 2108.13002 and its authors' code.

Options after a colon: the model, a size (xxs, xs, s) and a form (mlp, conv, attn), e.g.
  s_attn, or hybrid_xs, hybrid_s, hybrid_s_plus (default: xxs_mlp).

Expected: 74.5 % top-1 (xxs_mlp), 82.1 % (s_mlp), 73.1 % (xxs_conv), 81.6 % (s_conv),
  65.4 % (xxs_attn), 82.9 % (s_attn), 83.7 % (hybrid_s; the authors' log: 83.658, top-5
  96.762), 83.9 % (hybrid_s_plus), on the middle of images resized to 256 px.
Cost: 375,342 steps of 1024; 1 EFLOP with xxs_attn, 2 with xxs_mlp, 19 with s_mlp, 26
  with hybrid_s.
Source: microsoft/SPACH, commit dcede1e, whose defaults are DeiT's recipe with a warm-up
  of 20 epochs, stochastic depth that rises to 0.1 and a moving average of 0.99996. Its
  learning rate, 5e-4, is for 512 images.
Unknown: top-1 of the xs models, and whether the published numbers are of the averaged
  parameters. Their code measures those that are not averaged, here `last`; `val` is of
  the others.

    python -m mlp_mixer.train --config=configs/family/spach_ms.py:hybrid_s
"""

from mlp_mixer import deit, recipe

FORMS = ("mlp", "conv", "attn")
NAMES = [f"{size}_{form}" for size in ("xxs", "xs", "s") for form in FORMS]
NAMES += ["hybrid_xs", "hybrid_s", "hybrid_s_plus"]


def get_config(argument: str = ""):
    """The recipe for the model in `argument`."""
    words = recipe.words(argument, NAMES) or ["xxs_mlp"]
    if len(words) > 1:
        raise ValueError(f"These are several models: {', '.join(words)}; name one.")
    config = deit.training(
        f"spach_ms_{words[0]}", warmup_epochs=20, drop_path=0.1, ema=0.99996
    )
    config.evals.last = config.evals.val.copy_and_resolve_references()
    config.evals.last.ema = False
    return config
