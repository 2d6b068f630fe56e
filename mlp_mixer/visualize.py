"""Draws pictures: the report of a run, a sheet of predictions, learning rates."""

import io
import logging
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# It warns twice if it cannot write its cache of fonts, and only at the import.
logging.getLogger("matplotlib").addFilter(lambda record: "mkdir" not in record.msg)

import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from mlp_mixer import goodput  # noqa: E402
from mlp_mixer.text import printable, shortened  # noqa: E402

Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl

# With more classes nobody can read a confusion matrix.
MAX_CONFUSION_CLASSES = 40


def mistakes_first(examples: Any, count: int) -> np.ndarray:
    """Positions of `count` examples: the surest mistakes, then the least sure hits."""
    surest = np.where(examples.top1, 1.0 + examples.probability, -examples.probability)
    return np.argsort(surest, kind="stable")[:count]


def report(
    records: Records,
    *,
    name: str,
    examples: Any,
    shown: Sequence[int] | np.ndarray,
    images: Sequence[np.ndarray],
    truths: Sequence[Sequence[int]],
    class_names: Sequence[str],
) -> Figure:
    """Curves of a run, and its model's predictions for a split.

    Args:
      records: records of metrics.jsonl.
      name: name of the evaluator that saw the split.
      examples: `evaluators.accuracy.Examples` of the split.
      shown: positions of the examples on the sheet.
      images: images of these, uint8 (h, w, 3).
      truths: true classes of each of these, one or several.
      class_names: names of all classes.
    """
    confusion = len(class_names) <= MAX_CONFUSION_CLASSES
    columns = 10
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(15, 5 + 1.7 * rows), layout="constrained")
    heights = [4.6, 1.7 * max(rows, 1)]
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=heights))
    axes = top.subplots(1, 4 if confusion else 3)
    if seconds := goodput.sums(records):
        top.suptitle(goodput.sentence(seconds), size=10)
    _loss(axes[0], records)
    _learning_rate(axes[1], records)
    _accuracy(axes[2], records)
    if confusion:
        _confusion(axes[3], examples, class_names)
    wrong = int((~examples.top1).sum())
    bottom.suptitle(
        f"{_short(name, 60)}: {wrong} of {len(examples.top1)} are wrong "
        f"(top-1 {100 * examples.top1.mean():.2f} %); mistakes first",
        parse_math=False,
    )
    sheet = list(bottom.subplots(max(rows, 1), columns, squeeze=False).flat)
    for axis in sheet:
        axis.set_axis_off()
    for axis, i, image, truth in zip(sheet, shown, images, truths, strict=False):
        axis.imshow(image)
        name = class_names[examples.prediction[i]]
        text = f"{_short(name)} ({100 * examples.probability[i]:.0f} %)"
        if not examples.top1[i]:
            names = " or ".join(_short(class_names[k]) for k in truth)
            text += "\n" + textwrap.fill(f"is {names}", 24)
        colour = "black" if examples.top1[i] else "tab:red"
        axis.set_title(text, fontsize=8, color=colour, parse_math=False)
    return figure


def sheet(
    images: Sequence[np.ndarray],
    *,
    captions: Sequence[str],
    classes: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]],
    title: str,
) -> Figure:
    """Images with their most likely classes below, a bar for each probability.

    Args:
      images: uint8 (h, w, 3), of any sizes.
      captions: text above each image.
      classes: most likely classes of each image, best first; equally many for all.
      probabilities: probabilities of these classes, in [0, 1].
      title: title of the whole sheet.
    """
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    # In inches. Placed by hand: a layout engine takes many seconds for 60 images.
    cell, line = min(4.5, 14 / columns), 0.19
    side, gap, bars = cell - 0.2, 0.35, line * len(classes[0])
    title = textwrap.fill(printable(title), int(13 * cell * columns))
    top = 0.2 + 0.2 * (1 + title.count("\n"))
    wide, high = cell * columns, (side + gap + bars + 0.1) * rows + top
    figure = Figure(figsize=(wide, high))
    figure.suptitle(title, y=1 - 0.1 / high, va="top", size=10, parse_math=False)
    room = int(16.5 * cell)  # characters of 7 points that fit side by side

    def place(left: float, upper: float, width: float, height: float) -> Axes:
        lower = high - upper - height
        box = (left / wide, lower / high, width / wide, height / high)
        axis = figure.add_axes(box, xticks=(), yticks=())
        axis.spines[:].set_color("0.8")
        return axis

    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left = cell * column + 0.1
        upper = top + (side + gap + bars + 0.1) * row + gap - 0.1
        axis = place(left, upper, side, side)
        axis.set_anchor("S")
        axis.imshow(image)
        # The end of a path says more than its beginning.
        caption = shortened(captions[i], room, end=room - 1)
        axis.set_title(caption, size=7, pad=3, parse_math=False)
        axis = place(left, upper + side + 0.05, side, bars)
        axis.set_axis_off()
        axis.set(xlim=(0, 1), ylim=(len(classes[i]) - 0.5, -0.5))
        values = probabilities[i]
        axis.barh(range(len(values)), values, height=0.86, color="#a6cbe8")
        for y, (name, p) in enumerate(zip(classes[i], values, strict=True)):
            shown = shortened(name, room - 8)
            style: dict[str, Any] = {"size": 7, "va": "center_baseline"}
            axis.text(0.01, y, shown, ha="left", parse_math=False, **style)
            axis.text(0.99, y, f"{100 * p:.1f} %", ha="right", **style)
    return figure


def learning_rates(
    curves: Mapping[str, Mapping[float, float | None]], chosen: Mapping[str, float]
) -> Figure:
    """Accuracy over learning rate, a line for each data set and a ring for its choice.

    Args:
      curves: name → {learning rate: accuracy in [0, 1], None where it diverged}.
      chosen: name → learning rate.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    lines = {}
    for name, curve in curves.items():
        known = {r: 100 * a for r, a in sorted(curve.items()) if a is not None}
        (line,) = axis.plot([*known], [*known.values()], ".-")
        lines[name] = line
        rate, colour = chosen[name], line.get_color()
        axis.plot(rate, known[rate], "o", mfc="none", markersize=11, color=colour)
    axis.set(xscale="log", xlabel="learning rate", ylabel="top-1, %")
    axis.set_title("on held-out training images; ringed: chosen")
    ticks = sorted({rate for curve in curves.values() for rate in curve})
    axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axis.set_xticks([], minor=True)
    _legend(figure, lines, loc="outside right upper", fontsize="small")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # It warns of names in scripts that the font lacks, and older versions warn of
        # scripts that they draw in the wrong direction.
        for warned in (r"Glyph \d+ .* missing from", "Matplotlib currently does not"):
            warnings.filterwarnings("ignore", warned)
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _curve(records: Records, key: str) -> Iterable[tuple[float, ...]]:
    points = [(r["step"], r[key]) for r in records if key in r]
    return zip(*points, strict=True) if points else ((), ())


def _keys(records: Records, ending: str) -> list[str]:
    return sorted({k for r in records for k in r if k.endswith(ending)})


def _loss(axis: Axes, records: Records) -> None:
    (line,) = axis.plot(*_curve(records, "train/loss"), linewidth=0.8)
    lines = {"train": line}
    for key in _keys(records, "/loss"):
        if key != "train/loss":
            name = key.removesuffix("/loss")
            (lines[name],) = axis.plot(*_curve(records, key), "o-")
    axis.set(title="loss", xlabel="step", ylabel="nats", yscale="log")
    _legend(axis, lines)


def _learning_rate(axis: Axes, records: Records) -> None:
    axis.plot(*_curve(records, "train/lr"))
    axis.set(title="learning rate", xlabel="step")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _accuracy(axis: Axes, records: Records) -> None:
    lines = {}
    for ending in ("/top1", "/top5"):
        for key in _keys(records, ending):
            steps, values = _curve(records, key)
            (lines[key],) = axis.plot(steps, [100 * v for v in values], "o-")
    axis.set(title="accuracy", xlabel="step", ylabel="%")
    if lines:
        _legend(axis, lines)


def _legend(owner: Axes | Figure, lines: Mapping[str, Line2D], **style: Any) -> None:
    """Adds a legend with the names as they are: "$" and "_" have no meaning there."""
    names = [_short(name, 40) for name in lines]
    for entry in owner.legend([*lines.values()], names, **style).get_texts():
        entry.set_parse_math(False)


def _confusion(axis: Axes, examples: Any, class_names: Sequence[str]) -> None:
    k = len(class_names)
    counts = np.zeros((k, k), int)
    np.add.at(counts, (examples.label, examples.prediction), 1)
    axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues")
    axis.set(title="confusion", xlabel="predicted", ylabel="true")
    names = [_short(name) for name in class_names]
    turn = 90 if max(map(len, names)) > 2 else 0
    style: dict[str, Any] = {"parse_math": False, "size": min(10, 200 / k)}
    axis.set_xticks(range(k), names, rotation=turn, **style)
    axis.set_yticks(range(k), names, **style)
    if k <= 12:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if i == j else "black"
                axis.text(j, i, count, ha="center", va="center", color=colour, size=7)


def _short(name: str, room: int = 14) -> str:
    """Shortens in the middle: names of classes often differ at the end."""
    return shortened(name, room, end=room // 3)
