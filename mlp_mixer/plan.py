"""Says what a run will need on chips that need not be here.

    python -m mlp_mixer.plan --config=configs/mixer_b16.py --topology=v3:8x8
    python -m mlp_mixer.plan --config=configs/mixer_h14.py:jft300m \\
        --topology=v3:16x16,v5e:16x16 --price=1.2
    python -m mlp_mixer.plan --config=configs/mixer_l16.py --topology=v4:4x4x4 \\
        --shardings

Compiles the recipe's training step for them where their compiler is installed, else
reckons from shapes, and says which. Opens no data. Where a step does not fit, it
proposes the cheapest mesh, sharding, rematerialisation and accumulation that does.
"""

import json
import logging
import sys
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from mlp_mixer import files, program, recipe, text
from mlp_mixer.planning import chips, duration, report, search, targets
from mlp_mixer.planning.step import Planner

logger = logging.getLogger(__name__)


def plan(
    config: ConfigDict,
    topology: chips.Topology,
    *,
    can_compile: bool = True,
    price: float | None = None,
    image_bytes: float | None = None,
) -> report.Plan:
    """Returns what a recipe needs on a topology.

    Args:
      config: the recipe.
      topology: the chips.
      can_compile: whether to compile, where the compiler is there.
      price: price of a chip for an hour.
      image_bytes: mean bytes of an encoded image; None: as is known of the data set.

    Raises:
      ValueError: the recipe does not fit together, or not to the number of devices.
    """
    missing = targets.missing_wheels(topology.kind) if can_compile else ""
    can_compile = can_compile and not missing
    found = planner(config, topology, compiles=can_compile)
    shapes = found.reckoned()
    step = found.compiled() if can_compile else shapes
    proposal, proposed = None, None
    if not step.fits:
        logger.info("%s: it does not fit; searching what does.", topology.name)
        proposal = search.cheapest(found, can_compile=can_compile)
    options: dict[str, Any] = {"price": price, "image_bytes": image_bytes}
    run = duration.run(found.config, step, topology, **options)
    if proposal:
        proposed = duration.run(found.config, proposal.step, topology, **options)
    return report.Plan(topology, step, shapes, run, proposal, missing, proposed)


def planner(config: ConfigDict, topology: chips.Topology, *, compiles: bool) -> Planner:
    """Returns what reckons and compiles the steps of a recipe.

    Args:
      config: the recipe.
      topology: the chips.
      compiles: whether to use their compiler; else devices of this host stand for
        theirs.
    """
    recipe.check_fields(config)
    config = recipe.completed(config)
    recipe.total_steps(config)  # says what is missing
    if config.dataset.num_classes is None:
        raise ValueError(
            "The recipe does not say how many classes its data has; give "
            "--config.dataset.num_classes."
        )
    if compiles:
        devices = targets.devices(topology)
    else:
        devices = jax.devices("cpu")[: topology.devices]
    return Planner(config, topology, devices)


def _prices(text: str | None, count: int) -> list[float | None]:
    """The price of each of so many topologies: one for all, or one for each.

    Raises:
      ValueError: it is no number, or not one for each.
    """
    if text is None:
        return [None] * count
    words = text.split(",")
    try:
        prices: list[float | None] = [float(word) for word in words]
    except ValueError:
        prices = []
    if len(prices) not in (1, count) or any(p is None or not p >= 0 for p in prices):
        raise ValueError(
            f"--price={text}; expected the price of a chip for an hour, e.g. 1.2, or "
            f"one for each of {count} topologies, separated by commas."
        )
    return prices * (count // len(prices))


def prepare() -> None:
    """Gives JAX the devices that the command line needs."""
    given = flags.FLAGS
    compiles = given.compile and not given.shardings
    targets.prepare(chips.topologies(given.topology), compiles=compiles)


def main(arguments: list[str]) -> None:
    """The command line."""
    program.check_no_words(arguments)
    given = flags.FLAGS
    topologies = chips.topologies(given.topology)
    prices = _prices(given.price, len(topologies))
    config = given.config
    if given.shardings:
        for topology in topologies:
            found = planner(config, topology, compiles=False)
            title = f"{config.model.name} on {topology.name}"
            report.shardings(title, found.shardings()).show()
        return
    plans = [
        plan(
            config,
            topology,
            can_compile=given.compile,
            price=price,
            image_bytes=given.image_bytes,
        )
        for topology, price in zip(topologies, prices, strict=True)
    ]
    title = f"{config.model.name} on {config.dataset.name}"
    table, lines = report.table(title, plans), report.remarks(plans)
    as_json = [report.as_json(one) for one in plans]
    if given.json:
        with text.flushed(sys.stdout):
            print(json.dumps(as_json, indent=1))
    else:
        table.show()
        with text.flushed(sys.stdout):
            print("\n".join(lines))
    if given.output:
        folder = epath.Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "plan.json", as_json)
        files.write_text(folder / "plan.md", table.markdown() + "\n" + "\n".join(lines))


if __name__ == "__main__":
    program.define_recipe()
    flags.DEFINE_string(
        "topology",
        "cpu:8",
        "Chips, e.g. v3:16x16 (256 chips, 512 cores), v4:4x4x4, v5e:16x16, v5p:4x4x8, "
        "v6e:8x8, h100:8, h200:8, cpu:8; several with commas.",
    )
    flags.DEFINE_bool(
        "compile", True, "Compile, where the chips' compiler is installed."
    )
    flags.DEFINE_bool("shardings", False, "Show how each parameter is cut, and end.")
    flags.DEFINE_bool("json", False, "Print JSON in place of a table.")
    flags.DEFINE_string("price", None, "Of a chip for an hour; of several with commas.")
    flags.DEFINE_float(
        "image_bytes", None, "Mean bytes of an encoded image.", lower_bound=1.0
    )
    program.define_path("output", None, "A folder that gets plan.json and plan.md.")
    program.run(main, compiles=False, prepare=prepare)
