"""How a program starts: flags, logging, several processes, errors in one line."""

import contextlib
import itertools
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from mlp_mixer import console, errors, processes, recipe
from mlp_mixer.text import printable

logger = logging.getLogger(__name__)

# --help lists what is defined here as the program's that asked for it.
flags.disclaim_key_flags()

# How long one of several processes waits for the others, as in JAX.
WAIT_SECONDS = 300.0


def run(main: Callable[[list[str]], None], *, distributed: bool = False) -> None:
    """Runs `main(arguments)` with the flags that are defined, and exits.

    An error that this project raises on purpose says what to do, so it is printed
    alone; any other keeps its traceback. Both exit with 1.

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

    def start(argv: list[str]) -> None:
        console.log_to_terminal()
        try:
            main(argv[1:])
        except Exception:
            if distributed and jax.process_count() > 1:
                _end_soon()
            raise

    parse = _join_and_parse if distributed else _parse
    with errors_in_one_line():
        app.run(start, flags_parser=parse)


# --- Errors ---------------------------------------------------------------------------


@contextlib.contextmanager
def errors_in_one_line(*modules: str) -> Iterator[None]:
    """Exits with the message alone of an error that says what is wrong by itself.

    That is an error that this project or `modules` raise on purpose, and one of the
    operating system about a file.
    """
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
        if (message := errors.message(error, modules)) is None:
            raise
        sys.exit(_final_words(message))


def _final_words(message: str) -> str:
    """A message as a terminal shows it: it may name files and fields from outside."""
    return printable(message, keep="\n\t")


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a broken pipe is reported unasked
    return bool(poll.poll(0))


# --- Flags ----------------------------------------------------------------------------


def define_path(name: str, default: str | None, help: str, **options: Any) -> None:
    """Defines a flag whose value is a path; `~` is the home folder."""
    flags.DEFINE(_Path(), name, default, help, **options)


def define_dtype() -> None:
    """Defines --dtype for programs that predict."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Of activations and products; the run's own if not set, else float32.",
    )


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: Any) -> str:
        """Returns the path with `~` expanded."""
        return path(argument)


def path(text: str) -> str:
    """The path of an argument, `~` expanded.

    Raises:
      ValueError: it begins with `~` and there is no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(
            f"{text} begins with the home folder of somebody who is not known here; a "
            f"file of that name is written ./{text}."
        )
    return expanded


def check_no_words(arguments: Sequence[str]) -> None:
    """Passes if nothing is left of a command line that has flags alone.

    Raises:
      ValueError: a word that is no flag, e.g. since its `--` is missing.
    """
    if arguments:
        raise ValueError(
            f"{arguments[0]!r} is no flag, and nothing else is expected; a flag is "
            "written --NAME=VALUE, a list with commas and no blanks, and a field of a "
            "recipe --config.FIELD=VALUE."
        )


def define_recipe() -> None:
    """Defines the flag `--config`, and with it `--config.FIELD=VALUE`."""
    config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
    flags.FLAGS["config"].parser = _Recipe()
    flags.mark_flag_as_required("config")


class _Recipe(flags.ArgumentParser):
    syntactic_help = "a recipe and its words: configs/x.py:words"

    def parse(self, argument: str) -> ConfigDict:
        """Returns the recipe, closed to further fields."""
        config = recipe.load(argument)
        with config.unlocked():  # the file may have locked it
            recipe.open_model(config, _model_name(sys.argv))
        return config.lock()


# `--config.model.name=…`: the name of a field, and what stands behind it.
_FIELD = re.compile(r"(--?(?:no)?config\.)([\w.]+)(.*)", re.DOTALL)


def _model_name(argv: Sequence[str]) -> str | None:
    """Returns the name that a command line gives the model, if it does."""
    name = None
    for word, after in itertools.pairwise([*argv, ""]):
        if (field := _FIELD.fullmatch(word)) and field[2] == "model.name":
            name = field[3][1:] if field[3].startswith("=") else after
    return None if name == "None" else name


def _renamed(argv: Sequence[str]) -> list[str]:
    """Returns the command line with the new names of fields that had another."""
    words = []
    for word in argv:
        field = _FIELD.fullmatch(word)
        if field and (new := recipe.MOVED.get(field[2])):
            logger.warning("config.%s is now config.%s.", field[2], new)
            word = f"{field[1]}{new}{field[3]}"
        words.append(word)
    return words


def override(config: ConfigDict, words: Sequence[str]) -> ConfigDict:
    """Returns the recipe with `--config.FIELD=VALUE`, of which `words` are, set."""
    argv, values = ["program", *_renamed(words)], flags.FlagValues()
    with config.unlocked():
        recipe.open_model(config, _model_name(argv))
    with wrong_flags_in_one_line():
        config_flags.DEFINE_config_dict(
            *("config", config), flag_values=values, lock_config=True, sys_argv=argv
        )
        values(argv)
    config = values["config"].value
    _unwrap_none(config)
    recipe.close_model(config)
    return config


class _OrNone(flags.ArgumentParser):
    """Reads a field's value, or None, for `recipe.check_fields` to allow or refuse."""

    def __init__(self, parser: flags.ArgumentParser, expected: str):
        self._parser, self._expected = parser, expected

    def parse(self, argument: Any) -> Any:
        """Returns the value of a command line's word, or of a default."""
        if argument in (None, "None"):
            return None
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self._expected}.") from None

    def flag_type(self) -> str:
        """Returns the type, for --help."""
        return self._parser.flag_type()


class _Tuple(tuple_parser.TupleParser):
    """Reads a tuple; a lone None comes in one, see `_unwrap_none`."""

    def parse(self, argument: Any) -> tuple:
        """Returns the tuple that a command line's word or words stand for."""
        try:
            return super().parse(argument)
        except (MemoryError, RecursionError, TypeError, ValueError):
            raise ValueError("expected numbers, e.g. (224, 224).") from None


for _type, _parser in {
    int: _OrNone(flags.IntegerParser(), "a whole number"),
    float: _OrNone(flags.FloatParser(), "a number"),
    bool: _OrNone(flags.BooleanParser(), "true or false"),
    str: _OrNone(flags.ArgumentParser(), "text"),
    tuple: _Tuple(),
}.items():
    config_flags.register_flag_parser_for_type(_type, _parser)


def _unwrap_none(config: ConfigDict) -> None:
    """Turns the (None,) that ml_collections makes of a tuple's `=None` into None."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _unwrap_none(value)
        elif value == (None,):
            config[name] = None


def size(flag: str) -> tuple[int, int] | None:
    """(height, width) in pixels of a list flag; None if it is not set."""
    words = flags.FLAGS[flag].value
    if words is None:
        return None
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(
            f"--{flag} is {','.join(words)!r}; expected HEIGHT,WIDTH, e.g. 224,224."
        )
    return int(words[0]), int(words[1])


def _parse(argv: list[str]) -> list[str]:
    argv[:] = _renamed(argv)  # which is sys.argv, where the recipe's flags are read
    with wrong_flags_in_one_line():
        arguments = flags.FLAGS(argv)
    if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value):
        _unwrap_none(config)
        recipe.close_model(config)
    return arguments


@contextlib.contextmanager
def wrong_flags_in_one_line() -> Iterator[None]:
    """Exits with what is wrong with the flags that are read, a recipe's included."""
    try:
        yield
    except flags.Error as error:
        # Absl turns into one what a parser raises, and a recipe's bugs with it.
        cause = error.__context__
        if cause and errors.message(cause) is None and _is_in(cause, "mlp_mixer"):
            raise cause from None
        sys.exit(_final_words(f"{error}\nSee --help for the flags."))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if not _is_in(error, "ml_collections") or _is_in(error, "mlp_mixer.recipe"):
            raise
        reason = str(error).strip("'\"").replace("\\'", "'").replace("\\n", ". ")
        sys.exit(
            _final_words(
                f"The recipe has no such field: {reason}\nSee --help for the flags."
            )
        )


def _is_in(error: BaseException, package: str) -> bool:
    """Whether the error came up through the code of a package."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    return any(f"{name}.".startswith(f"{package}.") for name in names)


# --- One of several processes ---------------------------------------------------------


def _join_and_parse(argv: list[str]) -> list[str]:
    """Joins the others before a recipe is read: if that fails here, they are told."""
    early = flags.FlagValues()
    flags.DEFINE_string("distributed", None, "", flag_values=early)
    early.set_gnu_getopt(True)
    with contextlib.suppress(flags.Error):  # for `_parse` to tell
        early(argv, known_only=True)
    if early["distributed"].value is None:
        return _parse(argv)
    _join(early["distributed"].value)
    with processes.together():
        return _parse(argv)


def _join(where: str) -> None:
    """Makes this process one of several, as `--distributed` says.

    Raises:
      ValueError: it does not say so, or no cluster, host or port is there.
    """
    if where == "auto":
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "--distributed=auto finds no cluster (TPU pod, SLURM, Kubernetes, MPI) "
                f"that this process is part of: {error} Without one, leave the flag "
                "out, or give HOST:PORT,INDEX,COUNT."
            ) from error
        return
    host, port, index, count = _place(where)
    _check_address(where, host, port, listen=index == 0)
    others = (
        f"process 0 at {host}:{port}" if index else f"the other {count - 1} processes"
    )
    others += f"; all {count} need the same --distributed but for the INDEX"
    with _bounded_wait(others):
        try:
            jax.distributed.initialize(
                f"{host}:{port}",
                num_processes=count,
                process_id=index,
                # The end of our own wait is readable; JAX's is a core dump.
                initialization_timeout=int(WAIT_SECONDS) + 60,
            )
        except RuntimeError as error:
            raise ValueError(f"--distributed={where} fails: {error}") from error


def _end_soon() -> None:
    """Ends this process after some seconds, whoever does not end with it.

    JAX lets a process wait for the others at its end, and those that have not failed
    wait for its arrays: five minutes. Once it is gone, they end too.
    """
    timer = threading.Timer(10, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _place(where: str) -> tuple[str, int, int, int]:
    """Host, port, index and count of HOST:PORT,INDEX,COUNT."""
    address, *numbers = where.split(",")
    host, _, port = address.rpartition(":")
    numbers = [port, *numbers]
    plain = ":" not in host or (host.startswith("[") and host.endswith("]"))
    good = host and plain and len(numbers) == 3 and all(map(str.isdecimal, numbers))
    if not good:
        raise ValueError(
            f"--distributed is {where!r}; expected auto or HOST:PORT,INDEX,COUNT, "
            "e.g. 10.0.0.1:1234,0,2."
        )
    found, index, count = map(int, numbers)
    if not 0 < found < 2**16:
        raise ValueError(
            f"--distributed is {where!r}: port {found} is not one of 1 ... 65535."
        )
    if count < 1:
        raise ValueError(f"--distributed is {where!r}: the COUNT is 1 or more.")
    if index >= count:
        raise ValueError(
            f"--distributed is {where!r}: of {count} processes the INDEX is one of "
            f"0 ... {count - 1}."
        )
    return host, found, index, count


def _check_address(where: str, host: str, port: int, *, listen: bool) -> None:
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--distributed is {where!r}: the host {host!r} is not known here: {error}"
        ) from error
    if not listen:
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"--distributed is {where!r}: process 0 cannot listen on port {port} "
            f"({error.strerror}); choose another."
        ) from error


@contextlib.contextmanager
def _bounded_wait(others: str) -> Iterator[None]:
    """Says after a while whom this process waits for, and ends it after a long one."""

    def say() -> None:
        print(f"Waiting for {others}.", file=sys.stderr, flush=True)

    def end() -> None:
        message = f"Waited {WAIT_SECONDS:g} seconds in vain for {others}."
        print(message, file=sys.stderr, flush=True)
        # JAX waits in C++, where no exception reaches it.
        os._exit(1)

    timers = [threading.Timer(10, say), threading.Timer(WAIT_SECONDS, end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
