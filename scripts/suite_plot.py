"""The plot of a suite: cost against batch, tokens, depth and model size."""

import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import suite_report
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

OURS, REST = "#1f5fa8", "#9a9a9a"
# Pass, colour, marker.
PASSES = (("forward", "#1f5fa8", "o"), ("train", "#c4552d", "s"))
NAMES = {"forward": "inference", "train": "training step"}


def points(report: dict[str, Any], curve: str, kind: str) -> list[tuple[float, float]]:
    """Returns a curve's (x, images per second).

    Args:
      report: results of a suite.
      curve: "batches", "tokens" or "depth".
      kind: "train" or "forward".
    """
    sides = report["items"].get(f"curve of {curve}, {kind}", {}).get("sides", {})
    key = {"batches": "batch", "tokens": "tokens", "depth": "blocks"}[curve]
    found = [
        (side[key], side["images_per_s"])
        for side in sides.values()
        if "images_per_s" in side
    ]
    return sorted(found)


def costs(report: dict[str, Any], kind: str) -> list[tuple[str, float, float]]:
    """Returns (model, operations per image, seconds per image), by the best batch."""
    best: dict[str, tuple[str, float, float]] = {}
    for one, model, _, sides in suite_report.headlines(report):
        if one == kind:
            ours = sides["ours"]
            seconds = 1 / ours["images_per_s"]
            if model not in best or seconds < best[model][2]:
                best[model] = (model, ours["flops_per_image"], seconds)
    return sorted(best.values(), key=lambda row: row[1])


def write_plot(report: dict[str, Any], path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draws what the suite has of the four panels; yields the file's path, if any."""
    panels: list[tuple[str, Any]] = [
        (curve, {k: points(report, curve, k) for k, *_ in PASSES})
        for curve in ("batches", "tokens", "depth")
    ]
    panels.append(("size", {k: costs(report, k) for k, *_ in PASSES}))
    panels = [p for p in panels if any(len(found) > 1 for found in p[1].values())]
    if not panels:
        return
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "grid.linewidth": 0.8,
    }
    rows = (len(panels) + 1) // 2
    columns = min(len(panels), 2)
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(4.6 * columns, 3.3 * rows + 0.4),
            layout="constrained",
            squeeze=False,
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        for ax, (name, found) in zip(axes.flat, panels, strict=False):
            (_draw_costs if name == "size" else _draw_curve)(ax, report, name, found)
        figure.suptitle(
            suite_report.where(report).partition(";")[0], x=0.01, ha="left", fontsize=9
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
    yield path


def _draw_curve(ax: Any, report: dict[str, Any], curve: str, found: Any) -> None:
    titles = {
        "batches": ("B/16: speed against batch", "images in a batch"),
        "tokens": ("B/16: cost against tokens", "tokens of an image"),
        "depth": ("B/16: cost against depth", "blocks"),
    }
    title, label = titles[curve]
    speed = curve == "batches"
    ticks: set[float] = set()
    for kind, colour, marker in PASSES:
        if line := found[kind]:
            x = [point[0] for point in line]
            y = [rate if speed else 1e3 / rate for _, rate in line]
            ax.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.5)
            ax.annotate(
                NAMES[kind],
                (x[-1], y[-1]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="right" if speed else "center",
                color=colour,
            )
            ticks |= set(x)
    ax.set(title=title, xlabel=label, ylabel="images/s" if speed else "ms per image")
    if speed:
        ax.set_xscale("log")
    else:  # a cost in proportion is a straight line through the origin
        ax.set_xlim(0)
        ticks = {x for x in ticks if x > max(ticks) / 20 or x == 1}
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_ylim(0, 1.15 * ax.get_ylim()[1])


def _draw_costs(ax: Any, report: dict[str, Any], _: str, found: Any) -> None:
    ax.set(xscale="log", yscale="log")
    # Training steps are above. B/32 and S/16, and L/32 and B/16, are neighbours.
    above = ((-6, 3), "right")
    places = {
        "forward": (((6, -6), "left"), ((0, -13), "center")),
        "train": (above, above),
    }
    for kind, colour, marker in PASSES:
        if line := found[kind]:
            x = [operations / 1e9 for _, operations, _ in line]
            y = [1e3 * seconds for *_, seconds in line]
            ax.plot(x, y, color=colour, marker=marker, markersize=4, linestyle="none")
            for (model, *_), at_x, at_y in zip(line, x, y, strict=True):
                offset, side = places[kind][model.endswith("32")]
                ax.annotate(
                    suite_report.title(model),
                    (at_x, at_y),
                    xytext=offset,
                    textcoords="offset points",
                    ha=side,
                    color=colour,
                    fontsize=8,
                )
            ax.plot([], [], color=colour, marker=marker, ls="none", label=NAMES[kind])
    rate = report["items"].get("rates", {}).get("rates", {}).get("large")
    if rate:
        x = list(ax.get_xlim())
        ax.plot(
            x,
            [1e12 * value / rate["flops_per_s"] for value in x],
            color=REST,
            linewidth=1,
            zorder=0,
            label="at the rate of a large product",
        )
    ax.set(
        title="Cost against model size",
        xlabel="GFLOP per image (of products)",
        ylabel="ms per image",
    )
    _plain_numbers(ax.xaxis)
    _plain_numbers(ax.yaxis)
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
