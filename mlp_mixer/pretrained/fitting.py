"""Weights into models: strictly, but for the head and the resolution."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from mlp_mixer import known, models, processes
from mlp_mixer.data.class_names import assumed, places
from mlp_mixer.fingerprints import Params, fingerprint, leaves
from mlp_mixer.models import imlp, mixer
from mlp_mixer.models.model import Run, check_divisible
from mlp_mixer.pretrained import resize, tree
from mlp_mixer.pretrained.weights import Weights, checked_image_size, read
from mlp_mixer.text import listed

logger = logging.getLogger(__name__)

HEADS = ("match", "zero")


def create_model(
    weights: Weights | Params, run: Run = Run(), **overrides: Any
) -> models.Model:
    """Returns the model that the parameters are of.

    Args:
      weights: weights of `weights.read`, or parameters alone: their model is what their
        shapes and `overrides` say, with its class's other values (of a Mixer the
        authors': tanh GELU).
      run: how it is computed.
      **overrides: fields of the model, e.g. `gelu="exact"`; of parameters also `name`.
    """
    if not isinstance(weights, Weights):
        weights = Weights(weights, "parameters", model=overrides)
    fields = {"num_classes": weights.num_classes, **weights.model, **overrides}
    return models.create(**fields, run=run)


def with_fields(weights: Weights, **fields: Any) -> Weights:
    """The weights as those of a model with other fields, for a source that errs.

    Raises:
      ValueError: the model has no such field.
    """
    return dataclasses.replace(weights, model=weights.model | fields)


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
        logger.info(
            "The head is a new one of zeros for %d classes (the weights': %s).",
            tree.num_classes(target),
            tree.num_classes(params) or "none",
        )
        # But for what only scales others: between two zeros nothing would be learnt.
        given |= {
            name: np.full(x.shape, name == "head/scale", x.dtype)
            for name, x in ((name, wanted[name]) for name in heads)
        }
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
            f"{called} ({_sizes_in_words(params)}) do not fit the model "
            f"({_sizes_in_words(target)}):\n{listed(wrong)}"
        )
    return unflatten_dict({name: given[name] for name in wanted}, sep="/")


def initial(
    source: str | os.PathLike[str] | None,
    model: models.Model,
    target: Any,
    *,
    image_size: tuple[int, int],
    head: str,
    resize_by: str,
    class_names: Sequence[str] | None = None,
) -> dict[str, Params]:
    """Returns what a run starts from, for `config.init_from`: {"params", "stats"}.

    A Mixer's weights become the prior of an I-MLP: its statistics, and no parameters.

    Args:
      source: a run's folder, a file or a published name; none if it is empty.
      model: the model that they are for.
      target: what has the shapes of its `params` and `stats`.
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
        return {}
    processes.compare(init_from={"is here": os.path.exists(source)})
    with processes.together():
        weights = read(source)
        logger.info("From %s: %s.", weights, _sizes_in_words(weights.params))
        fitted = functools.partial(
            _fitted,
            image_size=image_size,
            head=head,
            resize_by=resize_by,
            class_names=class_names,
        )
        given: dict[str, Params]
        if isinstance(model, imlp.Imlp) and weights.architecture is mixer:
            logger.info("They become the prior, which is not trained.")
            wanted = tree.variables(model.prior, image_size)
            found = fitted(weights, model.prior, wanted)
            given = {"stats": model.with_prior(found["params"])}
        else:
            found = fitted(weights, model, {"params": target.params, **target.stats})
            given = {"params": found.pop("params"), "stats": found}
    if jax.process_count() > 1:  # each has read for itself, perhaps from its own disk
        processes.compare(**{f"weights at {source}": fingerprint(given)})
    return given


def _fitted(
    weights: Weights,
    model: models.Model,
    target: Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    head: str,
    resize_by: str,
    class_names: Sequence[str] | None,
) -> dict[str, Params]:
    """The variables of weights, fitted to a model whose variables are `target`."""
    for field, value in weights.model.items():
        # A word chooses what is computed; numbers show in shapes, or in training, but
        # for those that images are normalised by.
        ours = getattr(model, field, value)
        chooses = isinstance(value, str) or field in ("mean", "std")
        if field != "name" and chooses and ours != value:
            words = f"'{value}'" if isinstance(value, tuple) else value
            logger.warning(
                "%s are for %s %s, this model computes %s; --config.model.%s=%s "
                "keeps theirs.",
                *(weights.source, field, value, ours, field, words),
            )
    weights = _for_image_size(weights, model, image_size, resize_by)
    source, given = weights.source, weights.variables
    called = {"params": f"The weights {source}"}
    found = {
        kind: merge(
            given.get(kind, {}),
            target.get(kind, {}),
            head=head,
            called=called.get(kind, f"Statistics ({kind}) of {source}"),
        )
        for kind in {**given, **target}
    }
    count = weights.num_classes
    if count and head == "match" and count == tree.num_classes(found["params"]):
        order = places(
            class_names,
            weights.class_names or assumed(class_names, count),
            of="the training data",
            to=str(source),
            hint="--config.init_head=zero starts with a new head for other classes.",
        )
        if order is not None:
            at = np.array(order)
            for variables in found.values():
                kept = {k: x[..., at] for k, x in variables.get("head", {}).items()}
                variables |= {"head": kept} if kept else {}
    return found


def _for_image_size(
    weights: Weights, model: models.Model, image_size: tuple[int, int], how: str
) -> Weights:
    """The weights at the image size of a run that starts from them."""
    if weights.model["patch_size"] != model.patch_size:
        return weights  # for `merge` to refuse
    (h, w), (ph, pw) = image_size, model.patch_size
    if weights.image_size is None:
        count = tree.tokens(weights.params)
        if count in (None, h // ph * (w // pw)):
            logger.warning(
                "The weights do not say their grid; it is taken to be %dx%d.",
                *(h // ph, w // pw),
            )
            return weights
        raise ValueError(
            f"The weights {weights} have {count} tokens, which make no square, and do "
            "not say their image size; give them as a run's folder, or as a "
            "safetensors file of `mlp_mixer.convert --image_size=HEIGHT,WIDTH`."
        )
    if weights.image_size == image_size:
        return weights
    new = resized(weights, image_size, how)
    field = tree.FIELDS["ds"]
    wide, has = new.model.get(field), getattr(model, field, None)
    others = {name for row in new.architecture.SIZES.values() for name in row} - {field}
    if wide != has and all(new.model[f] == getattr(model, f, None) for f in others):
        old_h, old_w = weights.image_size
        raise ValueError(
            f"To {how} the weights {weights} from {old_h // ph}x{old_w // pw} to "
            f"{h // ph}x{w // pw} patches gives token mixing {wide} hidden units, the "
            f"model has {has}; set --config.model.{field}={wide}."
        )
    return new


def resized(weights: Weights, image_size: tuple[int, int], how: str) -> Weights:
    """Returns the weights for another resolution, with as many pixels to a patch.

    Those of a model that takes any resolution stay as they are.

    Args:
      weights: weights that know their image size.
      image_size: height and width in pixels wanted.
      how: "grow" or "interpolate", as in `resize.resized`.

    Raises:
      ValueError: it cannot be; or the model has arrays that are tied to the resolution
        by other letters than `s`.
    """
    old_size, (ph, pw) = checked_image_size(weights), weights.model["patch_size"]
    try:
        check_divisible(image_size, (ph, pw))
        params = weights.params
        if tree.tokens(params) is not None:
            params = resize.resized(
                params,
                old_grid=(old_size[0] // ph, old_size[1] // pw),
                new_grid=(image_size[0] // ph, image_size[1] // pw),
                how=how,
            )
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    found, file = tree.shapes(params), weights.architecture
    model = weights.model | tree.geometry(found, file)
    new = dataclasses.replace(
        weights, params=params, model=model, image_size=image_size
    )
    wanted = tree.shapes(tree.variables(create_model(new), image_size)["params"])
    axes = tree.layout(found, file)
    if tied := [name for name, shape in found.items() if shape != wanted[name]]:
        lines = [f"{name} ({' '.join(axes[name])})" for name in tied]
        raise ValueError(
            f"{weights}: {tree.family_name(file)} cannot be resized: these are "
            f"tied to the resolution, but not by tokens, s: {', '.join(lines[:5])}. "
            "Train it at the resolution that is wanted."
        )
    return new


def _sizes_in_words(params: Any) -> str:
    """What a person would call them, e.g. mixer_b16, 196 tokens, 1000 classes."""
    found = tree.shapes(params)
    if (file := tree.find_family(found)) is None:
        return "no whole model"
    fields = {"name": tree.family_name(file), **tree.geometry(found, file)}
    count, classes = (tree.sizes(found, file).get(letter) for letter in "sk")
    tokens = f"{count} tokens, " if count else ""
    head = f"{classes} classes" if classes else "no head"
    return f"{tree.describe(fields)}, {tokens}{head}"
