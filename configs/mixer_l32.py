"""Mixer-L/32, pretrained from scratch as in arXiv 2105.01601, Table 4.

Words: imagenet21k, jft300m (ImageNet-1k without a word); short (60 epochs of
  ImageNet-1k); gpu8 (one host with 8 GPUs: batch 4096 in 4 micro-batches).

Expected:
  ImageNet-1k    not trained in the paper; Table 4 says Mixer-L of any patch size
  imagenet21k    not trained in the paper; Table 4 says Mixer-L of any patch size
  jft300m        80.67 % on ImageNet after fine-tuning at 224 (Table 3, 7 epochs)
Cost: jft300m 0.12k TPUv3 core-days (Table 3); ImageNet-1k: 92,897 steps, not known.

    python -m mlp_mixer.train --config=configs/mixer_l32.py:jft300m
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
    "jft300m": recipe.table_4(epochs=7, learning_rate=0.001, weight_decay=0.03),
}


def get_config(argument: str = ""):
    """The recipe for the words in `argument`."""
    return recipe.pretraining("mixer_l32", argument, TABLE_4, gpu8=4)
