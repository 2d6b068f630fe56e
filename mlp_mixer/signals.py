"""When a run stops before its last step: at a signal, or when its time is over."""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from mlp_mixer import processes, supervisor

logger = logging.getLogger(__name__)

_TIME_IS_OVER = "the time of --stop_after is over"
_imported = time.monotonic()


def seconds_since_start() -> float:
    """How long this process has been running, imports included where Linux tells.

    One of several processes begins with its supervisor.
    """
    try:
        path = f"/proc/{supervisor.process_id()}/stat"
        with open(path, encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # not Linux
        return time.monotonic() - _imported


class StopFlag:
    """Whether the only process of a run is to save and stop.

    The first SIGTERM or SIGINT says so; the second acts as usual. Signals that were
    ignored (nohup) stay ignored. Outside of the main thread none is heard.

    Args:
      after: number of seconds since the start of this process, at which it stops too.
    """

    def __init__(self, after: float | None = None) -> None:
        self._is_set = False
        self._end = _end(after)
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(signum)
                if before is not signal.SIG_IGN:
                    self._before[signum] = before or signal.SIG_DFL
                    signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._is_set = True
        self.uninstall()
        # A print that this signal interrupts cannot be entered again.
        with contextlib.suppress(RuntimeError):
            logger.warning(
                "%s received: saving and stopping after this step; again to stop now",
                signal.Signals(signum).name,
            )

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`."""
        if not self._is_set and time.monotonic() >= self._end:
            self._is_set = True
            logger.warning("%s: saving and stopping after step %d", _TIME_IS_OVER, step)
        return self._is_set

    def uninstall(self) -> None:
        """Restores the former handlers."""
        for signum, before in self._before.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, before)


class AgreedStop:
    """Whether several processes of a run are to save and stop, all at the same call.

    When one receives SIGTERM, JAX tells the others and chooses a call of `requested`
    that none has made yet. Time is over when it is for process 0.

    Args:
      after: number of seconds since the start of process 0, at which they stop too.
    """

    def __init__(self, after: float | None = None) -> None:
        self._calls = 0
        self._is_set = False
        self._end = _end(after if jax.process_index() == 0 else None)
        self._is_over = False

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`; all must call it equally often."""
        if not self._is_over and time.monotonic() >= self._end:
            self._is_over = True
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's own way to tell the others
        self._calls += 1
        if not self._is_set and multihost_utils.reached_preemption_sync_point(
            self._calls
        ):
            self._is_set = True
            self._tell_why(step)
        return self._is_set

    def _tell_why(self, step: int) -> None:
        """Logs which process received which signal; all processes log all of them."""
        reasons = [f"received {name}" for name in supervisor.signals_received()]
        reasons += [_TIME_IS_OVER] * self._is_over
        mine = socket.gethostname(), supervisor.process_id(), reasons
        everybodys = processes.gather(mine)
        for index, (host, number, theirs) in enumerate(everybodys):
            for reason in theirs:
                who = f"Process {index} ({host}, process id {number})"
                logger.warning("%s: %s", who, reason)
        if not any(theirs for _, _, theirs in everybodys):
            logger.warning("A process received SIGTERM")
        logger.warning("All processes save and stop after step %d", step)

    def uninstall(self) -> None:
        """Does nothing: the handler is JAX's."""


def _end(after: float | None) -> float:
    """The value of the monotonic clock so long after this process started."""
    if after is None:
        return math.inf
    return time.monotonic() - seconds_since_start() + after
