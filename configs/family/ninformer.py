"""NiNformer on CIFAR-10, as in arXiv 2403.02411 and its authors' train.py.

Options, comma-separated after a colon: cifar100 trains on CIFAR-100.

Expected: unknown; the paper's figures were not at hand. Its script evaluates on test
  images that are cropped at random and mirrored like those of training. Here they are
  as they are, so a few tenths of a percent are between the two.
Cost: 100 epochs of 50,000 images of 32x32, 39,000 steps of 128; 7 PFLOP.
Source: Abdullah-88/NiNformer, commit 0ec85d4: model, optimiser, batch, epochs and
  augmentation. The rate is constant. torch's epochs end with a smaller batch; here
  batches run on into the next epoch.

    python -m mlp_mixer.train --config=configs/family/ninformer.py:cifar100
"""

from mlp_mixer import recipe


def get_config(argument: str = ""):
    """The recipe for the options in `argument`."""
    words = recipe.words(argument, ["cifar100"])
    config = recipe.base()
    config.dataset.name = "cifar100" if "cifar100" in words else "cifar10"
    config.dataset.num_examples = 50_000
    config.dataset.num_classes = 100 if "cifar100" in words else 10
    config.batch_size, config.epochs = 128, 100.0
    config.loss = "softmax_xent"

    # Padded with black by 4 pixels, cropped at random, mirrored.
    config.input.crop = "resize"
    config.input.shift = 4

    config.model.name = "ninformer_cifar"
    config.model.image_size = (32, 32)

    config.optim.learning_rate = config.optim.end_learning_rate = 1e-3
    config.optim.warmup_steps = 0
    config.optim.clip_norm = None

    config.evals.test = recipe.evaluation(
        "test", every_steps=1955, preprocess="vision_transformer"
    )
    return config
