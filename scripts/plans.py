"""Makes docs/plans/: what the paper's runs need on pods that nobody has here.

    python scripts/plans.py                        (all that are not there yet)
    python scripts/plans.py mixer_h14_jft300m_v3-512 --again
    python scripts/plans.py --refresh              (ranges and tables, nothing compiled)
    python scripts/plans.py --table                (the tables of docs/plan.md)

Each plan is `python -m mlp_mixer.plan` in a process of its own, so that one that is
killed leaves the others; the same command goes on with those that are missing.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

from mlp_mixer import program, recipe
from mlp_mixer.planning import chips, duration, report, search
from mlp_mixer.planning.step import Step

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "plans"

# Name of the files → recipe, topology, fields of the recipe.
PLANS: dict[str, tuple[str, ...]] = {
    **{
        f"mixer_{size}{suffix}_v3-128": (f"configs/mixer_{size}.py{word}", "v3:8x8")
        for size in ("b16", "l16")
        for suffix, word in (("", ""), ("_imagenet21k", ":imagenet21k"))
    },
    **{
        f"mixer_{size}_jft300m_v3-512": (f"configs/mixer_{size}.py:jft300m", "v3:16x16")
        for size in ("b16", "l16", "h14")
    },
    "mixer_h14_jft300m_fsdp_v3-128": (
        *("configs/mixer_h14.py:jft300m", "v3:8x8", "--config.sharding=fsdp"),
        *("--config.mesh.data=1", "--config.mesh.fsdp=128"),
    ),
    "mixer_b16_v5e-256": ("configs/mixer_b16.py", "v5e:16x16"),
    "mixer_b16_v4-128": ("configs/mixer_b16.py", "v4:4x4x4"),
    "mixer_b16_v6e-64": ("configs/mixer_b16.py", "v6e:8x8"),
    "mixer_b16_h200-8": ("configs/mixer_b16.py", "h200:8"),
    # Others that the paper has a duration of.
    **{
        f"mixer_{size}_jft300m_v3-512": (f"configs/mixer_{size}.py:jft300m", "v3:16x16")
        for size in ("s32", "s16", "b32", "l32")
    },
}

# Core-days of a v3 that have been published: 2 h 11 min on 128 cores (big_vision); the
# others as the paper rounds them (Table 3). What it extrapolated itself is left out.
PUBLISHED = {
    "mixer_b16_v3-128": 131 / 60 / 24 * 128,
    "mixer_s32_jft300m_v3-512": 10.0,
    "mixer_s16_jft300m_v3-512": 30.0,
    "mixer_b32_jft300m_v3-512": 50.0,
    "mixer_b16_jft300m_v3-512": 80.0,
    "mixer_l32_jft300m_v3-512": 120.0,
    "mixer_l16_jft300m_v3-512": 450.0,
    "mixer_h14_jft300m_v3-512": 1010.0,
}
# Of those, what says nothing: 10 and 30 may be anything from 5 to 15, and 25 to 35.
COARSE = ("mixer_s32_jft300m_v3-512", "mixer_s16_jft300m_v3-512")


def make(name: str) -> bool:
    """Compiles one plan and writes NAME.json and NAME.md; returns whether it could."""
    config, topology, *fields = PLANS[name]
    words = [f"--config={config}", f"--topology={topology}", *fields]
    command = ["-m", "mlp_mixer.plan", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *command, f"--output={folder}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            return False
        (plan,) = json.loads((pathlib.Path(folder) / "plan.json").read_text())
    if plan["step"]["origin"] != "compiled":
        sys.exit(plan["missing"])
    _write(name, {"command": " ".join(["python", *command]), **plan})
    refresh(name)
    return True


def read(name: str) -> tuple[Any, report.Plan]:
    """Returns the recipe, complete, and the plan of a pair of files."""
    config, found = _recorded(name)
    fields = found["run"]
    pairs = ("step_seconds", "hours", "chip_hours")
    run = duration.Run(**fields | {name: tuple(fields[name]) for name in pairs})
    return config, _plan(found, run)


def _recorded(name: str) -> tuple[Any, dict[str, Any]]:
    found = json.loads((FOLDER / f"{name}.json").read_text())
    config, _, *fields = PLANS[name]
    return recipe.completed(program.override(recipe.load(config), fields)), found


def _plan(found: dict[str, Any], run: duration.Run) -> report.Plan:
    """The plan of a file, with another run."""
    (topology,) = chips.topologies(found["topology"])
    proposal = found["proposal"] and _proposal(found["proposal"])
    steps = _step(found["step"]), _step(found["shapes"])
    return report.Plan(topology, *steps, run, proposal, found["missing"])


def _step(fields: dict[str, Any]) -> Step:
    sums = {kind: tuple(pair) for kind, pair in fields["collectives"].items()}
    return Step(**fields | {"collectives": sums})


def _proposal(fields: dict[str, Any]) -> search.Proposal:
    return search.Proposal(fields["fields"], _step(fields["step"]))


def refresh(name: str) -> None:
    """Writes a plan's files anew, with the range that its step has today."""
    config, found = _recorded(name)
    (topology,) = chips.topologies(found["topology"])
    run = duration.run(config, _step(found["step"]), topology)
    plan = _plan(found, run)
    anew = report.as_json(plan)
    _write(name, found | {"run": anew["run"], "chip": anew["chip"]})
    title = f"{config.model.name} on {config.dataset.name}, {plan.topology.name}"
    table = report.table("", [plan]).markdown()
    lines = [f"# {title}", "", "```text", found["command"], "```", "", table]
    lines += [f"- {line}" for line in report.remarks([plan])]
    (FOLDER / f"{name}.md").write_text("\n".join(lines) + "\n")


def _write(name: str, plan: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(plan, indent=1) + "\n")


def _path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def ratios() -> dict[str, dict[str, float]]:
    """Returns, by plan, published core-days and what is reckoned of them.

    Each reckoning is core-days too, as if a run did nothing but steps of that time.
    """
    found = {}
    for name, published in PUBLISHED.items():
        if not (FOLDER / f"{name}.json").exists():
            continue
        _, plan = read(name)
        days = plan.run.steps * plan.topology.devices / 86_400
        found[name] = {
            "published": published,
            "compiler": plan.step.seconds * days,
            "roofline": plan.step.roofline_seconds * days,
            "shapes": plan.shapes.seconds * days,
        }
    return found


def table() -> str:
    """Returns published core-days beside those that are reckoned, and their ratios."""
    head = ("plan", "published", "compiler", "roofline, program", "roofline, shapes")
    rows = []
    for name, row in ratios().items():
        published = row["published"]
        cells = [
            f"{_days(row[kind])} ({published / row[kind]:.2f} x)"
            for kind in ("compiler", "roofline", "shapes")
        ]
        coarse = " (too coarse)" if name in COARSE else ""
        rows.append((name, f"{_days(published)}{coarse}", *cells))
    return _markdown(head, rows)


def summary() -> str:
    """Returns a line for each plan that is there."""
    head = ("plan", "peak, of memory", "from shapes", "step", "run", "chip-hours")
    rows = []
    for name in PLANS:
        if (FOLDER / f"{name}.json").exists():
            _, plan = read(name)
            step, run = plan.step, plan.run
            memory = report.shown_bytes(plan.topology.memory)
            rows.append(
                (
                    f"[{name}](plans/{name}.md)",
                    f"{report.shown_bytes(step.peak)} of {memory}",
                    report.shown_bytes(plan.shapes.peak),
                    " to ".join(map(report.shown_time, run.step_seconds)),
                    " to ".join(report.shown_time(h * 3600) for h in run.hours),
                    report.spread(run.chip_hours),
                )
            )
    return _markdown(head, rows)


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--again", action="store_true", help="those that are there too")
    parser.add_argument("--refresh", action="store_true", help="nothing is compiled")
    parser.add_argument("--table", action="store_true", help="those of docs/plan.md")
    args = parser.parse_args(argv)
    if args.table:
        print(f"{summary()}\n\n{table()}")
        return
    if unknown := [name for name in args.names if name not in PLANS]:
        parser.error(f"there is no plan {unknown[0]}; there are {', '.join(PLANS)}")
    if args.refresh:
        for name in args.names or PLANS:
            if (FOLDER / f"{name}.json").exists():
                refresh(name)
        return
    failed = []
    for name in args.names or PLANS:
        if args.again or not (FOLDER / f"{name}.json").exists():
            print(name, flush=True)
            failed += [] if make(name) else [name]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
