"""What every evaluator is, and what they share."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from mlp_mixer.data.sources import Source

# Asked before every batch, the same number of times on every process.
Stop = Callable[[], bool]
# Wraps the batches, e.g. in a progress bar; gets their number too.
Track = Callable[[Iterable[Any], int], Iterable[Any]]


def never() -> bool:
    """Does not stop."""
    return False


def untracked(batches: Iterable[Any], count: int) -> Iterable[Any]:
    """Shows nothing."""
    del count
    return batches


class Result(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    examples: Any = None  # accuracy.Examples, of which a report can be drawn


@runtime_checkable
class Evaluator(Protocol):
    """A score of a model on data; one class per kind of score, which inherits this.

    Attributes:
      of_predictions: whether it measures the model's predictions, and not its features.
      every_steps: training steps between two evaluations.
      ema: whether it is of the averaged parameters, where a run has them.
      data: the splits, for people.
      preprocess: the protocol, a key of `data.image_ops.PROTOCOLS`.
      sources: all that it reads.
    """

    of_predictions: ClassVar[bool]
    every_steps: int
    ema: bool
    data: str
    preprocess: str
    sources: Sequence[Source]

    @staticmethod
    @abc.abstractmethod
    def completed(
        section: Mapping[str, Any], recipe: Any, class_names: Sequence[str] | None
    ) -> dict[str, Any]:
        """Returns a recipe's section with what it takes from training.

        Args:
          section: the fields that the recipe has, its `type` included, which stays.
          recipe: the recipe, with every field of training.
          class_names: names of training's classes, by label.
        """

    @staticmethod
    @abc.abstractmethod
    def scores(section: Mapping[str, Any]) -> dict[str, bool]:
        """{metric: whether more is better} of a recipe's section; counts are none."""

    @abc.abstractmethod
    def run(
        self, variables: Any, stop: Stop = never, track: Track = untracked
    ) -> Result | None:
        """Returns the metrics of a model, or None if `stop()` came true.

        Args:
          variables: what `predict` takes.
          stop: asked before every batch.
          track: wraps the batches.
        """

    @staticmethod
    def across(
        results: Mapping[str, Mapping[str, float]],
    ) -> dict[str, dict[str, float]]:
        """Returns what the metrics of all evaluators of this class add to each other.

        Args:
          results: evaluator → metric → value.
        """
        del results
        return {}  # each evaluator speaks for itself

    @staticmethod
    @abc.abstractmethod
    def shown(metrics: Mapping[str, float]) -> dict[str, str]:
        """Returns metric → text for people, without those that are not for them."""


def following(dataset: Mapping[str, Any], training: Any) -> dict[str, Any]:
    """The section of an evaluator's data set, completed with that of training's."""
    same = dataset["name"] is None
    label = dataset["label"] or (training.label if same else "label")
    return {**dataset, "name": dataset["name"] or training.name, "label": label}


def percent(value: float) -> str:
    """A share in [0, 1] for people."""
    return f"{100 * value:.2f} %"


def number(value: int | float) -> str:
    """A count, or a real number, for people."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
