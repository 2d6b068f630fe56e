"""Fine-tuning at twice the resolution in a minute: digits at 16x16, from those at 8x8.

Words: select (train on 90 % and evaluate on the rest).

    python -m mlp_mixer.train --config=configs/digits.py
    python -m mlp_mixer.train --config=configs/finetune/digits.py
    python scripts/sweep.py --config=configs/finetune/digits.py --seeds=3
"""

from mlp_mixer import recipe

LEARNING_RATES = recipe.FINETUNING["digits"]["learning_rates"]


def get_config(argument: str = ""):
    """The recipe for the words in `argument`."""
    recipe.words(argument, ["select"])
    config = recipe.finetuning("digits", argument)
    config.init_from = "runs/digits"
    config.init_head = "match"  # of the same ten digits
    config.batch_size = 100
    config.log_every_steps = 25
    config.input.flip = False

    # Of configs/digits.py, with four times as many tokens and as wide token mixing.
    config.model.name = "mixer_s16"
    config.model.image_size = (16, 16)
    config.model.patch_size = (2, 2)
    config.model.num_blocks = 4
    config.model.hidden_dim = 64
    config.model.tokens_mlp_dim = 4 * 32
    config.model.channels_mlp_dim = 256
    config.model.scan = False
    config.model.remat = "none"

    config.checkpoint.every_steps = 100
    return config
