"""RandAugment as timm defines it, "rand-m9-mstd0.5-inc1", on uint8 images.

The recipe of DeiT (arXiv 2012.12877), with which most relatives of Mixer were trained.
It equals timm 1.0.31's `auto_augment.py` bit for bit and is another one than the
authors' in `randaugment.py`: magnitudes go from 0 to 10 and vary about their mean, the
15 operations grow with them ("inc1"), each is applied with probability 1/2 only,
geometric ones interpolate, and Pillow computes all pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL import ImageEnhance, ImageOps

from mlp_mixer.data import image_ops

Image = UInt8[np.ndarray, "h w 3"]
Picture = PIL.Image.Image
Number = int | float

LARGEST = 10  # magnitude
PROBABILITY = 0.5  # that an operation is applied, once it is drawn
# The colour outside of the image: 255 times ImageNet's mean, whatever the model's is.
FILL = (124, 116, 104)


def randaugment(
    image: Image,
    rng: np.random.Generator,
    num_layers: int,
    magnitude: Number,
    std: Number,
    interpolation: str,
) -> Image:
    """Draws `num_layers` ops from the 15, with replacement, and applies half of them.

    Args:
      image: (height, width, 3), after crop and resize.
      rng: draws for each layer the op, whether it is applied, its magnitude, its sign
        and its filter.
      num_layers: number of ops in a row; timm's default is 2.
      magnitude: mean strength of every op, 0 to 10; DeiT's is 9.
      std: standard deviation of a normally distributed magnitude, which is then clipped
        to 0 ... 10; DeiT's is 0.5.
      interpolation: a key of `image_ops.INTERPOLATIONS`, for the geometric ops: timm
        gives them that of its crop; DeiT's is "bicubic".

    Raises:
      ValueError: `magnitude`, `std` or `num_layers` is out of range.
    """
    if not 0 <= magnitude <= LARGEST:
        raise ValueError(f"magnitude is {magnitude}; it must be in 0..10, e.g. 9.")
    if not 0 <= std <= LARGEST:
        raise ValueError(f"std is {std}; it must be in 0..10, e.g. 0.5.")
    if num_layers < 0:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 0, e.g. 2.")
    names = list(OPS)
    picture = PIL.Image.fromarray(image)
    for _ in range(num_layers):
        op = OPS[names[rng.integers(len(names))]]
        if rng.random() >= PROBABILITY:
            continue
        level = float(np.clip(rng.normal(magnitude, std), 0, LARGEST))
        negate = bool(rng.integers(2))
        picture = op(picture, level, negate, image_ops.draw_filter(rng, interpolation))
    return np.array(picture)


def posterize(picture: Picture, bits: int) -> Picture:
    """Keeps the upper `bits` bits; with none, at magnitude 10, all is black.

    Of none Pillow's own, which timm calls, gives that up to version 12, and raises in
    13.
    """
    return picture.point([x >> (8 - bits) << (8 - bits) for x in range(256)] * 3)


def solarize_add(picture: Picture, addition: int) -> Picture:
    """Adds to the levels below 128, up to 255."""
    table = [min(255, x + addition) if x < 128 else x for x in range(256)]
    return picture.point(table * 3)


def rotate(picture: Picture, degrees: float, resample: image_ops.Filter) -> Picture:
    """Rotates about the centre, counter-clockwise."""
    return picture.rotate(degrees, resample=resample, fillcolor=FILL)


def shear_x(picture: Picture, slope: float, resample: image_ops.Filter) -> Picture:
    """Moves row y by `slope`·y pixels to the left; the top row stays."""
    return _affine(picture, (1, slope, 0, 0, 1, 0), resample)


def shear_y(picture: Picture, slope: float, resample: image_ops.Filter) -> Picture:
    """Moves column x by `slope`·x pixels up; the left column stays."""
    return _affine(picture, (1, 0, 0, slope, 1, 0), resample)


def translate_x(picture: Picture, share: float, resample: image_ops.Filter) -> Picture:
    """Moves the content to the left by a share of the width."""
    return _affine(picture, (1, 0, share * picture.width, 0, 1, 0), resample)


def translate_y(picture: Picture, share: float, resample: image_ops.Filter) -> Picture:
    """Moves the content up by a share of the height."""
    return _affine(picture, (1, 0, 0, 0, 1, share * picture.height), resample)


def _affine(
    picture: Picture, rows: tuple[Number, ...], resample: image_ops.Filter
) -> Picture:
    """Takes the output (x, y) from a·x + b·y + c, d·x + e·y + f of the input."""
    affine = PIL.Image.Transform.AFFINE
    return picture.transform(
        picture.size, affine, rows, resample=resample, fillcolor=FILL
    )


@dataclasses.dataclass(frozen=True)
class Op:
    """One of the 15 operations.

    Attributes:
      function: (picture) → picture, or (picture, argument) → picture; a geometric one
        also takes `resample`.
      argument: (magnitude/10, sign) → argument; None if the function has none.
      signed: whether the sign changes the argument.
      geometric: whether the function interpolates.
    """

    function: Callable[..., Picture]
    argument: Callable[[float, int], Number] | None = None
    signed: bool = False
    geometric: bool = False

    def __call__(
        self,
        picture: Picture,
        magnitude: Number,
        negate: bool,
        interpolation: image_ops.Filter,
    ) -> Picture:
        """Applies the op at a magnitude from 0 to 10."""
        if self.argument is None:
            return self.function(picture)
        more: dict[str, Any] = {"resample": interpolation} if self.geometric else {}
        argument = self.argument(magnitude / LARGEST, -1 if negate else 1)
        return self.function(picture, argument, **more)


def _enhancement(kind: Any) -> Op:
    """Blends from a simpler picture through the picture (factor 1) and beyond."""
    return Op(
        lambda picture, factor: kind(picture).enhance(factor),
        lambda share, sign: max(0.1, 1.0 + sign * (share * 0.9)),
        signed=True,
    )


def _geometric(function: Callable[..., Picture], largest: float) -> Op:
    return Op(
        function,
        lambda share, sign: sign * (share * largest),
        signed=True,
        geometric=True,
    )


# The order and the constants of timm's _RAND_INCREASING_TRANSFORMS and LEVEL_TO_ARG.
# Its translate_const, 0.45 of the side, is that of TranslateX and TranslateY, which are
# not among these: the relative ones have a constant of their own, 0.45 as well.
OPS: dict[str, Op] = {
    "AutoContrast": Op(ImageOps.autocontrast),
    "Equalize": Op(ImageOps.equalize),
    "Invert": Op(ImageOps.invert),
    "Rotate": _geometric(rotate, 30.0),
    "PosterizeIncreasing": Op(posterize, lambda share, _: 4 - int(share * 4)),
    "SolarizeIncreasing": Op(
        ImageOps.solarize, lambda share, _: 256 - min(256, int(share * 256))
    ),
    "SolarizeAdd": Op(solarize_add, lambda share, _: min(128, int(share * 110))),
    "ColorIncreasing": _enhancement(ImageEnhance.Color),
    "ContrastIncreasing": _enhancement(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhancement(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhancement(ImageEnhance.Sharpness),
    "ShearX": _geometric(shear_x, 0.3),
    "ShearY": _geometric(shear_y, 0.3),
    "TranslateXRel": _geometric(translate_x, 0.45),
    "TranslateYRel": _geometric(translate_y, 0.45),
}
