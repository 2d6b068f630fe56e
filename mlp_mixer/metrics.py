"""What a run tells: metrics.jsonl and TensorBoard always, and lines for a person.

On a terminal a progress bar shows step, loss, images/s and time left; elsewhere the
same comes as plain lines. Only the first process writes.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import rich.console
import rich.logging
import rich.progress
import tensorboardX
from absl import logging as absl_logging
from etils import epath

_CONSOLE = rich.console.Console(stderr=True)
logger = logging.getLogger(__name__)


def log_to_terminal() -> None:
    """Sends the programs' own lines to stderr, above the progress bar if there is one.

    Absl's handler would prefix each with its source; what libraries say through absl
    is shown from warnings on.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    absl_logging.set_verbosity(absl_logging.WARNING)
    if _CONSOLE.is_terminal:
        handler = rich.logging.RichHandler(console=_CONSOLE, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if jax.process_index() > 0:
        handler.setLevel(logging.WARNING)
    root.addHandler(handler)
    root.setLevel(logging.INFO)


class Writer(contextlib.AbstractContextManager):
    """Records a run's metrics and shows its progress.

    metrics.jsonl holds one JSON object per record, `step` and names such as
    `train/loss` (nats), `train/grad_norm`, `train/lr`, `images_per_second`,
    `<evaluator>/top1` (in [0, 1]).
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
    ):
        """Opens the records of `workdir` for a run that goes on after `first_step`.

        Args:
          workdir: folder of the run.
          first_step: what came after it is dropped from metrics.jsonl: those steps
            are done again.
          total_steps: of the run.
          batch_size: images per step.
          every_steps: steps between two records of training metrics.
          learning_rate: update, counted from 0 → its learning rate.
          last_good: the newest checkpoint, named when the loss is not finite.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._total, self._batch, self._every = total_steps, batch_size, every_steps
        self._learning_rate, self._last_good = learning_rate, last_good
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._mark = (first_step, time.perf_counter())
        self._file = self._board = self._bar = None
        if jax.process_index() > 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(workdir) if r["step"] <= first_step]
        text = "".join(f"{json.dumps(record)}\n" for record in kept)
        rewritten = self._path.with_name("metrics.jsonl.tmp")
        rewritten.write_text(text)
        rewritten.replace(self._path)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(self._path.parent / "tensorboard"), purge_step=first_step + 1
        )
        if _CONSOLE.is_terminal:
            self._bar = rich.progress.Progress(
                "step {task.completed:.0f}/{task.total:.0f}",
                rich.progress.BarColumn(None),
                "{task.fields[said]}",
                rich.progress.TimeRemainingColumn(),
                console=_CONSOLE,
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=first_step, said="compiling"
            )
            self._bar.start()

    def train(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
        """Takes a step's metrics, still on the device, and records the one's before.

        Fetching them a step late keeps the device busy.

        Raises:
          FloatingPointError: a loss or gradient norm is not finite.
        """
        self.flush()
        self._pending = step, scalars

    def flush(self) -> None:
        """Fetches and records the step that is pending.

        Raises:
          FloatingPointError: its loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        step, scalars = self._pending
        self._pending = None
        values = {k: float(v) for k, v in jax.device_get(dict(scalars)).items()}
        if not all(map(math.isfinite, values.values())):
            good = self._last_good()
            raise FloatingPointError(
                f"At step {step} "
                + " and ".join(f"{k} is {v}" for k, v in values.items())
                + f" in {self._path.parent}. "
                + (
                    "There is no checkpoint yet. "
                    if good is None
                    else f"The last good checkpoint is that of step {good}. "
                )
                + "Try a lower learning rate, a longer warm-up, or another seed."
            )
        if self._bar:
            self._bar.update(self._task, completed=step)
        if step % self._every and step != self._total:
            return
        at, since = self._mark
        self._mark = step, time.perf_counter()
        rate = (step - at) / max(self._mark[1] - since, 1e-9)
        lr = float(self._learning_rate(step - 1))
        record = {f"train/{k}": v for k, v in values.items()}
        self.write(
            step, record | {"train/lr": lr, "images_per_second": rate * self._batch}
        )
        said = f"loss {values['loss']:.4f}  {rate * self._batch:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, said=said)
        else:
            left = time.strftime("%H:%M:%S", time.gmtime((self._total - step) / rate))
            logger.info("step %d/%d  %s  %s left", step, self._total, said, left)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records `scalars` for `step`."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def evaluation(self, step: int, name: str, results: Mapping[str, float]) -> None:
        """Records an evaluator's results and says them."""
        self.write(step, {f"{name}/{key}": value for key, value in results.items()})
        said = "  ".join(f"{key} {value:.4g}" for key, value in results.items())
        logger.info("step %d  %s: %s", step, name, said)
        # The time it took is not the training's.
        self._mark = step, time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        """Closes the files and the bar."""
        if self._bar:
            self._bar.stop()
        if self._file and self._board:
            self._file.close()
            self._board.close()


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in order; an unfinished last line is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class Profiler:
    """Writes a trace of some steps, for TensorBoard or Perfetto."""

    def __init__(self, workdir: epath.PathLike, steps: str | None, *, total_steps: int):
        """`steps` is "START:STOP" (both traced) of a run of `total_steps`, or None.

        Raises:
          ValueError: not two step numbers of the run in order.
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


def progress(name: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Returns `track(items, count)`, which shows a bar on a terminal."""

    def track(items: Iterable[Any], count: int) -> Iterable[Any]:
        return rich.progress.track(
            items,
            name,
            total=count,
            console=_CONSOLE,
            transient=True,
            disable=not _CONSOLE.is_terminal,
        )

    return track


@contextlib.contextmanager
def counter(
    what: str, total: int, unit: str, done: int = 0, *, every_seconds: float = 30.0
) -> Iterator[Callable[[int], None]]:
    """Shows how far something long is: a bar on a terminal, now and then a line else.

    Args:
      what: is going on.
      total: amount.
      unit: "bytes", shown as GB, or what else is counted.
      done: of the total, before this began.
      every_seconds: between two lines.

    Yields:
      `advance(amount)`, to be called as it goes on.
    """
    began = said = time.monotonic()
    now = done

    def amount(count: int | float) -> str:
        return f"{count / 1e9:,.2f} GB" if unit == "bytes" else f"{count:,.0f} {unit}"

    def advance(more: int) -> None:
        nonlocal now, said
        now += more
        rate = (now - done) / max(time.monotonic() - began, 1e-9)
        bar.update(task, completed=now, said=f"{amount(now)}  {amount(rate)}/s")
        due = time.monotonic() - said >= every_seconds
        if due and rate and not _CONSOLE.is_terminal:
            said = time.monotonic()
            left = time.strftime("%H:%M:%S", time.gmtime((total - now) / rate))
            logger.info(
                "%s: %s of %s  %s/s  %s left",
                *(what, amount(now), amount(total), amount(rate), left),
            )

    with rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(None),
        "{task.fields[said]}",
        rich.progress.TimeRemainingColumn(),
        console=_CONSOLE,
        transient=True,
        disable=not _CONSOLE.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total, completed=done, said="")
        yield advance
    taken = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
    logger.info("%s: %s in %s", what, amount(now), taken)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table to stdout."""
    drawn = rich.table.Table(title=title)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    rich.console.Console().print(drawn)
