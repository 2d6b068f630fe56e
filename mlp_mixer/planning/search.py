"""The cheapest way to run a recipe that does not fit as it is."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from mlp_mixer.planning.step import Planner, Step

# What shapes reckon may be so much too little.
MARGIN = 1.1
# Programs that are compiled before the search gives up.
TRIES = 3


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Fields of a recipe that make it fit, and what its step then needs."""

    fields: dict[str, Any]
    step: Step

    @property
    def words(self) -> str:
        """The fields as a command line has them."""
        return " ".join(f"--config.{name}={v}" for name, v in self.fields.items())


def candidates(planner: Planner) -> Iterator[dict[str, Any]]:
    """Yields fields of the recipe that might make it fit, by name.

    Meshes with an axis fsdp of all devices, or of a host's, or none; with an axis model
    of 2 to 8; the recipe's rematerialisation or more; up to 64 micro-batches.

    Args:
      planner: planner of the recipe as it is.
    """
    config, devices = planner.config, len(planner.devices)
    host = planner.topology.chip.host * planner.topology.chip.devices
    remats = ["none", "pre_gelu", "full"]
    remats = remats[remats.index(config.run.remat) :]
    for model in (1, 2, 4, 8):
        rest = devices // model
        if rest * model != devices:
            continue
        for fsdp in sorted({1, min(host, rest), rest}):
            if rest % fsdp or config.batch_size % rest:
                continue
            for remat in remats:
                for power in range(7):
                    micro = config.accumulate * 2**power
                    if config.batch_size // rest % micro:
                        break
                    yield {
                        "mesh.data": rest // fsdp,
                        "mesh.fsdp": fsdp,
                        "mesh.model": model,
                        "sharding": "fsdp" if fsdp > 1 else "replicated",
                        "run.remat": remat,
                        "accumulate": micro,
                    }


def reckoned(planner: Planner) -> list[Proposal]:
    """Returns what fits by its shapes, the cheapest first.

    Args:
      planner: planner of the recipe as it is.
    """
    found = []
    for fields in candidates(planner):
        step = changed(planner, fields).reckoned()
        if step.peak * MARGIN <= step.usable:
            found.append(Proposal(fields, step))
    return sorted(found, key=lambda p: (_seconds(p.step), p.fields["accumulate"]))


def cheapest(planner: Planner, *, can_compile: bool) -> Proposal | None:
    """Returns the cheapest that fits; None if nothing does.

    Args:
      planner: planner of the recipe as it is.
      can_compile: whether what shapes say is to be compiled too.
    """
    found = reckoned(planner)
    if not can_compile:
        return found[0] if found else None
    tried, limit = 0, math.inf
    for proposal in found:
        if tried < TRIES and proposal.step.peak <= limit:
            step = changed(planner, proposal.fields).compiled()
            if step.fits:
                return Proposal(proposal.fields, step)
            tried, limit = tried + 1, 0.9 * proposal.step.peak
    return None


def changed(planner: Planner, fields: dict[str, Any]) -> Planner:
    """Returns a planner with fields set, by their names in a recipe."""
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        if section:
            changes.setdefault(section, {})[field] = value
        else:
            changes[name] = value
    return planner.changed(**changes)


def _seconds(step: Step) -> float:
    """The time of a step, where nothing travels while something is computed."""
    return step.roofline_seconds + step.link_seconds
