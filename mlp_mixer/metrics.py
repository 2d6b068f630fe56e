"""A run's records, for people and TensorBoard, and traces of its steps.

Only the first process writes them.
"""

import collections
import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from mlp_mixer import console, files, goodput, processes, records
from mlp_mixer.text import brief, printable

MAX_BYTES = 2**29  # of metrics.jsonl, two million records
logger = logging.getLogger(__name__)


class Writer(contextlib.AbstractContextManager):
    """Records a run's metrics and shows its progress.

    metrics.jsonl, or the parts that `records` makes of it, holds one JSON object per
    record, `step` and names such as
    `train/loss` (nats), `train/grad_norm`, `train/lr`, `images_per_second`,
    `<evaluator>/top1` (in [0, 1]); and the seconds since the record before, by what
    they were spent on: `seconds/<kind>`, a key of `goodput.KINDS`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        first_step: int,
        total_steps: int,
        batch_size: int,
        every_steps: int,
        learning_rate: Callable[[int], Any],
        last_good: Callable[[], int | None],
        clock: goodput.Clock,
    ):
        """Opens the records of `workdir` for a run that goes on after `first_step`.

        Args:
          workdir: folder of the run.
          first_step: step after which the run goes on; later records are dropped.
          total_steps: last step of the run.
          batch_size: number of images per step.
          every_steps: number of steps between two records of training metrics.
          learning_rate: update, counted from 0 → its learning rate.
          last_good: function that returns the step of the newest checkpoint, or None.
          clock: clock of this start, whose start-up ends here.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._board_path = epath.Path(workdir) / "tensorboard"
        self._total, self._batch, self._every = total_steps, batch_size, every_steps
        self._learning_rate, self._last_good = learning_rate, last_good
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._clock = clock
        self._seconds: collections.Counter = collections.Counter()  # of all starts
        self._step = first_step
        self._unwritten: list[dict[str, float]] = []
        self._mark = first_step, clock.total(goodput.TRAINING)
        self._file: records.Lines | None = None
        self._board: Any = None
        # Evaluators with a record for the first step; the same on every process.
        self._evaluated: set[str] = set()
        with processes.together():
            if jax.process_index() == 0:
                self._open(first_step)
        self._evaluated = set(processes.first(sorted(self._evaluated)))
        clock.started()
        self._shown = console.Steps(total_steps, first_step)

    def _open(self, first_step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        there = read(self._path.parent)
        kept = [r for r in there if r["step"] <= first_step]
        if len(kept) < len(there):
            logger.info(
                "%d records after step %d are dropped: these steps are done again.",
                len(there) - len(kept),
                first_step,
            )
        for record in kept:
            if record["step"] == first_step and "train/lr" not in record:
                names = {name for name in record if not goodput.is_time(name)}
                self._evaluated |= {name.rpartition("/")[0] for name in names}
        opening = {"step": first_step} | goodput.stamped(
            goodput.opening(there, first_step, self._clock)
        )
        self._seconds.update(goodput.sums([*kept, opening]))
        if first_step < self._total:
            kept.append(opening)
        else:  # only if there is more to record: a finished run stays as it is
            self._unwritten.append(opening)
        lines = [f"{json.dumps(record)}\n" for record in kept]
        with self._failure_named(self._path):
            self._file = records.open_for_appending(self._path.parent, lines)
        from mlp_mixer import board  # tensorboardX is slow to import

        with self._failure_named(self._board_path):
            self._board = board.Board(self._board_path, first_step)

    @contextlib.contextmanager
    def _failure_named(self, path: epath.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                error.errno, f"Writing {path} failed: {reason}. {self._what_is_good()}"
            ) from error

    def _what_is_good(self) -> str:
        step = self._last_good()
        if step is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is that of step {step}."

    def is_due(self, step: int, name: str, every_steps: int) -> bool:
        """Whether an evaluator is to run after `step`.

        It is due after the last step and after each multiple of `every_steps`, unless
        it has a record for the step at which this start began.
        """
        if step == 0 or name in self._evaluated:
            return False
        return step == self._total or step % every_steps == 0

    def train(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """Takes a step's metrics, which stay on the device, and records the previous.

        To fetch them a step late keeps the device busy. Raises as `flush` does.
        """
        self._clock.step_began(scalars["loss"])
        self.flush()
        self._evaluated.clear()
        self._step, self._pending = step, (step, scalars)

    def flush(self) -> None:
        """Fetches and records the step that is pending.

        Raises:
          FloatingPointError: its loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        step, scalars = self._pending
        self._pending = None
        with self._clock.doing("steps"):
            values = {k: float(v) for k, v in jax.device_get(dict(scalars)).items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"At step {step} "
                + " and ".join(f"{k} is {v}" for k, v in values.items())
                + f" in {self._path.parent}. {self._what_is_good()} "
                + "Try a lower learning rate, a longer warm-up, or another seed."
            )
        self._shown.reached(step)
        if step % self._every and step != self._total:
            return
        before, since = self._mark
        self._mark = step, self._clock.total(goodput.TRAINING)
        rate = (step - before) / max(self._mark[1] - since, 1e-9)
        lr = float(self._learning_rate(step - 1))
        record = {f"train/{k}": v for k, v in values.items()}
        record |= {"train/lr": lr, "images_per_second": rate * self._batch}
        self.write_scalars(step, record)
        line = f"loss {values['loss']:.4f}  {rate * self._batch:,.0f} images/s"
        self._shown.tell(step, line, (self._total - step) / rate)

    def store(self) -> None:
        """Records the step that is pending, and has every record in the run's folder.

        Called before a checkpoint is saved, since a start from there keeps the records
        up to its step. Raises as `flush` does.
        """
        self.flush()
        if self._file is not None:
            with self._failure_named(self._path):
                self._file.store()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes a record."""
        self._write(step, scalars, self._clock.take())

    def _write(
        self, step: int, scalars: Mapping[str, float], times: Mapping[str, float]
    ) -> None:
        if self._file is None or self._board is None:
            return
        record = {"step": step, **scalars, **goodput.stamped(times)}
        self._seconds.update(goodput.sums([record]))
        with self._failure_named(self._path):
            for line in [*self._unwritten, record]:
                self._file.append(json.dumps(line) + "\n")
        self._unwritten.clear()
        if scalars:
            with self._failure_named(self._board_path):
                self._board.write_scalars(step, scalars)

    def evaluation(self, step: int, name: str, results: Mapping[str, float]) -> None:
        """Records and logs an evaluator's results."""
        self.write_scalars(
            step, {f"{name}/{key}": value for key, value in results.items()}
        )
        values = "  ".join(f"{key} {value:.4g}" for key, value in results.items())
        logger.info("step %d  %s: %s", step, name, values)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes the files and the bar, and says where the run's time went.

        A start that ends with an error counts as one that is killed, since the folder
        may be another process's by now.

        Raises:
          OSError: records could not be written; not raised if the block has raised an
            error, which this would hide.
        """
        self._shown.stop()
        failed = []
        if error is None and not self._unwritten:
            try:
                self._write(self._step, {}, goodput.closing(self._clock))
            except OSError as failure:
                failed.append(failure)
        for file, path in ((self._file, self._path), (self._board, self._board_path)):
            try:
                with self._failure_named(path):
                    if file is not None:
                        file.close()
            except OSError as failure:
                failed.append(failure)
        if failed and error is None:
            raise failed[0]
        if self._seconds and error is None:
            logger.info("%s.", goodput.sentence(self._seconds))


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a run, none if there are no files; see `read_file`."""
    return [record for path in records.paths(workdir) for record in read_file(path)]


def read_file(path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a file, in order, without an unfinished last line.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
      ValueError: a line is not an object of numbers with a step.
    """
    *lines, last = files.read_bytes(path, MAX_BYTES).split(b"\n")
    where = printable(os.fspath(path))
    found = [
        _record(line, f"Line {number} of {where}")
        for number, line in enumerate(lines, 1)
    ]
    if last.endswith(b"}"):  # complete, only the end of the line is missing
        found.append(_record(last, f"Line {len(lines) + 1} of {where}"))
    return found


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = files.parse_json(line, where, finite=False)
    step = record.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{where} is no record: its step is {brief(step)}.")
    for name, value in record.items():
        if type(value) not in (int, float):
            raise ValueError(
                f"{where} is no record: {brief(name)} is {files.kind_of(value)}; "
                "expected a number."
            )
    return record


class Profiler:
    """Writes a trace of some steps, for TensorBoard or Perfetto."""

    def __init__(self, workdir: epath.PathLike, steps: str | None, *, total_steps: int):
        """Parses which steps to trace.

        Args:
          workdir: folder of the run.
          steps: "START:STOP", the first and last step; None traces nothing.
          total_steps: number of steps of the run.

        Raises:
          ValueError: `steps` are not two steps of the run in order.
        """
        self._folder, self._steps = f"{workdir}/profile", (0, 0)
        if not steps:
            return
        numbers = [int(n) if n.isdecimal() else 0 for n in steps.split(":")]
        if len(numbers) != 2 or not 0 < numbers[0] <= min(numbers[1], total_steps):
            raise ValueError(
                f"--profile is {steps!r}; expected START:STOP, e.g. 10:12, of the "
                f"steps 1 ... {total_steps}."
            )
        self._steps = numbers[0], numbers[1]

    def before(self, step: int) -> None:
        """Starts the trace if `step` is its first."""
        if step == self._steps[0]:
            jax.profiler.start_trace(self._folder)

    def after(self, step: int, last: bool, result: Any) -> None:
        """Ends the trace if `step` is its last, once `result` is computed."""
        start, stop = self._steps
        if start <= step and (step == stop or (last and step < stop)):
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            logger.info(
                "Wrote a trace of steps %d to %d to %s.", start, step, self._folder
            )
