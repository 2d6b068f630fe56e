"""The programs' log, progress and tables.

Progress is a bar on a terminal, elsewhere plain lines.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.logging
import rich.progress
import rich.table
from absl import logging as absl_logging

from mlp_mixer import text

logger = logging.getLogger(__name__)
_CONSOLE = rich.console.Console(stderr=True)


class _Printable(logging.Formatter):
    """Escapes control characters, which a name in a message may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return text.printable(super().format(record), keep="\n\t")


def log_to_terminal() -> None:
    """Sends log lines to stderr, above the progress bar if there is one.

    It replaces absl's handler, which would begin each line with its place in the code;
    absl's own lines are shown from warnings on. stdout and stderr print any text from
    here on.
    """
    text.accept_any_text(sys.stdout, sys.stderr)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("fsspec").setLevel(logging.WARNING)  # a line for each file read
    if _CONSOLE.is_terminal:
        handler = rich.logging.RichHandler(console=_CONSOLE, show_path=False)
        handler.setFormatter(_Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    if jax.process_index() > 0:
        handler.setLevel(logging.WARNING)
    root.addHandler(handler)
    root.setLevel(logging.INFO)


class Steps:
    """Progress of a run: a bar on a terminal, lines of the log elsewhere."""

    def __init__(self, total: int, first: int):
        """Begins after step `first` of `total`."""
        self._total = total
        self._bar = rich.progress.Progress(
            "step {task.completed:.0f}/{task.total:.0f}",
            rich.progress.BarColumn(None),
            "{task.fields[shown]}",
            rich.progress.TimeRemainingColumn(),
            console=_CONSOLE,
            disable=not _CONSOLE.is_terminal or jax.process_index() > 0,
        )
        self._task = self._bar.add_task(
            "", total=total, completed=first, shown="compiling"
        )
        self._bar.start()

    def reached(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def tell(self, step: int, shown: str, seconds_left: float) -> None:
        """Shows a text beside the bar, or in a line with step and time left."""
        self._bar.update(self._task, shown=shown)
        if self._bar.disable:
            left = _clock(seconds_left)
            logger.info("step %d/%d  %s  %s left", step, self._total, shown, left)

    def stop(self) -> None:
        """Ends the bar."""
        self._bar.stop()


def progress(name: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Returns `track(items, count)`, which shows a bar on a terminal."""

    def track(items: Iterable[Any], count: int) -> Iterable[Any]:
        with _bar(
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        ) as bar:
            yield from bar.track(items, count, description=text.printable(name))

    return track


def _bar(*columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
    """A bar that disappears at its end, on a terminal only."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        *columns,
        console=_CONSOLE,
        transient=True,
        disable=not _CONSOLE.is_terminal,
    )


@contextlib.contextmanager
def counter(
    what: str, total: int, unit: str, done: int = 0, *, every_seconds: float = 30.0
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a long task: a bar on a terminal, elsewhere lines.

    Args:
      what: name of the task.
      total: amount of work.
      unit: name of what is counted; "bytes" are shown as GB.
      done: amount of work that an earlier start has done.
      every_seconds: number of seconds between two lines.

    Yields:
      `advance(amount)`, to be called for each finished amount.
    """
    began = latest = time.monotonic()
    now = done

    def amount(count: int | float) -> str:
        return f"{count / 1e9:,.2f} GB" if unit == "bytes" else f"{count:,.0f} {unit}"

    def advance(more: int) -> None:
        nonlocal now, latest
        now += more
        rate = (now - done) / max(time.monotonic() - began, 1e-9)
        bar.update(task, completed=now, shown=f"{amount(now)}  {amount(rate)}/s")
        due = time.monotonic() - latest >= every_seconds
        if due and rate and not _CONSOLE.is_terminal:
            latest = time.monotonic()
            left = _clock((total - now) / rate)
            texts = what, amount(now), amount(total), amount(rate), left
            logger.info("%s: %s of %s  %s/s  %s left", *texts)

    with _bar(
        rich.progress.BarColumn(None),
        rich.progress.TextColumn("{task.fields[shown]}", markup=False),
        rich.progress.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task(text.printable(what), total=total, completed=done, shown="")
        yield advance
    logger.info("%s: %s in %s", what, amount(now), _clock(time.monotonic() - began))


class Table(NamedTuple):
    """A table whose texts are shown as they are, without markup.

    Attributes:
      title: text above the table.
      columns: titles of the columns.
      rows: texts of the cells, row by row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self) -> None:
        """Prints the table to stdout.

        Raises:
          OSError: stdout cannot be written.
        """
        drawn = rich.table.Table(title=text.printable(self.title))
        for i, column in enumerate(map(text.printable, self.columns)):
            drawn.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(text.printable, row))
        with text.flushed(sys.stdout):
            rich.console.Console(markup=False, emoji=False).print(drawn)

    def markdown(self) -> str:
        """Returns the table in GitHub's Markdown, its title as a heading."""
        head, *body = ([*map(text.markdown, row)] for row in (self.columns, *self.rows))
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        title = f"# {text.markdown(self.title)}\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
