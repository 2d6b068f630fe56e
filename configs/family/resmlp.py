"""ResMLP on ImageNet-1k from scratch, as in arXiv 2105.03404, section 3.1.

Options after a colon: 12, 24, 36 or big_24, the size (default: 12).

Expected: 76.6 % top-1 (12), 79.4 % (24), 79.7 % (36), 81.0 % (big_24).
Cost: 250,228 steps of 2048; the paper: two days on eight V100 for most models.
Source: the paper (Lamb, learning rate 0.005, decay 0.2, 400 epochs); its first author's
  answer in issue 106 of facebookresearch/deit (batch, warm-up, stochastic depth of 12);
  its README (a crop of 0.9 at test time). The rest is DeiT's.
Unknown: stochastic depth of the others. 24 has 0.1, with which the author fine-tunes it
  (issue 117); 36 and big_24 have none here: set --config.model.stochastic_depth.

    python -m mlp_mixer.train --config=configs/family/resmlp.py:24
"""

from mlp_mixer import deit, recipe

# Size → stochastic depth, the same in all layers; None: unknown.
SIZES = {"12": 0.05, "24": 0.1, "36": None, "big_24": None}


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, [*SIZES]) or ["12"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    return deit.training(
        f"resmlp_{words[0]}",
        optimiser="lamb",
        batch_size=2048,
        learning_rate=5e-3,
        weight_decay=0.2,
        epochs=400,
        clip_norm=1.0,  # Lamb's own, in Apex and timm
        drop_path=SIZES[words[0]],
        protocol="timm-0.9",
    )
