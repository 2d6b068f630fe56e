"""Recipes: every field of a run, with its unit and meaning, and where runs live.

`base` is the dictionary of the project and the only place where defaults stand. A
recipe is a file with `get_config(argument)` that starts from `base` or `pretraining`
and states the differences; it imports nothing but this module, so it works wherever
it lies. Each section holds the arguments of exactly one function.
"""

import difflib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

PACKAGE = pathlib.Path(__file__).parent

# Fields that may change between two starts of one run: they move no result (beyond
# the order of float additions), or only what is looked at and kept.
MAY_CHANGE = (
    "mesh",
    "sharding",
    "accumulate",
    "input.workers",
    "model.scan",
    "model.remat",
    "log_every_steps",
    "evals",
    "checkpoint",
)


def base() -> ConfigDict:
    """Returns every field with its default."""
    config = ConfigDict()
    # Of parameters, data order, augmentation, mixup, dropout, stochastic depth.
    config.seed = 0
    # Images per update, over all devices and micro-batches.
    config.batch_size = 4096
    # Passes over dataset.num_examples; total_steps follows from it.
    config.epochs = 300.0
    # Updates; None: round(epochs · num_examples / batch_size), at least 1.
    config.total_steps = config_dict.placeholder(int)
    # A key of losses.LOSSES.
    config.loss = "sigmoid_xent"
    # p of mixup's Beta(p, p); 0 does not mix.
    config.mixup = 0.0
    # Micro-batches per update: 1/accumulate of the activations, the same update.
    config.accumulate = 1
    # Where parameters and moments live: "replicated" or "fsdp".
    config.sharding = "replicated"
    # Updates between two records of training metrics.
    config.log_every_steps = 50

    # sharding.make_mesh
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices on the batch axis; -1: all

    # data.sources.open_source, for training; evaluators have their own
    config.dataset = ConfigDict()
    # "digits", "synthetic", "folder:/path/to/images" or any TFDS name.
    config.dataset.name = "imagenet2012"
    config.dataset.split = "train"
    # What the recipe was computed for, so that a run can be planned without the data;
    # compared with the data at the start. None: what the data has.
    config.dataset.num_examples = config_dict.placeholder(int)
    config.dataset.num_classes = config_dict.placeholder(int)

    # data.pipeline.train_batches
    config.input = ConfigDict()
    config.input.crop = "inception"  # or "resize"
    config.input.flip = True  # horizontally, with probability 1/2
    config.input.shift = 0  # pad by so many pixels and crop at random
    config.input.randaugment_layers = 0
    config.input.randaugment_magnitude = 0
    config.input.workers = 0  # processes that decode; 0: threads of this one
    config.input.max_broken_images = 10  # distinct; one more ends the run

    # models.create, with dataset.num_classes; None: what Table 1 says of the model
    config.model = ConfigDict()
    config.model.name = "mixer_b16"
    config.model.image_size = (224, 224)  # height, width in pixels
    config.model.patch_size = config_dict.placeholder(tuple)
    config.model.num_blocks = config_dict.placeholder(int)
    config.model.hidden_dim = config_dict.placeholder(int)
    config.model.tokens_mlp_dim = config_dict.placeholder(int)
    config.model.channels_mlp_dim = config_dict.placeholder(int)
    config.model.gelu = "tanh"  # or "exact"
    config.model.dropout = 0.0
    config.model.stochastic_depth = 0.0  # the last block's rate, linear from 0
    config.model.rescale_stochastic_depth = False
    config.model.head_bias = 0.0  # initial value
    config.model.dtype = "float32"  # of activations and products, or "bfloat16"
    config.model.scan = True
    config.model.remat = "pre_gelu"  # or "none", "full"

    # optim.create
    config.optim = ConfigDict()
    config.optim.name = "adam"  # or "momentum"
    config.optim.learning_rate = 0.001  # the peak
    config.optim.warmup_steps = 10_000
    config.optim.decay = "linear"  # or "cosine"
    # The last learning rate: either absolute, or a fraction of the peak.
    config.optim.end_learning_rate = config_dict.placeholder(float)
    config.optim.end_learning_rate = 1e-5
    config.optim.end_factor = config_dict.placeholder(float)
    config.optim.weight_decay = 0.0  # decoupled; times the learning rate
    config.optim.decayed = "kernels"  # or "all"
    config.optim.clip_norm = config_dict.placeholder(float)
    config.optim.clip_norm = 1.0  # global norm; None: no clipping
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9
    config.optim.momentum_dtype = "float32"

    # evaluators.create: {name: evaluation(...)}, completed by `evaluations`
    config.evals = ConfigDict()

    # checkpoint.Checkpointer; the last step is kept in any case
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_every_steps = config_dict.placeholder(int)
    config.checkpoint.keep_best = config_dict.placeholder(str)  # e.g. "val/top1"
    return config


def evaluation(split: str, **differences: Any) -> ConfigDict:
    """An evaluator's section: accuracy on a split. None: as in training."""
    section = ConfigDict()
    section.type = "accuracy"
    section.every_steps = 2500  # of training; 0: never, not even at its end
    section.batch_size = config_dict.placeholder(int)
    section.preprocess = "big_vision"  # a key of data.image_ops.PROTOCOLS
    section.dataset = ConfigDict()
    section.dataset.name = config_dict.placeholder(str)
    section.dataset.split = split
    section.dataset.num_examples = config_dict.placeholder(int)
    section.dataset.num_classes = config_dict.placeholder(int)
    section.update(differences)
    return section


def evaluations(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The sections of `config.evals` with training's batch size and data set where
    they name none of their own; without those that every_steps = 0 turns off.
    """
    sections = {k: v for k, v in config.evals.to_dict().items() if v["every_steps"]}
    for section in sections.values():
        if section["batch_size"] is None:
            section["batch_size"] = config.batch_size
        for field in ("name", "num_classes"):
            if section["dataset"][field] is None:
                section["dataset"][field] = config.dataset[field]
    return sections


def completed(config: ConfigDict, num_examples: int, num_classes: int) -> ConfigDict:
    """The recipe with what its data set has, where it did not say."""
    config = config.copy_and_resolve_references()
    found = {"num_examples": num_examples, "num_classes": num_classes}
    for field, value in found.items():
        if config.dataset[field] is None:
            config.dataset[field] = value
    return config


def table_4(
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    randaugment: int | None = None,
    mixup: float = 0.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
) -> dict[str, Any]:
    """A row of the paper's Table 4; without RandAugment, JFT's crop and flip only."""
    return {
        "epochs": float(epochs),
        "mixup": mixup,
        "input": {
            "randaugment_layers": 0 if randaugment is None else 2,
            "randaugment_magnitude": randaugment or 0,
        },
        "model": {"dropout": dropout, "stochastic_depth": stochastic_depth},
        "optim": {"learning_rate": learning_rate, "weight_decay": weight_decay},
    }


# Data set → training split and size (section 3.1 and big_vision's configs), classes,
# initial head bias (big_vision for ImageNet; its ViT configs' for the others), and the
# splits that are watched. ImageNet-21k: 14,197,122 images without the two held-out
# parts. JFT-300M is Google's; a set of one's own takes --config.dataset.name.
PRETRAINING: dict[str, dict[str, Any]] = {
    "imagenet2012": {
        "split": "train[:99%]",
        "num_examples": 1_268_355,
        "num_classes": 1000,
        "head_bias": -6.9,
        "evals": {"minival": "train[99%:]", "val": "validation"},
    },
    "imagenet21k": {
        "split": "full[51200:]",
        "num_examples": 14_145_922,
        "num_classes": 21_843,
        "head_bias": -10.0,
        "evals": {"val": "full[25600:51200]"},
    },
    "jft300m": {
        "split": "train",
        "num_examples": 300_000_000,
        "num_classes": 18_291,
        "head_bias": -10.0,
        "evals": {"val": "test[:49511]"},
    },
}


def pretraining(
    model: str, argument: str, rows: dict[str, dict[str, Any]]
) -> ConfigDict:
    """The paper's pretraining of `model` (section 3.1, Table 4).

    Args:
      model: a key of `models.MODELS`.
      argument: what stands behind the colon of `--config`: a data set of
        `PRETRAINING`, nothing for ImageNet-1k.
      rows: data set → `table_4` row.
    """
    name = "imagenet2012"
    for word in words(argument, [key for key in rows if key != name]):
        name = word
    data, config = PRETRAINING[name], base()
    config.dataset.name = name
    for field in ("split", "num_examples", "num_classes"):
        config.dataset[field] = data[field]
    config.model.name = model
    config.model.head_bias = data["head_bias"]
    config.update(rows[name])
    for key, split in data["evals"].items():
        config.evals[key] = evaluation(split)
    return config


def words(argument: str, known: Sequence[str]) -> list[str]:
    """The words of a recipe's argument ("imagenet21k,short").

    Raises:
      ValueError: a word that the recipe does not know.
    """
    given = _split(argument or "")
    for word in given:
        if word not in known:
            tries = ", ".join(_nearest(word, known)) or "none"
            raise ValueError(
                f"The recipe does not know the word {word!r}; it knows: {tries}."
            )
    return given


def _split(argument: str) -> list[str]:
    return [word.strip() for word in argument.split(",") if word.strip()]


def total_steps(config: ConfigDict) -> int:
    """Updates of the whole run: round(epochs · N / batch_size), at least 1."""
    if config.total_steps is not None:
        return config.total_steps
    if config.dataset.num_examples is None:
        raise ValueError(
            "Without config.total_steps, config.dataset.num_examples is needed to "
            "turn epochs into steps."
        )
    examples = config.epochs * config.dataset.num_examples
    return max(round(examples / config.batch_size), 1)


# --- Where a recipe is, and where its run goes ----------------------------------------


def resolve(argv: Sequence[str]) -> list[str]:
    """Finds shipped recipes from any folder, in a clone and in an installed wheel.

    `--config=configs/x.py:words` stays as it is if the file exists; otherwise it
    becomes the recipe of that name beside or inside the package.
    """
    out = list(argv)
    for i, word in enumerate(out):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        at = i if equals else i + 1
        value = value if equals else "".join(out[at : at + 1])
        path, colon, argument = value.partition(":")
        found = _find(path) if path else None
        if found:
            out[at] = (f"{flag}=" if equals else "") + f"{found}{colon}{argument}"
    return out


def _find(path: str) -> str | None:
    for root in (pathlib.Path(), PACKAGE.parent, PACKAGE):
        if (root / path).is_file():
            return path if root == pathlib.Path() else str(root / path)
    shipped = {p.relative_to(r).as_posix() for r in _roots() for p in _recipes(r)}
    raise FileNotFoundError(
        f"There is no recipe {path}; shipped are: "
        f"{', '.join(_nearest(path, sorted(shipped)))}."
    )


def _roots() -> list[pathlib.Path]:
    return [r for r in (PACKAGE.parent, PACKAGE) if (r / "configs").is_dir()]


def _recipes(root: pathlib.Path) -> Iterable[pathlib.Path]:
    return (p for p in (root / "configs").rglob("*.py") if p.stem != "__init__")


def default_workdir(argv: Sequence[str]) -> str:
    """`runs/<recipe>`, with the words of its argument: `runs/mixer_b16-imagenet21k`."""
    value = ""
    for i, word in enumerate(argv):
        flag, equals, rest = word.partition("=")
        if flag in ("--config", "-config"):
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    path, _, argument = value.partition(":")
    stem = pathlib.PurePath(path).stem
    return os.path.join("runs", "-".join([stem, *_split(argument)]))


# --- A run explains itself ------------------------------------------------------------


def claim(
    config: ConfigDict,
    workdir: epath.PathLike,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the resolved recipe to `workdir`, or checks that it is the one there.

    Args:
      config: with every field resolved.
      workdir: folder of the run.
      class_names: kept beside the recipe for prediction.

    Raises:
      ValueError: another recipe's run; lists the fields that differ.
    """
    path = epath.Path(workdir) / "config.json"
    new = json.loads(config.to_json_best_effort())
    if path.exists():
        old = json.loads(path.read_text())
        before, now = _flat(old), _flat(new)
        differing = [
            f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
            for key in sorted(before.keys() | now.keys())
            if before.get(key, "absent") != now.get(key, "absent")
            and not any(key == m or key.startswith(f"{m}.") for m in MAY_CHANGE)
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds a run of another recipe:\n"
                + "\n".join(differing)
                + "\nChoose another --workdir, or give the fields their old values."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", new), ("class_names", class_names)):
        # Whole or not at all, also if the process is killed here.
        written = path.with_name(f"{name}.json.{os.getpid()}")
        written.write_text(json.dumps(content, indent=2) + "\n")
        written.replace(path.with_name(f"{name}.json"))


def load(workdir: epath.PathLike) -> ConfigDict:
    """The recipe of the run in `workdir`.

    Raises:
      FileNotFoundError: no run there.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json). Name a folder that "
            "`python -m mlp_mixer.train` has written, e.g. --workdir=runs/digits."
        )
    return ConfigDict(_tuples(json.loads(path.read_text())))


def load_class_names(workdir: epath.PathLike) -> list[str] | None:
    """The names of the classes of the run in `workdir`, if its data set has names."""
    return json.loads((epath.Path(workdir) / "class_names.json").read_text())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = ((f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items())
    return {k: v for key, value in pairs for k, v in _flat(value, key).items()}


def _tuples(tree: Any) -> Any:
    """JSON's lists back to tuples."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, max(len(known), 1), 0)
