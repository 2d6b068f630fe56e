"""The recipe of the field: how most all-MLP papers after Mixer train on ImageNet-1k.

It is DeiT's (arXiv 2012.12877, Table 9) as timm defines its parts: AdamW without decay
on vectors, cosine after a short warm-up, label smoothing, mixup and CutMix, random
erasing, RandAugment and repeated augmentation. `training` makes a recipe of a model; a
file in configs/family says which, and how its paper differs.
"""

from typing import Any

from ml_collections import ConfigDict

from mlp_mixer import paper, recipe

# Images of ImageNet-1k's whole training split.
NUM_EXAMPLES = 1_281_167


def training(
    model: str,
    *,
    optimiser: str = "adam",
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    end_learning_rate: float = 1e-5,
    weight_decay: float = 0.05,
    epochs: int | float = 300,
    warmup_epochs: int | float = 5,
    cooldown_epochs: int | float = 0,
    clip_norm: float | None = None,
    drop_path: float | None = None,
    label_smoothing: float = 0.1,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    erasing: float = 0.25,
    magnitude: int | float = 9,
    repeats: int = 3,
    ema: float = 0.0,
    protocol: str = "timm",
    image_size: tuple[int, int] = (224, 224),
    **model_fields: Any,
) -> ConfigDict:
    """Returns the training of a model on all of ImageNet-1k, watched on its validation.

    ReaL, ImageNet-v2 and 5-shot on ImageNet have every_steps = 0, as in
    `paper.pretraining`.

    Args:
      model: name of the model.
      optimiser: "adam", which with its decay is AdamW, or another `optim.name`.
      batch_size: images per update, with all copies of each.
      learning_rate: the peak at this batch size (5e-4 for each 512 images).
      end_learning_rate: the last learning rate.
      weight_decay: decoupled, of arrays of two and more axes.
      epochs: passes over the training images, without those of the cool-down.
      warmup_epochs: epochs of linear warm-up from 1e-6.
      cooldown_epochs: epochs at the last learning rate, after the others.
      clip_norm: global norm of the gradient; None does not clip.
      drop_path: the model's `stochastic_depth`; None: what its table says.
      label_smoothing: share of a label that goes to all classes alike.
      mixup, cutmix: p of Beta(p, p) of each; 0 leaves it out.
      erasing: probability of random erasing.
      magnitude: strength of RandAugment's 2 operations, with a deviation of 0.5; 0
        leaves it out.
      repeats: number of times that an image is shown in a row, each augmented anew.
      ema: decay of the parameters' moving average; 0 keeps none.
      protocol: a key of `data.image_ops.PROTOCOLS` for every evaluation but 5-shot;
        DeiT's own code crops 0.875 of the resized image.
      image_size: height and width in pixels.
      **model_fields: fields of the model that differ from its table.
    """
    config = recipe.base()
    config.dataset.num_examples = NUM_EXAMPLES
    config.dataset.num_classes = 1000
    config.batch_size, config.epochs = batch_size, float(epochs + cooldown_epochs)
    config.loss, config.label_smoothing = "softmax_xent", label_smoothing
    config.mixup, config.cutmix, config.erasing = mixup, cutmix, erasing

    config.input.crop = config.input.randaugment = "timm"
    config.input.repeats = repeats
    if magnitude:
        config.input.randaugment_layers = 2
        config.input.randaugment_magnitude = magnitude
        config.input.randaugment_std = 0.5

    config.model.update({"name": model, "image_size": image_size, **model_fields})
    if drop_path is not None:
        config.model.stochastic_depth = drop_path

    config.optim.name, config.optim.learning_rate = optimiser, learning_rate
    config.optim.warmup_steps = round(warmup_epochs * NUM_EXAMPLES / batch_size)
    config.optim.warmup_learning_rate = 1e-6
    config.optim.cooldown_steps = round(cooldown_epochs * NUM_EXAMPLES / batch_size)
    config.optim.decay = "cosine"
    config.optim.end_learning_rate = end_learning_rate
    config.optim.weight_decay, config.optim.decayed = weight_decay, "matrices"
    config.optim.clip_norm, config.optim.ema = clip_norm, ema

    paper.evaluate_on(config, "imagenet2012")
    del config.evals.minival  # a part of what is trained on
    for section in config.evals.values():
        if section.type == "accuracy":
            section.preprocess = protocol
    return config
