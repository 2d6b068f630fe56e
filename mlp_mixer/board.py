"""Files of TensorBoard's, on a disk or a bucket."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import tensorboardX
from etils import epath
from tensorboardX.proto import event_pb2, summary_pb2


class Board:
    """A file of TensorBoard's.

    tensorboardX's own writer has a thread; after that has ended on a full disk, the
    next write would wait for ever.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        """Opens a new file, which hides what older files hold after `first_step`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = os.fspath(folder)
        # tensorboardX reads the part before a colon as the name of a service.
        where = path if "://" in path else os.path.abspath(path)
        host = socket.gethostname()
        self._file = tensorboardX.RecordWriter(
            f"{where}/events.out.tfevents.{time.time():.6f}.{host}"
        )
        self._flushed = time.monotonic()
        version = "brain.Event:2"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(0, file_version=version)
        self._add(first_step + 1, file_version=version)
        self._add(first_step + 1, session_log=start)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars; they are on the disk within some minutes."""
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(value))
            for name, value in scalars.items()
        ]
        self._add(step, summary=summary_pb2.Summary(value=values))
        if time.monotonic() > self._flushed + 120:  # rarely: a bucket gets all again
            self._flushed = time.monotonic()
            self._file.flush()

    def _add(self, step: int, **fields: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, **fields)
        self._file.write(event.SerializeToString())

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
