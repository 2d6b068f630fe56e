"""The suite: what is worth measuring, in order of value, within a time budget.

    python scripts/benchmark.py suite --minutes=8 --out=FOLDER
    python scripts/benchmark.py suite --compare FOLDER_A FOLDER_B
    python scripts/benchmark.py suite --tables FOLDER ...

The first command runs the items of suite_plan.py, each in a process of its own, and
writes FOLDER/suite.json after each, then a table and a plot. An item that fails costs
only itself; one for which the time does not suffice is left out. The same command again
measures what is missing. Peers are optional: timm runs under --timm-python, onnxruntime
in the package's environment. --compare prints ratios of two suites, --tables keeps
one (or several of one machine, of which the last counts) in docs/benchmarks and puts
its tables into README.md and docs/speed.md.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import arguments
import suite_plan
import suite_report
from measurement import say
from suite_item import write_json
from suite_plan import Item

HERE = pathlib.Path(__file__).resolve().parent
# Scripts that have a part in the figures, besides the package.
MEASURING = (
    "bias_row",
    "literal_mixer",
    "measurement",
    "onnx_peer",
    "stacked_step",
    "suite_item",
    "timm_peer",
)
# What makes two figures comparable; of a folder with other values nothing is resumed.
SAME = ("machine", "sources", "dtype", "threads")


def sources() -> str:
    """Returns a hash of the code that is measured, and of what measures it."""
    found = hashlib.sha256()
    package = (HERE.parent / "mlp_mixer").rglob("*.py")
    for path in sorted([*package, *(HERE / f"{name}.py" for name in MEASURING)]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str | None:
    """Returns the clone's commit, with "+" if files differ; None outside of git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _comparable(value: Any) -> Any:
    """What has to be the same; the memory that a device has free varies."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != "device_bytes"}
    return value


def file_name(item: Item) -> str:
    """Returns what the item's file is called, without its ending."""
    return re.sub(r"[^\w.-]+", "_", item.name)


def now() -> str:
    """Returns date and time in UTC."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


class Suite:
    """Runs items in order of value and keeps their results in one file.

    Args:
      path: file of the results; one that is there is continued.
      identity: values of `SAME`.
      items: the items, the most valuable first.
      measure: takes an item and its time limit in seconds; returns its result.
      minutes: the budget.
      seconds_now: the clock.
    """

    def __init__(
        self,
        path: pathlib.Path,
        identity: dict[str, Any],
        items: list[Item],
        measure: Callable[[Item, float], dict[str, Any]],
        minutes: float,
        seconds_now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.items, self.measure = path, items, measure
        self.seconds_now = seconds_now
        self.end = seconds_now() + 60 * minutes
        self.report = self._opened(identity)
        self.pace = 1.0  # how much longer items take here than expected

    def _opened(self, identity: dict[str, Any]) -> dict[str, Any]:
        fresh = {"format": 1, "starts": [], "items": {}, "left_out": {}} | identity
        if not self.path.exists():
            return fresh
        report = json.loads(self.path.read_text(encoding="utf-8"))
        for key in SAME:
            there, here = _comparable(report[key]), _comparable(identity[key])
            if there != here:
                raise ValueError(
                    f"{self.path} was measured with another {key}: {there} there, "
                    f"{here} here. Figures of both would not compare: choose another "
                    "--out, or remove the folder."
                )
        return report | {"left_out": {}}

    @property
    def machine(self) -> suite_plan.Machine:
        """The machine that the budget is planned for, with its rate if it is known."""
        machine = suite_plan.MACHINES[self.report["machine"]["platform"]]
        rates = self.report["items"].get("rates", {}).get("rates", {})
        if "large" in rates:
            rate = rates["large"]["flops_per_s"]
            machine = dataclasses.replace(machine, rate=rate)
        return machine

    def run(self) -> None:
        """Measures what is missing, until the budget is spent."""
        self.report["starts"].append({"date": now(), "commit": commit()})
        for i, item in enumerate(self.items, 1):
            known = self.report["items"].get(item.name, {})
            where = f"[{i}/{len(self.items)}] {item.name}"
            asked = json.loads(json.dumps(dataclasses.asdict(item)))
            if known.get("status") == "done" and known["item"] == asked:
                say(f"{where}: is there")
                continue
            expected = self.pace * suite_plan.expected_seconds(item, self.machine)
            left = self.end - self.seconds_now()
            if expected > left:
                why = f"about {expected:.0f} s, and {max(left, 0):.0f} s are left"
                self.report["left_out"][item.name] = why
                say(f"{where}: left out: {why}")
                continue
            say(f"{where}: about {expected:.0f} s; {left:.0f} s are left")
            begun = self.seconds_now()
            result = self.measure(item, min(left, 60 + 3 * expected))
            took = self.seconds_now() - begun
            self.pace *= min(max(took / expected, 0.5), 2.0) ** 0.5
            result |= {"date": now(), "commit": commit(), "seconds": took}
            result["item"] = asked
            self.report["items"][item.name] = result
            say(f"{where}: {result['status']} in {took:.0f} s")
            for line in suite_report.lines_of(result):
                say(f"    {line}")
            write_json(self.path, self.report)
        write_json(self.path, self.report)


def in_a_process(
    arguments: list[str], answer: pathlib.Path, limit: float
) -> dict[str, Any]:
    """Runs suite_item.py; returns its answer, and how it ended as `status`.

    Args:
      arguments: what comes before the answer's path.
      answer: file that it writes.
      limit: seconds after which it is ended, with all that it has started.
    """
    answer.unlink(missing_ok=True)
    # Where a peer's process shares the GPU, nobody takes all of its memory at once.
    variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "suite_item.py"), *arguments, str(answer)],
        env=variables,
        start_new_session=True,
    )
    status = "done"
    try:
        if code := process.wait(limit):
            status = f"failed: its process ended with {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        # Unless it has ended, and so has everything that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
    return found | {"status": status}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="benchmark.py suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = p.add_argument
    flag("--minutes", type=arguments.real(0.1), default=8, help="the budget; default 8")
    flag("--out", type=arguments.path, metavar="FOLDER", help="where results go")
    flag("--only", default="", metavar="WORDS", help="items with this in their names")
    flag("--list", action="store_true", help="print the items, and run nothing")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: by the device")
    threads = arguments.whole(1, 2**16)
    flag("--threads", type=threads, default=1, help="of a CPU; default: 1")
    flag("--timm-python", default=sys.executable, metavar="PYTHON", help="has timm")
    flag("--compare", nargs=2, metavar="SUITE", help="print ratios of two suites")
    flag("--tables", nargs="+", metavar="SUITE", help="put tables into README and docs")
    return p


def opened(args: argparse.Namespace, folder: pathlib.Path) -> Suite:
    """Returns the suite of the command line, on this machine.

    Raises:
      ValueError: there is no device, no item of that name, or the folder has figures
        that would not compare.
    """
    begun = time.monotonic()
    (folder / "items").mkdir(parents=True, exist_ok=True)
    machine = in_a_process(["--machine"], folder / "machine.json", 120)
    if machine.pop("status") != "done":
        raise ValueError("JAX found no device; its message is above.")
    on_cpu = machine["platform"] == "cpu"
    identity = {
        "machine": machine,
        "commit": commit(),
        "sources": sources(),
        "dtype": args.dtype or ("float32" if on_cpu else "bfloat16"),
        "threads": args.threads if on_cpu else 0,
    }
    plan = suite_plan.items_for(machine["platform"])
    items = [item for item in plan if args.only in item.name]
    if not items:
        raise ValueError(f"--only={args.only}: no item is called so; try --list.")

    def measure(item: Item, limit: float) -> dict[str, Any]:
        asked, answer = (
            folder / "items" / f"{file_name(item)}{end}"
            for end in (".request.json", ".json")
        )
        request = {
            "item": dataclasses.asdict(item),
            "dtype": identity["dtype"],
            "threads": identity["threads"],
            "until": time.time() + limit - 5,
            "seconds": suite_plan.MACHINES[machine["platform"]].seconds,
            "timm_python": args.timm_python,
            "programs": str(folder / "programs"),
        }
        write_json(asked, request)
        return in_a_process([str(asked)], answer, limit)

    minutes = args.minutes - (time.monotonic() - begun) / 60
    return Suite(folder / "suite.json", identity, items, measure, minutes)


def main(argv: list[str]) -> None:
    """Runs the suite, or reads what it has written."""
    args = parser().parse_args(argv)
    try:
        if args.compare:
            a, b = (suite_report.load(name) for name in args.compare)
            return print(suite_report.comparison(a, b))
        if args.tables:
            report = suite_report.merged([suite_report.load(x) for x in args.tables])
            for page in suite_report.write_pages(report):
                print(page)
            return None
        if args.list:
            with tempfile.TemporaryDirectory() as folder:
                return print_items(opened(args, pathlib.Path(args.out or folder)))
        if not args.out:
            raise ValueError("--out=FOLDER says where the results go.")
        suite = opened(args, pathlib.Path(args.out))
    except (OSError, ValueError) as error:
        parser().error(str(error))
    # Ended by another program, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    suite.run()
    for path in suite_report.write_folder(suite.report, pathlib.Path(args.out)):
        say(f"wrote {path}")
    print(suite_report.headline_table(suite.report))


def print_items(suite: Suite) -> None:
    """Prints the items, and how long each is expected to take."""
    for item in suite.items:
        seconds = suite_plan.expected_seconds(item, suite.machine)
        labels = ", ".join(side.label for side in item.sides)
        print(f"{seconds:5.0f} s  {item.name}: {labels}")
