"""Whether two runs are the same run: loss and gradient norm of their first steps.

    python scripts/compare_runs.py runs/digits docs/ledgers/digits.jsonl
    python scripts/compare_runs.py my_pod/mixer_b16 your_pod/mixer_b16

Each side is the folder of a run or a file of such records, written with
--config.log_every_steps=1. Order of data, augmentation, mixup and stochastic depth are
functions of (seed, step), so on any number of devices and processes two runs of one
recipe differ by the order of float additions only. Those differences grow: by a
factor of about ten every fifty steps while the learning rate rises.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping

import arguments

from mlp_mixer import metrics

STEPS = (1, 10, 100, 1000)
KEYS = ("train/loss", "train/grad_norm")
# Relative. Seen between jax 0.10 and 0.12, one and four devices, optimised and not:
# 1e-7, 2e-6 and 2e-4 at steps 1, 10 and 100 of the digits.
TOLERANCES = {1: 1e-4, 10: 1e-3, 100: 1e-2, 1000: 5e-2}

Ledger = dict[int, dict[str, float]]


def read_ledger(path: str | pathlib.Path) -> Ledger:
    """{step: {"train/loss": nats, "train/grad_norm": ...}} of `STEPS`.

    Raises:
      FileNotFoundError: neither a file nor the folder of a run.
      ValueError: it is damaged, or has no record of step 1.
    """
    path = pathlib.Path(path)
    read = metrics.read if path.is_dir() else metrics.read_file
    ledger = {
        r["step"]: {key: float(r[key]) for key in KEYS}
        for r in read(path)
        if r["step"] in STEPS and set(KEYS) <= r.keys()
    }
    if 1 not in ledger:
        raise ValueError(
            f"{path} has no record of step 1; train with --config.log_every_steps=1."
        )
    return ledger


Row = tuple[int, str, float, float, float]


def differences(a: Mapping, b: Mapping) -> list[Row]:
    """(step, key, a's value, b's value, relative difference) of the common steps."""
    return [
        (step, key, a[step][key], b[step][key], _relative(a[step][key], b[step][key]))
        for step in sorted(a.keys() & b.keys())
        for key in KEYS
    ]


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(a / b - 1) if b else math.inf


def differing(rows: Iterable[Row]) -> list[Row]:
    """The rows that two runs of one recipe would not show."""
    return [row for row in rows if not row[-1] <= TOLERANCES[row[0]]]


def main(argv: list[str] | None = None) -> None:
    """Prints the comparison; exits with 1 if the runs are not the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = arguments.path
    parser.add_argument("run", type=path, help="folder of a run, or a file of records")
    parser.add_argument("other", type=path, help="the same")
    args = parser.parse_args(argv)
    try:
        rows = differences(read_ledger(args.run), read_ledger(args.other))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wrong = differing(rows)
    for row in rows:
        step, key, a, b, difference = row
        remark = f"more than {TOLERANCES[step]:.0e}" if row in wrong else ""
        print(
            f"step {step:4}  {key:15}  {a:12.6g}  {b:12.6g}  {difference:7.1e}"
            f"  {remark}".rstrip()
        )
    if wrong:
        sys.exit("These are different runs; compare their config.json.")


if __name__ == "__main__":
    main()
