"""Names what is on images, and turns images into features, by weights from anywhere.

    python -m mlp_mixer.predict --workdir=runs/digits docs/digits
    python -m mlp_mixer.predict --weights=b16.npz --sheet=sheet.png 'photos/**/*.jpg'
    python -m mlp_mixer.predict --weights=b16.npz --format=csv photos > photos.csv
    find . -name '*.jpg' | python -m mlp_mixer.predict --weights=b16.npz -
    python -m mlp_mixer.predict --weights=b16.npz --features=features.npz photos
    python -m mlp_mixer.predict --weights=cyclemlp_b1.pth --features=stages photos

Images are files, folders with all below them, globs, or - for a list on stdin (a file
of that name is ./-; after -- nothing is a flag). The probabilities are the softmax of
the logits, also where the loss was the sigmoid cross-entropy. Ends with 1 if an image
could not be read; the others are done.

csv and jsonl are UTF-8 on stdout too, and hold every name exactly: what is no text is
those bytes in csv (Python reads them with errors="surrogateescape"), and \\udc80 ...
\\udcff in jsonl. The table and the sheet are for people: there it is escaped.
"""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32

from mlp_mixer import console, models, program, runs, sharding, steps, text
from mlp_mixer.data import decoding, folders, image_ops, pipeline
from mlp_mixer.files import writing

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # images at once
SHEET = 60  # images of the sheet
THUMBNAIL = 400  # pixels of the shorter side


class Prediction(NamedTuple):
    """What a model makes of one image.

    `classes` are its most likely ones, `indices` their numbers and `probabilities`
    their softmax, highest first; all are empty for weights without a head. `features`
    are the pre-logits. `stages` are the maps of a pyramid's stages, by the names of
    `models.stage_names`, if they were asked for.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    indices: tuple[int, ...]
    features: Float32[np.ndarray, " c"]
    stages: Mapping[str, Float32[np.ndarray, "h w c"]]


def predict(
    source: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    top: int = 5,
    exif: bool = False,
    batch_size: int = BATCH_SIZE,
    stages: bool = False,
    **options: Any,
) -> Iterator[Prediction]:
    """Returns an iterator of a prediction for every readable image, in their order.

        for image in predict.predict("runs/digits", ["docs/digits"]):
            print(image.path, image.classes[0], image.probabilities[0])

    An image that cannot be read is named in the log.

    Args:
      source: a run's folder, a file of weights or a published name.
      paths: image files, folders or globs.
      top: number of classes that are named.
      exif: whether images are turned as their Exif orientation says; the authors do
        not, and the log says how many would be.
      batch_size: images at once.
      stages: whether predictions have the maps of a pyramid's stages.
      **options: step, ema, preprocess, labels, dtype and image_size, as in
        `runs.open_model`.

    Raises:
      FileNotFoundError: there are no such weights, or no such file or folder.
      ValueError: a folder holds no image; the model has no stages; or see
        `runs.open_model` and `classify`.
    """
    files = [file for path in paths for file in folders.find_images(os.fspath(path))]
    _check_counts(files, top, batch_size)
    model = runs.open_model(source, **options)
    if stages:
        models.stage_names(model.model)  # raises if there are none
    return classify(
        model, files, top=top, exif=exif, batch_size=batch_size, stages=stages
    )


@dataclasses.dataclass(frozen=True)
class _Files(folders.FolderSource):
    """Image files that remember which of them Exif turns, as they are read."""

    turned: set[int] = dataclasses.field(default_factory=set)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        if decoding.orientation(example["image"]) != 1:
            self.turned.add(index)
        return example


def classify(
    model: runs.Opened,
    files: Sequence[str],
    *,
    top: int,
    exif: bool = False,
    batch_size: int = BATCH_SIZE,
    stages: bool = False,
) -> Iterator[Prediction]:
    """Yields what an open model makes of every readable file, as `predict` does.

    Raises:
      ValueError: `top`, `batch_size` or the number of files is not 1 or more.
    """
    _check_counts(files, top, batch_size)
    images = _Files(**vars(folders.open_files(files)))
    turned = 0
    kept = models.stage_names(model.model) if stages else ()
    forward = (
        steps.make_predict(model.model, model.mesh, also=kept)
        if stages
        else model.predict
    )
    # Decodes ahead in threads, and names what is broken.
    batches = pipeline.eval_batches(
        images,
        image_size=model.image_size,
        batch_size=sharding.whole_batch(model.mesh, min(batch_size, len(images))),
        preprocess=model.preprocess,
        exif=exif,
    )
    for batch in batches:
        cut = sharding.place_rows({"image": batch["image"]}, model.mesh)
        out = jax.device_get(forward(model.variables, cut))
        logits, features = out["logits"], out["pre_logits"]
        for i in np.flatnonzero(batch["mask"]):
            turned += batch["index"][i] in images.turned
            best, probabilities = _most_likely(
                logits[i], top if model.class_names else 0
            )
            yield Prediction(
                files[batch["index"][i]],
                tuple(model.class_names[k] for k in best),
                probabilities,
                best,
                features[i],
                {name: np.asarray(out[name][i], np.float32) for name in kept},
            )
    if turned:
        manner = (
            "were turned as Exif says"
            if exif
            else "are turned by Exif; they were read as they are stored, unrotated, as "
            "the authors do (--exif turns them)"
        )
        logger.warning("%d of %d images %s.", turned, len(files), manner)


def _most_likely(
    logits: Float32[np.ndarray, " k"], count: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The classes of the highest logits, and their softmax."""
    best = np.argsort(-logits, kind="stable")[:count]
    powers = np.exp(logits - logits.max())
    shares = powers[best] / powers.sum()
    return tuple(map(int, best)), tuple(map(float, shares))


def _check_counts(files: Sequence[str], top: int, batch_size: int) -> None:
    if min(len(files), top, batch_size) < 1:
        raise ValueError(
            f"There are {len(files)} images, top is {top} and batch_size is "
            f"{batch_size}; each must be 1 or more."
        )


# --- The command line -----------------------------------------------------------------


def run(
    files: Sequence[str],
    model: runs.Opened,
    *,
    top: int = 3,
    exif: bool = False,
    format: str = "table",
    out: str | None = None,
    features: str | None = None,
    sheet: str | None = None,
) -> int:
    """Writes predictions, and features and a picture if wanted.

    Files are written whole, at the end, or not at all; those of stages as soon as a
    batch is computed, so that memory does not grow with the number of images.

    Args:
      files: image files, as `find_images` gives them.
      model: model of `runs.open_model`.
      top, exif: as in `predict`.
      format: a key of `FORMATS`.
      out: a file for what else goes to stdout.
      features: an npz file for `path` (n,) and `features` (n, c) float32, in the order
        of the images; or, ending in anything else, a new folder for one npz file for
        each image, as `stage_files` names them, with its `path` () and the maps
        `stage_1`, … `stage_4` (h, w, c) float32.
      sheet: a PNG file with up to `SHEET` of the images and their classes.

    Returns:
      How many images could not be read.

    Raises:
      FileExistsError: the folder for features is not empty.
      OSError: stdout cannot be written.
      RuntimeError: the sheet cannot be drawn; all else is written.
      ValueError: no image at all could be read; the model has no head, or no stages
        where a folder is for them; the sheet has another ending; or as in `classify`.
    """
    if sheet and not sheet.lower().endswith(".png"):
        raise ValueError(f"{sheet} will be a png file: end it in .png.")
    of_stages: Mapping[str, str] = {}
    if features and not features.lower().endswith(".npz"):
        _check_stages_folder(features, model)
        of_stages = stage_files(files, features)
    if not model.class_names and (sheet or out or not features):
        raise ValueError(
            f"{model.origin} has no head, so there are no classes to name; "
            "--features=FILE.npz alone writes its features."
        )
    if model.class_names and not out and sys.stdout is None:
        raise ValueError("stdout is closed; name a file with --out.")
    # Evenly spread: the first ones of a data set are often of one class.
    spread = np.linspace(0, len(files) - 1, min(SHEET, len(files))).round().astype(int)
    on_sheet = {files[i] for i in spread} if sheet else set()
    shown: list[Prediction] = []
    paths: list[str] = []
    vectors: list[np.ndarray] = []
    header, line = FORMATS[format](files, model, top)
    progress: contextlib.AbstractContextManager[Callable[[int], None]]
    progress = console.counter("predict", len(files), "images")
    if model.class_names and not out and sys.stdout.isatty():
        # The lines themselves show how far it is.
        progress = contextlib.nullcontext(lambda count: None)
    with _lines_to(out) as write_line, progress as advance:
        if model.class_names:
            write_line(header)
        for image in classify(model, files, top=top, exif=exif, stages=bool(of_stages)):
            if model.class_names:
                write_line(line(image))
            if of_stages:
                arrays: Any = {"path": np.array(image.path), **image.stages}
                with writing(of_stages[image.path]) as npz:
                    np.savez(npz, **arrays)
            elif features:
                vectors.append(image.features)
            if image.path in on_sheet:
                nothing = np.empty(0, np.float32)
                shown.append(image._replace(features=nothing, stages={}))
            paths.append(image.path)
            advance(1)
        if not paths:
            raise ValueError(f"None of {len(files)} images could be read.")
        advance(len(files) - len(paths))
    if out:
        logger.info("Wrote %d predictions to %s.", len(paths), out)
    if of_stages:
        logger.info("Wrote the stages of %d images to %s.", len(paths), features)
    elif features:
        with writing(features) as npz:
            np.savez(npz, path=np.array(paths), features=np.stack(vectors))
        shape = (*np.shape(vectors), features)
        logger.info("Wrote the features of %d images, %d each, to %s.", *shape)
    if sheet:
        try:
            _write_sheet(shown[:SHEET], len(paths), model, sheet, exif)
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"{sheet} is not drawn: {error}. All else is written."
            ) from error
    return len(files) - len(paths)


def stage_files(files: Sequence[str], folder: str) -> dict[str, str]:
    """Returns the npz file of each image: its own path and name, below a folder.

        >>> stage_files(["/photos/a/1.png", "/photos/2.png"], "stages")
        {'/photos/a/1.png': 'stages/a/1.png.npz', '/photos/2.png': 'stages/2.png.npz'}

    The path is from the folder that all images have in common, with links to folders
    followed: two images never get the same file.

    Args:
      files: image files, which need not exist.
      folder: where the npz files will lie.
    """
    folders = {os.path.dirname(file) for file in files}
    real = {path: os.path.realpath(path) for path in folders}
    common = os.path.commonpath(real.values())

    def npz(file: str) -> str:
        place, name = os.path.split(file)
        below = os.path.relpath(real[place], common)
        return os.path.normpath(os.path.join(folder, below, f"{name}.npz"))

    return {file: npz(file) for file in files}


def _check_stages_folder(folder: str, model: runs.Opened) -> None:
    """Raises unless a model has stages and its folder holds no others yet."""
    try:
        models.stage_names(model.model)
    except ValueError as error:
        raise ValueError(
            f"--features={folder} is a folder for the maps of stages, but {error} End "
            f"it in .npz for the features that there are: --features={folder}.npz."
        ) from error
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise FileExistsError(
            f"{folder} is not empty, and features of other images or weights would "
            "stay between the new ones; name a new folder, or empty it."
        )


@contextlib.contextmanager
def _lines_to(out: str | None) -> Iterator[Callable[[str], object]]:
    """Gives a function that writes a line to a file, or at once to stdout."""
    if out:
        any_name: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
        with writing(out, "w", newline="", **any_name) as file:
            yield file.write
        return
    stdout = sys.stdout  # taken here, since a bar that begins redirects it

    def write_now(line: str) -> None:
        with text.flushed(stdout):
            stdout.write(line)

    yield write_now


def find_images(arguments: Sequence[str]) -> list[str]:
    """Returns all image files of files, folders, globs, and "-" for paths on stdin.

    Those of stdin, one a line, need not exist; they are named when they are read.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: there is no image, or stdin is closed.
    """
    files: list[str] = []
    for argument in arguments:
        if argument != "-":
            files += folders.find_images(argument)
            continue
        if sys.stdin is None:
            raise ValueError("- reads paths from stdin, but stdin is closed.")
        for line in map(os.fsdecode, sys.stdin.buffer.read().splitlines()):
            files += folders.find_images(line) if os.path.isdir(line) else [line]
    files = [file for file in files if file]
    if not files:
        raise ValueError(
            "Name image files, folders or globs, e.g. docs/digits, or - and a list of "
            "paths on stdin."
        )
    return files


# What comes first, and what each image gets.
Form = tuple[str, Callable[[Prediction], str]]


def _table_form(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """Aligned columns for people, a line as soon as it is known."""

    def widest(names: Sequence[str]) -> int:
        return max((text.width(text.printable(name)) for name in names), default=0)

    path_width, width = min(60, widest(files)), min(24, widest(model.class_names))

    def line(image: Prediction) -> str:
        cells = [text.padded(text.printable(image.path), path_width)]
        for name, p in zip(image.classes, image.probabilities, strict=True):
            name = text.padded(text.shortened(name, width), width)
            cells.append(f"{name} {100 * p:5.1f} %")
        return "  ".join(cells) + "\n"

    return "", line


def _csv_form(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """A header, then a row for each image."""

    def row(*cells: str) -> str:
        written = io.StringIO()
        # It quotes what ends a line: for a reader "\r" does too.
        writer = csv.writer(written, lineterminator="\r\n")
        writer.writerow(map(text.encodable, cells))
        return written.getvalue().removesuffix("\r\n") + "\n"

    def line(image: Prediction) -> str:
        pairs = zip(image.classes, image.probabilities, strict=True)
        return row(image.path, *(x for name, p in pairs for x in (name, f"{p:.6g}")))

    ranks = range(1, min(top, len(model.class_names)) + 1)
    columns = (f"{what}_{i}" for i in ranks for what in ("class", "probability"))
    return row("path", *columns), line


def _jsonl_form(files: Sequence[str], model: runs.Opened, top: int) -> Form:
    """An object for each image, which says how it came about."""

    def line(image: Prediction) -> str:
        found = zip(image.indices, image.classes, image.probabilities, strict=True)
        record = {
            "path": image.path,
            "predictions": [
                {"index": k, "class": name, "probability": float(f"{p:.6g}")}
                for k, name, p in found
            ],
            "weights": model.origin,
            "preprocess": model.preprocess,
        }
        return json.dumps(record) + "\n"

    return "", line


FORMATS: dict[str, Callable[[Sequence[str], runs.Opened, int], Form]] = {
    "table": _table_form,
    "csv": _csv_form,
    "jsonl": _jsonl_form,
}


def _write_sheet(
    shown: Sequence[Prediction], count: int, model: runs.Opened, path: str, exif: bool
) -> None:
    if not shown:
        raise ValueError("none of the images chosen for it could be read")
    from mlp_mixer import visualize  # only a sheet needs Matplotlib

    images = []
    for image in shown:
        pixels = decoding.decode(pathlib.Path(image.path).read_bytes(), exif=exif)
        if min(pixels.shape[:2]) > THUMBNAIL:  # sixty photos would take gigabytes
            pixels = image_ops.resize_small(pixels, (THUMBNAIL, THUMBNAIL))
        images.append(pixels)
    part = f"{count}" if len(shown) == count else f"{len(shown)} of {count}"
    figure = visualize.sheet(
        images,
        captions=[image.path for image in shown],
        classes=[image.classes for image in shown],
        probabilities=[image.probabilities for image in shown],
        title=f"{model.origin}, preprocessed by {model.preprocess}; images: {part}",
    )
    with writing(path) as file:
        file.write(visualize.png(figure))
    logger.info("Wrote %s; images: %s.", path, part)


def main(arguments: list[str]) -> None:
    """The command line; exits with 1 if an image could not be read."""
    values = flags.FLAGS.flag_values_dict()
    if values["format"] != "table" and isinstance(sys.stdout, io.TextIOWrapper):
        # As in a file: names may be any bytes, whatever the terminal shows.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    files = find_images([program.path(argument) for argument in arguments])
    of_model = ("step", "ema", "preprocess", "labels", "dtype")
    size = program.size("image_size")
    of_run = ("top", "exif", "format", "out", "features", "sheet")
    model = runs.open_model(
        values["weights"], **{k: values[k] for k in of_model}, image_size=size
    )
    if broken := run(files, model, **{k: values[k] for k in of_run}):
        sys.exit(f"{broken} of {len(files)} images could not be read.")


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
    program.define_ema()
    flags.DEFINE_integer("top", 3, "How many classes.", lower_bound=1)
    flags.DEFINE_enum(
        "preprocess",
        None,
        list(image_ops.PROTOCOLS),
        "If not set, that of the run's evaluation, else big_vision.",
    )
    flags.DEFINE_boolean(
        "exif", False, "Turns images as Exif says; the authors leave them as stored."
    )
    flags.DEFINE_list(
        "image_size",
        None,
        "HEIGHT,WIDTH in pixels, or a square's side, that images are resized to, of a "
        "model that takes any; the weights' own if not set.",
    )
    program.define_path("labels", None, "A text file with a class's name a line.")
    flags.DEFINE_enum("format", "table", list(FORMATS), "Of the predictions.")
    program.define_dtype()
    program.define_path("out", None, "A file for them; stdout if not set.")
    program.define_path(
        "features",
        None,
        "FILE.npz for features (pre-logits) of all images; or, with any other ending, "
        "a new folder for the maps of a pyramid's stages, an npz file for each image.",
    )
    program.define_path("sheet", None, "A PNG file: images and classes to look at.")
    # Flags may also follow the images.
    flags.FLAGS.set_gnu_getopt()
    program.run(main)
