"""ParaMixer-S/16 on CIFAR-10 at 224 px, as in arXiv 2406.12220 and its README.

Options, comma-separated after a colon: the form, sym, asym or vanilla (default: para).
  asym's λ is --config.model.penalty; the authors have 0, 1e-6, 1e-5, 1e-4, 5e-4, 1e-3,
  1e-2, 0.1 and 1. --config.model.n_iter=2 (or 3, 4) applies each block so many times.

Expected: unknown; the paper's figures were not at hand. By its abstract symmetric
  weights hurt, and less symmetric ones come back up to vanilla.
Cost: 300 epochs of 50,000 images, 39,000 steps of 384; 0.34 EFLOP in every form (the
  authors multiply twice for asym's two terms, here once).
Source: Toshihiro-Ota/paramixer, commit cddc611: model and command line, for 4 GPUs of
  96 images; what it leaves out is timm 0.9.2's. Differences: timm's rate is constant
  within an epoch, and its cosine counts the warm-up; torch's epochs end with a smaller
  batch; theirs is mixed precision (float16).

    python -m mlp_mixer.train --config=configs/family/paramixer.py:asym \
        --config.model.penalty=1e-3
"""

from mlp_mixer import recipe

FORMS = {"sym": "symmixer_s16", "asym": "asymmixer_s16", "vanilla": "vanillamixer_s16"}


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    words = recipe.words(argument, [*FORMS])
    if len(words) > 1:
        raise ValueError(f"These are several forms: {', '.join(words)}; name one.")
    config = recipe.base()
    config.dataset.name = "cifar10"
    config.dataset.num_examples = 50_000
    config.dataset.num_classes = 10
    config.batch_size, config.epochs = 384, 300.0
    config.loss, config.label_smoothing = "softmax_xent", 0.1
    config.mixup, config.cutmix, config.erasing = 0.8, 1.0, 0.25

    # The images of 32 px are enlarged by timm's crop and protocol.
    config.input.crop, config.input.interpolation = "timm", "random"
    config.input.randaugment = "timm"
    config.input.randaugment_layers = 2
    config.input.randaugment_magnitude = 9
    config.input.randaugment_std = 0.5

    config.model.name = FORMS[words[0]] if words else "paramixer_s16"
    config.model.stochastic_depth = 0.1

    config.optim.learning_rate = 5e-4 * 384 / 512
    config.optim.warmup_steps = round(20 * 50_000 / 384)
    config.optim.warmup_learning_rate = 1e-6
    config.optim.decay = "cosine"
    config.optim.end_learning_rate = 0.0
    config.optim.weight_decay, config.optim.decayed = 0.05, "matrices"
    config.optim.clip_norm = None

    config.evals.test = recipe.evaluation("test", every_steps=1302, preprocess="timm")
    return config
