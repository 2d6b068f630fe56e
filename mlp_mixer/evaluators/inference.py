"""One pass of a model over a split: every readable example once, on every host.

The last batch is padded and masked, so the result does not depend on the batch size,
nor on the number of devices and processes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mlp_mixer import sharding
from mlp_mixer.data import pipeline
from mlp_mixer.data.sources import Source
from mlp_mixer.evaluators.evaluator import Stop, Track, never, untracked

Predict = Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]]
Keep = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]


class Outputs(NamedTuple):
    """What a pass found."""

    rows: dict[str, np.ndarray]  # by name (n, …), in the order of the source
    broken: int  # images that could not be read


class Inference:
    """Runs `predict` over sources, and keeps a function of what it says."""

    def __init__(
        self,
        keep: Keep,
        *,
        predict: Predict,
        mesh: Mesh,
        image_size: tuple[int, int],
        preprocess: str,
        batch_size: int,
        workers: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          keep: (out, batch) → arrays (n, …) that travel to the hosts, on the device;
            `out` is what `predict` returns.
          predict: function of `steps.make_predict`.
          mesh: mesh of `sharding.make_mesh`.
          image_size: height and width in pixels.
          preprocess: a key of `data.image_ops.PROTOCOLS`.
          batch_size: images at once over all devices, rounded up to a multiple of
            the parts that they cut it into.
          workers: number of processes that decode; 0: threads of this one.
        """
        self._predict, self._mesh, self._batch_size = predict, mesh, batch_size
        self._options: dict[str, Any] = {
            "image_size": image_size,
            "preprocess": preprocess,
            "workers": workers,
        }
        self._keep = jax.jit(
            lambda out, batch: (
                keep(out, batch) | {"index": batch["index"], "mask": batch["mask"]}
            ),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(
        self,
        source: Source,
        variables: Any,
        stop: Stop = never,
        track: Track = untracked,
    ) -> Outputs | None:
        """Returns what `keep` and `index`, the position, are for each readable example.

        None if `stop()` came true.

        Raises:
          ValueError: no image could be read.
        """
        batch_size = sharding.whole_batch(
            self._mesh, min(self._batch_size, len(source))
        )
        batches = pipeline.eval_batches(
            source,
            batch_size=batch_size,
            rows=sharding.process_rows(self._mesh, batch_size),
            **self._options,
        )
        parts, broken = [], 0
        for batch in track(batches, -(-len(source) // batch_size)):
            if stop():
                return None
            batch = sharding.place_rows(batch, self._mesh)
            out = self._predict(variables, batch)
            part = jax.device_get(self._keep(out, batch))
            mask = part.pop("mask")
            broken += int((~mask & (part["index"] >= 0)).sum())
            parts.append({key: value[mask] for key, value in part.items()})
        rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if not len(rows["index"]):
            raise ValueError(
                f"None of {len(source)} images could be read, e.g. {source.name_of(0)}."
            )
        return Outputs(rows, broken)
