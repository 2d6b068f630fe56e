"""Weights in and out of files, checked: what is wrong with a file is one error.

The current npz layout is for the world, safetensors for ourselves: it keeps bfloat16,
and carries checksums and what else a model needs to know.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

import mlp_mixer
from mlp_mixer import files, known, models
from mlp_mixer.fingerprints import Params, leaves
from mlp_mixer.models.model import axes_by_form
from mlp_mixer.pretrained import (
    foreign,
    hub,
    npz,
    published,
    safetensors,
    torch_files,
    tree,
)
from mlp_mixer.pretrained.normalisation import (
    CENTRED,
    Normalisation,
    Stated,
    fold,
    normalisation,
)
from mlp_mixer.text import brief, listed

logger = logging.getLogger(__name__)

NAMES = ("ours", *foreign.TABLES)
TORCH_SUFFIXES = torch_files.SUFFIXES
Flat = dict[str, np.ndarray]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, and what a model needs to know besides.

    Attributes:
      params: the model's tree, for images in [-1, 1]: nested dicts of NumPy arrays.
      origin: what they come from, for people.
      model: all fields that say what it computes, and its name: of the size in a paper
        that has these fields, else of the architecture. Given without a name, it is
        what the shapes say, but for the fields that are given.
      stats: the model's other variables by collection, e.g. "batch_stats".
      image_size: (height, width) in pixels; None if neither the file nor the shapes of
        its arrays say it. Of a file with others' names, whose model takes any size, it
        is what the paper trains at.
      class_names: names by class; None if they have none.
      preprocess: the evaluation protocol of the run; None if it is not known.
      source: the name that they were read by; None if they were made.
      normalisation: what the source's images were normalised by; folded into `params`.
      dtype: dtype that the run computes in; float32 of any other source.
      step: step of the run's checkpoint.
    """

    params: Params = dataclasses.field(repr=False)
    origin: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    stats: Params = dataclasses.field(default_factory=dict, repr=False)
    image_size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: str | None = None
    source: str | None = None
    normalisation: Normalisation = CENTRED
    dtype: str = "float32"
    step: int | None = None

    def __post_init__(self) -> None:
        if "name" in self.model:
            model = tree.with_name(self.model["name"], models.fields(**self.model))
        else:
            model = tree.model_of(self.params, **self.model)
        object.__setattr__(self, "model", model)

    def __str__(self) -> str:
        return f"{self.source} ({self.origin})" if self.source else self.origin

    @property
    def architecture(self) -> ModuleType:
        """The file of `models` that declares their model."""
        return models.family(self.model["name"])

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the head, if there is one."""
        return tree.num_classes(self.params)

    @property
    def variables(self) -> dict[str, Any]:
        """What the model takes."""
        return {"params": self.params, **self.stats}


# --- Reading --------------------------------------------------------------------------


def load(source: str | os.PathLike[str], *, dtype: str | None = "float32") -> Params:
    """Returns the parameters at `source`: `read(source).params`."""
    return read(source, dtype=dtype).params


def read(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = "float32",
    step: int | None = None,
    best: str | None = None,
    ema: bool | None = None,
    mean: Stated | None = None,
    std: Stated | None = None,
    model: Mapping[str, Any] | None = None,
) -> Weights:
    """Reads weights of any model from any source, for images in [-1, 1].

    Values that are not finite are reported in the log, by array. So is what is taken
    for granted of a file with timm's names that says no mean and standard deviation;
    they are read from a config.json beside it, as timm and the hub write one.

    Args:
      source: a run's folder, a file, or a published name such as
        "imagenet1k/Mixer-B_16", which is downloaded once (see `published`).
      dtype: dtype of the arrays, a key of `DTYPES`; None keeps the file's.
      step: step of a run's checkpoint; the newest intact one by default.
      best: instead of a step, the score whose best value chooses the checkpoint, the
        highest or the lowest, as its evaluator says.
      ema: whether averaged weights are read, of a run or of a torch file, or the last
        ones; None: the averaged ones, if it keeps them.
      mean, std: what the images that the weights are for were normalised by, in levels
        from 0 to 1, if the source does not say it: a number, or red, green, blue.
      model: fields of the model that the source does not say, or not right.

    Raises:
      FileNotFoundError: nothing is there, or a published file cannot be downloaded.
      ValueError: damaged; of a kind that is not known; or not the parameters of a
        model: an array is missing or unexpected, or shapes contradict each other;
        or the source says another normalisation than `mean` and `std`.
    """
    given = normalisation(mean, std, "--mean and --std")
    name = os.fspath(source)
    if not name or name.startswith(("http://", "https://")):
        raise ValueError(
            f"{name!r} are no weights; expected a run's folder, a file, or a published "
            f"name: {', '.join(published.PUBLISHED)}."
        )
    path = epath.Path(name).expanduser()
    entry = published.PUBLISHED.get(name)
    suffix = path.suffix if entry is None else entry.suffix
    if path.is_dir():
        weights = _read_run(path, step, best, ema)
        _check_agreed(f"{name} is a run, which", CENTRED, given)
    elif (
        step is not None
        or best is not None
        or (ema and suffix.lower() not in TORCH_SUFFIXES)
    ):
        wanted = f"no step {step}" if best is None else "no best checkpoint"
        wanted = "no averaged parameters" if ema else wanted
        raise ValueError(f"{name} is no run's folder: it has {wanted}.")
    elif path.exists():
        weights = _read_any_file(path, given, model or {}, ema)
    elif entry is not None:
        _check_agreed(f"{name} is published, and", entry.normalisation, given)
        ema = entry.ema if ema is None else ema
        file = published.fetch(name)
        weights = _read_file(file, entry.normalisation, {}, ema, published.IMAGE_SIZE)
        weights = dataclasses.replace(
            weights, origin="published", preprocess=entry.preprocess
        )
    else:
        raise FileNotFoundError(
            f"There are no weights {name}: no run's folder, no file, and not one of "
            f"the published names {known.nearest(name, published.PUBLISHED)}."
        )
    if model:
        weights = dataclasses.replace(weights, model=weights.model | dict(model))
    params, stats = weights.params, weights.stats
    if dtype is not None:
        params = cast(params, dtype)
        stats = cast(stats, "float32")
    for array, count in not_finite({**params, **stats}).items():
        logger.warning("%s: %d values of %s are not finite.", name, count, array)
    size = weights.image_size or tree.told_image_size(params, weights.model)
    weights = dataclasses.replace(
        weights, params=params, stats=stats, image_size=size, source=name
    )
    _check_class_names(weights)
    if size is not None:
        checked_image_size(weights)
    return weights


def checked_image_size(
    weights: Weights, called: Callable[[str], str] = str
) -> tuple[int, int]:
    """Returns the image size, if all that a model needs to know is there and fits.

    Args:
      weights: weights of a model.
      called: gives the name of an array for people, by that in our tree.

    Raises:
      ValueError: the image size is not known; the arrays are not those of the model at
        this size; a field has a value that there is not; or more or fewer names than
        classes.
    """
    _check_class_names(weights)
    size, count = weights.image_size, tree.tokens(weights.params)
    if size is None:
        why = f"are for {count} tokens, which make no square, and " if count else ""
        raise ValueError(
            f"The weights {weights} {why}do not say their image size; "
            "`python -m mlp_mixer.convert SOURCE NEW.safetensors "
            "--image_size=HEIGHT,WIDTH` writes some that do."
        )
    try:
        model = models.create(**weights.model, num_classes=weights.num_classes)
        variables = tree.variables(model, size)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    expected = tree.shapes(variables)
    found = tree.shapes(weights.variables)
    if found == expected:
        return size
    tokens = tree.tokens(variables["params"])
    if count != tokens:
        (h, w), (ph, pw) = size, model.patch_size
        raise ValueError(
            f"{weights}: a {h}x{w} image makes {tokens} tokens of {ph}x{pw} pixels, "
            f"but the weights are for {count}; give the image size that they were "
            "trained at."
        )
    raise ValueError(
        f"{weights} has not the arrays of its model, {tree.describe(weights.model)}:\n"
        + listed(tree.differences(found, expected, called))
    )


def _check_class_names(weights: Weights) -> None:
    classes, names = weights.num_classes, weights.class_names
    if classes and names and len(names) != classes:
        raise ValueError(
            f"{weights} has {len(names):,} names of classes for a head of {classes:,}."
        )


def cast(params: Mapping[str, Any], dtype: str) -> Params:
    """The parameters in a dtype of `DTYPES`.

    Raises:
      ValueError: there is no such dtype.
    """
    wanted = known.pick("dtype", dtype, DTYPES)
    flat = {k: np.asarray(x, wanted) for k, x in leaves(params)}
    return unflatten_dict(flat, sep="/")


def not_finite(params: Mapping[str, Any]) -> dict[str, int]:
    """{array: how many of its values are infinite or not a number}, where any is."""
    counts = {
        name: int(x.size - np.isfinite(np.asarray(x, np.float32)).sum())
        for name, x in leaves(params)
    }
    return {name: count for name, count in counts.items() if count}


def _read_run(
    folder: epath.Path, step: int | None, best: str | None, ema: bool | None
) -> Weights:
    from mlp_mixer import checkpoint, evaluators, workdir  # only a run needs Orbax

    if not all((folder / part).exists() for part in ("config.json", "checkpoints")):
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json and checkpoints). Name a folder "
            "that `python -m mlp_mixer.train` has written, e.g. runs/digits, or a file."
        )
    config = workdir.load(folder)
    evals = config.evals.to_dict()
    names = workdir.load_class_names(folder, config.dataset.num_classes)
    averaged = config.optim.ema > 0 if ema is None else ema
    if averaged and not config.optim.ema:
        raise ValueError(
            f"{folder} keeps no average of its parameters, its recipe's optim.ema is "
            "0; without --ema you get the last ones."
        )
    at, variables = checkpoint.restore_variables(
        folder / "checkpoints",
        step=step,
        best=best,
        more_is_better=best is None or evaluators.more_is_better(evals, best),
        ema=averaged,
    )
    model = config.model.to_dict()
    weights = Weights(
        variables.pop("params"),
        f"run at step {at}" + (", averaged" if averaged else ""),
        image_size=model.pop("image_size"),
        model=model,
        stats=variables,
        class_names=tuple(names) if names else None,
        preprocess=evaluators.preprocess_of_predictions(evals),
        dtype=config.run.dtype,
        step=at,
    )
    if weights.num_classes != config.dataset.num_classes:
        raise ValueError(
            f"The checkpoint of {folder} at step {at} is not of its config.json: "
            f"it has {weights.num_classes} classes, that says "
            f"{config.dataset.num_classes}."
        )
    return weights


def _read_any_file(
    path: epath.Path,
    given: Normalisation | None,
    model: Mapping[str, Any],
    ema: bool | None,
) -> Weights:
    """Reads a file that is here, or on a bucket, which is copied for that long."""
    if "://" not in os.fspath(path):
        return _read_file(pathlib.Path(path), given, model, ema)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        with path.open("rb") as there, copy.open("wb") as here:
            shutil.copyfileobj(there, here, 2**24)
        return _read_file(copy, given, model, ema)


def _read_file(
    path: pathlib.Path,
    given: Normalisation | None,
    model: Mapping[str, Any],
    ema: bool | None = None,
    image_size: tuple[int, int] | None = None,
) -> Weights:
    """The arrays and what the file states of them, with the normalisation folded."""
    suffix = path.suffix.lower()
    metadata: dict[str, str] = {}

    def model_arrays(arrays: Flat, metadata: Mapping[str, str]) -> "_ModelArrays":
        return _model_arrays(arrays, _stated_fields(metadata, path), path)

    if suffix == ".npz":
        arrays, metadata = npz.read(path, model_arrays)
    elif suffix == ".safetensors":
        arrays, metadata = safetensors.read(path, model_arrays)
    elif suffix in TORCH_SUFFIXES:
        arrays = torch_files.read(
            path, lambda arrays: model_arrays(arrays, {}), ema=ema
        )
    else:
        raise ValueError(
            f"{path} ends in {suffix!r}; weights are read from a run's folder, from "
            f".npz, .safetensors, {', '.join(TORCH_SUFFIXES)}."
        )
    found = model_arrays(arrays, metadata)
    origin, fields = f"{suffix[1:]} file", _stated_fields(metadata, path)
    fields["stats"] = unflatten_dict(found.stats, sep="/")
    if image_size is not None:
        fields["image_size"] = image_size
    images, told = given or CENTRED, dict[str, Any]()
    if found.names is not None:
        origin += f", {found.names}"
        told["gelu"] = "exact"
    if METADATA in metadata:
        _check_agreed(f"{path} was written by mlp_mixer, and", CENTRED, given)
    elif found.names is not None:
        config = hub.read_config_beside(path, found.file)
        _check_agreed(f"{path}, says {config.path},", config.images, given)
        fields |= _fitting_fields(config, found)
        usual = Normalisation(*getattr(found.file, "NORMALISATION", CENTRED))
        images, told["gelu"] = given or config.images or usual, config.gelu or "exact"
        if given is None and config.images is None:
            origin += ", normalisation assumed"
            logger.warning(
                "%s does not say what its images were normalised by (%s). It is taken "
                "to be for %s, and for the %s GELU. If it is not, "
                "`python -m mlp_mixer.convert %s NEW.safetensors --mean=… --std=…` "
                "makes it so: 0.5 and 0.5 for images in [-1, 1], 0 and 1 for [0, 1], "
                "0.485,0.456,0.406 and 0.229,0.224,0.225 for ImageNet's; and "
                "--gelu=tanh for Google's own.",
                *(path, config.why_silent, images, told["gelu"], path),
            )
        if "mean" in models.declared(tree.family_name(found.file)):
            # The model normalises its images itself, of three channels or of one.
            channels = tree.sizes(tree.shapes(found.params), found.file).get("x")
            told |= {k: x[:channels] for k, x in images._asdict().items()}
            images = CENTRED
    declared = models.declared(tree.family_name(found.file))
    told = {k: v for k, v in told.items() if k in declared}
    fields["model"] = told | fields.get("model", {}) | dict(model)
    try:
        if found.names is not None:
            found.names.check_buffers(arrays, found.params)
        params = unflatten_dict(fold(found.params, images), sep="/")
        weights = Weights(params, origin, normalisation=images, **fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found.names is not None and METADATA not in metadata:
        weights = _with_usual_image_size(weights, path)
    if found.names is not None and weights.image_size:
        checked_image_size(
            dataclasses.replace(weights, source=os.fspath(path)), found.names.for_people
        )
    return weights


def _with_usual_image_size(weights: Weights, path: pathlib.Path) -> Weights:
    """The weights with the image size of their paper, where nothing says another.

    Only of a model that takes any size, or arrays would be tied to theirs.
    """
    size = weights.image_size or tree.told_image_size(weights.params, weights.model)
    if size or tree.tokens(weights.params) is not None:
        return dataclasses.replace(weights, image_size=size)
    side, _ = models.counted(weights.model["name"])
    try:
        model = models.create(**weights.model, num_classes=weights.num_classes)
        variables = tree.variables(model, (side, side))
    except ValueError:
        return weights
    if tree.shapes(variables["params"]) != tree.shapes(weights.params):
        return weights
    logger.warning(
        "%s does not say its image size, and a %s takes any: %d x %d px are assumed. "
        "If it is for others, `python -m mlp_mixer.convert %s NEW.safetensors "
        "--image_size=HEIGHT,WIDTH` makes it say so.",
        *(path, tree.describe(weights.model), side, side, path),
    )
    return dataclasses.replace(weights, image_size=(side, side))


class _ModelArrays(NamedTuple):
    """The arrays of one model, by their names in our tree."""

    params: Flat
    stats: Flat
    file: ModuleType  # the architecture's
    names: foreign.Names | None  # whose the names were, if not ours


def _model_arrays(
    arrays: Flat, fields: Mapping[str, Any], source: object
) -> _ModelArrays:
    """Returns the arrays of a file, if they are those of one model.

    Args:
      arrays: arrays, or what has their names, shapes and dtypes.
      fields: what the file states of them.
      source: the file.

    Raises:
      ValueError: they are not; names what is wrong as the source does.
    """
    stated = fields.get("model", {})
    file = models.family(stated["name"]) if "name" in stated else None
    names = foreign.find(arrays, file)
    file = file or (names.file if names else tree.find_family(arrays))
    if file is None:
        strange = [f"unexpected: {name} {x.shape}" for name, x in arrays.items()]
        raise ValueError(
            f"{source} does not hold the parameters of a model that is known here "
            f"({', '.join(models.families())}):\n{listed(strange)}"
        )
    try:
        flat = names.with_our_names(arrays) if names else dict(arrays)
    except ValueError as error:
        raise ValueError(f"{source}: {error}.") from error

    called = names.for_people if names else str
    collections = {tree.STATISTICS} if names else fields.get("stats", ())
    starts = tuple(f"{collection}/" for collection in collections)
    stats = {name: x for name, x in flat.items() if name.startswith(starts)}
    if not names:  # the model itself says which there are
        flat = {name: x for name, x in flat.items() if name not in stats}
    expected = tree.layout(flat, file)
    wrong = [
        f"dtype: {called(name)} is {x.dtype}, expected floats"
        for name, x in flat.items()
        if name in expected and not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    shapes = {name: x.shape for name, x in flat.items()}
    wrong += tree.problems(shapes, file, called)
    if not wrong and "name" in stated:
        wrong = [
            f"{field}: {stated[field]} is stated, the arrays have {value}"
            for field, value in tree.geometry(shapes, file).items()
            if stated[field] != value and not _same_arrays(file, stated[field], value)
        ]
    if wrong:
        name = tree.family_name(file)
        raise ValueError(
            f"{source} does not hold the parameters of one {name}:\n{listed(wrong)}"
        )
    params = {name: x for name, x in flat.items() if name not in stats}
    return _ModelArrays(params, stats, file, names)


def _same_arrays(file: ModuleType, form: Any, other: Any) -> bool:
    """Whether two forms of an architecture have the same arrays."""
    forms = axes_by_form(file)
    return form in forms and other in forms and forms[form] == forms[other]


def _check_agreed(
    where: str, stated: Normalisation | None, given: Normalisation | None
) -> None:
    if stated is not None and given is not None and stated != given:
        raise ValueError(
            f"{where} is for {stated}, but --mean and --std say {given}. Leave them "
            "out, or correct what is wrong."
        )


def _fitting_fields(config: hub.Config, found: _ModelArrays) -> dict[str, Any]:
    """What a config.json says besides and fits the arrays; what does not is logged."""
    sides = tree.sizes(tree.shapes(found.params), found.file)
    classes = sides.get("k")
    fields: dict[str, Any] = {"preprocess": config.preprocess}
    if classes and config.num_classes not in (None, classes):
        raise ValueError(
            f"{config.path} says num_classes {config.num_classes}, the weights beside "
            f"it have {classes}: is it theirs? Correct it, or move it away."
        )
    if config.image_size is not None:
        # What an architecture has no letter for, its arrays do not contradict.
        (h, w), ph, pw = config.image_size, sides.get("ph", 1), sides.get("pw", 1)
        tokens = h // ph * (w // pw)
        if (h % ph, w % pw, tokens) == (0, 0, sides.get("s", tokens)):
            fields["image_size"] = config.image_size
        else:
            logger.warning(
                "%s says that images are %d x %d px; the weights beside it are not.",
                *(config.path, h, w),
            )
    if config.class_names is not None:
        if len(config.class_names) == classes:
            fields["class_names"] = config.class_names
        else:
            logger.warning(
                "%s names %d classes; the weights beside it have %s.",
                *(config.path, len(config.class_names), classes or "no head"),
            )
    return fields


# --- Metadata -------------------------------------------------------------------------

# JSON of these fields of `Weights`, as far as they are known, and of the format: in a
# safetensors file's metadata, and as an array of bytes in an npz file that is not of a
# published architecture. Format 1, which does not say so, has Mixers: "gelu" and no
# "model".
METADATA, FORMAT = "mlp_mixer", 2
_IS_FIELD: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: (
        isinstance(value, dict) and isinstance(value.get("name"), str)
    ),
    "gelu": lambda value: isinstance(value, str),
    "stats": lambda value: _is_list(value, str),
    "image_size": lambda value: _is_list(value, int) and len(value) == 2,
    "class_names": lambda value: _is_list(value, str),
    "preprocess": lambda value: isinstance(value, str),
}


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(inner) is kind for inner in value)


def _metadata(weights: Weights) -> dict[str, str]:
    values = {field: getattr(weights, field, None) for field in _IS_FIELD}
    # The versions that know no "model" read "gelu" alone.
    values |= {"gelu": weights.model.get("gelu"), "stats": [*weights.stats] or None}
    known = {field: value for field, value in values.items() if value is not None}
    content = {"format": FORMAT, "version": mlp_mixer.__version__, **known}
    return {METADATA: json.dumps(content)}


def _stated_fields(metadata: Mapping[str, str], path: pathlib.Path) -> dict[str, Any]:
    """Fields of `Weights` from our metadata, as far as this version has them."""
    strange = f"{path} has metadata that is not ours"
    content = files.parse_json(metadata.get(METADATA, "{}"), f"{strange}: it")
    number = content.get("format", 1)
    if type(number) is int and number > FORMAT:
        writer = brief(str(content.get("version", "a later version")), 60)
        raise ValueError(
            f"{path} has the format {number}, written by mlp_mixer {writer}; this "
            f"version reads the formats 1 to {FORMAT}. Read it with the version that "
            "wrote it, or a later one."
        )
    fields = {field: content[field] for field in _IS_FIELD if field in content}
    for field, value in fields.items():
        if not _IS_FIELD[field](value):
            raise ValueError(f"{strange}: {field} is {brief(value)}.")
    fields = _with_tuples(fields)
    gelu = fields.pop("gelu", None)
    if "model" in fields:
        try:
            values = models.fields(**fields["model"])
        except ValueError as error:
            raise ValueError(f"{strange}: {error}") from error
        fields["model"] = {"name": fields["model"]["name"], **values}
    elif gelu is not None:  # format 1, which had Mixers alone
        fields["model"] = {"gelu": gelu}
    return fields


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# --- Writing --------------------------------------------------------------------------


def write_npz(weights: Weights, path: str | os.PathLike[str]) -> None:
    """Writes float32 in the published layout, which the authors' code loads as it is.

    Files of an architecture that nobody has published so say what they are besides.
    """
    flat = leaves(weights.params | weights.stats)
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in flat}
    if not published.is_published_as_npz(weights.architecture):
        for name, text in _metadata(weights).items():
            arrays[name] = np.frombuffer(text.encode(), np.uint8)
    with files.writing(path) as file:
        np.savez(file, **arrays)


def lost_in_npz(weights: Weights) -> dict[str, Any]:
    """What a reader of `write_npz` takes for something else: {field: value}."""
    if not published.is_published_as_npz(weights.architecture):
        return {}
    again = Weights(weights.params, "")
    lost = {k: v for k, v in weights.model.items() if type(v) is str}
    lost = {k: v for k, v in lost.items() if k != "name" and v != again.model[k]}
    size = weights.image_size
    if size and size != tree.told_image_size(weights.params, weights.model):
        lost["image_size"] = f"{size[0]} × {size[1]} px"
    return lost


def write_safetensors(
    weights: Weights, path: str | os.PathLike[str], *, names: str = "ours"
) -> None:
    """Writes every array in its own dtype, and the other fields as metadata.

    Args:
      weights: to write.
      path: the file to write.
      names: "ours", those of our tree, "timm" or "authors".

    Raises:
      ValueError: timm, or the authors, have no such model.
    """
    known.require("names", names, NAMES)
    flat = dict(leaves(weights.params | weights.stats))
    if names != "ours":
        theirs = foreign.names_of(weights.architecture, names, weights.model)
        flat = theirs.with_their_names(flat)
    with files.writing(path) as out:
        out.write(safetensors.to_bytes(flat, _metadata(weights)))
