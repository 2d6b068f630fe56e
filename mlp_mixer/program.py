"""How a program starts: flags, logging, several processes, errors in one line."""

import collections
import contextlib
import gc
import importlib.util
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from jax._src import clusters
from ml_collections import ConfigDict

from mlp_mixer import (
    compilation_cache,
    console,
    errors,
    fields,
    joining,
    known,
    models,
    processes,
    recipe,
    supervisor,
)
from mlp_mixer.text import printable

logger = logging.getLogger(__name__)

# --help lists what is defined here as the program's that asked for it.
flags.disclaim_key_flags()

# Seconds after which a process that waits for others says so again.
ANNOUNCE_EVERY = 30.0


def run(
    main: Callable[[list[str]], None],
    *,
    distributed: bool = False,
    compiles: bool = True,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Runs `main(arguments)` with the flags that are defined, and exits.

    An error that this project raises on purpose says what to do, so it is printed
    alone; any other keeps its traceback. Both exit with 1.

    Args:
      main: receives what is left of the command line without flags.
      distributed: whether the program may be one of several processes.
      compiles: whether what it compiles is kept for its next start.
      prepare: what is called first, before JAX has used a device.
    """
    if distributed:
        _define_distributed(flags.FLAGS)

    if compiles:
        define_path(
            "compilation_cache",
            None,
            "A folder that keeps compiled programs for the next start, or off; "
            "~/.cache/mlp_mixer/compiled if not set.",
        )

    def start(argv: list[str]) -> None:
        if prepare:
            prepare()
        console.log_to_terminal()
        try:
            if compiles:
                compilation_cache.keep_programs(flags.FLAGS.compilation_cache)
            main(argv[1:])
        except Exception as error:
            if distributed and jax.process_count() > 1:
                _end_with_the_others(error)
            raise
        finally:
            # Python would look for garbage in all that the libraries hold, and then end
            # anyway: half a second.
            gc.freeze()

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
        sys.exit(_for_terminal(message))


def _for_terminal(message: str) -> str:
    """The message, which may name files and fields from outside."""
    return printable(message, keep="\n\t")


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a broken pipe is reported unasked
    return bool(poll.poll(0))


# --- Flags ----------------------------------------------------------------------------


def define_path(name: str, default: str | None, help: str, **options: Any) -> None:
    """Defines a flag whose value is a path; `~` is the home folder."""
    flags.DEFINE(_Path(), name, default, help, **options)


def define_duration(name: str, default: str | None, help: str, **options: Any) -> None:
    """Defines a flag such as 3h50m; its value is a number of seconds."""
    flags.DEFINE(_Duration(), name, default, help, **options)


def define_dtype() -> None:
    """Defines --dtype for programs that predict."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Of activations and products; the run's own if not set, else float32.",
    )


def define_ema() -> None:
    """Defines --ema for programs that read weights."""
    flags.DEFINE_bool(
        "ema",
        None,
        "The averaged parameters of a run or a torch file; --noema: the last ones. If "
        "not set, the averaged ones where it keeps them.",
    )


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: Any) -> str:
        """Returns the path with `~` expanded."""
        return path(argument)


class _Duration(flags.ArgumentParser):
    syntactic_help = "a duration such as 90s, 15m, 3h50m or 1d12h"

    def parse(self, argument: Any) -> float:
        """Returns the seconds in days, hours, minutes and seconds, in this order."""
        parts = re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", argument, re.ASCII)
        seconds = 0
        for part, unit in zip(parts.groups() if parts else (), _UNITS, strict=False):
            seconds += unit * int(part[:-1]) if part else 0
        if not seconds:
            raise ValueError(f"expected {self.syntactic_help}, longer than nothing.")
        return float(seconds)


_UNITS = 86400, 3600, 60, 1  # seconds in a day, an hour, …


def path(text: str) -> str:
    """The path of an argument, `~` expanded.

    Raises:
      ValueError: it begins with `~` and there is no such user; or it is on a bucket,
        and the library for that is missing.
    """
    if text.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{text} is on a bucket, for which gcsfs is missing: "
            "pip install '.[gcs]' in the clone."
        )
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
    """Defines the flag `--config`, and with it `--config.FIELD=VALUE`.

    `flags.FLAGS.config` is the recipe with its fields set.
    """
    text = "A recipe and its words: configs/x.py:words."
    flags.DEFINE_string("config", None, text, required=True)


# `--config.FIELD=VALUE`, where VALUE may be the next word; of a switch
# `--config.FIELD` and `--noconfig.FIELD` too.
_FIELD = re.compile(r"--?(?:noconfig\.([\w.]+)|config\.([\w.]+)(?:=(.*))?)", re.DOTALL)
_FLAG = re.compile(r"--?[a-zA-Z]")


def _without_fields(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns a command line without the fields of its recipe, and their values."""
    rest: list[str] = []
    given: dict[str, list[str]] = {}
    words = collections.deque(argv)
    while words and rest[-1:] != ["--"]:
        word = words.popleft()
        field = _FIELD.fullmatch(word)
        if not field:
            rest.append(word)
            continue
        off, on, value = field.groups()
        name = off or on
        if value is None and (off or not words or _FLAG.match(words[0])):
            value = str(not off)
        elif value is None:
            value = words.popleft()
        if name in recipe.MOVED:
            logger.warning("config.%s is now config.%s.", name, recipe.MOVED[name])
        given.setdefault(recipe.MOVED.get(name, name), []).append(value)
    return rest + list(words), given


def override(config: ConfigDict, words: Sequence[str]) -> ConfigDict:
    """Returns the recipe with `--config.FIELD=VALUE`, of which `words` are, set."""
    rest, given = _without_fields(words)
    check_no_words(rest)
    return _set_fields(config, given)


def _set_fields(config: ConfigDict, given: Mapping[str, Sequence[str]]) -> ConfigDict:
    """Returns the recipe, closed to further fields, with {field: its words} set."""
    # The model's name says which fields it has.
    for field in sorted(given, key="model.name".__ne__):
        rows, words = fields.rows(config.to_dict()), given[field]
        *sections, name = field.split(".")
        place: Any = config
        for section in sections:
            place = place.get(section) if isinstance(place, ConfigDict) else None
        if field not in rows or not isinstance(place, ConfigDict):
            if sections == ["model"] and isinstance(place, ConfigDict):
                models.family(str(place.get("name")))  # raises if there is none
            near = known.nearest(field, rows, 3)
            _exit_with(f"config.{field} is no field of the recipe; try {near}.")
        row = rows[field]
        try:
            value = row.parse(words)
        except ValueError:
            expected = row.expected(words[-1])
            _exit_with(f"flag --config.{field}={words[-1]}: expected {expected}.")
        with config.unlocked(), config.ignore_type():
            place[name] = value
            if value is None and row.optional:
                del place[name]
    return config.lock()


def _exit_with(message: str) -> NoReturn:
    sys.exit(_for_terminal(f"{message}\nSee --help for the flags."))


def size(flag: str) -> tuple[int, int] | None:
    """(height, width) in pixels of a list flag, one number for a square; None if unset.

    Raises:
      ValueError: it is neither.
    """
    words = flags.FLAGS[flag].value
    if words is None:
        return None
    if len(words) not in (1, 2) or not all(word.strip().isdecimal() for word in words):
        raise ValueError(
            f"--{flag} is {','.join(words)!r}; expected HEIGHT,WIDTH, e.g. 224,224, or "
            "the side of a square."
        )
    return int(words[0]), int(words[-1])


def _parse(argv: list[str]) -> list[str]:
    given: dict[str, list[str]] = {}
    if "config" in flags.FLAGS:
        argv, given = _without_fields(argv)
    try:
        arguments = flags.FLAGS(argv)
    except flags.Error as error:
        _exit_with(str(error))
    if "config" in flags.FLAGS:
        flags.FLAGS.config = _set_fields(recipe.load(flags.FLAGS.config), given)
    return arguments


# --- One of several processes ---------------------------------------------------------


def _define_distributed(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "distributed",
        None,
        "One of several processes of one run: auto (TPU pods, SLURM, Kubernetes) "
        "or HOST:PORT,INDEX,COUNT with the address of process 0.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "join_timeout_seconds",
        300,
        "How long one of several processes waits for the others at the start.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        100,
        "Time after which a process that does not answer is given up by the others, "
        "which end.",
        lower_bound=5,
        flag_values=values,
    )


def _join_and_parse(argv: list[str]) -> list[str]:
    """Joins the others before a recipe is read: if that fails here, they are told."""
    early = flags.FlagValues()
    _define_distributed(early)
    early.set_gnu_getopt(True)
    try:
        early(argv, known_only=True)
    except flags.Error:
        return _parse(argv)  # which tells it
    if early["distributed"].value is None:
        return _parse(argv)
    _join(**early.flag_values_dict())
    with processes.together():
        return _parse(argv)


def _join(
    distributed: str, join_timeout_seconds: int, heartbeat_timeout_seconds: int
) -> None:
    """Makes this process one of several, as the flags of these names say.

    Raises:
      ValueError: `distributed` does not say so, or no cluster, host or port is there.
    """
    with _bounded_wait(join_timeout_seconds) as now_for:
        if distributed == "auto":
            now_for(lambda: "the cluster's word where process 0 is")
            host, port, index, count = _cluster(join_timeout_seconds)
        else:
            host, port, index, count = _place(distributed)
            _check_host(distributed, host, port)
        roll = joining.RollCall(host, port, index, count)
        now_for(lambda: roll.missing)
        try:
            hosts = roll.call()
        except OSError as error:
            raise ValueError(
                f"--distributed is {distributed!r}: process 0 cannot listen on port "
                f"{port} ({error.strerror}); choose another."
            ) from error
        supervisor.hosts_known(index, hosts)
        now_for(lambda: f"JAX's service at {host}:{port}; all processes were there")
        try:
            jax.distributed.initialize(
                f"{host}:{port}",
                num_processes=count,
                process_id=index,
                # The end of our own wait is readable; JAX's is a core dump.
                initialization_timeout=join_timeout_seconds + 60,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            )
        except RuntimeError as error:
            raise ValueError(f"--distributed={distributed} fails: {error}") from error
    supervisor.take_signals()


def _end_with_the_others(error: Exception) -> None:
    """Lets this process end after an error, and no other wait for it.

    An error of an exchange with a process that is gone is not told: within the time of
    its heartbeat JAX ends this process too and says which one is gone, unless that one
    could tell its own error.
    """
    seconds = flags.FLAGS.heartbeat_timeout_seconds
    if processes.is_of_an_exchange(error):
        if failures := processes.failures_of_others(seconds + 10):
            print(_for_terminal(failures), file=sys.stderr, flush=True)
            os._exit(1)  # JAX would wait for those that are gone
    else:
        processes.tell_failure(errors.message(error) or repr(error))
    # JAX lets a process wait for the others at its end, and those that have not failed
    # wait for its arrays: five minutes. Once it is gone, they end too.
    timer = threading.Timer(10, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _cluster(seconds: int) -> tuple[str, int, int, int]:
    """Returns host and port of process 0, index and count, as JAX finds them out."""
    address: str | None = os.environ.get("JAX_COORDINATOR_ADDRESS")
    why = ""
    try:
        address, count, index, _ = (
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                address, None, None, None, None, seconds
            )
        )
    except (RuntimeError, ValueError) as error:
        why = f": {error}"
    if why or None in (address, count, index):
        raise ValueError(
            "--distributed=auto finds no cluster (TPU pod, SLURM, Kubernetes, MPI) "
            f"that this process is part of{why}. Without one, leave the flag out, or "
            "give HOST:PORT,INDEX,COUNT."
        )
    host, _, port = str(address).rpartition(":")
    return host, int(port), int(str(index)), int(str(count))


_PLACE = re.compile(r"(\[[^]]+\]|[^:]+):(\d+),(\d+),(\d+)")


def _place(where: str) -> tuple[str, int, int, int]:
    """Returns host, port, index and count of HOST:PORT,INDEX,COUNT."""
    found = _PLACE.fullmatch(where)
    if not found:
        raise ValueError(
            f"--distributed is {where!r}; expected auto or HOST:PORT,INDEX,COUNT, "
            "e.g. 10.0.0.1:1234,0,2."
        )
    port, index, count = map(int, found.groups()[1:])
    wrong = ""
    if not 0 < port < 2**16:
        wrong = f"port {port} is not one of 1 ... 65535"
    elif count < 1:
        wrong = "the COUNT is 1 or more"
    elif index >= count:
        wrong = f"of {count} processes the INDEX is one of 0 ... {count - 1}"
    if wrong:
        raise ValueError(f"--distributed is {where!r}: {wrong}.")
    return found[1], port, index, count


def _check_host(where: str, host: str, port: int) -> None:
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--distributed is {where!r}: the host {host!r} is not known here: {error}"
        ) from error


@contextlib.contextmanager
def _bounded_wait(
    seconds: int,
) -> Iterator[Callable[[Callable[[], str]], None]]:
    """Says from time to time whom this process waits for, and ends it after `seconds`.

    Yields:
      `now_for(whom)`, to be called with a function that names whom it waits for next.
    """
    begun, done = time.monotonic(), threading.Event()
    for_whom: list[Callable[[], str]] = []

    def watch() -> None:
        while (left := begun + seconds - time.monotonic()) > 0:
            if done.wait(min(ANNOUNCE_EVERY, left)):
                return
            if left > ANNOUNCE_EVERY:
                waited = f"{time.monotonic() - begun:.0f} seconds so far"
                whom = f"Waiting for {for_whom[-1]()}, {waited}."
                print(whom, file=sys.stderr, flush=True)
        print(
            f"Waited {seconds:g} seconds in vain for {for_whom[-1]()}. All processes "
            "need the same --distributed but for the INDEX; --join_timeout_seconds "
            "says how long they wait.",
            file=sys.stderr,
            flush=True,
        )
        # JAX waits in C++, where no exception reaches it.
        os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        for_whom.append(lambda: "the others")
        watcher.start()
        yield for_whom.append
    finally:
        done.set()
