"""Parameters for another grid of patches, hence for another resolution.

What is tied to the number of tokens s, rows × columns of the grid in raster order, says
so in the letters of the architecture's `AXES`. The patch size stays, and so does all
else. Two ways:

`grow` is the paper's (arXiv 2105.01601, Appendix C): K times as many patches on each
axis. The image is cut into K×K parts, and at first each of them is processed on its
own, exactly as the old model would. The hidden layer of token mixing grows with the
tokens.

`interpolate` is ours: any other grid, with the hidden layer as wide as it was. The
weights of a hidden unit are read as an image over the grid and resampled like one.

Both take and return nested dicts of host arrays with the official names. Nothing is
modified, and what does not change is shared.
"""

import math
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float

from mlp_mixer import known
from mlp_mixer.fingerprints import Params, leaves
from mlp_mixer.pretrained import tree

Grid = tuple[int, int]  # (rows, columns) of patches

METHODS = ("grow", "interpolate")
HIDDEN = "ds"  # the letter of token mixing's hidden units


def resized(params: Params, *, old_grid: Grid, new_grid: Grid, how: str) -> Params:
    """Returns the parameters for `new_grid`, made by `grow` or by `interpolate`.

    Args:
      params: parameters; returned as they are if the grids are equal.
      old_grid: (rows, columns) of patches that `params` are for.
      new_grid: (rows, columns) of patches wanted.
      how: "grow" or "interpolate".

    Raises:
      ValueError: there is no such method, a grid does not fit the tokens, or `grow`
        cannot make this grid.
    """
    known.require("Resizing by", how, METHODS)
    _check_grid(params, old_grid)
    if new_grid == old_grid:
        return params
    _check_resizable(params)
    if how == "interpolate":
        return interpolate(params, new_grid, old_grid)
    (h, w), (new_h, new_w) = old_grid, new_grid
    factor = max(1, min(new_h // h, new_w // w))
    if new_grid != (factor * h, factor * w):
        factors = range(max(2, factor), factor + 2)
        raise ValueError(
            f"Weights for {h}x{w} patches cannot grow to {new_h}x{new_w}: the paper "
            "multiplies rows and columns by one whole number. Try "
            f"{' or '.join(f'{k * h}x{k * w}' for k in factors)}, or interpolate, "
            "which takes any grid."
        )
    return grow(params, factor, old_grid)


def grow(params: Params, factor: int, grid: Grid) -> Params:
    """Returns the parameters for `factor` times as many patches on each axis.

    The paper's procedure (Appendix C). Tokens s and hidden units d of token mixing
    become factor² times as many, so the model has to be created with factor² times the
    `tokens_mlp_dim`. Kernels become block-diagonal, a copy of the old kernel for each
    part of the image; biases repeat. The new model's tokens are the old model's tokens
    of each part, its logits the mean over the parts. The zeros are trained.

    Args:
      params: parameters; of a Mixer `token_mixing/Dense_0/kernel` becomes
        (factor²·s, factor²·d), and so on.
      factor: K, a whole number, e.g. 2 from 224 to 448 pixels.
      grid: (rows, columns) of patches that `params` are for.

    Raises:
      ValueError: `factor` is below 1, or `grid` does not fit the tokens.
    """
    if factor < 1:
        raise ValueError(
            f"factor is {factor!r}; expected a whole number of at least 1. Try "
            "interpolate, which takes any grid."
        )
    _check_grid(params, grid)
    _check_resizable(params)
    (h, w), k = grid, factor

    def tiled(tokens: Float[np.ndarray, "s ..."]) -> Float[np.ndarray, "t ..."]:
        """Copies for each part, where the big image's raster order has its tokens."""
        rest = tokens.shape[1:]
        image = tokens.reshape(h, w, *rest)
        return np.tile(image, (k, k, *[1] * len(rest))).reshape(-1, *rest)

    # The part of the image that each token of the new model belongs to.
    a, b = np.indices((k * h, k * w))
    parts = (a // h * k + b // w).ravel()

    def change(
        name: str, array: Float[np.ndarray, "..."], letters: tuple[str, ...]
    ) -> Float[np.ndarray, "..."]:
        grown = [i for i, letter in enumerate(letters) if letter in ("s", HIDDEN)]
        new = array
        for i in grown:
            new = np.moveaxis(new, i, 0)
            copies = [k * k, *[1] * (new.ndim - 1)]
            new = tiled(new) if letters[i] == "s" else np.tile(new, copies)
            new = np.moveaxis(new, 0, i)
        if len(grown) > 1:  # between parts nothing is mixed
            first, second = (
                parts if letters[i] == "s" else np.repeat(range(k * k), array.shape[i])
                for i in grown
            )
            same = np.equal.outer(first, second)
            new = np.where(same, new, np.zeros((), new.dtype))
        return np.ascontiguousarray(new)

    return _with_arrays_changed(params, change)


def interpolate(params: Params, new_grid: Grid, grid: Grid) -> Params:
    """Returns the parameters for any other grid of patches. Not the paper's procedure.

    The hidden layer keeps its width. Along the tokens, kernels and the output bias are
    images over the grid, and are resampled as sums of cosines (the DCT-II, whose
    samples lie at the patches' centres): up adds no frequency, down drops those that
    the new grid cannot hold. The input kernel is also scaled by old / new tokens: a
    hidden unit sums over all tokens, and its input shall not grow with their number.

    Resampling tokens upwards and then mixing them is therefore mixing them and then
    resampling, exactly. Up and back is the identity, and one step equals two: the laws
    that bilinear and bicubic weights, which blur, do not have. Constants stay
    constant. The price is ringing where neighbouring weights jump.

    Fine-tune afterwards: at another resolution a patch also shows another part of the
    object, which no resampling undoes.

    Args:
      params: parameters; of a Mixer `token_mixing/Dense_0/kernel` becomes
        (rows·columns, d), and so on.
      new_grid: (rows, columns) of patches wanted, each at least 1.
      grid: (rows, columns) of patches that `params` are for.

    Raises:
      ValueError: `grid` does not fit the tokens, or `new_grid` is no grid.
    """
    _check_grid(params, grid)
    _check_resizable(params)
    if min(new_grid) < 1:
        raise ValueError(
            f"new_grid is {new_grid}; expected (rows, columns) of at least 1."
        )
    matrices = [_cosines(n, m) for n, m in zip(grid, new_grid, strict=True)]

    def resample(
        field: Float[np.ndarray, "s ..."], scale: float = 1.0
    ) -> Float[np.ndarray, "t ..."]:
        image = field.astype(np.float64).reshape(*grid, -1)
        new = scale * np.einsum("yi,xj,ijd->yxd", *matrices, image, optimize=True)
        return new.reshape(-1, *field.shape[1:]).astype(field.dtype)

    def change(
        name: str, array: Float[np.ndarray, "..."], letters: tuple[str, ...]
    ) -> Float[np.ndarray, "..."]:
        for i, letter in enumerate(letters):
            if letter == "s":
                # The inputs of a product are summed over.
                inward = name.endswith("/kernel") and i == 0
                scale = math.prod(grid) / math.prod(new_grid) if inward else 1.0
                resampled = resample(np.moveaxis(array, i, 0), scale)
                array = np.ascontiguousarray(np.moveaxis(resampled, 0, i))
        return array

    return _with_arrays_changed(params, change)


def _cosines(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that resamples `old` points to `new` ones as a sum of cosines.

    With U this matrix and V that of the way back, for old ≤ new: VU = 1 and
    Uᵀ = (new / old) V, which is why one scale makes the input kernel follow.
    """
    frequencies = np.arange(min(old, new))

    def sampled(n: int) -> np.ndarray:
        return np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, frequencies))

    weights = np.where(frequencies == 0, 1, 2) / old
    return (sampled(new) * weights) @ sampled(old).T


def _with_arrays_changed(
    params: Params,
    change: Callable[[str, np.ndarray, tuple[str, ...]], np.ndarray],
) -> Params:
    """The tree with every array changed that has tokens or their hidden units."""
    flat = dict(leaves(params))
    axes = tree.layout(flat, tree.family(flat))
    new = {
        name: change(name, np.asarray(x), axes[name])
        if {"s", HIDDEN} & {*axes.get(name, ())}
        else x
        for name, x in flat.items()
    }
    return unflatten_dict(new, sep="/")


def _check_grid(params: Params, grid: Grid) -> None:
    """Raises ValueError unless the parameters are for a grid of patches."""
    tokens = tree.tokens(params)
    if tokens is None:
        _refuse(
            params,
            "none of its arrays has an axis of tokens, which is what `grow` and "
            "`interpolate` change",
        )
    if min(grid) < 1 or math.prod(grid) != tokens:
        possible = ", ".join(
            f"{rows}x{tokens // rows}"
            for rows in range(math.isqrt(tokens), 0, -1)
            if tokens % rows == 0
        )
        raise ValueError(
            f"A grid of {grid[0]}x{grid[1]} patches does not fit the parameters, which "
            f"are for {tokens} tokens; try {possible}, or one of these turned."
        )


def _check_resizable(params: Params) -> None:
    """Raises ValueError where an architecture says that no other grid fits it."""
    file = tree.family(tree.shapes(params))
    if hasattr(file, "CANNOT_RESIZE"):
        _refuse(params, file.CANNOT_RESIZE)


def _refuse(params: Params, why: str) -> NoReturn:
    name = tree.family_name(tree.family(tree.shapes(params)))
    raise ValueError(
        f"Weights of a {name} cannot be resized: {why}. Train it at the resolution "
        "that is wanted."
    )
