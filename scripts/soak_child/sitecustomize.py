"""A slow disk and a clock that goes back, for processes that `soak.py` starts.

Python imports this module by its name when it starts with this folder in PYTHONPATH.
SOAK_SLOW_DISK=SEED delays what changes names on the disk, up to half a second each.
SOAK_CLOCK=AFTER,BACK sets the clock back by BACK seconds, AFTER seconds from the start.
"""

import functools
import os
import random
import time

SECONDS = 0.5  # the longest delay


def slow_down(seed: str) -> None:
    """Delays the calls that open, make, rename, sync and remove files."""
    draw = random.Random(seed)

    def delayed(call):
        @functools.wraps(call)
        def wait_and_call(*args, **kwargs):
            time.sleep(SECONDS * draw.random() ** 3)  # most delays are short
            return call(*args, **kwargs)

        return wait_and_call

    for name in ("fsync", "mkdir", "rename", "replace", "rmdir"):
        setattr(os, name, delayed(getattr(os, name)))


def set_back(after: float, back: float) -> None:
    """Replaces the wall clock; the monotonic one goes on as before."""
    until = time.monotonic() + after
    now, now_ns = time.time, time.time_ns

    def offset() -> float:
        return back if time.monotonic() > until else 0.0

    time.time = lambda: now() - offset()
    time.time_ns = lambda: now_ns() - int(offset() * 1e9)


if seed := os.environ.get("SOAK_SLOW_DISK"):
    slow_down(seed)
if clock := os.environ.get("SOAK_CLOCK"):
    set_back(*map(float, clock.split(",")))
