"""Mixer-L/16, pretrained from scratch as in arXiv 2105.01601, Table 4.

Words: imagenet21k, jft300m (ImageNet-1k without a word); short (60 epochs of
  ImageNet-1k); gpu8 (one host with 8 GPUs: batch 4096 in 8 micro-batches).

Expected:
  ImageNet-1k    71.76 % top-1 (Table 3)
  imagenet21k    82.89 % on ImageNet after fine-tuning at 224 (Table 3)
  jft300m        84.82 % on ImageNet after fine-tuning at 224 (Table 3, 14 epochs;
                 84.05 % with --config.epochs=7)
Cost: 0.04k, 0.41k and 0.45k TPUv3 core-days (Table 3). ImageNet-1k: 92,897 steps.

    python -m mlp_mixer.train --config=configs/mixer_l16.py:jft300m
"""

from mlp_mixer import recipe

TABLE_4 = {
    "imagenet2012": recipe.table_4(
        epochs=300,
        learning_rate=0.001,
        weight_decay=0.1,
        randaugment=15,
        mixup=0.5,
        stochastic_depth=0.1,
    ),
    "imagenet21k": recipe.table_4(
        epochs=300,
        learning_rate=0.001,
        weight_decay=0.1,
        randaugment=20,
        mixup=0.5,
        stochastic_depth=0.1,
    ),
    "jft300m": recipe.table_4(epochs=14, learning_rate=0.001, weight_decay=0.03),
}


def get_config(argument: str = ""):
    """The recipe for the words in `argument`."""
    return recipe.pretraining("mixer_l16", argument, TABLE_4, gpu8=8)
