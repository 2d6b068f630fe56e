"""Top-1, top-5 and loss on a split, every example counted once.

The last batch is padded and masked, so the result does not depend on the batch size,
nor on the number of devices and processes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt8

from mlp_mixer import losses, sharding
from mlp_mixer.data import pipeline, sources


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a model makes of each example of a split, on the host."""

    index: Int[np.ndarray, " n"]  # position in the source
    label: Int[np.ndarray, " n"]
    prediction: Int[np.ndarray, " n"]  # most likely class
    probability: Float[np.ndarray, " n"]  # softmax, of the prediction
    top1: Bool[np.ndarray, " n"]
    top5: Bool[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]  # nats


class Accuracy:
    """Accuracy for one true class per image.

    Attributes:
      every_steps: of training, between two evaluations.
      source: the split.
      broken: images of the split that could not be read in the last pass.
    """

    def __init__(
        self,
        *,
        predict: Callable[[Any, Any], tuple[jax.Array, Any]],
        mesh: Mesh,
        loss: str,
        image_size: tuple[int, int],
        dataset: Mapping[str, Any],
        preprocess: str,
        batch_size: int,
        every_steps: int,
        data_dir: str | None = None,
    ):
        """Opens the split.

        Args:
          predict: of `steps.make_predict`.
          mesh: of `sharding.make_mesh`.
          loss: a key of `losses.LOSSES`.
          image_size: height and width in pixels.
          dataset: arguments of `data.sources.open_source`.
          preprocess: a key of `data.image_ops.PROTOCOLS`.
          batch_size: images at once over all devices; made a multiple of them.
          every_steps: see above.
          data_dir: where data sets are; TFDS's own folder by default.
        """
        self.every_steps = every_steps
        self.source = sources.open_source(
            **dataset, data_dir=data_dir, image_size=image_size
        )
        self.broken = 0
        self._predict, self._mesh = predict, mesh
        per_device = -(-min(batch_size, len(self.source)) // mesh.size)
        self._batches = {
            "image_size": image_size,
            "batch_size": per_device * mesh.size,
            "preprocess": preprocess,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        loss_fn = losses.LOSSES[loss]

        def score(logits, batch):
            classes = logits.shape[-1]
            top = jax.lax.top_k(logits, min(5, classes))[1]
            label = batch["label"]
            hits = top == label[:, None]
            return batch | {
                "prediction": top[:, 0],
                "probability": jax.nn.softmax(logits).max(-1),
                "top1": hits[:, 0],
                "top5": hits.any(-1),
                "loss": loss_fn(logits, jax.nn.one_hot(label, classes)),
            }

        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def examples(
        self,
        params: Any,
        stop: Callable[[], bool] = lambda: False,
        track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, n: items,
    ) -> Examples | None:
        """Returns each readable example once, or None if `stop()` came true.

        Args:
          params: the model's.
          stop: asked before every batch, the same number of times on every process.
          track: wraps the batches, e.g. in a progress bar; gets their number too.
        """
        batches = pipeline.eval_batches(self.source, **self._batches)
        count = -(-len(self.source) // self._batches["batch_size"])
        parts, self.broken = [], 0
        for batch in track(batches, count):
            if stop():
                return None
            batch = sharding.put(batch, self._mesh)
            logits, _ = self._predict(params, batch.pop("image"))
            part = jax.device_get(self._score(logits, batch))
            mask = part.pop("mask")
            self.broken += int((~mask & (part["index"] >= 0)).sum())
            parts.append({key: value[mask] for key, value in part.items()})
        fields = [field.name for field in dataclasses.fields(Examples)]
        return Examples(
            **{key: np.concatenate([part[key] for part in parts]) for key in fields}
        )

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image at `index` of the source as it is, for people to look at."""
        return pipeline.read_image(self.source, index)[0]

    def run(
        self, params: Any, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Returns `top1` and `top5` in [0, 1], `loss` in nats and `count`.

        None if `stop()` came true. Images that cannot be read are left out, and
        counted as `broken` if there are any.
        """
        examples = self.examples(params, stop)
        return None if examples is None else self.summary(examples)

    def summary(self, examples: Examples) -> dict[str, float]:
        """The metrics of `run` for the examples of the last pass."""
        results = {
            "top1": float(examples.top1.mean()),
            "top5": float(examples.top5.mean()),
            "loss": float(examples.loss.mean(dtype=np.float64)),
            "count": len(examples.label),
        }
        return results | ({"broken": self.broken} if self.broken else {})
