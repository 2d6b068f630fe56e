"""Hire-MLP on ImageNet-1k from scratch, as its authors' code trains it.

Options after a colon: tiny, small, base or large, the size (default: tiny).

Expected: 79.7 % top-1 (tiny), 82.1 % (small), 83.2 % (base), 83.8 % (large), says the
  repository; arXiv 2108.13341v1, which sums the branches, has 78.9, 81.8, 83.1, 83.4.
Cost: 193,927 steps of 2048 with tiny, 387,853 of 1024 with the others; 5 EFLOP with
  tiny, 10 with small, 19 with base, 32 with large.
Source: README and train.py of ggjy/Hire-Wave-MLP.pytorch, commit 7ef7ddd: DeiT's recipe
  with 20 epochs of warm-up, ten of cool-down after the 300, and no average of the
  parameters; 256 (tiny) or 128 images (base) on each of eight devices, and stochastic
  depth 0 (tiny) and 0.2 (base). It tests a crop of 224 of 256 pixels (datasets.py; the
  0.9 in the model's file is for timm, and is not read).
Unknown: stochastic depth and batch of small and large. Here they have none, and 1024:
  set --config.model.stochastic_depth. Nor is it known whether the published numbers are
  the last epoch's; train.py also keeps the best on the validation images.

    python -m mlp_mixer.train --config=configs/family/hiremlp.py:base
"""

from mlp_mixer import deit, recipe

# Size → images per update and stochastic depth; None: unknown.
SIZES = {
    "tiny": (2048, 0.0),
    "small": (1024, None),
    "base": (1024, 0.2),
    "large": (1024, None),
}


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, [*SIZES]) or ["tiny"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    batch_size, drop_path = SIZES[words[0]]
    return deit.training(
        f"hiremlp_{words[0]}",
        batch_size=batch_size,
        learning_rate=5e-4 * batch_size / 512,
        warmup_epochs=20,
        cooldown_epochs=10,
        drop_path=drop_path,
    )
