"""Types of the scripts' options: what an option may be is checked when it is read.

Needs nothing but Python, so that the benchmark runs in a bare environment.
"""

import argparse
import math
import os
from collections.abc import Callable


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {low:,} to {high:,}"
            )
        return number

    return parse


def real(low: float, high: float = 1e9) -> Callable[[str], float]:
    """Numbers from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:  # nan is not
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number from {low:g} to {high:g}"
            )
        return number

    return parse


def path(text: str) -> str:
    """A path, `~` expanded."""
    expanded = os.path.expanduser(text)
    if not text or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no path; ~ is the home folder, ./~ a file of that name"
        )
    return expanded


def new_file(text: str) -> str:
    """The path of a file to be written at the end, whose folder has to be there."""
    expanded = path(text)
    folder = os.path.dirname(expanded) or "."
    if os.path.isdir(expanded) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written; name a file in a folder that is there"
        )
    return expanded
