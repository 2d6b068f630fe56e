"""CycleMLP on ImageNet-1k from scratch, as in arXiv 2107.10224 and its authors' code.

Options after a colon: b1, b2, b3, b4 or b5, the size (default: b1).

Expected: 78.9 % top-1 (b1), 81.6 % (b2), 82.4 % (b3), 83.0 % (b4), 83.2 % (b5), where
  the authors' settings of each model crop 0.9 (b1, b2, b3) and 0.875 (b4, b5).
Cost: 375,342 steps of 1024; what the paper's took is unknown.
Source: main.py of ShoufaChen/CycleMLP, commit 4e062a0, whose defaults are DeiT's recipe
  with stochastic depth up to 0.1 and an average of the parameters, on 8 devices of 128
  images as its README says.
Unknown: the crop that the published numbers are of. The code's own evaluation crops
  0.875 for all sizes (--config.evals.val.preprocess=timm), and takes the parameters
  that are not averaged. Both are measured here: val, and last of those that are not.

    python -m mlp_mixer.train --config=configs/family/cyclemlp.py:b2
"""

from mlp_mixer import deit, recipe


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, ["b1", "b2", "b3", "b4", "b5"]) or ["b1"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    config = deit.training(
        f"cyclemlp_{words[0]}",
        drop_path=0.1,
        ema=0.99996,
        protocol="timm" if words[0] in ("b4", "b5") else "timm-0.9",
    )
    config.evals.last = config.evals.val.copy_and_resolve_references()
    config.evals.last.ema = False
    return config
