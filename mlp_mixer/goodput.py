"""Where the time of a run goes: each second of its starts belongs to one kind.

A second in which a step computes is the step's, whatever else the process does in it;
any other belongs to what the process does. So waiting for input counts as a loss only
while the device has nothing to compute. Records of metrics.jsonl hold the seconds since
the record before; their sum over all records is the time of the run.
"""

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Kind → what it is called for people; a record's names are `seconds/<kind>`.
KINDS = {
    "steps": "steps",
    "input": "waiting for input",
    "evaluation": "evaluation",
    "checkpoint": "waiting for checkpoints",
    "compile": "compilation",
    "start": "start-up",
    "restart": "starting again",
    "repeated": "done twice",
    "lost": "lost by kills (estimate)",
    "other": "other",
}
_NOT_RUNNING = "not_running"  # between two starts; no second of the run
# What counts for images per second.
TRAINING = ("steps", "input", "other")
# What is done again after a start from an older step; the first two step by step.
_REPEATED = ("steps", "input", "evaluation", "repeated")
_SECONDS = {f"seconds/{kind}": kind for kind in (*KINDS, _NOT_RUNNING)}
# Numbers of starts, and of those that ended by themselves.
_COUNTS = ("starts", "ends")
_STAMP = "unix_time"
# Seconds of which it does not matter much whether they are steps or not.
_SHORT = 1e-3
# JAX's names of tracing, lowering and compiling.
_COMPILING = tuple(
    f"/jax/core/compile/{part}_duration"
    for part in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)

Record = Mapping[str, Any]


def is_time(name: str) -> bool:
    """Whether a number of a record is a time, or a rate, which no two runs share."""
    return name in (*_SECONDS, *_COUNTS, _STAMP, "images_per_second")


class Clock(contextlib.AbstractContextManager):
    """Counts the seconds of a start, by kind.

    It begins with "start"; after `started` what no `doing` names is "other". Whatever
    JAX compiles in the block, in the thread that made the clock, is "compile".
    """

    def __init__(
        self,
        before: float = 0.0,
        *,
        now: Callable[[], float] = time.monotonic,
    ):
        """Begins to count.

        Args:
          before: number of seconds that the start took until now.
          now: function that returns the time in seconds; never goes back.
        """
        self._now = now
        self._began = self._mark = now() - before
        self._kind = "start"
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._taken = dict(self._spent)
        self._owner = threading.get_ident()
        self._compiled: list[tuple[float, float]] = []  # start and length
        self._running: Any = None  # the result of the step that computes, if one does
        self._step = 0
        # Where steps end while the process waits for something else, another thread
        # notes when: asking for it here would hold up the loop.
        self._is_watched = False
        self._steps: queue.SimpleQueue = queue.SimpleQueue()
        self._noted = (0, 0.0)  # a step and its end
        self._watcher = threading.Thread(target=self._note_ends, daemon=True)

    def __enter__(self) -> "Clock":
        """Begins to notice compilations."""
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends that."""
        jax.monitoring.unregister_event_duration_listener(self._note_compilation)
        if self._watcher.is_alive():
            self._steps.put(None)
            self._watcher.join(1.0)  # of a step that fails, the end may never come

    def starts_again(self) -> None:
        """Makes the start-up that of a later start: "restart"."""
        self._settle()
        self._spent["restart"], self._spent["start"] = self._spent["start"], 0.0
        self._kind = "restart"

    def started(self) -> None:
        """Ends the start-up."""
        self._switch("other")

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Counts what the block takes as `kind`."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def step_began(self, result: Any) -> None:
        """Counts all as "steps" until the array `result` is computed."""
        self._settle()
        self._running = result
        self._step += 1
        if self._is_watched:
            if not self._watcher.is_alive():
                self._watcher.start()
            self._steps.put((self._step, result))

    def age(self) -> float:
        """The seconds since the start began."""
        return self._now() - self._began

    def total(self, kinds: Iterable[str]) -> float:
        """The seconds of some kinds since the start began."""
        self._settle()
        return sum(self._spent[kind] for kind in kinds)

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call, for a record."""
        self._settle()
        self._compiled.clear()
        since = {kind: spent - self._taken[kind] for kind, spent in self._spent.items()}
        self._taken = dict(self._spent)
        return {f"seconds/{kind}": value for kind, value in since.items() if value}

    def _switch(self, kind: str) -> str:
        self._settle()
        before, self._kind = self._kind, kind
        return before

    def _settle(self) -> None:
        """Counts what passed since the last call."""
        now = self._now()
        passed = now - self._mark
        busy = 0.0 if self._running is None else self._busy(passed)
        self._spent["steps"] += busy
        self._spent[self._kind] += passed - busy
        self._mark = now

    def _busy(self, passed: float) -> float:
        """How long of the last `passed` seconds the step computed."""
        if not self._running.is_ready():
            return passed
        self._running = None
        step, end = self._noted
        # It is unknown when it ended: at the beginning, or just now and not noted yet.
        busy = passed if self._is_watched else 0.0
        if step == self._step:
            busy = min(max(end - self._mark, 0.0), passed)
        self._is_watched = self._kind != "steps" and passed > _SHORT
        return busy

    def _note_ends(self) -> None:
        while (item := self._steps.get()) is not None:
            step, result = item
            with contextlib.suppress(Exception):  # the loop fetches it too, and raises
                result.block_until_ready()
            self._noted = step, self._now()

    def _note_compilation(
        self, event: str, duration_secs: float, **kwargs: Any
    ) -> None:
        if event not in _COMPILING or threading.get_ident() != self._owner:
            return
        self._settle()
        began, inner = self._mark - duration_secs, 0.0
        # A function is traced with those that it calls, which were noted before it.
        while self._compiled and self._compiled[-1][0] >= began:
            inner += self._compiled.pop()[1]
        self._compiled.append((began, duration_secs))
        counted = self._spent[self._kind] - self._taken[self._kind]
        moved = min(max(duration_secs - inner, 0.0), counted)
        self._spent[self._kind] -= moved
        self._spent["compile"] += moved


# --- Records --------------------------------------------------------------------------


def stamped(times: Mapping[str, float]) -> dict[str, float]:
    """Returns the times for a record, with the time of day."""
    return {name: round(value, 6) for name, value in times.items()} | {
        _STAMP: round(time.time(), 3)
    }


def opening(
    records: Sequence[Record], first_step: int, clock: Clock
) -> dict[str, float]:
    """Returns the times that a start begins with: its own, and those it takes over.

    Args:
      records: records of the starts before.
      first_step: step after which this start goes on; later records are dropped.
      clock: clock of this start.
    """
    times = collections.Counter(_dropped(records, first_step))
    if records:
        times.update(_between(records[-1], _last_training(records), clock.age()))
        clock.starts_again()
    times.update(clock.take() | {"starts": 1.0})
    return dict(times)


def closing(clock: Clock) -> dict[str, float]:
    """Returns the last times of a start that ends by itself."""
    return {**clock.take(), "ends": 1.0}


def _dropped(records: Sequence[Record], first_step: int) -> collections.Counter:
    """The times of the records after `first_step`; what they tell is done again."""
    times: collections.Counter = collections.Counter()
    before = 0
    for record in records:
        step = record["step"]
        if step > first_step:
            # Its times are those of the steps since the record before.
            share = min((step - first_step) / max(step - before, 1), 1.0)
            shares = dict(zip(_REPEATED, (share, share, 1.0, 1.0), strict=True))
            for name in record.keys() & {*_SECONDS, *_COUNTS}:
                value = float(record[name])
                again = shares.get(_SECONDS.get(name, ""), 0.0) * value
                times["seconds/repeated"] += again
                times[name] += value - again
        before = step
    return +times


def _between(last: Record, training: Record, age: float) -> dict[str, float]:
    """The times between the last record and this start, which is `age` seconds old."""
    if _STAMP not in last:  # of an older version
        return {}
    gap = max(time.time() - age - last[_STAMP], 0.0)
    # A process that is killed cannot write when: on average, half way to a record.
    until = sum(training.get(f"seconds/{kind}", 0.0) for kind in TRAINING) / 2
    lost = 0.0 if "ends" in last else min(until, gap)
    return {"seconds/lost": lost, f"seconds/{_NOT_RUNNING}": gap - lost}


def _last_training(records: Sequence[Record]) -> Record:
    return next((r for r in reversed(records) if "train/lr" in r), {})


# --- For people -----------------------------------------------------------------------


def sums(records: Iterable[Record]) -> dict[str, float]:
    """Returns {kind: seconds} of all starts, largest first; {} if none is recorded.

    Beside `KINDS` there is "not_running", the time between two starts.
    """
    times: collections.Counter = collections.Counter()
    for record in records:
        times.update({kind: record.get(name, 0.0) for name, kind in _SECONDS.items()})
    return {kind: value for kind, value in times.most_common() if value}


def sentence(seconds: Mapping[str, float]) -> str:
    """Says how much of a run's time went into steps, and what it lost most by.

    Args:
      seconds: kind → seconds, as of `sums`; not empty.
    """
    running = {kind: seconds[kind] for kind in KINDS if kind in seconds}
    whole = sum(running.values())
    useful = running.pop("steps", 0.0)
    line = f"{100 * useful / whole:.1f} % of {duration(whole)} went into steps"
    if running:
        most = max(running, key=running.__getitem__)
        share = 100 * running[most] / whole
        line += f"; largest loss: {KINDS[most]}, {share:.1f} %"
    return line


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Returns a table for people: name, time and share of each kind, largest first.

    The shares are of the time in which the run was running. No rows if nothing is
    recorded.
    """
    seconds = sums(records)
    between = seconds.pop(_NOT_RUNNING, 0.0)
    whole = sum(seconds.values())
    if not whole:
        return []
    table = [
        [KINDS[kind], duration(value), f"{100 * value / whole:.1f} %"]
        for kind, value in seconds.items()
    ]
    starts = round(sum(r.get("starts", 0) for r in records))
    name = "all" if starts == 1 else f"all of {starts} starts"
    table.append([name, duration(whole), "100.0 %"])
    if between:
        table.append(["not running", duration(between), ""])
    return table


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 3 min 12 s, 2 h 11 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"
