"""Makes docs/plans/: what the paper's runs need on pods that nobody has here.

    python scripts/plans.py                        (all that are not there yet)
    python scripts/plans.py mixer_h14_jft300m_v3-512 --again
    python scripts/plans.py --table                (predicted beside published)

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

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "plans"

# Name of the files → recipe, topology.
PLANS = {
    **{
        f"mixer_{size}{suffix}_v3-128": (f"configs/mixer_{size}.py{word}", "v3:8x8")
        for size in ("b16", "l16")
        for suffix, word in (("", ""), ("_imagenet21k", ":imagenet21k"))
    },
    **{
        f"mixer_{size}_jft300m_v3-512": (f"configs/mixer_{size}.py:jft300m", "v3:16x16")
        for size in ("b16", "l16", "h14")
    },
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


def make(name: str) -> bool:
    """Compiles one plan and writes NAME.json and NAME.md; returns whether it could."""
    recipe, topology = PLANS[name]
    words = [f"--config={recipe}", f"--topology={topology}"]
    command = [sys.executable, "-m", "mlp_mixer.plan", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, f"--output={folder}"],
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
        plan = {"command": " ".join(["python", *command[1:]]), **plan}
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(plan, indent=1) + "\n")
        text = (pathlib.Path(folder) / "plan.md").read_text()
        (FOLDER / f"{name}.md").write_text(text)
    return True


def _path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def ratios() -> dict[str, dict[str, float]]:
    """Returns, by plan, published core-days and what is reckoned of them.

    Each reckoning is core-days too, as if a run did nothing but steps of that time.
    """
    found = {}
    for name, published in PUBLISHED.items():
        path = FOLDER / f"{name}.json"
        if not path.exists():
            continue
        plan = json.loads(path.read_text())
        step, days = plan["step"], plan["run"]["steps"] * plan["devices"] / 86_400
        shapes = plan["shapes"]
        found[name] = {
            "published": published,
            "compiler": step["compiler_seconds"] * days,
            "roofline": step["roofline_seconds"] * days,
            "shapes": max(shapes["roofline_seconds"], shapes["link_seconds"]) * days,
        }
    return found


def table() -> str:
    """Returns published core-days beside those that are reckoned, and their ratios."""
    lines = [
        "| plan | published | compiler | roofline, program | roofline, shapes |",
        "|---|---:|---:|---:|---:|",
    ]
    found = ratios()
    for name, row in found.items():
        published = row["published"]
        cells = [
            f"{row[kind]:.3g} ({published / row[kind]:.2f} x)"
            for kind in ("compiler", "roofline", "shapes")
        ]
        lines.append(f"| {name} | {published:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--again", action="store_true", help="those that are there too")
    parser.add_argument("--table", action="store_true", help="predicted and published")
    args = parser.parse_args(argv)
    if args.table:
        print(table())
        return
    if unknown := [name for name in args.names if name not in PLANS]:
        parser.error(f"there is no plan {unknown[0]}; there are {', '.join(PLANS)}")
    failed = []
    for name in args.names or PLANS:
        if args.again or not (FOLDER / f"{name}.json").exists():
            print(name, flush=True)
            failed += [] if make(name) else [name]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
