"""Few-shot linear evaluation: how good the features are (section 7.2).

A ridge regression from the frozen features of a few images per class to targets ±1, in
closed form. The features come from the device; the regressions are solved on the host
in float64, since the constant feature makes XᵀX too ill-conditioned for float32 (the
largest eigenvalue is 10⁴·N or more, the smallest l2 is 2^−10), and at these sizes
they cost little beside the features.
"""

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, Integer

from mlp_mixer.data import sources
from mlp_mixer.evaluators.evaluator import (
    Evaluator,
    Result,
    Stop,
    Track,
    following,
    never,
    number,
    percent,
    untracked,
)
from mlp_mixer.evaluators.inference import Inference

logger = logging.getLogger(__name__)

Features = Float[np.ndarray, "n d"] | Float[jax.Array, "n d"]
Labels = Integer[np.ndarray, " n"] | Integer[jax.Array, " n"]

# Standard deviations get it, and every example has it as one more feature, so that
# the bias is almost unregularised (big_vision `evaluators/fewshot_lsr.py`).
STD_OFFSET, CONSTANT = 1e-5, 100.0
_ROWS = 4096  # of test images scored at once


class Ridge:
    """The regressions of one training set for any l2: one eigendecomposition.

    W = (XᵀX + l2·I)⁻¹XᵀY, or, with fewer examples than features, the equal
    Xᵀ(XXᵀ + l2·I)⁻¹Y. X are the features, standardised by their own mean and standard
    deviation, and the constant; Y is 1 for the class and −1 for the others.
    """

    def __init__(self, x: Features, y: Labels, num_classes: int):
        """Decomposes the training set `x` (n, d) with labels `y`.

        Raises:
          ValueError: there is no example, or a label is not below `num_classes`.
        """
        features, labels = np.asarray(x, np.float64), np.asarray(y)
        if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"Labels are {np.unique(labels)}; expected some of 0 … "
                f"{num_classes - 1}."
            )
        self._mean = features.mean(0)
        self._std = features.std(0) + STD_OFFSET
        design = self._design(features)
        targets = 2.0 * np.eye(num_classes)[labels] - 1.0
        if len(design) < design.shape[1]:
            values, vectors = np.linalg.eigh(design @ design.T)
            self._left, right = design.T @ vectors, targets
        else:
            values, vectors = np.linalg.eigh(design.T @ design)
            self._left, right = vectors, design.T @ targets
        self._right = vectors.T @ right
        # Of a Gram matrix none is negative, but for rounding.
        self._eigenvalues = np.maximum(values, 0.0)[:, None]

    def _design(self, features: np.ndarray) -> np.ndarray:
        scaled = (features - self._mean) / self._std
        return np.pad(scaled, ((0, 0), (0, 1)), constant_values=CONSTANT)

    def weights(self, l2: float | int) -> Float[np.ndarray, "d_plus_1 k"]:
        """W; its last row is the constant's."""
        if not l2 > 0:
            raise ValueError(f"l2 is {l2}; it must be above 0, e.g. 1024.")
        return self._left @ (self._right / (self._eigenvalues + l2))

    def accuracy(self, x: Features, y: Labels, l2: float | int) -> float:
        """The fraction of `x` (n, d) whose highest score is that of its label."""
        weights, right = self.weights(l2), 0
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            scores = self._design(np.asarray(x[rows], np.float64)) @ weights
            right += int((scores.argmax(-1) == np.asarray(y[rows])).sum())
        return right / len(x)


def permuted_by_class(
    labels: Int[np.ndarray, " n"], num_classes: int, seed: int | None
) -> list[Int[np.ndarray, " m"]]:
    """The positions of each class, in the order in which they become shots.

    One permutation per class from `default_rng(seed)` (big_vision); None: as they are.
    """
    positions = [np.flatnonzero(labels == k) for k in range(num_classes)]
    if seed is None:
        return positions
    rng = np.random.default_rng(seed)
    return [rng.permutation(p) for p in positions]


def choose_l2(
    results: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Of sweeps over l2, one value per number of shots for all data sets.

    It is the value of the best mean accuracy over the data sets, as the authors' group
    describes its protocol of that time (arXiv 2212.05055); with one data set it is the
    best there.

    Args:
      results: evaluator → metric → value; `5shot_l2_-3` is accuracy at l2 = 2^−3.

    Returns:
      For each evaluator with sweeps `{shots}shot`, and `{shots}shot_l2`, the value.

    Raises:
      ValueError: two sweeps of as many shots have no exponent in common.
    """
    sweeps: dict[str, dict[str, dict[int, float]]] = {}
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if found := _SWEPT.fullmatch(metric):
                accuracies = sweeps.setdefault(found[1], {}).setdefault(name, {})
                accuracies[int(found[2])] = value
    chosen: dict[str, dict[str, float]] = {}
    for shots, by_name in sweeps.items():
        common = sorted(set.intersection(*map(set, by_name.values())))
        if not common:
            raise ValueError(
                f"The l2_exponents of {', '.join(by_name)} have none in common; give "
                "them the same."
            )
        best = max(common, key=lambda e: sum(a[e] for a in by_name.values()))
        for name, accuracies in by_name.items():
            scores = {shots: accuracies[best], f"{shots}_l2": 2.0**best}
            chosen.setdefault(name, {}).update(scores)
    return chosen


def _metric_name(shots: int, exponent: int, exponents: Sequence[int]) -> str:
    """What the accuracy is called: as in `choose_l2` if there are several exponents."""
    return f"{shots}shot" if len(exponents) == 1 else f"{shots}shot_l2_{exponent}"


_SWEPT = re.compile(r"(\d+shot)_l2_(-?\d+)")


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some examples of a source, as a source."""

    source: sources.Source
    positions: Int[np.ndarray, " n"]
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.positions[index])]

    def label(self, index: int) -> sources.Label:
        return self.source.label(int(self.positions[index]))

    def name_of(self, index: int) -> str:
        return self.source.name_of(int(self.positions[index]))


class FewShot(Evaluator):
    """Accuracy of ridge regressions on the features of a few images per class."""

    of_predictions: ClassVar[bool] = False

    @staticmethod
    def completed(
        section: Mapping[str, Any], recipe: Any, class_names: Sequence[str] | None
    ) -> dict[str, Any]:
        """The section with training's data set by default; the classes are its own."""
        del class_names
        splits = {k: following(section[k], recipe.dataset) for k in ("train", "test")}
        return {**section, **splits}

    @staticmethod
    def scores(section: Mapping[str, Any]) -> dict[str, bool]:
        """{metric: whether more is better} of a recipe's section; counts are none."""
        shots, exponents = sorted(section["shots"]), tuple(section["l2_exponents"])
        return {_metric_name(n, e, exponents): True for n in shots for e in exponents}

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        train: Mapping[str, Any],
        test: Mapping[str, Any],
        shots: Sequence[int],
        seeds: int,
        l2_exponents: Sequence[int],
        preprocess: str,
        every_steps: int,
        ema: bool = True,
        data_dir: str | None = None,
        **more: Any,
    ):
        """Opens the splits.

        Args:
          image_size: height and width in pixels.
          train: arguments of `data.sources.open_source`: where shots are drawn.
          test: arguments of `open_source` for the images that are classified.
          shots: examples per class; each number is an evaluation.
          seeds: draws 0 … seeds − 1, over which accuracies are averaged; 0: one draw,
            the first of each class as they stand (the 2021 protocol).
          l2_exponents: l2 = 2^exponent. One is reported as `5shot`, each of several
            as `5shot_l2_10`: see `choose_l2`.
          preprocess: a key of `data.image_ops.PROTOCOLS`.
          every_steps: training steps between two evaluations.
          ema: whether it is of the averaged parameters, where a run has them.
          data_dir: where data sets are; TFDS's own folder by default.
          **more: predict, mesh, batch_size and workers, as in `Inference`.

        Raises:
          ValueError: the splits have other classes, or several labels per image; or
            `shots` or `l2_exponents` is empty or impossible.
        """
        for field, values in (("shots", shots), ("l2_exponents", l2_exponents)):
            if not values:
                raise ValueError(f"{field} is empty; try one number, (10,).")
        if min(shots) < 1 or seeds < 0:
            raise ValueError(
                f"shots are {tuple(shots)} and seeds is {seeds}; expected numbers from "
                "1, and from 0."
            )
        self.every_steps, self.preprocess = every_steps, preprocess
        self.ema = ema
        other = "" if test["name"] == train["name"] else f"{test['name']} "
        self.data = f"{train['name']} {train['split']} → {other}{test['split']}"
        self._train, test_source = (
            sources.open_source(**split, data_dir=data_dir, image_size=image_size)
            for split in (train, test)
        )
        self._test = sources.with_classes(
            test_source,
            self._train.class_names,
            self._train.num_classes,
            of=f"{test['name']} {test['split']}",
            to=f"{train['name']} {train['split']}",
        )
        self.sources: Sequence[sources.Source] = (self._train, self._test)
        if self._train.multi_label or self._test.multi_label:
            raise ValueError(f"{self.data}: few-shot needs one label per image.")
        self._shots, self._seeds = tuple(sorted(shots)), seeds
        self._exponents = tuple(l2_exponents)
        self._infer = Inference(
            lambda out, batch: {
                "feature": out["pre_logits"],
                "label": batch["label"],
            },
            image_size=image_size,
            preprocess=preprocess,
            **more,
        )

    def run(
        self, variables: Any, stop: Stop = never, track: Track = untracked
    ) -> Result | None:
        """Returns `{shots}shot` in [0, 1] for each number of shots, and `count`.

        With several `l2_exponents`, `{shots}shot_l2_{exponent}`. `count` are the test
        images; `broken`, those of both splits that could not be read, if any. None if
        `stop()` came true.
        """
        draws = self._draws
        needed = np.unique(np.concatenate([p for draw in draws for p in draw]))
        train = self._infer(_Chosen(self._train, needed), variables, stop, track)
        if train is None:
            return None
        test = self._infer(self._test, variables, stop, track)
        if test is None:
            return None
        # Position in the training split → row of its features; −1: broken.
        row_of = np.full(len(self._train), -1)
        row_of[needed[train.rows["index"]]] = np.arange(len(train.rows["index"]))
        accuracies: dict[str, list[float]] = collections.defaultdict(list)
        for draw in draws:
            for shots in self._shots:
                rows = row_of[np.concatenate([p[:shots] for p in draw])]
                rows = rows[rows >= 0]
                ridge = Ridge(
                    train.rows["feature"][rows],
                    train.rows["label"][rows],
                    self._train.num_classes,
                )
                for exponent in self._exponents:
                    if stop():
                        return None
                    name = _metric_name(shots, exponent, self._exponents)
                    x, y = test.rows["feature"], test.rows["label"]
                    accuracies[name].append(ridge.accuracy(x, y, 2.0**exponent))
        results = {name: float(np.mean(all_)) for name, all_ in accuracies.items()}
        results["count"] = len(test.rows["label"])
        unreadable = int((self._labels < 0).sum())
        broken = unreadable + train.broken + test.broken
        return Result(results | ({"broken": broken} if broken else {}))

    across = staticmethod(choose_l2)

    @staticmethod
    def shown(metrics: Mapping[str, float]) -> dict[str, str]:
        """Without the hundred values of a sweep; the one that was chosen is there."""
        forms = {"shot": percent, "shot_l2": "{:g}".format}
        return {
            name: forms.get(name.lstrip("0123456789"), number)(value)
            for name, value in metrics.items()
            if not _SWEPT.fullmatch(name)
        }

    @functools.cached_property
    def _draws(self) -> list[list[np.ndarray]]:
        """Per seed and class, the positions of the most shots."""
        most, count = self._shots[-1], self._train.num_classes
        draws = [
            [p[:most] for p in permuted_by_class(self._labels, count, seed)]
            for seed in (range(self._seeds) if self._seeds else [None])
        ]
        if few := sum(len(p) < most for p in draws[0]):
            logger.warning(
                "%s: %d of %d classes have fewer than %d examples; all of them are "
                "used.",
                self.data,
                few,
                count,
                most,
            )
        return draws

    @functools.cached_property
    def _labels(self) -> Int[np.ndarray, " n"]:
        """Labels of the training split; −1 where a record cannot be read."""
        labels = np.full(len(self._train), -1)
        for i in range(len(labels)):
            try:
                labels[i] = self._train.label(i)
            except (OSError, ValueError) as error:
                name = self._train.name_of(i)
                logger.warning("Broken image %s: %s; it is not used.", name, error)
        return labels
