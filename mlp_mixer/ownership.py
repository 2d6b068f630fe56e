"""One process at a time trains in a run's folder.

The owner locks a file there; the system releases the lock when the process ends, even
if it is killed. Where there are no locks, as on a bucket, the file itself says that the
folder is in use, and its owner renews it: a start that sees it unchanged for long takes
the folder.
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from mlp_mixer import files, processes, text

logger = logging.getLogger(__name__)

FILE = "owner.json"
# Errors of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Seconds that another host may need to see a new file.
_PATIENCE = 5.0
# Without locks: seconds between two renewals, and after the last one until the owner is
# taken to have ended.
_RENEWED_EVERY, _ABANDONED_AFTER = 20.0, 120.0
# Variables in which Slurm and the usual MPI launchers say the number of a job's tasks.
_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_WIDTH = 300  # characters of a command in a message

_locked: set[int] = set()  # descriptors of locked files


class OwnedError(RuntimeError):
    """Another process trains in the folder, or the folder is gone."""


@contextlib.contextmanager
def owned(workdir: epath.PathLike) -> Iterator[Callable[[], None]]:
    """Owns the folder, and makes it if it is missing, until the end of the block.

    The first of several processes owns it for all; each checks that it sees the same
    file in its own `workdir`.

    Yields:
      `check_kept()`, to be called before writing: raises OwnedError if the folder was
      removed, renamed or taken meanwhile.

    Raises:
      OwnedError: another process owns it; says which.
      ValueError: not all processes of this run see the same folder.
    """
    path = epath.Path(workdir) / FILE
    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
        "token": uuid.uuid4().hex,
    }
    with contextlib.ExitStack() as held:
        with processes.together():
            if jax.process_index() == 0:
                held.enter_context(_locked_by(owner, path))
        owner = processes.first(owner)
        with processes.together():
            if jax.process_index() > 0:
                _check_seen(path, owner)
        yield functools.partial(_check_kept, path, owner["token"])


def _check_kept(path: epath.Path, token: str) -> None:
    """Raises OwnedError if the folder was removed, renamed or taken."""
    if jax.process_index() > 0:
        return
    if path.exists() and _read(path).get("token", token) == token:
        return
    now = "another process's" if path.exists() else "gone"
    raise OwnedError(
        f"{path.parent} is not this run's any more: its {FILE} is {now}, so the folder "
        "was removed, renamed or taken while this run was training. Nothing more is "
        "written there. Start again where the run is now."
    )


def _check_seen(path: epath.Path, owner: dict[str, Any]) -> None:
    until = time.monotonic() + _PATIENCE
    while _read(path).get("token") != owner["token"]:
        if time.monotonic() > until:
            raise ValueError(
                f"--workdir: {path.parent} on {socket.gethostname()} is not the folder "
                f"of process 0 on {owner['host']}, whose {FILE} is not there; give all "
                "processes one folder on a disk that they share."
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _locked_by(owner: dict[str, Any], path: epath.Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_local = "://" not in os.fspath(path)
    descriptor = _lock(path) if is_local else None
    if descriptor is None:
        _check_free(path)
    else:
        _locked.add(descriptor)
    try:
        if descriptor is None:
            owner = owner | {"renewed": 0}
        path.write_text(json.dumps(owner, indent=2) + "\n")
        if descriptor is None:
            _check_still_mine(path, owner)
            with _renewed(path, owner):
                yield
        else:
            yield
    finally:
        if _read(path).get("token") in (owner["token"], None):
            path.unlink(missing_ok=True)
        if descriptor is not None:
            _locked.discard(descriptor)
            os.close(descriptor)


def _lock(path: epath.Path) -> int | None:
    """Locks the file and returns its descriptor; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have removed it and ended meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OwnedError(_refusal(path)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise
        os.close(descriptor)


def _close_locks() -> None:
    """Closes the locked files in a forked child, which does not own the folder."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_close_locks)


def _check_free(path: epath.Path) -> None:
    """Raises OwnedError if the file says that the folder is in use, without locks."""
    owner = _read(path)
    if not owner or _has_ended(owner) or _is_abandoned(path, owner):
        return
    raise OwnedError(
        f"{_refusal(path)} If it has ended, remove {path}: there are no locks here "
        "that would tell."
    )


def _is_abandoned(path: epath.Path, owner: dict[str, Any]) -> bool:
    """Whether an owner on another host does not renew the file any more; waits for it.

    Older versions do not renew it at all, so of theirs that is not known.
    """
    if owner.get("host") == socket.gethostname() or "renewed" not in owner:
        return False
    known = text.printable(str(owner["host"]))
    logger.warning(
        "%s says that %s trains there; waiting %.0f s for a sign that it still does.",
        path,
        known,
        _ABANDONED_AFTER,
    )
    until = time.monotonic() + _ABANDONED_AFTER
    while time.monotonic() < until:
        time.sleep(_ABANDONED_AFTER / 60)
        if (now := _read(path)) != owner and (now or not path.exists()):
            return not now  # removed at its end, else renewed or taken by another
    logger.warning("There is none: the run on %s has ended. Taking its folder.", known)
    return True


@contextlib.contextmanager
def _renewed(path: epath.Path, owner: dict[str, Any]) -> Iterator[None]:
    """Renews the file until the end of the block, unless somebody else has taken it."""

    def renew(count: int) -> None:
        try:
            if _read(path).get("token") == owner["token"]:
                path.write_text(json.dumps(owner | {"renewed": count}, indent=2))
        except OSError as error:
            logger.warning("%s cannot be renewed now: %s", path, error)

    with processes.repeated(renew, _RENEWED_EVERY):
        yield


def _check_still_mine(path: epath.Path, owner: dict[str, Any]) -> None:
    """Raises unless this process wrote the file last, and so owns it without a lock."""
    time.sleep(1.0)
    if _read(path).get("token") != owner["token"]:
        raise OwnedError(_refusal(path))


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner's process has certainly ended; unknown on another host."""
    number = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(number, int):
        return False
    if number == os.getpid():  # a container was started again
        return True
    try:
        os.kill(number, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _read(path: epath.Path) -> dict[str, Any]:
    """Content of the file; {} if it is missing or incomplete."""
    try:
        return files.read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


def _refusal(path: epath.Path) -> str:
    until = time.monotonic() + 1.0
    while not (owner := _read(path)) and time.monotonic() < until:
        time.sleep(0.05)  # it is being written
    known = {key: text.printable(str(value)) for key, value in owner.items()}
    who = (
        f"process {known.get('process', '?')} on {known.get('host', '?')}, since "
        f"{known.get('since', '?')}: {known.get('command', '?')[:_WIDTH]}"
    )
    tasks = [os.environ.get(name, "") for name in _TASKS]
    hint = ""
    if not jax.distributed.is_initialized() and any(
        count.isdigit() and int(count) > 1 for count in tasks
    ):
        hint = (
            " This process is one of several tasks of a job: with --distributed=auto "
            "they are one run."
        )
    return (
        f"{path.parent} is in use by {who}\nNothing there is changed. Wait for its "
        f"end, or choose another --workdir.{hint}"
    )
