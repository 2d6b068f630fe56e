"""Weights in and out of files, checked: what is wrong with a file is one error.

The current npz layout is for the world, safetensors for ourselves: it keeps bfloat16,
and carries checksums and what else a model needs to know.
"""

import dataclasses
import difflib
import json
import logging
import os
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from mlp_mixer import atomic, checkpoint
from mlp_mixer.fingerprints import leaves
from mlp_mixer.models.layers import GELUS
from mlp_mixer.models.mixer import check_divisible
from mlp_mixer.pretrained import npz, published, safetensors, timm, tree
from mlp_mixer.pretrained.tree import Params

logger = logging.getLogger(__name__)

NAMES = ("ours", "timm")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, and what a model needs to know besides.

    Attributes:
      params: the official tree: nested dicts of NumPy arrays.
      said: where they come from, for people.
      gelu: "tanh" (the authors') or "exact" (timm's).
      image_size: (height, width) in pixels; None if the file does not say and the
        tokens make no square.
      class_names: by class; None if they have no names.
      preprocess: the evaluation protocol of the run; None if it is not known.
    """

    params: Params
    said: str
    gelu: str = "tanh"
    image_size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: str | None = None


# --- Reading --------------------------------------------------------------------------


def load(source: str | os.PathLike[str], *, dtype: str | None = "float32") -> Params:
    """Returns the parameters at `source`: `read(source).params`."""
    return read(source, dtype=dtype).params


def read(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = "float32",
    step: int | None = None,
) -> Weights:
    """Reads weights of any geometry from any source.

    Values that are not finite are reported in the log, by array.

    Args:
      source: a run's folder, a file, or a published name such as
        "imagenet1k/Mixer-B_16", which is downloaded once (see `published`).
      dtype: of the arrays, a key of `DTYPES`; None keeps the file's.
      step: of a run's checkpoint; the newest intact one by default.

    Raises:
      FileNotFoundError: nothing is there, or a published file cannot be downloaded.
      ValueError: damaged; of a kind that is not known; or not the parameters of an
        MLP-Mixer: an array is missing or unexpected, or shapes contradict each other.
    """
    name = os.fspath(source)
    if not name or name.startswith(("http://", "https://")):
        raise ValueError(
            f"{name!r} are no weights; expected a run's folder, a file, or a published "
            f"name: {', '.join(published.PUBLISHED)}."
        )
    path = epath.Path(name).expanduser()
    if path.is_dir():
        flat, weights = _read_run(path, step)
    elif step is not None:
        raise ValueError(f"{name} is no run's folder: it has no step {step}.")
    elif path.exists():
        if "://" in name:
            raise ValueError(f"{name} is a file elsewhere; copy it here first.")
        flat, weights = _read_file(pathlib.Path(path))
    elif name in published.PUBLISHED:
        flat, weights = _read_file(published.fetch(name))
        weights = dataclasses.replace(weights, said="published")
    else:
        names = published.PUBLISHED
        near = difflib.get_close_matches(name, names, len(names), 0)
        raise FileNotFoundError(
            f"There are no weights {name}: no run's folder, no file, and not one of "
            f"the published names {', '.join(near)}."
        )
    wrong = tree.problems({k: x.shape for k, x in flat.items()})
    wrong += [
        f"dtype: {k} is {x.dtype}, expected floats"
        for k, x in flat.items()
        if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f"{name} does not hold the parameters of one MLP-Mixer:\n  "
            + "\n  ".join(wrong)
        )
    params = unflatten_dict(flat, sep="/")
    if dtype is not None:
        params = cast(params, dtype)
    for array, count in not_finite(params).items():
        logger.warning("%s: %d values of %s are not finite.", name, count, array)
    size = weights.image_size or tree.square_image(params)
    weights = dataclasses.replace(weights, params=params, image_size=size)
    if size is not None:
        check(weights)
    return weights


def check(weights: Weights) -> tuple[int, int]:
    """Returns the image size, if all that a model needs to know is there and fits.

    Raises:
      ValueError: the image size is not known or makes other tokens than the parameters
        are for; there is no such GELU; or more or fewer names than classes.
    """
    if weights.gelu not in GELUS:
        raise ValueError(f"gelu {weights.gelu!r} is unknown; try {', '.join(GELUS)}.")
    classes, names = tree.geometry(weights.params)["num_classes"], weights.class_names
    if classes and names and len(names) != classes:
        raise ValueError(
            f"The weights ({weights.said}) name {len(names)} classes, but their head "
            f"has {classes}."
        )
    count = tree.tokens(weights.params)
    if weights.image_size is None:
        raise ValueError(
            f"The weights ({weights.said}) are for {count} tokens, which make no "
            "square, and do not say their image size; `python -m mlp_mixer.convert "
            "SOURCE NEW.safetensors --image_size=HEIGHT,WIDTH` writes some that do."
        )
    (h, w), (ph, pw) = weights.image_size, tree.geometry(weights.params)["patch_size"]
    check_divisible((h, w), (ph, pw))
    if (h // ph) * (w // pw) != count:
        raise ValueError(
            f"A {h}x{w} image makes {h // ph * (w // pw)} tokens of {ph}x{pw} pixels, "
            f"but the weights ({weights.said}) are for {count}; give the image size "
            "that they were trained at."
        )
    return h, w


def cast(params: Params, dtype: str) -> Params:
    """The parameters in a dtype of `DTYPES`.

    Raises:
      ValueError: there is no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; try {', '.join(DTYPES)}.")
    flat = {k: np.asarray(x, DTYPES[dtype]) for k, x in leaves(params)}
    return unflatten_dict(flat, sep="/")


def not_finite(params: Params) -> dict[str, int]:
    """{array: how many of its values are infinite or not a number}, where any is."""
    counts = {
        name: int(x.size - np.isfinite(np.asarray(x, np.float32)).sum())
        for name, x in leaves(params)
    }
    return {name: count for name, count in counts.items() if count}


Flat = dict[str, np.ndarray]


def _read_run(folder: epath.Path, step: int | None) -> tuple[Flat, Weights]:
    if not all((folder / part).exists() for part in ("config.json", "checkpoints")):
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json and checkpoints). Name a folder "
            "that `python -m mlp_mixer.train` has written, e.g. runs/digits, or a file."
        )
    config = json.loads((folder / "config.json").read_text())
    names = json.loads((folder / "class_names.json").read_text())
    step, params = checkpoint.restore_params(folder / "checkpoints", step=step)
    kinds = ((e["type"], e["preprocess"]) for e in config["evals"].values())
    return dict(leaves(params)), Weights(
        {},
        f"run at step {step}",
        gelu=config["model"]["gelu"],
        image_size=tuple(config["model"]["image_size"]),
        class_names=names and tuple(names),
        preprocess=next((p for kind, p in kinds if kind == "accuracy"), None),
    )


def _read_file(path: pathlib.Path) -> tuple[Flat, Weights]:
    suffix = path.suffix.lower()
    metadata: dict[str, str] = {}
    if suffix == ".npz":
        arrays = npz.read(path)
    elif suffix == ".safetensors":
        arrays, metadata = safetensors.read(path)
    elif suffix in TORCH_SUFFIXES:
        arrays = timm.read_torch(path)
    else:
        raise ValueError(
            f"{path} ends in {suffix!r}; weights are read from a run's folder, from "
            f".npz, .safetensors, {', '.join(TORCH_SUFFIXES)}."
        )
    try:
        said = dict(json.loads(metadata.get(METADATA, "{}")))
        fields = {field: said[field] for field in KNOWN if field in said}
        for field in {"image_size", "class_names"} & fields.keys():
            fields[field] = tuple(fields[field])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has metadata that is not ours: {error}.") from error
    if not timm.is_timm(arrays):
        return arrays, Weights({}, f"{suffix[1:]} file", **fields)
    fields = {"gelu": "exact", **fields}
    return timm.ours(arrays), Weights({}, f"{suffix[1:]} file, timm's names", **fields)


# --- Writing --------------------------------------------------------------------------

# Of a safetensors file: JSON of these fields of `Weights`, as far as they are known.
METADATA = "mlp_mixer"
KNOWN = ("gelu", "image_size", "class_names", "preprocess")


def write_npz(weights: Weights, path: str | os.PathLike[str]) -> None:
    """Writes the published layout, float32, which the authors' code loads as it is."""
    with atomic.writing(path) as file:
        npz.write(file, dict(leaves(weights.params)))


def write_safetensors(
    weights: Weights, path: str | os.PathLike[str], *, names: str = "ours"
) -> None:
    """Writes every array in its own dtype, and the other fields as metadata.

    Args:
      weights: to write.
      path: of the file.
      names: "ours", those of the official tree, or "timm".
    """
    if names not in NAMES:
        raise ValueError(f"names {names!r} are unknown; try {', '.join(NAMES)}.")
    flat = dict(leaves(weights.params))
    known = {
        field: value
        for field in KNOWN
        if (value := getattr(weights, field)) is not None
    }
    flat = timm.theirs(flat) if names == "timm" else flat
    with atomic.writing(path) as file:
        file.write(safetensors.dumps(flat, {METADATA: json.dumps(known)}))
