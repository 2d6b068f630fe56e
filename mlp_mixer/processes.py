"""Several processes of one run: what they must have in common, and errors of one.

Processes that differ, or of which one has ended, wait for one another for ever. So they
tell one another what they have, and what failed, before they work together.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

SLOW_SECONDS = 30.0
LINES = 10  # of a message, for differences
WIDTH = 50  # characters, of one value in it


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; each calls it.

    Args:
      value: value of this process, made of what JSON has.
    """
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(mine.size)).ravel()
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    pairs = zip(rows, sizes, strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in pairs]


def first(value: Any) -> Any:
    """Returns the value of process 0, of what JSON has; each process calls it."""
    return gather(value if jax.process_index() == 0 else None)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends every process if one fails in the block, in which none waits for another.

    Raises:
      RuntimeError: others have failed; names them and their errors.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        gather(f"{socket.gethostname()}: {kind}{error}")
        raise
    failed = [(i, error) for i, error in enumerate(gather(None)) if error is not None]
    if failed:
        more = f"\nand {len(failed) - LINES} more" if len(failed) > LINES else ""
        lines = [f"Process {i} failed on {error}" for i, error in failed[:LINES]]
        raise RuntimeError("\n".join(lines) + more)


# Errors of collectives on CPUs and GPUs, and of JAX's service for several processes.
_EXCHANGE = re.compile(
    "gloo|nccl|coordination|barrier|connection (?:closed|reset)|socket closed",
    re.IGNORECASE,
)
_FAILURES = "mlp_mixer/failures/"


def is_of_an_exchange(error: BaseException | None) -> bool:
    """Whether a process that is gone explains an error, or one that it arose from."""
    while error is not None:
        # XLA's errors begin with the name of a status, whatever their class.
        if re.match("[A-Z_]{5,}: ", str(error)) and _EXCHANGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def tell_failure(message: str) -> None:
    """Leaves word of this process's error for the others."""
    told = f"Process {jax.process_index()} on {socket.gethostname()} failed: {message}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
        _client().key_value_set(f"{_FAILURES}{jax.process_index()}", told)


def failures_of_others(seconds: float) -> str:
    """Waits so long for the errors that others tell; empty if there are none."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
            if told := _client().key_value_dir_get(_FAILURES):
                return "\n".join(sorted(message for _, message in told))
        time.sleep(0.5)
    return ""


def _client() -> Any:
    """The client of JAX's service, which keeps values of all processes."""
    return distributed.global_state.client


@contextlib.contextmanager
def warn_if_slow(what: str) -> Iterator[None]:
    """Says every 30 seconds that this host still waits for something in the block.

    A mount that hangs raises no error, and the other processes wait for this one.

    Args:
      what: what it waits for, e.g. "the images in /mnt/images".
    """
    who = f"{socket.gethostname()} (process {jax.process_index()})"

    def warn(count: int) -> None:
        logger.warning(
            "%s waits for %s since %.0f s. Is its disk slow, or does its mount "
            "hang? The other processes wait too.",
            who,
            what,
            count * SLOW_SECONDS,
        )

    with repeated(warn, SLOW_SECONDS):
        yield


@contextlib.contextmanager
def repeated(work: Callable[[int], None], seconds: float) -> Iterator[None]:
    """Calls `work` in a thread from time to time, until the end of the block.

    Args:
      work: function of the number of calls, counted from 1.
      seconds: time before each call.
    """
    done = threading.Event()

    def repeat() -> None:
        for count in itertools.count(1):
            if done.wait(seconds):
                return
            work(count)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compare(**values: Any) -> None:
    """Passes if every process has the same values; each calls it.

    Args:
      **values: name → what JSON has.

    Raises:
      ValueError: they differ; names each one, its values, the processes and, of several
        hosts, theirs.
    """
    mine = _flattened(values)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    hosts, everybodys = zip(*gather([socket.gethostname(), mine]), strict=True)
    names = sorted(set().union(*everybodys))
    lines = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for i, theirs in enumerate(everybodys):
            value = json.dumps(theirs[name]) if name in theirs else "absent"
            holders.setdefault(value, []).append(i)
        if len(holders) > 1:
            each = (
                f"{_shortened(v)} on {_named(who, hosts)}" for v, who in holders.items()
            )
            lines.append(f"  {name}: {'; '.join(each)}")
    more = [f"  and {len(lines) - LINES} more"] if len(lines) > LINES else []
    raise ValueError(
        "The processes of one run must agree, and these do not; start all of them with "
        "the same command, code and data:\n" + "\n".join(lines[:LINES] + more)
    )


def _flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of nested dicts and sequences; empty ones are values."""
    if not tree or not isinstance(tree, dict | list | tuple):
        return {prefix: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    named = ((f"{prefix}.{key}" if prefix else str(key), v) for key, v in pairs)
    return {k: v for key, value in named for k, v in _flattened(value, key).items()}


def _shortened(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _named(indices: Sequence[int], hosts: Sequence[str]) -> str:
    """Processes for people: "processes 0 and 3", with their hosts if there are more."""
    several = len(set(hosts)) > 1
    each = [f"{i} ({hosts[i]})" if several else str(i) for i in indices[:LINES]]
    more = f" and {len(indices) - LINES} more" if len(indices) > LINES else ""
    return f"process{'es' * (len(indices) > 1)} {', '.join(each)}{more}"
