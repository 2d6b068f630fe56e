"""The mean and standard deviation that images are normalised by, folded into the stem.

Everything here is for images in [-1, 1], which is levels from 0 to 1 less 0.5, over
0.5. A stem that is linear and does not pad makes weights for any other normalisation
weights for this one, exactly but for rounding. A model with another stem normalises its
images itself: it has the fields `mean` and `std`, and nothing is folded.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Levels = tuple[float, float, float]
Stated = float | int | Sequence[float | int]  # one number, or red, green, blue


class Normalisation(NamedTuple):
    """What is subtracted from levels in [0, 1], then divided by: red, green, blue."""

    mean: Levels
    std: Levels

    def __str__(self) -> str:
        return (
            f"mean {_levels_in_words(self.mean)} and std {_levels_in_words(self.std)}"
        )


CENTRED = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def normalisation(mean: Any, std: Any, where: object) -> Normalisation | None:
    """Returns the normalisation that someone states, checked; None of two Nones.

    Args:
      mean: a number from 0 to 1, or three: red, green, blue.
      std: likewise, and more than 0.
      where: what states them, for errors.

    Raises:
      ValueError: they are no such numbers, or one of the two is None.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        has, lacks = ("std", "mean") if mean is None else ("mean", "std")
        raise ValueError(f"{where}: there is a {has} and no {lacks}; give both.")
    return Normalisation(_levels("mean", mean, where), _levels("std", std, where))


def _levels(field: str, values: Any, where: object) -> Levels:
    given = list(values) if isinstance(values, list | tuple) else [values]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in given)
    if numbers and len(given) in (1, 3) and all(0 <= x <= 1 for x in given):
        red, green, blue = map(float, given * (3 // len(given)))
        if field == "mean" or min(red, green, blue) > 0:
            return red, green, blue
    value = str(values)[:80]
    limits = "from 0 to 1" if field == "mean" else "above 0, at most 1"
    hint = ""
    if numbers and any(1 < x <= 255 for x in given):
        hint = " Levels from 0 to 255? Divide mean and std by 255."
    raise ValueError(
        f"{where}: {field} is {value}; expected a number {limits}, or three: red, "
        f"green, blue.{hint}"
    )


def fold(
    flat: Mapping[str, np.ndarray], images: Normalisation
) -> dict[str, np.ndarray]:
    """Returns the parameters for images in [-1, 1] of those for other images.

    With x in [-1, 1], ((x + 1) / 2 - mean) / std is x · scale + offset. The stem is
    computed in float64 and kept in float32 at least: rounded to bfloat16 its bias
    would move.

    Args:
      flat: {name in our tree: array}.
      images: the normalisation of the images that they are for.
    """
    if images == CENTRED:
        return dict(flat)
    scale = 0.5 / np.array(images.std)
    offset = (0.5 - np.array(images.mean)) / np.array(images.std)
    try:
        kernel, bias = (flat[f"stem/{part}"] for part in ("kernel", "bias"))
    except KeyError as error:
        raise ValueError(
            f"Weights for images of {images} need a stem with a bias to become weights "
            f"for {CENTRED}; there is no {error}."
        ) from error
    wide = kernel.astype(np.float64)
    folded = {
        "stem/kernel": wide * scale[:, None],
        "stem/bias": bias.astype(np.float64) + np.einsum("hwrc,r->c", wide, offset),
    }
    # No less than float32.
    kept = {k: np.promote_types(flat[k].dtype, np.float32) for k in folded}
    return {**flat, **{k: x.astype(kept[k]) for k, x in folded.items()}}


def _levels_in_words(levels: Levels) -> str:
    values = levels[:1] if len(set(levels)) == 1 else levels
    return ", ".join(f"{x:.9g}" for x in values)
