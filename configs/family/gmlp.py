"""gMLP on ImageNet-1k from scratch, as in arXiv 2105.08050, Table 7.

Options after a colon: ti16, s16 or b16, the size (default: s16).

Expected: 72.3 % top-1 (ti16), 79.6 % (s16), 81.6 % (b16).
Cost: 93,835 steps of 4096; what the paper's took is unknown.
Source: the paper's table as public implementations quote it: AdamW 0.001 with epsilon
  1e-6, decay 0.05, clipping at 1, batch 4096, 300 epochs, 10,000 steps of warm-up,
  mixup 0.8 or CutMix 1, smoothing 0.1, no erasing, no repeated augmentation.
Other than there: AutoAugment, which is not here; RandAugment m9 is in its place.
Unknown: where the learning rate begins and ends (here 1e-6 and 0), which arrays have
  decay (here matrices), and the test crop (here 0.875, as timm has it).

    python -m mlp_mixer.train --config=configs/family/gmlp.py:b16
"""

from mlp_mixer import deit, recipe

# Size → stochastic depth.
SIZES = {"ti16": 0.0, "s16": 0.05, "b16": 0.2}


def get_config(argument: str = ""):
    """The recipe for the size in `argument`."""
    words = recipe.words(argument, [*SIZES]) or ["s16"]
    if len(words) > 1:
        raise ValueError(f"These are several sizes: {', '.join(words)}; name one.")
    config = deit.training(
        f"gmlp_{words[0]}",
        batch_size=4096,
        end_learning_rate=0.0,
        clip_norm=1.0,
        drop_path=SIZES[words[0]],
        erasing=0.0,
        repeats=1,
    )
    config.optim.warmup_steps, config.optim.eps = 10_000, 1e-6
    return config
