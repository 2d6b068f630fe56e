"""The paper's recipes (arXiv 2105.01601): Table 4 and Appendix C, as printed.

`pretraining` and `finetuning` make a recipe of a row of them; a file in configs/ says
which. Table 1, the sizes of the models, is in `mlp_mixer.models`.
"""

from typing import Any

from ml_collections import ConfigDict

from mlp_mixer import recipe
from mlp_mixer.models import mixer

# The models of Table 1: word of a recipe → name.
MIXERS = {name.removeprefix("mixer_"): name for name in mixer.SIZES}

# --- Pretraining ----------------------------------------------------------------------

# Table 4: data set → model → epochs, learning rate, weight decay, magnitude of
# RandAugment's 2 layers, mixup, dropout, stochastic depth; 0 for the paper's dash. On
# JFT-300M it prints 7/14 epochs for Mixer-L: Table 3 has both for L/16.
TABLE_4: dict[str, dict[str, tuple[int | float, ...]]] = {
    "imagenet2012": {
        "B": (300, 0.001, 0.1, 15, 0.5, 0.0, 0.1),
        "L": (300, 0.001, 0.1, 15, 0.5, 0.0, 0.1),
    },
    "imagenet21k": {
        "B": (300, 0.001, 0.1, 10, 0.2, 0.0, 0.1),
        "L": (300, 0.001, 0.1, 20, 0.5, 0.0, 0.1),
    },
    "jft300m": {
        "S": (5, 0.003, 0.03, 0, 0.0, 0.0, 0.0),
        "B": (7, 0.003, 0.03, 0, 0.0, 0.0, 0.0),
        "L": (7, 0.001, 0.03, 0, 0.0, 0.0, 0.0),
        "L, 14 epochs": (14, 0.001, 0.03, 0, 0.0, 0.0, 0.0),
        "H": (14, 0.001, 0.03, 0, 0.0, 0.0, 0.0),
    },
}

# Data set → training split and size (section 3.1 and big_vision's configs), classes,
# initial head bias (big_vision for ImageNet; its ViT configs' for the others), and
# arguments of `evaluation`. ImageNet-21k: 14,197,122 images without the two held-out
# parts. JFT-300M is Google's; for your own data set give --config.dataset.name.
PRETRAINING: dict[str, dict[str, Any]] = {
    "imagenet2012": {
        "split": "train[:99%]",
        "num_examples": 1_268_355,
        "num_classes": 1000,
        "head_bias": -6.9,
        "evals": {
            "minival": {"split": "train[99%:]"},
            "val": {"split": "validation"},
            # These need data sets of their own.
            "real": {
                "split": "validation",
                "every_steps": 0,
                "dataset": {"name": "imagenet2012_real", "label": "real_label"},
            },
            "v2": {
                "split": "test",
                "every_steps": 0,
                "dataset": {"name": "imagenet_v2"},
            },
        },
    },
    "imagenet21k": {
        "split": "full[51200:]",
        "num_examples": 14_145_922,
        "num_classes": 21_843,
        "head_bias": -10.0,
        "evals": {"val": {"split": "full[25600:51200]"}},
    },
    "jft300m": {
        "split": "train",
        "num_examples": 300_000_000,
        "num_classes": 18_291,
        "head_bias": -10.0,
        "evals": {"val": {"split": "test[:49511]"}},
    },
}


def pretraining(
    model: str,
    argument: str,
    *,
    imagenet2012: str,
    imagenet21k: str,
    jft300m: str,
    gpu8: int,
    end_factor: float | None = None,
) -> ConfigDict:
    """Returns the paper's pretraining of a model (section 3.1, Table 4).

    What is watched during training is the training data set alone. ReaL, ImageNet-v2
    and 5-shot on ImageNet have every_steps = 0: `evaluate --only=all` runs them, and so
    does training with, say, --config.evals.real.every_steps=2500.

    Args:
      model: name of the model, a key of `models.mixer.SIZES`.
      argument: options, comma-separated: imagenet21k or jft300m, the data set (default:
        ImageNet-1k); short, 60 epochs of ImageNet-1k, big_vision's regression test;
        gpu8, for one host with 8 GPUs.
      imagenet2012, imagenet21k, jft300m: row of `TABLE_4` for this data set. Where the
        paper has none for the model, that of the next larger (S → B) or smaller
        (H → L) one.
      gpu8: micro-batches with which a batch of 4096 fits 8 GPUs of 24 GB: 4 to 20 GB
        each, by the compiler's account (on CPU).
      end_factor: last learning rate on ImageNet-1k as a fraction of the peak; None: it
        is absolute, as on the other data sets.

    Raises:
      ValueError: an unknown option, or options that exclude each other.
    """
    rows = dict(imagenet2012=imagenet2012, imagenet21k=imagenet21k, jft300m=jft300m)
    standard, *others = rows
    given = recipe.words(argument, [*others, "short", "gpu8"])
    name = recipe.option_of(others, given, standard)
    if "short" in given and name != standard:
        raise ValueError(
            f"The options short and {name} exclude each other: short is for "
            "ImageNet-1k."
        )
    data, config = PRETRAINING[name], recipe.base()
    config.dataset.name = name
    for field in ("split", "num_examples", "num_classes"):
        config.dataset[field] = data[field]
    config.model.name = model
    config.model.head_bias = data["head_bias"]
    epochs, rate, decay, magnitude, mixup, dropout, depth = TABLE_4[name][rows[name]]
    config.epochs = 60.0 if "short" in given else float(epochs)
    config.mixup = mixup
    config.input.randaugment_layers = 2 if magnitude else 0
    config.input.randaugment_magnitude = magnitude
    config.model.dropout, config.model.stochastic_depth = dropout, depth
    config.optim.learning_rate, config.optim.weight_decay = rate, decay
    if end_factor is not None and name == standard:
        config.optim.end_learning_rate, config.optim.end_factor = None, end_factor
    evaluate_on(config, name)
    if "gpu8" in given:
        config.accumulate = gpu8
        # Less memory than a GPU's fastest formulation.
        config.run.scan, config.run.remat = True, "pre_gelu"
        config.input.workers = 32  # half the cores of a usual host of 8 GPUs
    return config


def evaluate_on(config: ConfigDict, name: str) -> None:
    """Adds the evaluators of a data set of `PRETRAINING`, and 5-shot on ImageNet."""
    for key, differences in PRETRAINING[name]["evals"].items():
        config.evals[key] = recipe.evaluation(**differences)
    # The first 65,000 hold at least 30 images of each class.
    config.evals.fewshot = recipe.fewshot(
        "train[:65000]", "validation", "imagenet2012", shots=(5,), every_steps=0
    )


# --- Fine-tuning ----------------------------------------------------------------------

# The learning rates that the paper tried (Appendix C); which won, it does not say.
RATES = (0.003, 0.01, 0.03, 0.06)
# Data set → classes; training split, its size and the test split; the same with a part
# of training held out to choose the learning rate with; updates, of which warm-up.
# Steps and held-out parts: ViT's Table 4, which the paper follows. Warm-up:
# big_vision's transfer configs. Flowers' 2k images are train and validation.
FINETUNING: dict[str, dict[str, Any]] = {
    "imagenet2012": {
        "num_classes": 1000,
        "final": ("train", 1_281_167, "validation"),
        "select": ("train[:99%]", 1_268_355, "train[99%:]"),
        "steps": (20_000, 500),
        "learning_rates": RATES,
    },
    "cifar10": {
        "num_classes": 10,
        "final": ("train", 50_000, "test"),
        "select": ("train[:98%]", 49_000, "train[98%:]"),
        "steps": (10_000, 500),
        "learning_rates": RATES,
    },
    "cifar100": {
        "num_classes": 100,
        "final": ("train", 50_000, "test"),
        "select": ("train[:98%]", 49_000, "train[98%:]"),
        "steps": (10_000, 500),
        "learning_rates": RATES,
    },
    "oxford_iiit_pet": {
        "num_classes": 37,
        "final": ("train", 3680, "test"),
        "select": ("train[:90%]", 3312, "train[90%:]"),
        "steps": (500, 100),
        "learning_rates": RATES,
    },
    "oxford_flowers102": {
        "num_classes": 102,
        "final": ("train+validation", 2040, "test"),
        "select": (
            "train[:90%]+validation[:90%]",
            1836,
            "train[90%:]+validation[90%:]",
        ),
        "steps": (500, 100),
        "learning_rates": RATES,
    },
    # Ours: the embedded digits.
    "digits": {
        "num_classes": 10,
        "final": ("train", 1500, "test"),
        "select": ("train[:90%]", 1350, "train[90%:]"),
        "steps": (150, 25),
        "learning_rates": RATES,
    },
    # Each of 19 tasks; the recipe adds its name and classes.
    "vtab": {
        "num_classes": None,
        "final": ("train800val200", 1000, "test"),
        "select": ("train800", 800, "val200"),
        "steps": (2500, 500),
        "learning_rates": (0.003, 0.01, 0.03),
    },
}
# The weights that the authors have published: model → name below the data set's.
PUBLISHED = {"b16": "Mixer-B_16", "l16": "Mixer-L_16"}
# What was pretrained on → the words of the recipes that do so, by run folder.
PRETRAINED = {"imagenet21k": "-imagenet21k", "imagenet1k": "", "jft300m": "-jft300m"}


def finetuning(name: str, argument: str) -> ConfigDict:
    """Returns the paper's fine-tuning on a data set (section 3 and Appendix C).

    SGD with momentum 0.9 (the accumulator in bfloat16, as the authors have it), batch
    512, clip 1, cosine to 0, no weight decay; a zero head, softmax cross-entropy; no
    mixup, no Inception crop, no stochastic depth. It starts from the authors' weights
    where they are published, else from the run that the pretraining recipe leaves in
    runs/.

    Args:
      name: a key of `FINETUNING`.
      argument: options, comma-separated, as in configs/finetune/README.md.

    Raises:
      ValueError: an unknown option, or options that exclude each other.
    """
    others = ["448", "resize_crop", "select"]
    given = recipe.words(argument, [*MIXERS, *PRETRAINED, *others])
    model = recipe.option_of(MIXERS, given, "b16")
    upstream = recipe.option_of(PRETRAINED, given, "imagenet21k")
    data, config = FINETUNING[name], recipe.base()
    select = "select" in given
    train, count, test = data["select" if select else "final"]
    config.dataset.name = name
    config.dataset.split = train
    config.dataset.num_examples = count
    config.dataset.num_classes = data["num_classes"]
    config.input.crop = "resize_crop"
    config.loss = "softmax_xent"

    config.model.name = MIXERS[model]
    if model in PUBLISHED and upstream != "jft300m":
        config.init_from = f"{upstream}/{PUBLISHED[model]}"
    else:
        config.init_from = f"runs/{MIXERS[model]}{PRETRAINED[upstream]}"
    config.init_head = "zero"
    if "448" in given:
        config.model.image_size = (448, 448)
        # As many times as wide as there are more tokens (Appendix C).
        sizes = mixer.SIZES[config.model.name]
        config.model.tokens_mlp_dim = 4 * sizes["tokens_mlp_dim"]

    config.batch_size = 512
    config.total_steps, config.optim.warmup_steps = data["steps"]
    config.optim.name = "momentum"
    config.optim.momentum_dtype = "bfloat16"
    # The last but one of the grid; vision_transformer's own choice is 0.03.
    config.optim.learning_rate = data["learning_rates"][-2]
    config.optim.decay = "cosine"
    config.optim.end_learning_rate = 0.0

    watched = "minival" if select else "val" if test == "validation" else "test"
    config.evals[watched] = recipe.evaluation(
        test,
        every_steps=config.total_steps // 5,
        preprocess=(
            "paper-resize-crop" if "resize_crop" in given else "paper-resmall-crop"
        ),
    )
    return config
