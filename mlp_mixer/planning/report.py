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
from mlp_mixer.planning.step import Step


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
    """

    topology: Topology
    step: Step
    shapes: Step
    run: Run
    proposal: Proposal | None
    missing: str


def table(title: str, plans: Sequence[Plan]) -> console.Table:
    """Returns a column for each plan.

    Args:
      title: title of the table.
      plans: plans of one recipe.
    """
    columns = [_column(plan) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return console.Table(title, ["a device", *(p.topology.name for p in plans)], rows)


def _column(plan: Plan) -> dict[str, str]:
    """What is known, by its name."""
    topology, step, run = plan.topology, plan.step, plan.run
    cells = {
        "chips, devices, hosts": (
            f"{topology.chips}, {topology.devices}, {topology.hosts}"
        ),
        "known from": step.origin
        + (f", {step.compiler}, {step.compile_seconds:.0f} s" if step.compiler else ""),
        "computed in": step.run,
        "mesh": " x ".join(f"{name} {size}" for name, size in step.mesh.items()),
        "parameters are": step.sharding,
        "micro-batches": f"{step.accumulate}",
        "parameters": gib(step.parameters),
        "optimiser": gib(step.moments),
        "batch": gib(step.batch),
        "activations and other temporaries": gib(step.temporaries),
        "peak": gib(step.peak),
        "memory": f"{gib(topology.memory)}, of which a program has {gib(step.usable)}",
        "fits": "yes" if step.fits else "NO",
        "TFLOP of a step, without what is computed again": (
            f"{step.flops / 1e12:.3g}, {step.needed_flops / 1e12:.3g}"
        ),
        "GB read and written": f"{step.moved / 1e9:.3g}",
    }
    for kind, (count, size) in sorted(step.collectives.items()):
        cells[kind] = f"{count} x, {size / 1e6:,.0f} MB"
    cells["time of what travels"] = milliseconds(step.link_seconds)
    cells["roofline"] = milliseconds(step.roofline_seconds)
    if step.compiler_seconds is not None:
        cells["the compiler's estimate"] = milliseconds(step.compiler_seconds)
    if step.optimal_seconds is not None:
        cells["its bound, a scanned block once"] = milliseconds(step.optimal_seconds)
    cells |= {
        "step": " to ".join(map(milliseconds, run.step_seconds)),
        "origin of the range": run.origin,
        "steps": f"{run.steps:,}",
        "hours": spread(run.hours),
        "chip-hours": spread(run.chip_hours),
    }
    if run.cost is not None:
        cells["cost"] = spread(run.cost)
    cells |= {
        "images/s that hosts make": f"{run.images_per_second:,.0f}",
        "cores for them": f"{run.cores:,.0f}, {run.cores / run.hosts:,.0f} a host",
        "MB/s read": f"{run.read_bytes_per_second / 1e6:,.0f}",
        "disk for data": f"{run.data_bytes / 1e9:,.0f} GB",
        "disk for checkpoints": f"{run.checkpoint_bytes / 1e9:,.1f} GB",
    }
    return cells


def remarks(plans: Sequence[Plan]) -> list[str]:
    """Returns what else is to be said of plans, line by line."""
    lines = []
    for topology, step, _, _, proposal, missing in plans:
        if step.origin == "shapes":
            lines.append(f"{topology.name}: from shapes alone. {missing}".strip())
        if proposal:
            lines.append(
                f"{topology.name}: it does not fit. The cheapest that does, of those "
                f"that were tried ({proposal.step.origin}): {proposal.words}: "
                f"{gib(proposal.step.peak)} at the peak, "
                f"{milliseconds(proposal.step.seconds)} a step."
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
    topology, step, shapes, run, proposal, missing = plan
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
        "missing": missing,
    }


def shardings(
    title: str, rows: Sequence[tuple[str, str, str, str, float]]
) -> console.Table:
    """Returns how each parameter is cut; those of like blocks are one row.

    Args:
      title: title of the table.
      rows: rows of `Planner.shardings`.
    """
    columns = ["parameter", "times", "shape", "letters", "cut over", "a device has"]
    alike: dict[tuple[str, ...], list[float]] = {}
    for name, shape, letters, cut, held in rows:
        of_any_block = re.sub(r"_\d+/", "_*/", name, count=1)
        alike.setdefault((of_any_block, shape, letters, cut), []).append(held)
    cells = [
        (name, str(len(held)), *how, _mib(sum(held)))
        for (name, *how), held in alike.items()
    ]
    total = sum(row[4] for row in rows)
    return console.Table(
        title, columns, [*cells, ("all", str(len(rows)), "", "", "", _mib(total))]
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.3f} MiB"


def gib(size: float) -> str:
    """A number of bytes in GiB."""
    return f"{size / 2**30:,.2f} GiB"


def milliseconds(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{seconds * 1e3:.3g} ms"


def spread(pair: tuple[float, float]) -> str:
    """The least and the most."""
    return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in pair)
