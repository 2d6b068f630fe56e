"""Mixer-H/14, pretrained from scratch as in arXiv 2105.01601, Table 4.

Words: imagenet21k, jft300m (ImageNet-1k without a word); short (60 epochs of
  ImageNet-1k); gpu8 (one host with 8 GPUs: batch 4096 in 16 micro-batches).

Expected:
  ImageNet-1k    not trained in the paper; the settings are Mixer-L's
  imagenet21k    not trained in the paper; the settings are Mixer-L's
  jft300m        86.32 % on ImageNet after fine-tuning at 224 (Table 3)
Cost: jft300m 1.01k TPUv3 core-days (Table 3); ImageNet-1k: 92,897 steps, not known.

    python -m mlp_mixer.train --config=configs/mixer_h14.py:jft300m
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
    return recipe.pretraining("mixer_h14", argument, TABLE_4, gpu8=16)
