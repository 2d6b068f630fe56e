"""How a program starts: flags, logging, several processes, errors in one line."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from absl import app, flags

from mlp_mixer import metrics, recipe


def run(main: Callable[[list[str]], None], *, distributed: bool = False) -> None:
    """Runs `main(arguments)` with the flags that are defined, and exits.

    An error that this project raises says what to do, so it is printed alone; one
    from a library keeps its traceback. Both exit with 1.

    Args:
      main: receives what is left of the command line without flags.
      distributed: whether the program may be one of several processes.
    """
    if distributed:
        flags.DEFINE_string(
            "distributed",
            None,
            "One of several processes of one run: auto (TPU pods, SLURM, Kubernetes) "
            "or HOST:PORT,INDEX,COUNT with the address of process 0.",
        )

    def start(argv):
        if distributed and flags.FLAGS.distributed:
            _join(flags.FLAGS.distributed)
        metrics.log_to_terminal()
        main(argv[1:])

    with errors_in_one_line():
        app.run(start, recipe.resolve(sys.argv), flags_parser=_parse)


@contextlib.contextmanager
def errors_in_one_line(*modules: str) -> Iterator[None]:
    """Exits with the message alone of an error that this project or `modules` raise."""
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _stdout_has_no_reader():
            raise
        # `… | head` has seen enough; the rest would fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not _is_ours(error, modules):
            raise
        sys.exit(str(error))


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # whether it is broken is told in any case
    return bool(poll.poll(0))


def size(flag: str) -> tuple[int, int] | None:
    """(height, width) in pixels of a list flag; None if it is not set."""
    words = flags.FLAGS[flag].value
    if words is None:
        return None
    if len(words) != 2 or not all(word.strip().isdigit() for word in words):
        raise ValueError(
            f"--{flag} is {','.join(words)!r}; expected HEIGHT,WIDTH, e.g. 224,224."
        )
    return int(words[0]), int(words[1])


def _join(where: str) -> None:
    if where == "auto":
        jax.distributed.initialize()
        return
    address, *numbers = where.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(
            f"--distributed is {where!r}; expected auto or HOST:PORT,INDEX,COUNT, "
            "e.g. 10.0.0.1:1234,0,2."
        )
    index, count = map(int, numbers)
    jax.distributed.initialize(address, num_processes=count, process_id=index)


def _parse(argv: list[str]) -> list[str]:
    with wrong_flags_in_one_line():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def wrong_flags_in_one_line() -> Iterator[None]:
    """Exits with what is wrong with the flags that are read, a recipe's included."""
    try:
        yield
    except (flags.Error, AttributeError, KeyError, ValueError) as error:
        # ml_collections wraps what a recipe raises into a page of text.
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__  # type: ignore[assignment]
        said = str(root if _is_ours(root) else error)
        if isinstance(error, AttributeError | KeyError):
            said = "The recipe has no such field: " + said.strip("'\"").replace(
                "\\'", "'"
            ).replace("\\n", ". ")
        sys.exit(f"{said}\nSee --help for the flags.")


def _is_ours(error: BaseException, modules: tuple[str, ...] = ()) -> bool:
    """Whether the line that raised it is this project's, or of `modules`."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals if trace else {}
    if "get_config" in where:  # a recipe, whatever it was loaded as
        return True
    name = where.get("__name__", "")
    return name.partition(".")[0] in ("mlp_mixer", "__main__", *modules)
