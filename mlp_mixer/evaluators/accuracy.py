"""Top-1, top-5, likelihood and calibration on a split, every example counted once.

Of an image with several labels (ImageNet ReaL, JFT) any of them is right; images
without a label are left out and counted (section 7.1).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mlp_mixer import losses
from mlp_mixer.data import pipeline, sources
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


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a model makes of each labelled example of a split, on the host."""

    source: sources.Source
    index: Int[np.ndarray, " n"]  # position in the source
    label: Int[np.ndarray, " n"]  # of several the predicted, or the first
    prediction: Int[np.ndarray, " n"]  # most likely class
    probability: Float[np.ndarray, " n"]  # softmax, of the prediction
    top1: Bool[np.ndarray, " n"]
    top5: Bool[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]  # the recipe's, nats
    nll: Float[np.ndarray, " n"]  # −log softmax of the true classes together, nats

    def image(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image of example `i` as it is, for people to look at."""
        return pipeline.read_image(self.source, int(self.index[i]))[0]

    def labels(self, i: int) -> list[int]:
        """The true classes of example `i`."""
        return np.atleast_1d(self.source.label(int(self.index[i]))).tolist()


class Accuracy(Evaluator):
    """How often, and how surely, the model is right.

    Attributes:
      source: the split.
      broken: images of the split that could not be read in the last pass.
      unlabelled: readable ones without a label in the last pass.
    """

    of_predictions: ClassVar[bool] = True

    @staticmethod
    def completed(
        section: Mapping[str, Any], recipe: Any, class_names: Sequence[str] | None
    ) -> dict[str, Any]:
        """The section with training's loss and classes, and its data set by default."""
        training = recipe.dataset
        dataset = following(section["dataset"], training)
        same = all(dataset[k] == training[k] for k in ("name", "label"))
        if dataset["num_classes"] is None and same:
            dataset["num_classes"] = training.num_classes
        return {
            **section,
            "dataset": dataset,
            "loss": recipe.loss,
            "num_classes": training.num_classes,
            "class_names": class_names,
        }

    @staticmethod
    def scores(section: Mapping[str, Any]) -> dict[str, bool]:
        """{metric: whether more is better} of a recipe's section; counts are none."""
        return {"top1": True, "top5": True, "loss": False, "nll": False} | (
            {"ece": False} if section.get("ece_bins") else {}
        )

    def __init__(
        self,
        *,
        loss: str,
        image_size: tuple[int, int],
        dataset: Mapping[str, Any],
        preprocess: str,
        every_steps: int,
        ece_bins: int,
        ema: bool = True,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        data_dir: str | None = None,
        **more: Any,
    ):
        """Opens the split.

        Args:
          loss: a key of `losses.LOSSES`.
          image_size: height and width in pixels.
          dataset: arguments of `data.sources.open_source`.
          preprocess: a key of `data.image_ops.PROTOCOLS`.
          every_steps: training steps between two evaluations.
          ece_bins: number of bins of the expected calibration error; 0 leaves it out.
          ema: whether it is of the averaged parameters, where a run has them.
          num_classes: number of the model's classes; by default the split's.
          class_names: names of the model's classes, by which the split's labels are
            mapped to them; None if they have none.
          data_dir: where data sets are; TFDS's own folder by default.
          **more: predict, mesh, batch_size and workers, as in `Inference`.

        Raises:
          ValueError: the split has classes that the model does not have.
        """
        self.every_steps, self.preprocess = every_steps, preprocess
        self.ema = ema
        self.data = f"{dataset['name']} {dataset['split']}"
        source = sources.open_source(
            **dataset, data_dir=data_dir, image_size=image_size
        )
        self.source = sources.with_classes(
            source,
            class_names,
            num_classes or source.num_classes,
            of=self.data,
            to="the model",
        )
        self.sources: Sequence[sources.Source] = (self.source,)
        self.broken = self.unlabelled = 0
        self._ece_bins = ece_bins
        loss_fn = losses.LOSSES[loss]

        def keep(out: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
            logits = out["logits"]
            target = losses.targets(batch["label"], logits.shape[-1])
            top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
            hits = jnp.take_along_axis(target, top, axis=-1) > 0
            log_p = jax.nn.log_softmax(logits)
            true_log_p = jnp.where(target > 0, log_p, -jnp.inf)
            return {
                "label": jnp.where(hits[:, 0], top[:, 0], target.argmax(-1)),
                "prediction": top[:, 0],
                "probability": jnp.exp(log_p.max(-1)),
                "top1": hits[:, 0],
                "top5": hits.any(-1),
                "loss": loss_fn(logits, out, {**batch, "label": target}),
                "nll": -jax.nn.logsumexp(true_log_p, axis=-1),
                "labelled": target.any(-1),
            }

        self._infer = Inference(
            keep, image_size=image_size, preprocess=preprocess, **more
        )

    def examples(
        self, variables: Any, stop: Stop = never, track: Track = untracked
    ) -> Examples | None:
        """Returns each readable, labelled example once, or None if `stop()` came true.

        Raises:
          ValueError: there is none.
        """
        outputs = self._infer(self.source, variables, stop, track)
        if outputs is None:
            return None
        rows, self.broken = outputs
        labelled = rows.pop("labelled")
        self.unlabelled = int((~labelled).sum())
        if not labelled.any():
            raise ValueError(
                f"None of {len(labelled)} images of {self.data} is labelled."
            )
        kept = {key: value[labelled] for key, value in rows.items()}
        return Examples(self.source, **kept)

    def run(
        self, variables: Any, stop: Stop = never, track: Track = untracked
    ) -> Result | None:
        """Returns `top1` and `top5` in [0, 1], `loss` and `nll` in nats, and `count`.

        None if `stop()` came true. Also `ece` in [0, 1] where asked, `unlabelled` of
        multi-label data, and `broken`, the images that could not be read, if any.
        """
        examples = self.examples(variables, stop, track)
        if examples is None:
            return None
        return Result(self.summary(examples), examples)

    def summary(self, examples: Examples) -> dict[str, float]:
        """The metrics of `run` for the examples of the last pass."""
        results = {
            "top1": float(examples.top1.mean()),
            "top5": float(examples.top5.mean()),
            "loss": float(examples.loss.mean(dtype=np.float64)),
            "nll": float(examples.nll.mean(dtype=np.float64)),
        }
        if self._ece_bins:
            results["ece"] = expected_calibration_error(
                examples.probability, examples.top1, self._ece_bins
            )
        results["count"] = len(examples.label)
        if self.source.multi_label:
            results["unlabelled"] = self.unlabelled
        return results | ({"broken": self.broken} if self.broken else {})

    @staticmethod
    def shown(metrics: Mapping[str, float]) -> dict[str, str]:
        """All metrics; shares of images in per cent."""
        return {
            name: (percent if name in ("top1", "top5") else number)(value)
            for name, value in metrics.items()
        }


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int
) -> float:
    """Mean |accuracy − confidence| over bins of equal width, weighted by their counts.

    Bin m of M holds the confidences in ((m − 1)/M, m/M] (Guo et al., arXiv 1706.04599,
    section 2).
    """
    inner_edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    bin_of = np.searchsorted(inner_edges, confidence, side="left")
    # count·(accuracy − confidence) of a bin is the sum of these.
    gaps = np.bincount(bin_of, correct - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
