"""Plans as a table for people, and as JSON for programs."""

import dataclasses
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlp_mixer import console
from mlp_mixer.planning.chips import Topology
from mlp_mixer.planning.duration import Run
from mlp_mixer.planning.search import Proposal
from mlp_mixer.planning.step import Part, Step


class Plan(NamedTuple):
    """What a recipe needs on a topology.

    Attributes:
      topology: the chips.
      step: what a step needs.
      shapes: what shapes say that it needs.
      run: what the whole run needs.
      proposal: fields that make it fit, where it does not; None if it does, or if
        nothing was found.
      missing: how to install the compiler, where it is not there.
      proposed: what the whole run needs with the proposal.
    """

    topology: Topology
    step: Step
    shapes: Step
    run: Run
    proposal: Proposal | None
    missing: str
    proposed: Run | None = None


def table(title: str, plans: Sequence[Plan]) -> console.Table:
    """Returns a column for each plan.

    Args:
      title: title of the table.
      plans: plans of one recipe.
    """
    columns = [_column(plan) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return console.Table(
        title, ["of a device", *(p.topology.name for p in plans)], rows
    )


def _column(plan: Plan) -> dict[str, str]:
    """What is known, by its name."""
    topology, step, run = plan.topology, plan.step, plan.run
    known_from = step.origin
    if step.compile_seconds is not None:
        known_from += f", {step.compiler}, in {step.compile_seconds:.0f} s"
    cells = {
        "chips, devices, hosts": (
            f"{topology.chips}, {topology.devices}, {topology.hosts}"
        ),
        "known from": known_from,
        "computed in": step.run,
        "mesh": " x ".join(f"{name} {size}" for name, size in step.mesh.items()),
        "parameters are": step.sharding,
        "micro-batches": f"{step.accumulate}",
        "parameters": shown_bytes(step.parameters),
        "optimiser": shown_bytes(step.moments),
        "batch": shown_bytes(step.batch),
        "activations and other temporaries": shown_bytes(step.temporaries),
        "peak": shown_bytes(step.peak),
        "memory": shown_bytes(topology.memory),
        "of which a program may have": shown_bytes(step.usable),
        "fits": "yes" if step.fits else "NO",
        "TFLOP of a step": f"{step.flops / 1e12:.3g}",
        "of which nothing is computed again": f"{step.needed_flops / 1e12:.3g}",
        "GB read and written": f"{step.moved / 1e9:.3g}",
    }
    for kind, (count, size) in sorted(step.collectives.items()):
        cells[kind] = f"{count} x, {size / 1e6:,.0f} MB in all"
    cells["time of what travels"] = shown_time(step.link_seconds)
    cells["roofline"] = shown_time(step.roofline_seconds)
    if step.compiler_seconds is not None:
        cells["the compiler's estimate"] = shown_time(step.compiler_seconds)
    if step.optimal_seconds is not None:
        cells["its bound (a scanned block once)"] = shown_time(step.optimal_seconds)
    cells |= {
        "step": " to ".join(map(shown_time, run.step_seconds)),
        "that is": run.origin,
        "steps": f"{run.steps:,}",
        "run": " to ".join(shown_time(hours * 3600) for hours in run.hours),
        "chip-hours": spread(run.chip_hours),
    }
    if run.cost is not None:
        cells["cost"] = spread(run.cost)
    cells |= {
        "images/s that hosts make": f"{run.images_per_second:,.0f}",
        "cores for them": f"{run.cores:,.0f}",
        "of each host": f"{run.cores / run.hosts:,.1f}",
        "kB of an image": f"{run.image_bytes / 1e3:,.0f}, {run.image_bytes_from}",
        "MB/s read": f"{run.read_bytes_per_second / 1e6:,.0f}",
        "disk for data": f"{run.data_bytes / 1e9:,.1f} GB",
        "disk for checkpoints": f"{run.checkpoint_bytes / 1e9:,.1f} GB",
    }
    return cells


def remarks(plans: Sequence[Plan]) -> list[str]:
    """Returns what else is to be said of plans, line by line."""
    lines = []
    for topology, step, _, _, proposal, missing, proposed in plans:
        if step.origin == "shapes":
            lines.append(f"{topology.name}: from shapes alone. {missing}".strip())
        if proposal and proposed:
            lines.append(
                f"{topology.name}: it does not fit. The cheapest that does, of those "
                f"that were tried ({proposal.step.origin}): {proposal.words}: "
                f"{shown_bytes(proposal.step.peak)} at the peak, "
                f"{spread(proposed.chip_hours)} chip-hours."
            )
        elif not step.fits:
            lines.append(
                f"{topology.name}: it does not fit, and nothing was found that does; "
                "take more chips, or a smaller batch."
            )
        done = step.compiled_flops or 0.0
        if done > 1.2 * step.flops:
            lines.append(
                f"{topology.name}: the program computes {done / step.flops:.1f} times "
                "the operations of a device's share: the mesh does not divide the work."
            )
        lines.append(f"{topology.name}: {topology.chip.source}.")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan in what JSON has."""
    topology, step, shapes, run, proposal, missing, proposed = plan
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "devices": topology.devices,
        "hosts": topology.hosts,
        "chip": dataclasses.asdict(topology.chip),
        "jax": importlib.metadata.version("jax"),
        "fits": step.fits,
        "step": dataclasses.asdict(step),
        "shapes": dataclasses.asdict(shapes),
        "run": dataclasses.asdict(run),
        "proposal": proposal and dataclasses.asdict(proposal),
        "proposed": proposed and dataclasses.asdict(proposed),
        "missing": missing,
    }


def shardings(title: str, parts: Sequence[Part]) -> console.Table:
    """Returns how each parameter is cut; those of like blocks are one row.

    Args:
      title: title of the table.
      parts: what `Planner.shardings` gives.
    """
    alike: dict[tuple[str, ...], list[float]] = {}
    for part in parts:
        of_any_block = re.sub(r"_\d+/", "_*/", part.path, count=1)
        row = (of_any_block, part.shape, part.letters, part.cut)
        alike.setdefault(row, []).append(part.bytes)
    rows = [
        (path, str(len(held)), *how, shown_bytes(sum(held)))
        for (path, *how), held in alike.items()
    ]
    total = sum(part.bytes for part in parts)
    columns = ("parameter", "times", "shape", "letters", "cut over", "a device has")
    last = ("all", str(len(parts)), "", "", "", shown_bytes(total))
    return console.Table(title, columns, [*rows, last])


def shown_bytes(size: float) -> str:
    """A number of bytes, in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def shown_time(seconds: float) -> str:
    """A time, in the unit that fits."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for limit, length, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def spread(pair: tuple[float, float]) -> str:
    """The least and the most."""
    return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in pair)
