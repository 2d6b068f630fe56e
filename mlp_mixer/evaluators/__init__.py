"""Evaluators: what a score is.

Everything about a kind of score stands in its own file: what it takes from a recipe,
what it measures, and how that is shown. It receives the compiled `predict` instead of
importing how a step is made.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlp_mixer import known
from mlp_mixer.evaluators.accuracy import Accuracy
from mlp_mixer.evaluators.evaluator import Evaluator
from mlp_mixer.evaluators.fewshot import FewShot

logger = logging.getLogger(__name__)

EVALUATORS: dict[str, type[Evaluator]] = {"accuracy": Accuracy, "fewshot": FewShot}


def sections(
    recipe: Any,
    only: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns the sections of `recipe.evals`, with what they take from training.

    Args:
      recipe: the recipe, with every field of training.
      only: names of evaluators, or "all"; None: those that run in training.
      class_names: names of training's classes, by label; None: they have none.

    Raises:
      ValueError: an evaluator that the recipe does not have, or of no known type.
    """
    evals = recipe.evals.to_dict()
    if only is None:
        only = [name for name, section in evals.items() if section["every_steps"]]
    elif "all" in only:
        only = list(evals)
    found = {}
    for name in only:
        if name not in evals:
            tries = known.nearest(name, [*evals, "all"])
            raise ValueError(f"The recipe has no evaluator {name!r}; try {tries}.")
        section = evals[name]
        section["batch_size"] = section["batch_size"] or recipe.batch_size
        section["workers"] = recipe.input.workers
        found[name] = _class_of(name, section).completed(section, recipe, class_names)
    return found


def create(
    sections: Mapping[str, Mapping[str, Any]], **shared: Any
) -> dict[str, Evaluator]:
    """Returns {name: evaluator} for sections of a recipe.

    Args:
      sections: name → `type`, a key of `EVALUATORS`, and that class's arguments.
      **shared: arguments that all of them take.

    Raises:
      FileNotFoundError: there is no such data set on this machine.
      ValueError: unknown type.
    """
    evaluators = {}
    for name, section in sections.items():
        fields = {key: value for key, value in section.items() if key != "type"}
        evaluators[name] = _class_of(name, section)(**fields, **shared)
    return evaluators


def across(
    evaluators: Mapping[str, Evaluator], results: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Returns `results` with what the evaluators of one class add to each other.

    Args:
      evaluators: name → evaluator.
      results: name → metric → value, of some of them.
    """
    whole = {name: dict(metrics) for name, metrics in results.items()}
    for cls in EVALUATORS.values():
        of_class = {k: v for k, v in whole.items() if isinstance(evaluators[k], cls)}
        for name, metrics in cls.across(of_class).items():
            whole[name] |= metrics
    return whole


def more_is_better(evals: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Whether the best of a metric is the highest value, or the lowest.

    Args:
      evals: a recipe's `evals`: name → section.
      name: name of the metric, with its evaluator: "val/top1".

    Raises:
      ValueError: it is no score of an evaluator that runs in training; lists those.
    """
    scores = {
        f"{evaluator}/{metric}": more
        for evaluator, section in evals.items()
        if section["every_steps"]
        for metric, more in _class_of(evaluator, section).scores(section).items()
    }
    if name in scores:
        return scores[name]
    evaluator = name.rpartition("/")[0]
    if evaluator in evals and not evals[evaluator]["every_steps"]:
        why = f"{evaluator} never runs in training (its every_steps is 0)"
    else:
        why = "it is none of the recipe's scores"
    near = known.nearest(name, scores)
    raise ValueError(
        f"No checkpoint can be the best by {name!r}: {why}; try one of "
        f"{near or 'none: no evaluator runs in training'}."
    )


def preprocess_of_predictions(evals: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the protocol that a run's predictions are measured with, if they are.

    Args:
      evals: a recipe's `evals`: name → section.
    """
    for name, section in evals.items():
        if _class_of(name, section).of_predictions:
            return section["preprocess"]
    return None


def warn_if_only_the_last_is_measured(recipe: Any, total_steps: int) -> None:
    """Says in the log if `keep_best` has no checkpoint to choose but the last."""
    best, saved = recipe.checkpoint.keep_best, recipe.checkpoint.every_steps
    if best is None:
        return
    measured = recipe.evals[best.rpartition("/")[0]].every_steps
    if math.lcm(saved, measured) >= total_steps > saved:
        logger.warning(
            "No checkpoint but the last can be the best by %s: it is measured every %d "
            "steps, and a checkpoint is saved every %d.",
            best,
            measured,
            saved,
        )


def _class_of(name: str, section: Mapping[str, Any]) -> Any:
    return known.pick(f"evals.{name}.type", section["type"], EVALUATORS)
