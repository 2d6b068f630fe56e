"""Names what is on images: top-k classes for files and folders.

python -m mlp_mixer.predict --workdir=runs/digits docs/digits
"""

import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from mlp_mixer import program, runs, sharding
from mlp_mixer.data import folders, image_ops

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """One image's most likely classes, with softmax probabilities, highest first."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    workdir: epath.PathLike,
    paths: Sequence[str],
    *,
    top: int = 5,
    step: int | None = None,
    batch_size: int = 64,
) -> Iterator[Prediction]:
    """Yields a prediction for every readable image.

    Args:
      workdir: folder of the run.
      paths: image files, or folders that are searched for images.
      top: how many classes.
      step: of the checkpoint; the newest by default.
      batch_size: images at once.

    Raises:
      FileNotFoundError: no run there, or no such file or folder.
      ValueError: `top` is not 1 or more; or a folder holds no image.
    """
    if top < 1:
        raise ValueError(f"top is {top}; it must be 1 or more.")
    files = list(find_images(paths))
    run = runs.open_run(workdir, step)
    size = run.config.model.image_size
    evals = run.config.evals.values()
    protocols = [e.preprocess for e in evals if e.type == "accuracy"]
    protocol = protocols[0] if protocols else "big_vision"
    rows = -(-min(batch_size, len(files)) // run.mesh.size) * run.mesh.size
    for start in range(0, len(files), rows):
        names, images = [], []
        for path in files[start : start + rows]:
            try:
                image = image_ops.decode(path.read_bytes())
            except (OSError, ValueError) as error:
                logger.error("%s is left out: %s", path, error)
                continue
            names.append(str(path))
            images.append(image_ops.preprocess(image, protocol, size))
        if not images:
            continue
        batch = np.zeros((rows, *images[0].shape), images[0].dtype)
        batch[: len(images)] = images
        logits, _ = run.predict(run.params, sharding.put(batch, run.mesh))
        probabilities = np.asarray(jax.nn.softmax(logits))[: len(images)]
        for name, p in zip(names, probabilities, strict=True):
            best = np.argsort(-p)[:top]
            yield Prediction(
                name,
                tuple(run.class_names[i] for i in best),
                tuple(float(p[i]) for i in best),
            )


def find_images(paths: Sequence[str]) -> Iterator[pathlib.Path]:
    """The files among `paths`, and the images inside the folders among them."""
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in folders.IMAGE_SUFFIXES
            )
            if not found:
                raise ValueError(f"There is no image in {path}.")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"There is no file or folder {path}.")


def main(arguments: list[str]) -> None:
    """The command line; exits with 1 if an image could not be read."""
    if not arguments:
        raise ValueError("Name image files or folders, e.g. docs/digits.")
    files = list(find_images(arguments))
    said = 0
    for prediction in predict(
        flags.FLAGS.workdir, arguments, top=flags.FLAGS.top, step=flags.FLAGS.step
    ):
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        ranked = "  ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)
        print(f"{prediction.path}: {ranked}", flush=True)
        said += 1
    if said < len(files):
        sys.exit(f"{len(files) - said} of {len(files)} images could not be read.")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("top", 3, "How many classes.")
    flags.DEFINE_integer("step", None, "Of the checkpoint; the newest if not set.")
    program.run(main)
