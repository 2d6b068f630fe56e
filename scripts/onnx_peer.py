"""Our own graph under onnxruntime, on the CPU. Needs the package's extra `export`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlp_mixer import export, pretrained


def runner(
    name: str, params: Any, image: Any, threads: int
) -> tuple[Callable[[], np.ndarray], dict[str, str]]:
    """Returns what predicts a batch, giving its logits, and the versions.

    Args:
      name: model, e.g. "mixer_b16".
      params: tree of parameters.
      image: batch of levels 0 … 255, (n, h, w, 3).
      threads: number of threads.
    """
    import onnx
    import onnxruntime

    values = np.asarray((np.asarray(image, np.float32) - 127.5) / 127.5)
    weights = pretrained.Weights(
        _on_host(params), "noise", {"name": name}, image_size=values.shape[1:3]
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        export.to_onnx(weights).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    return lambda: session.run(["logits"], {"image": values})[0], versions


def _on_host(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _on_host(value) for name, value in tree.items()}
    return np.asarray(tree)
