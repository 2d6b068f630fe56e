"""Evaluators: what a score is.

An evaluator has `every_steps`, `data` and `preprocess` (what it looks at, and how), and
`run(params, stop, track) -> {metric: float}`. Its class has `scores(section)`, which
says of each metric whether more is better. It receives the compiled `predict` instead
of importing how a step is made.
"""

from collections.abc import Mapping
from typing import Any

from mlp_mixer import known
from mlp_mixer.evaluators.accuracy import Accuracy
from mlp_mixer.evaluators.fewshot import FewShot

EVALUATORS: dict[str, Any] = {"accuracy": Accuracy, "fewshot": FewShot}


def create(sections: Mapping[str, Mapping[str, Any]], **shared: Any) -> dict[str, Any]:
    """Returns {name: evaluator} for a recipe's `evals`.

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


def more_is_better(evals: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Whether the best of a metric is the highest value, or the lowest.

    Args:
      evals: a recipe's `evals`: name → section.
      name: of the metric, with its evaluator: "val/top1".

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


def _class_of(name: str, section: Mapping[str, Any]) -> Any:
    return known.pick(f"evals.{name}.type", section["type"], EVALUATORS)
