"""Names what is on images, and turns images into features, by weights from anywhere.

    python -m mlp_mixer.predict --workdir=runs/digits docs/digits
    python -m mlp_mixer.predict --weights=b16.npz --sheet=sheet.png 'photos/**/*.jpg'
    python -m mlp_mixer.predict --weights=b16.npz --format=csv photos > photos.csv
    find . -name '*.jpg' | python -m mlp_mixer.predict --weights=b16.npz -
    python -m mlp_mixer.predict --weights=b16.npz --features=features.npz photos

Images are files, folders with all below them, globs, or - for a list on stdin. The
probabilities are the softmax of the logits, also where the loss was the sigmoid
cross-entropy. Ends with 1 if an image could not be read; the others are done.
"""

import contextlib
import csv
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32

from mlp_mixer import atomic, metrics, program, runs, sharding, visualize
from mlp_mixer.data import folders, image_ops, pipeline

logger = logging.getLogger(__name__)

SHEET = 60  # images of the sheet
THUMBNAIL = 400  # pixels of the shorter side


class Prediction(NamedTuple):
    """What a model makes of one image.

    `classes` are its most likely ones, `indices` their numbers and `probabilities`
    their softmax, highest first; all are empty for weights without a head. `features`
    are the pre-logits.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    indices: tuple[int, ...]
    features: Float32[np.ndarray, " c"]


def predict(
    source: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    top: int = 5,
    step: int | None = None,
    preprocess: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
) -> Iterator[Prediction]:
    """Returns an iterator of a prediction for every readable image, in their order.

        for image in predict.predict("runs/digits", ["docs/digits"]):
            print(image.path, image.classes[0], image.probabilities[0])

    An image that cannot be read is named in the log.

    Args:
      source: of the weights: a run's folder, a file or a published name.
      paths: image files, folders or globs.
      top: how many classes.
      step: of a run's checkpoint; the newest by default.
      preprocess: a protocol, instead of the one that the run was evaluated with.
      labels: a text file with the names of the classes, one a line.
      batch_size: images at once.

    Raises:
      FileNotFoundError: there are no such weights, or no such file or folder.
      ValueError: `top` is not 1 or more; a folder holds no image; or see
        `runs.open_model`.
    """
    files = [file for path in paths for file in folders.find_images(os.fspath(path))]
    if not files or batch_size < 1:
        raise ValueError(
            f"There are {len(files)} images and batch_size is {batch_size}; each must "
            "be 1 or more."
        )
    _check_top(top)
    model = runs.open_model(source, step=step, preprocess=preprocess, labels=labels)
    return classify(model, files, top=top, batch_size=batch_size)


def classify(
    model: runs.Opened, files: Sequence[str], *, top: int, batch_size: int = 64
) -> Iterator[Prediction]:
    """Yields what an open model makes of every readable file, as `predict` does."""
    images = folders.open_files(files)
    per_device = -(-min(batch_size, len(images)) // model.mesh.size)
    # Decodes ahead in threads, and names what is broken.
    batches = pipeline.eval_batches(
        images,
        image_size=model.image_size,
        batch_size=per_device * model.mesh.size,
        preprocess=model.preprocess,
    )
    for batch in batches:
        logits, features = jax.device_get(
            model.predict(model.params, sharding.put(batch["image"], model.mesh))
        )
        for i in np.flatnonzero(batch["mask"]):
            best, probabilities = _top(logits[i], top if model.class_names else 0)
            yield Prediction(
                files[batch["index"][i]],
                tuple(model.class_names[k] for k in best),
                probabilities,
                best,
                features[i],
            )


def _top(
    logits: Float32[np.ndarray, " k"], count: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The classes of the highest logits, and their softmax."""
    best = np.argsort(-logits, kind="stable")[:count]
    powers = np.exp(logits - logits.max())
    shares = powers[best] / powers.sum()
    return tuple(map(int, best)), tuple(map(float, shares))


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top is {top}; it must be 1 or more.")


# --- The command line -----------------------------------------------------------------


def run(
    images: Sequence[str],
    *,
    weights: str,
    step: int | None = None,
    top: int = 3,
    preprocess: str | None = None,
    labels: str | None = None,
    format: str = "table",
    out: str | None = None,
    features: str | None = None,
    sheet: str | None = None,
) -> tuple[int, int]:
    """Writes predictions, and features and a picture if wanted.

    Files are written whole, at the end, or not at all.

    Args:
      images: files, folders, globs, and "-" for paths on stdin, one a line.
      weights: as `source` in `predict`, which explains step, top, preprocess, labels.
      step: see weights.
      top: see weights.
      preprocess: see weights.
      labels: see weights.
      format: a key of `FORMATS`.
      out: a file for what else goes to stdout.
      features: an npz file for `path` (n,) and `features` (n, c) float32, in the order
        of the images.
      sheet: a PNG file with up to `SHEET` of the images and their classes.

    Returns:
      How many images there are, and how many could not be read.

    Raises:
      FileNotFoundError: as in `predict`.
      ValueError: as in `predict`; or no image at all could be read.
    """
    for name, suffix in ((features, ".npz"), (sheet, ".png")):
        if name and not name.lower().endswith(suffix):
            raise ValueError(f"{name} will be a {suffix[1:]} file: end it in {suffix}.")
    _check_top(top)
    files = _find(images)
    model = runs.open_model(weights, step=step, preprocess=preprocess, labels=labels)
    if not model.class_names and (sheet or out or not features):
        raise ValueError(
            f"{weights} has no head, so there are no classes to name; "
            "--features=FILE.npz alone writes its features."
        )
    top = min(top, len(model.class_names))
    # Evenly spread: the first ones of a data set are often of one class.
    spread = np.linspace(0, len(files) - 1, min(SHEET, len(files))).round().astype(int)
    on_sheet = {files[i] for i in spread} if sheet else set()
    shown: list[Prediction] = []
    paths: list[str] = []
    vectors: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        # A bar that begins redirects sys.stdout, so it is taken before.
        file: IO[str] = sys.stdout
        if out:
            options: Any = {
                "encoding": "utf-8",
                "errors": "surrogateescape",
                "newline": "",
            }
            file = stack.enter_context(atomic.writing(out, "w", **options))
        header, line = FORMATS[format](files, model, top)
        track = metrics.counter("predict", len(files), "images")
        # On a terminal the lines themselves show how far it is.
        watched = model.class_names and file.isatty()
        advance = _ignore if watched else stack.enter_context(track)
        if model.class_names:
            file.write(header)
        for image in classify(model, files, top=top):
            if model.class_names:
                file.write(line(image))
            if features:
                vectors.append(image.features)
            if image.path in on_sheet:
                shown.append(image._replace(features=np.empty(0, np.float32)))
            paths.append(image.path)
            advance(1)
        if not paths:
            raise ValueError(f"None of {len(files)} images could be read.")
        advance(len(files) - len(paths))
        file.flush()
    if out:
        logger.info("Wrote %d predictions to %s.", len(paths), out)
    if features:
        with atomic.writing(features) as npz:
            np.savez(npz, path=np.array(paths), features=np.stack(vectors))
        said = (*np.shape(vectors), features)
        logger.info("Wrote the features of %d images, %d each, to %s.", *said)
    if sheet:
        _write_sheet(shown[:SHEET], len(paths), model, sheet)
    return len(files), len(files) - len(paths)


def _find(arguments: Sequence[str]) -> list[str]:
    """All image files; those of a list need not exist, they are named when read."""
    files: list[str] = []
    for argument in arguments:
        if argument != "-":
            files += folders.find_images(argument)
            continue
        for line in map(os.fsdecode, sys.stdin.buffer.read().splitlines()):
            files += folders.find_images(line) if os.path.isdir(line) else [line]
    files = [file for file in files if file]
    if not files:
        raise ValueError(
            "Name image files, folders or globs, e.g. docs/digits, or - and a list of "
            "paths on stdin."
        )
    return files


def _ignore(count: int) -> None:
    del count


# What comes first, and what each image gets.
Form = tuple[str, Callable[[Prediction], str]]


def _table(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """Aligned columns for people, a line as soon as it is known."""
    path_width = min(60, max(map(len, files)))
    width = min(24, max(map(len, model.class_names), default=0))

    def line(image: Prediction) -> str:
        cells = [f"{image.path:{path_width}}"]
        for name, p in zip(image.classes, image.probabilities, strict=True):
            name = name if len(name) <= width else f"{name[: width - 1]}…"
            cells.append(f"{name:{width}} {100 * p:5.1f} %")
        return "  ".join(cells) + "\n"

    return "", line


def _csv(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """A header, then a row for each image."""

    def row(*cells: str) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def line(image: Prediction) -> str:
        pairs = zip(image.classes, image.probabilities, strict=True)
        return row(image.path, *(x for name, p in pairs for x in (name, f"{p:.6g}")))

    ranks = range(1, top + 1)
    columns = (f"{what}_{i}" for i in ranks for what in ("class", "probability"))
    return row("path", *columns), line


def _jsonl(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """An object for each image, which says how it came about."""

    def line(image: Prediction) -> str:
        found = zip(image.indices, image.classes, image.probabilities, strict=True)
        record = {
            "path": image.path,
            "predictions": [
                {"index": k, "class": name, "probability": float(f"{p:.6g}")}
                for k, name, p in found
            ],
            "weights": model.said,
            "preprocess": model.preprocess,
        }
        return json.dumps(record) + "\n"

    return "", line


FORMATS: dict[str, Callable[[Sequence[str], runs.Opened, int], Form]] = {
    "table": _table,
    "csv": _csv,
    "jsonl": _jsonl,
}


def _write_sheet(
    shown: Sequence[Prediction], count: int, model: runs.Opened, path: str
) -> None:
    images = []
    for image in shown:
        pixels = image_ops.decode(pathlib.Path(image.path).read_bytes())
        if min(pixels.shape[:2]) > THUMBNAIL:  # sixty photos would take gigabytes
            pixels = image_ops.resize_small(pixels, THUMBNAIL)
        images.append(pixels)
    part = f"{count}" if len(shown) == count else f"{len(shown)} of {count}"
    figure = visualize.sheet(
        images,
        captions=[os.fsencode(i.path).decode(errors="replace") for i in shown],
        classes=[image.classes for image in shown],
        probabilities=[image.probabilities for image in shown],
        title=f"{model.said}, preprocessed by {model.preprocess}; images: {part}",
    )
    with atomic.writing(path) as file:
        file.write(visualize.png(figure))
    logger.info("Wrote %s; images: %s.", path, part)


def main(arguments: list[str]) -> None:
    """The command line; exits with 1 if an image could not be read."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    values = flags.FLAGS.flag_values_dict()
    images = [program.path(argument) for argument in arguments]
    count, broken = run(images, **{name: values[name] for name in OPTIONS})
    if broken:
        sys.exit(f"{broken} of {count} images could not be read.")


OPTIONS = (
    *("weights", "step", "top", "preprocess", "labels"),
    *("format", "out", "features", "sheet"),
)

if __name__ == "__main__":
    program.define_path(
        "weights",
        None,
        "A run's folder, a file (npz, safetensors, timm's) or a published name.",
        required=True,
    )
    flags.DEFINE_alias("workdir", "weights")
    flags.DEFINE_integer(
        "step", None, "Of a run's checkpoint; the newest if not set.", lower_bound=0
    )
    flags.DEFINE_integer("top", 3, "How many classes.", lower_bound=1)
    flags.DEFINE_enum(
        "preprocess",
        None,
        list(image_ops.PROTOCOLS),
        "If not set, that of the run's evaluation, else big_vision.",
    )
    program.define_path("labels", None, "A text file with a class's name a line.")
    flags.DEFINE_enum("format", "table", list(FORMATS), "Of the predictions.")
    program.define_path("out", None, "A file for them; stdout if not set.")
    program.define_path("features", None, "An npz file for features (pre-logits).")
    program.define_path("sheet", None, "A PNG file: images and classes to look at.")
    # Flags may also follow the images.
    flags.FLAGS.set_gnu_getopt()
    program.run(main)
