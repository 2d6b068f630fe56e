"""Models by name.

    model = models.create("mixer_b16", num_classes=1000)
    params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    logits, out = model.apply({"params": params}, image)

An architecture is one file of this package and one entry of `FAMILIES`; `model` says
what such a file declares.
"""

import dataclasses
from numbers import Integral
from types import ModuleType
from typing import Any, get_args, get_origin

from jaxtyping import Array, Float

from mlp_mixer import known
from mlp_mixer.models import (
    ccs,
    convmlp,
    cyclemlp,
    gmlp,
    hiremlp,
    imlp,
    kan_mixer,
    mixer,
    msmlp,
    ninformer,
    paramixer,
    resmlp,
    s2mlp,
    smlpnet,
    spach,
    spach_ms,
)
from mlp_mixer.models.model import Model, Run

__all__ = [
    "FAMILIES",
    "Model",
    "Run",
    "counted",
    "create",
    "declared",
    "families",
    "family",
    "features",
    "fields",
    "names",
    "pyramids",
    "stage_names",
]

FAMILIES: tuple[ModuleType, ...] = (
    mixer,
    resmlp,
    gmlp,
    smlpnet,
    paramixer,
    ninformer,
    kan_mixer,
    spach,
    imlp,
    s2mlp,
    ccs,
    cyclemlp,
    hiremlp,
    msmlp,
    convmlp,
    spach_ms,
)


def families() -> dict[str, ModuleType]:
    """Returns the architectures by their own names: {"mixer": …}."""
    return {file.__name__.rpartition(".")[2]: file for file in FAMILIES}


def names() -> list[str]:
    """Returns the names of all sizes of all architectures."""
    return [name for file in FAMILIES for name in file.SIZES]


def family(name: str) -> ModuleType:
    """Returns the file of the architecture that has a size, or is, called `name`.

    Raises:
      ValueError: there is none.
    """
    found = families() | {size: file for file in FAMILIES for size in file.SIZES}
    if name not in found:
        tries = known.nearest(str(name).lower(), [*names(), *families()])
        raise ValueError(f"model {name!r} is unknown; try {tries}.")
    return found[name]


def counted(name: str) -> tuple[int, int]:
    """Returns the paper's (side of the images in pixels, number of classes).

    Of the size called `name`, or of the first of an architecture: 224 px and 1,000
    classes, unless its file says otherwise in `COUNTED`.
    """
    file = family(name)
    size = name if name in file.SIZES else next(iter(file.SIZES))
    return getattr(file, "COUNTED", {}).get(size, (224, 1000))


def declared(name: str) -> dict[str, dataclasses.Field]:
    """Returns the fields that say what a model called `name` computes."""
    return family(name).MODEL.declared()


def fields(name: str, **overrides: Any) -> dict[str, Any]:
    """Returns all fields that say what a model called `name` computes, with values.

    Args:
      name: name of a size, or of an architecture whose sizes are all in `overrides`.
      **overrides: values of fields; None means the table's or the class's.

    Raises:
      ValueError: there is no such model or field, or a field has no value.
    """
    all_fields = declared(name)
    for field in overrides:
        if field not in all_fields:
            tries = known.nearest(field, all_fields)
            raise ValueError(f"{name} has no field {field!r}; try {tries}.")
    missing = dataclasses.MISSING
    values = {f: x.default for f, x in all_fields.items()}
    values |= family(name).SIZES.get(name, {})
    values |= {f: value for f, value in overrides.items() if value is not None}
    if without := [field for field, value in values.items() if value is missing]:
        raise ValueError(f"{name} needs {', '.join(without)}; give each a value.")
    return values


def create(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    run: Run = Run(),
    **overrides: Any,
) -> Model:
    """Returns the Flax module called `name`, of the sizes that its paper gives it.

    Args:
      name: name of a size, e.g. "mixer_b16", or of an architecture ("mixer") whose
        sizes are all in `overrides`.
      num_classes: size of the head; None returns features instead of logits.
      image_size: (height, width) in pixels; only checked: the model takes its number
        of tokens from the image at `init`.
      run: how it is computed.
      **overrides: fields of the module, e.g. `num_blocks=2`; None means the table's or
        the class's value.

    Raises:
      ValueError: unknown name or field, or the image does not fit the patches.
    """
    values = fields(name, **overrides)
    for field, declaration in declared(name).items():
        _check_size(field, values[field], declaration.type)
    if num_classes is not None:
        _check_size("num_classes", num_classes, int)
    model = family(name).MODEL(**values, num_classes=num_classes, run=run)
    if image_size is not None:
        _check_size("image_size", image_size, tuple[int, int])
        model.check_size(image_size)
    return model


# --- Dense features -------------------------------------------------------------------


def features(
    model: Model, variables: Any, image: Float[Array, "n h w 3"]
) -> dict[str, Float[Array, "n _ _ _"]]:
    """Returns the maps after the stages of a pyramid, e.g. for segmentation.

        dense = jax.jit(models.features, static_argnums=0)
        dense(model, variables, image)["stage_4"]

    They are the states before any final norm, in the dtype of the model's activations.

    Args:
      model: a model with stages.
      variables: what `model.apply` takes: {"params": …} and the model's statistics.
      image: images of any size that the model takes, values in [-1, 1].

    Returns:
      `stage_1`, … `stage_4` (n, h, w, c). A position is as many pixels as
      `model.patch_size`, then two, four and eight times as many: 4, 8, 16 and 32 in
      all papers.

    Raises:
      ValueError: the model has no stages, or the images do not fit it.
    """
    names = stage_names(model)
    _, out = model.apply(variables, image)
    return {name: out[name] for name in names}


def stage_names(model: Model) -> tuple[str, str, str, str]:
    """Returns the names that the maps of a pyramid's four stages have in its `out`.

    Raises:
      ValueError: the model has no stages; its `num_blocks` does not count by stage.
    """
    if not isinstance(getattr(model, "num_blocks", None), tuple):
        called = {file.MODEL: name for name, file in families().items()}
        name = called.get(type(model), type(model).__name__)
        raise ValueError(
            f"{name} has no stages: its state keeps one size from the first block to "
            f"the last. Models with stages are those of {', '.join(pyramids())}."
        )
    return "stage_1", "stage_2", "stage_3", "stage_4"


def pyramids() -> list[str]:
    """Returns the names of the architectures that have stages."""
    return [
        name
        for name, file in families().items()
        if all(isinstance(row["num_blocks"], tuple) for row in file.SIZES.values())
    ]


# --- Checks ---------------------------------------------------------------------------


def _check_size(field: str, value: Any, kind: Any) -> None:
    """Raises ValueError unless a size has values that a model can be made of."""
    if kind is int:
        numbers, expected = (value,), "a whole number from 1"
    elif get_origin(kind) is tuple and get_args(kind)[0] is int:
        any_number = get_args(kind)[1:] == (...,)
        count = 0 if any_number else len(get_args(kind))
        fits = isinstance(value, tuple) and len(value) == (count or max(len(value), 1))
        numbers = value if fits else (None,)
        two = "(height, width), e.g. (16, 16)"
        expected = (
            two if count == 2 else f"{count or 'a tuple of'} whole numbers from 1"
        )
    else:
        return
    if not all(map(_is_count, numbers)):
        raise ValueError(f"{field} is {value!r}; expected {expected}.")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and value > 0
