"""Weights into models: strictly, but for the head and the resolution."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from mlp_mixer import known, processes
from mlp_mixer.data.class_names import assumed, places
from mlp_mixer.fingerprints import fingerprint, leaves
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.pretrained import resize, tree
from mlp_mixer.pretrained.tree import Params
from mlp_mixer.pretrained.weights import Weights, read
from mlp_mixer.text import listed

logger = logging.getLogger(__name__)

HEADS = ("match", "zero")


def create_model(weights: Weights | Params, **overrides: Any) -> MlpMixer:
    """Returns the model that the parameters are of.

    Args:
      weights: result of `read`, or parameters alone, which are taken to be the
        authors': tanh GELU.
      **overrides: fields of `MlpMixer`, e.g. `dtype="bfloat16"` or `gelu="exact"`.
    """
    if isinstance(weights, Weights):
        overrides = {"gelu": weights.gelu, **overrides}
        weights = weights.params
    return MlpMixer(**tree.geometry(weights) | overrides)


def merge(
    params: Params, target: Any, *, head: str = "match", called: str = "The weights"
) -> Params:
    """Returns `params` for a model with the arrays of `target`, strictly.

    Only the head may differ: one for another number of classes becomes a zero one, as
    in the authors' fine-tuning.

    Args:
      params: to load.
      target: arrays or shapes of the model's parameters.
      head: "match" keeps a head for the same number of classes; "zero" never does.
      called: what an error calls the parameters.

    Raises:
      ValueError: arrays are unexpected, of another shape or missing; names them.
    """
    known.require("head", head, HEADS)
    given, wanted = dict(leaves(params)), dict(leaves(target))
    heads = [name for name in wanted if name.startswith("head/")]
    same = all(
        name in given and given[name].shape == wanted[name].shape for name in heads
    )
    if heads and (head == "zero" or not same):
        had = "none" if "head/bias" not in given else len(given["head/bias"])
        logger.info(
            "The head is a new one of zeros for %d classes (the weights': %s).",
            wanted["head/bias"].shape[0],
            had,
        )
        given |= {n: np.zeros(wanted[n].shape, wanted[n].dtype) for n in heads}
    if not heads:
        given = {name: x for name, x in given.items() if not name.startswith("head/")}
    missing = [f"missing: {name}" for name in wanted if name not in given]
    unexpected = [f"unexpected: {name}" for name in given if name not in wanted]
    shapes = [
        f"shape: {name} is {given[name].shape}, the model's {wanted[name].shape}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if wrong := unexpected + shapes + missing:
        raise ValueError(
            f"{called} ({_said(params)}) do not fit the model "
            f"({_said(target)}):\n{listed(wrong)}"
        )
    return unflatten_dict({name: given[name] for name in wanted}, sep="/")


def initial(
    source: str | os.PathLike[str] | None,
    model: Any,
    target: Any,
    *,
    image_size: tuple[int, int],
    head: str,
    resize_by: str,
    class_names: Sequence[str] | None = None,
) -> Params | None:
    """Returns the parameters that a run starts from, for `config.init_from`.

    Args:
      source: a run's folder, a file or a published name; none if it is empty.
      model: the `MlpMixer` that they are for.
      target: shapes of its parameters.
      image_size: height and width in pixels that it is trained at.
      head: "match" or "zero", as in `merge`.
      resize_by: what to do if the weights are for another grid of patches: "grow"
        (the paper's way, K times as many on each side) or "interpolate".
      class_names: names of the data's classes, by label; a head that is kept is
        brought into their order by name. None: they have no names.

    Raises:
      ValueError: they do not fit.
    """
    if not source:
        return None
    processes.compare(init_from={"is here": os.path.exists(source)})
    with processes.together():
        weights = read(source)
        logger.info("From %s: %s.", weights.called, _said(weights.params))
        if weights.gelu != model.gelu:
            logger.warning(
                "%s are for the %s GELU, this model computes the %s one; "
                "--config.model.gelu=%s keeps theirs.",
                *(source, weights.gelu, model.gelu, weights.gelu),
            )
        params = _at(weights, model, image_size, how=resize_by)
        params = merge(params, target, head=head, called=f"The weights {source}")
        count = tree.geometry(weights.params)["num_classes"]
        if count and head == "match" and count == tree.geometry(params)["num_classes"]:
            had = weights.class_names or assumed(class_names, count)
            params = _head_by_name(params, class_names, had, source)
    _check_equal_everywhere(params, source)
    return params


def _head_by_name(
    params: Params,
    names: Sequence[str] | None,
    had: Sequence[str] | None,
    source: object,
) -> Params:
    """With a head for classes called `names` instead of `had`."""
    order = places(
        names,
        had,
        of="the training data",
        to=str(source),
        hint="--config.init_head=zero starts with a new head for other classes.",
    )
    if order is None:
        return params
    head = {name: x[..., np.array(order)] for name, x in params["head"].items()}
    return params | {"head": head}


def _check_equal_everywhere(params: Params, source: object) -> None:
    """Every process reads for itself, perhaps from its own disk."""
    if jax.process_count() == 1:
        return
    mine, *others = processes.gather(fingerprint(params))
    if any(theirs != mine for theirs in others):
        raise ValueError(
            f"The processes read different weights at {source}; name a file on a "
            "shared disk, or a run that is finished."
        )


def _at(weights: Weights, model: Any, image_size: tuple[int, int], how: str) -> Params:
    """The parameters for another resolution, with as many pixels to a patch."""
    ph, pw = tree.geometry(weights.params)["patch_size"]
    if (ph, pw) != tuple(model.patch_size):
        return weights.params  # for `merge` to refuse
    new_grid = (image_size[0] // ph, image_size[1] // pw)
    if weights.image_size is None:
        if tree.tokens(weights.params) == new_grid[0] * new_grid[1]:
            logger.warning(
                "The weights do not say their grid; it is taken to be %dx%d.", *new_grid
            )
            return weights.params
        raise ValueError(
            f"The weights {weights.called} have {tree.tokens(weights.params)} "
            "tokens, which make no square, and do not say their image size; give them "
            "as a run's folder, or as a safetensors file of `mlp_mixer.convert "
            "--image_size=HEIGHT,WIDTH`."
        )
    old_grid = (weights.image_size[0] // ph, weights.image_size[1] // pw)
    try:
        params = resize.resized(
            weights.params, old_grid=old_grid, new_grid=new_grid, how=how
        )
    except ValueError as error:
        raise ValueError(f"{weights.called}: {error}") from error
    fields = tree.geometry(params)
    wide = fields["tokens_mlp_dim"]
    same = ("num_blocks", "hidden_dim", "channels_mlp_dim")
    if (
        new_grid != old_grid
        and wide != model.tokens_mlp_dim
        and all(fields[field] == getattr(model, field) for field in same)
    ):
        raise ValueError(
            f"To {how} the weights {weights.called} "
            f"from {old_grid[0]}x{old_grid[1]} to {new_grid[0]}x{new_grid[1]} patches "
            f"gives token mixing {wide} hidden units, the model has "
            f"{model.tokens_mlp_dim}; set --config.model.tokens_mlp_dim={wide}."
        )
    return params


def _said(params: Any) -> str:
    """What a person would call them, e.g. mixer_b16, 196 tokens, 1000 classes."""
    try:
        fields = tree.geometry(params)
    except ValueError:
        return "no whole MLP-Mixer"
    name = tree.variant(fields)
    if name is None:
        name = (
            f"{fields['num_blocks']} blocks of width {fields['hidden_dim']}, patches "
            f"of {fields['patch_size'][0]}x{fields['patch_size'][1]}"
        )
    classes = fields["num_classes"]
    head = "no head" if classes is None else f"{classes} classes"
    return f"{name}, {tree.tokens(params)} tokens, {head}"
