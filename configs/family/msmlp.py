"""MS-MLP on ImageNet-1k from scratch, as in arXiv 2202.06510 and its authors' code.

Options, comma-separated after a colon: t, s or b, the size (default: t); paper, for the
  paper's rates of stochastic depth, 0.2, 0.3 and 0.5, in place of the code's, 0.1, 0.4
  and 0.5.

Expected: 82.1 % top-1 (t), 83.4 % (s), 83.8 % (b), of a crop of 0.875.
Cost: 375,342 steps of 1024; 10 EFLOP (t), 20 EFLOP (s), 35 EFLOP (b). The authors'
  commands are for 8 GPUs.
Source: JegZheng/MS-MLP, commit a10d34d, config.py and its yaml files (AdamW, decay 0.05
  but of vectors, 0.001 to 1e-5 at batch 1024, 20 epochs of warm-up, clipping at 5; no
  repeated augmentation, no average of the parameters).
Unknown: which rates of stochastic depth the published models had.

    python -m mlp_mixer.train --config=configs/family/msmlp.py:s,paper
"""

from mlp_mixer import deit, recipe

# Size → the paper's rate of stochastic depth.
SIZES = {"t": 0.2, "s": 0.3, "b": 0.5}


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    words = recipe.words(argument, [*SIZES, "paper"])
    size = recipe.option_of(SIZES, words, "t")
    return deit.training(
        f"msmlp_{size}",
        warmup_epochs=20,
        clip_norm=5.0,
        drop_path=SIZES[size] if "paper" in words else None,
        repeats=1,
    )
