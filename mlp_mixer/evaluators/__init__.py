"""Evaluators: what a score is.

An evaluator has `every_steps`, `data` and `preprocess` (what it looks at, and how), and
`run(params, stop, track) -> {metric: float}`. It receives the compiled `predict`
instead of importing how a step is made.
"""

import difflib
from collections.abc import Mapping
from typing import Any

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
        kind = section["type"]
        if kind not in EVALUATORS:
            near = difflib.get_close_matches(kind, EVALUATORS, len(EVALUATORS), 0)
            raise ValueError(
                f"evals.{name}.type {kind!r} is unknown; try {', '.join(near)}."
            )
        fields = {key: value for key, value in section.items() if key != "type"}
        evaluators[name] = EVALUATORS[kind](**fields, **shared)
    return evaluators
