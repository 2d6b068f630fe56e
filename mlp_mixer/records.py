"""Where a run's records lie: in metrics.jsonl, or in numbered parts.

An object on a bucket cannot be appended to. There, and on a disk that refuses to
append, the records are cut into metrics/00000.jsonl, metrics/00001.jsonl, …, of which
the last is written again, whole, with what is new. If there is a metrics.jsonl, it
alone counts: parts beside it are left from a start that was killed while it turned one
form into the other.
"""

import abc
import errno
import os
import time
from typing import IO

from etils import epath

from mlp_mixer import files

FILE, FOLDER = "metrics.jsonl", "metrics"
# Some thousand records. The whole part is sent each time that one is added to it.
PART_BYTES = 2**20
# Between two writings of the last part. A bucket takes one per second and object.
PART_SECONDS = 30.0
_NO_APPENDING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def paths(workdir: epath.PathLike) -> list[epath.Path]:
    """Returns the files with a run's records, in their order; none if there are none.

    Raises:
      FileNotFoundError: one of several parts is missing.
    """
    path = epath.Path(workdir) / FILE
    if path.exists():
        return [path]
    found = _parts(workdir)
    for number, part in enumerate(found):
        if part.name != _name(number):
            raise FileNotFoundError(
                f"Of the records of {workdir}, {FOLDER}/{_name(number)} is missing "
                f"before {part.name}. Bring it back, or remove the parts after it."
            )
    return found


def _parts(workdir: epath.PathLike) -> list[epath.Path]:
    folder = epath.Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name[:5].isdecimal())


def _name(number: int) -> str:
    return f"{number:05d}.jsonl"


class Lines(abc.ABC):
    """A run's records that are added to."""

    @abc.abstractmethod
    def append(self, line: str) -> None:
        """Takes one more line, with its end."""

    @abc.abstractmethod
    def store(self) -> None:
        """Writes to the folder what it does not have yet."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stores what is left, and ends."""


def open_for_appending(workdir: epath.PathLike, lines: list[str]) -> Lines:
    """Makes these lines, each with its end, all records of a run; more may follow."""
    folder = epath.Path(workdir)
    if "://" in os.fspath(folder):
        return _Parts(folder, lines)
    files.write_text(folder / FILE, "".join(lines))
    try:
        file = (folder / FILE).open("a")
    except OSError as error:
        if error.errno not in _NO_APPENDING:
            raise
        return _Parts(folder, lines)
    for part in reversed(_parts(folder)):
        part.unlink()
    return _File(file)


class _File(Lines):
    """metrics.jsonl, which has each line at once."""

    def __init__(self, file: IO[str]):
        self._file = file

    def append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def store(self) -> None:
        """Does nothing: no line is missing."""

    def close(self) -> None:
        self._file.close()


class _Parts(Lines):
    """Numbered parts, of which the last is behind by `PART_SECONDS` at most."""

    def __init__(self, workdir: epath.Path, lines: list[str]):
        self._folder = workdir / FOLDER
        self._number, self._last = 0, ""
        self._folder.mkdir(parents=True, exist_ok=True)
        for line in lines:
            self._add(line)
        self._write()
        # From the end, so that none is missing before another if this is cut off.
        for part in reversed(_parts(workdir)[self._number + 1 :]):
            part.unlink()
        (workdir / FILE).unlink(missing_ok=True)

    def _add(self, line: str) -> None:
        if len(self._last) + len(line) > PART_BYTES and self._last:
            self._write()
            self._number, self._last = self._number + 1, ""
        self._last += line

    def _write(self) -> None:
        files.write_text(self._folder / _name(self._number), self._last)
        self._written, self._changed = time.monotonic(), False

    def append(self, line: str) -> None:
        self._add(line)
        self._changed = True
        if time.monotonic() - self._written >= PART_SECONDS:
            self._write()

    def store(self) -> None:
        if self._changed:
            self._write()

    def close(self) -> None:
        self.store()
