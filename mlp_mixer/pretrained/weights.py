"""Weights in and out of files, checked: what is wrong with a file is one error.

The current npz layout is for the world, safetensors for ourselves: it keeps bfloat16,
and carries checksums and what else a model needs to know.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from mlp_mixer import files, known
from mlp_mixer.data import class_names
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models.derivatives import GELUS
from mlp_mixer.models.model import check_divisible
from mlp_mixer.pretrained import hub, npz, published, safetensors, timm, tree
from mlp_mixer.pretrained.normalisation import (
    CENTRED,
    Normalisation,
    Stated,
    fold,
    normalisation,
)
from mlp_mixer.pretrained.tree import Params
from mlp_mixer.text import brief, listed

logger = logging.getLogger(__name__)

NAMES = ("ours", "timm")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
Flat = dict[str, np.ndarray]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, and what a model needs to know besides.

    Attributes:
      params: the official tree, for images in [-1, 1]: nested dicts of NumPy arrays.
      said: what they come from, for people.
      gelu: "tanh" (the authors') or "exact" (timm's).
      image_size: (height, width) in pixels; None if the file does not say and the
        tokens make no square.
      class_names: by class; None if they have no names.
      preprocess: the evaluation protocol of the run; None if it is not known.
      source: the name that they were read by; None if they were made.
      normalisation: what the source's images were normalised by; folded into `params`.
    """

    params: Params
    said: str
    gelu: str = "tanh"
    image_size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: str | None = None
    source: str | None = None
    normalisation: Normalisation = CENTRED

    @property
    def called(self) -> str:
        """The source and what it is, for people."""
        return f"{self.source} ({self.said})" if self.source else self.said


# --- Reading --------------------------------------------------------------------------


def load(source: str | os.PathLike[str], *, dtype: str | None = "float32") -> Params:
    """Returns the parameters at `source`: `read(source).params`."""
    return read(source, dtype=dtype).params


def read(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = "float32",
    step: int | None = None,
    mean: Stated | None = None,
    std: Stated | None = None,
) -> Weights:
    """Reads weights of any geometry from any source, for images in [-1, 1].

    Values that are not finite are reported in the log, by array. So is what is taken
    for granted of a file with timm's names that says no mean and standard deviation;
    they are read from a config.json beside it, as timm and the hub write one.

    Args:
      source: a run's folder, a file, or a published name such as
        "imagenet1k/Mixer-B_16", which is downloaded once (see `published`).
      dtype: dtype of the arrays, a key of `DTYPES`; None keeps the file's.
      step: step of a run's checkpoint; the newest intact one by default.
      mean, std: what the images that the weights are for were normalised by, in levels
        from 0 to 1, if the source does not say it: a number, or red, green, blue.

    Raises:
      FileNotFoundError: nothing is there, or a published file cannot be downloaded.
      ValueError: damaged; of a kind that is not known; or not the parameters of an
        MLP-Mixer: an array is missing or unexpected, or shapes contradict each other;
        or the source says another normalisation than `mean` and `std`.
    """
    given = None
    if mean is not None or std is not None:
        given = normalisation(mean, std, "--mean and --std")
    name = os.fspath(source)
    if not name or name.startswith(("http://", "https://")):
        raise ValueError(
            f"{name!r} are no weights; expected a run's folder, a file, or a published "
            f"name: {', '.join(published.PUBLISHED)}."
        )
    path = epath.Path(name).expanduser()
    if path.is_dir():
        flat, weights = _read_run(path, step)
        _check_agreed(f"{name} is a run, which", CENTRED, given)
    elif step is not None:
        raise ValueError(f"{name} is no run's folder: it has no step {step}.")
    elif path.exists():
        if "://" in name:
            raise ValueError(f"{name} is a file elsewhere; copy it here first.")
        flat, weights = _read_file(pathlib.Path(path), given)
    elif name in published.PUBLISHED:
        _check_agreed(f"{name} is published, and", CENTRED, given)
        flat, weights = _read_file(published.fetch(name), None)
        weights = dataclasses.replace(weights, said="published")
    else:
        near = known.nearest(name, published.PUBLISHED)
        raise FileNotFoundError(
            f"There are no weights {name}: no run's folder, no file, and not one of "
            f"the published names {near}."
        )
    params = unflatten_dict(fold(flat, weights.normalisation), sep="/")
    if dtype is not None:
        params = cast(params, dtype)
    for array, count in not_finite(params).items():
        logger.warning("%s: %d values of %s are not finite.", name, count, array)
    size = weights.image_size or tree.square_image(params)
    weights = dataclasses.replace(weights, params=params, image_size=size, source=name)
    count = tree.geometry(params)["num_classes"]
    if weights.class_names and count not in (None, len(weights.class_names)):
        raise ValueError(
            f"{name} has {len(weights.class_names):,} names of classes for a head of "
            f"{count:,}."
        )
    if size is not None:
        check(weights)
    return weights


def check(weights: Weights) -> tuple[int, int]:
    """Returns the image size, if all that a model needs to know is there and fits.

    Raises:
      ValueError: the image size is not known or makes other tokens than the parameters
        are for; there is no such GELU; or more or fewer names than classes.
    """
    known.require(f"{weights.called}: gelu", weights.gelu, GELUS)
    classes, names = tree.geometry(weights.params)["num_classes"], weights.class_names
    if classes and names and len(names) != classes:
        raise ValueError(
            f"{weights.called}: {len(names)} classes are named, but the head has "
            f"{classes}."
        )
    count = tree.tokens(weights.params)
    if weights.image_size is None:
        raise ValueError(
            f"The weights {weights.called} are for {count} tokens, which make no "
            "square, and do not say their image size; `python -m mlp_mixer.convert "
            "SOURCE NEW.safetensors --image_size=HEIGHT,WIDTH` writes some that do."
        )
    (h, w), (ph, pw) = weights.image_size, tree.geometry(weights.params)["patch_size"]
    try:
        check_divisible((h, w), (ph, pw))
    except ValueError as error:
        raise ValueError(f"{weights.called}: {error}") from error
    if (h // ph) * (w // pw) != count:
        raise ValueError(
            f"{weights.called}: a {h}x{w} image makes {h // ph * (w // pw)} tokens of "
            f"{ph}x{pw} pixels, but the weights are for {count}; give the image size "
            "that they were trained at."
        )
    return h, w


def cast(params: Params, dtype: str) -> Params:
    """The parameters in a dtype of `DTYPES`.

    Raises:
      ValueError: there is no such dtype.
    """
    wanted = known.pick("dtype", dtype, DTYPES)
    flat = {k: np.asarray(x, wanted) for k, x in leaves(params)}
    return unflatten_dict(flat, sep="/")


def not_finite(params: Params) -> dict[str, int]:
    """{array: how many of its values are infinite or not a number}, where any is."""
    counts = {
        name: int(x.size - np.isfinite(np.asarray(x, np.float32)).sum())
        for name, x in leaves(params)
    }
    return {name: count for name, count in counts.items() if count}


def _read_run(folder: epath.Path, step: int | None) -> tuple[Flat, Weights]:
    if not all((folder / part).exists() for part in ("config.json", "checkpoints")):
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json and checkpoints). Name a folder "
            "that `python -m mlp_mixer.train` has written, e.g. runs/digits, or a file."
        )
    # Here, not above: `import mlp_mixer.pretrained` must not load Orbax.
    from mlp_mixer import checkpoint, recipe

    config = recipe.read(folder / "config.json")
    names = class_names.of_run(folder / "class_names.json", config.dataset.num_classes)
    step, params = checkpoint.restore_params(folder / "checkpoints", step=step)
    flat = _checked(dict(leaves(params)), folder)
    sections = config.evals.values()
    kinds = ((section.type, section.preprocess) for section in sections)
    return flat, Weights(
        {},
        f"run at step {step}",
        gelu=config.model.gelu,
        image_size=config.model.image_size,
        class_names=tuple(names) if names else None,
        preprocess=next((p for kind, p in kinds if kind == "accuracy"), None),
    )


def _read_file(path: pathlib.Path, given: Normalisation | None) -> tuple[Flat, Weights]:
    """The arrays and what is said of them, with no normalisation folded yet."""
    suffix = path.suffix.lower()
    metadata: dict[str, str] = {}

    def check_declared(arrays: Flat) -> None:
        _checked(arrays, path)

    if suffix == ".npz":
        arrays = npz.read(path, check_declared)
    elif suffix == ".safetensors":
        arrays, metadata = safetensors.read(path, check_declared)
    elif suffix in TORCH_SUFFIXES:
        arrays = timm.read_torch(path, check_declared)
    else:
        raise ValueError(
            f"{path} ends in {suffix!r}; weights are read from a run's folder, from "
            f".npz, .safetensors, {', '.join(TORCH_SUFFIXES)}."
        )
    fields = _known(metadata.get(METADATA, "{}"), path)
    flat = _checked(arrays, path)
    kind = f"{suffix[1:]} file"
    if timm.is_timm(arrays):
        kind, fields = f"{kind}, timm's names", {"gelu": "exact", **fields}
    if METADATA in metadata:
        _check_agreed(f"{path} was written by mlp_mixer, and", CENTRED, given)
    elif timm.is_timm(arrays):
        return flat, _of_timm(path, flat, kind, given)
    return flat, Weights({}, kind, normalisation=given or CENTRED, **fields)


def _checked(arrays: Flat, source: object) -> Flat:
    """The arrays of one Mixer, by their names in our tree.

    Raises:
      ValueError: they are not; names what is wrong as the source does.
    """
    is_timm = timm.is_timm(arrays)
    try:
        flat = timm.ours(arrays) if is_timm else arrays
    except ValueError as error:
        raise ValueError(f"{source}: {error}.") from error
    called = _in_timm if is_timm else str
    expected = tree.layout(flat)
    wrong = [
        f"dtype: {called(name)} is {x.dtype}, expected floats"
        for name, x in flat.items()
        if name in expected and not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    wrong += tree.problems({name: x.shape for name, x in flat.items()}, called)
    if wrong:
        raise ValueError(
            f"{source} does not hold the parameters of one MLP-Mixer:\n{listed(wrong)}"
        )
    return flat


def _in_timm(name: str) -> str:
    theirs = timm.their_name(name)
    return name if theirs == name else f"{theirs} as {name}"


def _known(metadata: str, path: pathlib.Path) -> dict[str, Any]:
    """Fields of `Weights` from our metadata, as far as this version has them."""
    try:
        said = files.parse_json(metadata, "what it says")
        fields = {field: said[field] for field in KNOWN if field in said}
        for field, value in fields.items():
            if not _FITS[field](value):
                raise ValueError(f"{field} is {brief(value)}")
    except ValueError as error:
        raise ValueError(f"{path} has metadata that is not ours: {error}.") from error
    for field in {"image_size", "class_names"} & fields.keys():
        fields[field] = tuple(fields[field])
    return fields


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(inner) is kind for inner in value)


def _check_agreed(
    where: str, said: Normalisation | None, given: Normalisation | None
) -> None:
    if said is not None and given is not None and said != given:
        raise ValueError(
            f"{where} is for {said}, but --mean and --std say {given}. Leave them out, "
            "or correct what is wrong."
        )


def _of_timm(
    path: pathlib.Path, flat: Flat, kind: str, given: Normalisation | None
) -> Weights:
    """Of a file that somebody else wrote: what its config.json says, and what not."""
    config, why = hub.beside(path), f"no {hub.NAME} is beside it"
    if config is not None and not config.is_of_a_mixer():
        why = f"{config.path} is of a {config.architecture}"
        config = None
    elif config is not None:
        why = f"nor does {config.path}"
        _check_agreed(f"{path}, says {config.path},", config.images, given)
    config = config or hub.Config(path)
    images = given or config.images
    if images is None:
        kind = f"{kind}, normalisation assumed"
        logger.warning(
            "%s does not say what its images were normalised by (%s). It is taken to "
            "be for %s, images in [-1, 1], and for the %s GELU. If it is not, "
            "`python -m mlp_mixer.convert %s NEW.safetensors --mean=… --std=…` makes "
            "it so: 0 and 1 for images in [0, 1], 0.485,0.456,0.406 and "
            "0.229,0.224,0.225 for ImageNet's; and --gelu=tanh for Google's own.",
            *(path, why, CENTRED, config.gelu or "exact", path),
        )
    return Weights(
        {},
        kind,
        gelu=config.gelu or "exact",
        normalisation=images or CENTRED,
        **_fitting(config, flat),
    )


def _fitting(config: hub.Config, flat: Flat) -> dict[str, Any]:
    """The image size and the names of classes that fit the arrays; others are said."""
    sides = tree.sizes({name: x.shape for name, x in flat.items()})
    classes, fields = sides.get("k"), dict[str, Any]()
    if classes and config.num_classes not in (None, classes):
        raise ValueError(
            f"{config.path} says num_classes {config.num_classes}, the weights beside "
            f"it have {classes}: is it theirs? Correct it, or move it away."
        )
    if config.image_size is not None:
        (h, w), (ph, pw) = config.image_size, (sides["ph"], sides["pw"])
        if (h % ph, w % pw, h // ph * (w // pw)) == (0, 0, sides["s"]):
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


# --- Writing --------------------------------------------------------------------------

# Of a safetensors file: JSON of these fields of `Weights`, as far as they are known.
METADATA = "mlp_mixer"
KNOWN = ("gelu", "image_size", "class_names", "preprocess")
_FITS: dict[str, Callable[[Any], bool]] = {
    "gelu": lambda value: isinstance(value, str),
    "image_size": lambda value: _is_list(value, int) and len(value) == 2,
    "class_names": lambda value: _is_list(value, str),
    "preprocess": lambda value: isinstance(value, str),
}


def write_npz(weights: Weights, path: str | os.PathLike[str]) -> None:
    """Writes the published layout, float32, which the authors' code loads as it is."""
    with files.writing(path) as file:
        npz.write(file, dict(leaves(weights.params)))


def write_safetensors(
    weights: Weights, path: str | os.PathLike[str], *, names: str = "ours"
) -> None:
    """Writes every array in its own dtype, and the other fields as metadata.

    Args:
      weights: to write.
      path: the file to write.
      names: "ours", those of the official tree, or "timm".
    """
    known.require("names", names, NAMES)
    flat = dict(leaves(weights.params))
    metadata = {
        field: value
        for field in KNOWN
        if (value := getattr(weights, field)) is not None
    }
    flat = timm.theirs(flat) if names == "timm" else flat
    with files.writing(path) as file:
        file.write(safetensors.dumps(flat, {METADATA: json.dumps(metadata)}))
