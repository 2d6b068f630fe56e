"""A small gMLP on real handwritten digits: configs/digits.py with another model.

Expected: 97.5 to 99 % top-1 on the 297 held-out images.
Cost: 900 steps, 54 to 58 s of CPU time.

    python -m mlp_mixer.train --config=configs/family/gmlp.py
"""

from mlp_mixer import recipe


def get_config(argument: str = ""):
    """The recipe; it has no options."""
    recipe.words(argument, [])
    config = recipe.load("configs/digits.py")
    config.model = {
        "name": "gmlp_ti16",
        "image_size": (8, 8),
        "patch_size": (2, 2),
        "num_blocks": 4,
        "hidden_dim": 64,
        "channels_mlp_dim": 384,
    }
    return config
