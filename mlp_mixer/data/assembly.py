"""Batches whose rows are written, each into its place, by threads or by processes.

A batch lies in one block of memory, which worker processes share with this one: nobody
copies a row, and this process spends no time on it. A block is used again when nothing
refers to its arrays any more. Worker processes are started once, for training and all
of its evaluations.
"""

import abc
import atexit
import contextlib
import dataclasses
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import queue
import select
import signal
import socket
import struct
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]

# To pass on a task takes a thirtieth of the time of a row. A task is so many rows, or
# more where a batch is large.
_ROWS_OF_TASK, _TASKS_OF_BATCH = 16, 256
# More threads in one process compete for the interpreter. In a worker process one
# decodes while the other reads.
_THREADS, _THREADS_OF_WORKER = 4, 2
# Seconds that a worker process goes on working after SIGTERM.
_GRACE = 30
# What workers are told beside tasks: a stream, one of its blocks, the block's bytes.
# Instead of a block: the stream's own pickle, or its end.
_HEADER = struct.Struct("qqq")
_PICKLE, _END = -1, -2


@runtime_checkable
class Rows(Protocol):
    """The rows of a stream of batches; worker processes get a pickled copy."""

    @property
    def blank(self) -> dict[str, Any]:
        """A row, for its keys, shapes and dtypes."""

    @property
    def rows(self) -> int:
        """Number of rows of a batch."""

    @property
    def steps(self) -> int:
        """Number of batches."""

    def row(self, step: int, row: int) -> dict[str, Any]:
        """Makes a row, which is a function of its place alone."""


class Batches:
    """An iterator over batches, of which some are made in advance.

    In a process that has workers, one thread may use all of these iterators.
    """

    def __init__(self, of: Rows, workers: int) -> None:
        """Starts nothing yet.

        Args:
          of: the rows.
          workers: number of processes that make them; 0: threads of this one do.
        """
        self._of, self._workers = of, workers
        self._crew: _Crew | None = None
        self._step = 0

    def start(self) -> None:
        """Begins with the first batches; otherwise the first `next` does."""
        if self._crew is None and self._step < self._of.steps:
            with _signals_blocked():
                self._crew = _workers(self._workers) if self._workers else _Threads()
                self._stream = self._crew.open(self._of)
            # Two batches, or as many small ones as keep all busy.
            tasks = -(-self._of.rows // _rows_of_task(self._of))
            ahead = max(2, math.ceil(4 * self._crew.hands / tasks))
            for step in range(min(ahead, self._of.steps)):
                self._crew.ask(self._stream, step)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.start()
        if self._crew is None:
            raise StopIteration
        following = self._step + len(self._stream.made)
        batch = self._crew.take(self._stream, self._step)
        self._step += 1
        if following < self._of.steps:
            self._crew.ask(self._stream, following)
        if self._step == self._of.steps:
            self.close()
        return batch

    def close(self) -> None:
        """Ends threads, and lets worker processes forget these batches."""
        if self._crew is not None:
            self._crew.close(self._stream)
        self._crew, self._step = None, self._of.steps


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keeps signals to stop for this thread: what it starts inherits its mask."""
    # Its start unblocks signals.
    multiprocessing.resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _rows_of_task(of: Rows) -> int:
    return max(_ROWS_OF_TASK, of.rows // _TASKS_OF_BATCH)


def _places(of: Rows) -> tuple[list[tuple[str, int, np.ndarray]], int]:
    """Where each array of a batch begins in its block, and the bytes of all."""
    places, end = [], 0
    for key, value in of.blank.items():
        blank = np.asarray(value)
        places.append((key, end, blank))
        end += -(-of.rows * blank.nbytes // 64) * 64
    return places, end


def _arrays(block: np.ndarray, of: Rows) -> Batch:
    """The arrays of a batch in a block of memory."""
    batch = {}
    for key, start, blank in _places(of)[0]:
        flat = block[start : start + of.rows * blank.nbytes].view(blank.dtype)
        batch[key] = flat.reshape(of.rows, *blank.shape)
    return batch


def _fill(batch: Batch, of: Rows, step: int, first: int, end: int) -> None:
    for row in range(first, end):
        made = of.row(step, row)
        for key in batch:
            batch[key][row] = made[key]


class _Block(NamedTuple):
    number: int
    memory: mmap.mmap


@dataclasses.dataclass(eq=False)
class _Made:
    """A batch that is being made."""

    block: int
    batch: Batch
    tasks: int  # that are not done
    error: Exception | None = None

    def note(self, error: Exception | None) -> None:
        """Notes that a task is done, and how."""
        self.tasks -= 1
        self.error = self.error or error


@dataclasses.dataclass(eq=False)
class _Stream:
    of: Rows
    number: int
    blocks: int = 0
    free: list[_Block] = dataclasses.field(default_factory=list)
    made: dict[int, _Made] = dataclasses.field(default_factory=dict)
    closed: bool = False


class _Crew(abc.ABC):
    """Threads or processes that make rows."""

    hands: int  # number of tasks that they work on at the same time

    @abc.abstractmethod
    def open(self, of: Rows) -> _Stream:
        """Begins a stream of batches."""

    @abc.abstractmethod
    def close(self, stream: _Stream) -> None:
        """Ends a stream; what is being made of it is dropped."""

    def ask(self, stream: _Stream, step: int) -> None:
        """Gives out the tasks of a batch."""
        if stream.free:
            block = stream.free.pop()
        else:
            block = _Block(stream.blocks, self._new_memory(stream))
            stream.blocks += 1
        memory = np.frombuffer(block.memory, np.uint8)
        # Called when the batch, or whoever took over its memory, is gone.
        weakref.finalize(memory, stream.free.append, block).atexit = False
        rows, n = stream.of.rows, _rows_of_task(stream.of)
        tasks = [(first, min(first + n, rows)) for first in range(0, rows, n)]
        made = _Made(block.number, _arrays(memory, stream.of), len(tasks))
        stream.made[step] = made
        for first, end in tasks:
            self._give(stream, made, step, first, end)

    def take(self, stream: _Stream, step: int) -> Batch:
        """Returns a batch when it is made, or raises what happened to it."""
        made = stream.made[step]
        while made.tasks:
            self._receive()
        del stream.made[step]
        if made.error is not None:
            raise made.error
        return made.batch

    @abc.abstractmethod
    def _new_memory(self, stream: _Stream) -> mmap.mmap:
        """Returns memory for one more batch."""

    @abc.abstractmethod
    def _give(
        self, stream: _Stream, made: _Made, step: int, first: int, end: int
    ) -> None:
        """Gives out one task: some rows of a batch."""

    @abc.abstractmethod
    def _receive(self) -> None:
        """Waits until something is done, and notes it."""


# --- Threads --------------------------------------------------------------------------


class _Threads(_Crew):
    """Threads of this process, for one stream."""

    hands = _THREADS

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._stop = threading.Event()

    def open(self, of: Rows) -> _Stream:
        arguments = self._tasks, self._done, self._stop
        for _ in range(self.hands):
            thread = threading.Thread(target=_work, args=arguments, daemon=True)
            _threads[thread] = self._tasks, self._stop
            thread.start()
        return _Stream(of, 0)

    def close(self, stream: _Stream) -> None:
        self._stop.set()
        for _ in range(self.hands):
            self._tasks.put(None)

    def _new_memory(self, stream: _Stream) -> mmap.mmap:
        return mmap.mmap(-1, _places(stream.of)[1])

    def _give(
        self, stream: _Stream, made: _Made, step: int, first: int, end: int
    ) -> None:
        self._tasks.put((made, stream.of, step, first, end))

    def _receive(self) -> None:
        made, error = self._done.get()
        made.note(error)


def _work(
    tasks: queue.SimpleQueue, done: queue.SimpleQueue, stop: threading.Event
) -> None:
    """Does tasks until `stop` is set."""
    while (task := tasks.get()) is not None and not stop.is_set():
        made, *what = task
        try:
            _fill(made.batch, *what)
        except Exception as error:
            done.put((made, error))
        else:
            done.put((made, None))
        del task, made  # whose memory may be free soon


# Threads of all streams → what ends them.
_threads: weakref.WeakKeyDictionary[
    threading.Thread, tuple[queue.SimpleQueue, threading.Event]
] = weakref.WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    """Waits for the images that are being decoded when this process ends.

    A thread that is in C++ while the interpreter ends would abort the process, whose
    exit status would be that of a crash.
    """
    running = [*_threads.items()]
    for _, (tasks, stop) in running:
        stop.set()
        tasks.put(None)
    for thread, _ in running:
        thread.join(_GRACE)


# --- Worker processes -----------------------------------------------------------------


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    told: socket.socket
    done: Connection


class _Workers(_Crew):
    """Processes, for any number of streams at the same time."""

    def __init__(self, count: int) -> None:
        self.hands = count * _THREADS_OF_WORKER
        context = multiprocessing.get_context("spawn")
        self._tasks = context.SimpleQueue()
        self._workers: list[_Worker] = []
        self._streams: dict[int, _Stream] = {}
        self._opened = 0
        self._reason = ChildProcessError("The processes that decode images are ended.")
        for _ in range(count):
            ours, theirs = socket.socketpair()
            done, their_done = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(theirs, self._tasks, their_done), daemon=True
            )
            process.start()
            theirs.close()
            their_done.close()
            self._workers.append(_Worker(process, ours, done))

    @property
    def has_ended(self) -> bool:
        """Whether there are no processes any more."""
        return not self._workers

    def end(self) -> None:
        """Kills the processes."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.told.close()
            worker.done.close()
        self._workers = []

    def open(self, of: Rows) -> _Stream:
        stream = _Stream(of, self._opened)
        self._opened += 1
        self._streams[stream.number] = stream
        pickled = pickle.dumps(of)
        self._share(stream, _PICKLE, len(pickled))[:] = pickled
        return stream

    def close(self, stream: _Stream) -> None:
        stream.closed = True
        self._forget(stream)

    def _forget(self, stream: _Stream) -> None:
        """Forgets a closed stream, once nobody works for it."""
        for step, made in [*stream.made.items()]:
            if not made.tasks:
                del stream.made[step]
        if not stream.made and stream.number in self._streams:
            del self._streams[stream.number]
            with contextlib.suppress(ChildProcessError):  # `_receive` will raise it
                self._tell(stream, _END)

    def _new_memory(self, stream: _Stream) -> mmap.mmap:
        return self._share(stream, stream.blocks, _places(stream.of)[1])

    def _share(self, stream: _Stream, block: int, size: int) -> mmap.mmap:
        """Returns new memory that all workers see; it has no name that could remain."""
        if hasattr(os, "memfd_create"):  # Linux; without the limit of /dev/shm
            handle = os.memfd_create("mlp_mixer")
        else:
            with tempfile.TemporaryFile() as file:
                handle = os.dup(file.fileno())
        try:
            os.ftruncate(handle, size)
            memory = mmap.mmap(handle, size)
            self._tell(stream, block, size, [handle])
        finally:
            os.close(handle)
        return memory

    def _tell(
        self, stream: _Stream, block: int, size: int = 0, handles: Sequence[int] = ()
    ) -> None:
        header = _HEADER.pack(stream.number, block, size)
        for worker in self._workers:
            try:
                socket.send_fds(worker.told, [header], handles)
            except OSError as error:
                raise self._ended(worker) from error

    def _give(
        self, stream: _Stream, made: _Made, step: int, first: int, end: int
    ) -> None:
        self._tasks.put((stream.number, made.block, step, first, end))

    def _receive(self) -> None:
        if self.has_ended:  # noticed elsewhere, where nobody could be told
            raise self._reason
        by_pipe: dict[Any, _Worker] = {w.done: w for w in self._workers}
        for pipe in multiprocessing.connection.wait([*by_pipe]):
            try:
                number, step, error = by_pipe[pipe].done.recv()
            except (EOFError, OSError) as ended:
                raise self._ended(by_pipe[pipe]) from ended
            stream = self._streams[number]
            stream.made[step].note(error)
            if stream.closed:
                self._forget(stream)

    def _ended(self, worker: _Worker) -> ChildProcessError:
        worker.process.join(10)
        code = worker.process.exitcode
        self.end()
        self._reason = ChildProcessError(
            f"A process that decodes images ended (exit code {code}). An exit code of"
            " -9 mostly means that memory was short: start again with fewer"
            " input.workers."
        )
        return self._reason


# By their number. They stay until this process ends.
_pools: dict[int, _Workers] = {}


def _workers(count: int) -> _Workers:
    if count not in _pools or _pools[count].has_ended:
        _pools[count] = _Workers(count)
        # Before multiprocessing would wait for them.
        atexit.register(_pools[count].end)
    return _pools[count]


class _Told:
    """What a worker process was told: streams, and their batches in shared memory."""

    def __init__(self, told: socket.socket) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._of: dict[int, Rows] = {}
        self._batches: dict[int, dict[int, Batch]] = {}

    def find(self, stream: int, block: int) -> tuple[Batch, Rows]:
        """Returns the arrays of a block, and the rows of its stream."""
        with self._lock:
            while select.select([self._told], [], [], 0)[0] or block not in (
                self._batches.get(stream, ())
            ):
                self._listen()
            return self._batches[stream][block], self._of[stream]

    def _listen(self) -> None:
        header, handles, _, _ = socket.recv_fds(self._told, _HEADER.size, 1)
        if not header:  # the parent is gone
            os._exit(1)
        stream, block, size = _HEADER.unpack(header)
        if block == _END:
            del self._of[stream], self._batches[stream]
            return
        (handle,) = handles
        memory = mmap.mmap(handle, size)
        os.close(handle)
        if block == _PICKLE:
            self._of[stream], self._batches[stream] = pickle.loads(memory), {}
        else:
            whole = np.frombuffer(memory, np.uint8)
            self._batches[stream][block] = _arrays(whole, self._of[stream])


def _serve(told: socket.socket, tasks: Any, done: Connection) -> None:
    """The life of a worker process."""
    _follow_parent()
    known, lock = _Told(told), threading.Lock()

    def work() -> None:
        while True:
            stream, block, step, first, end = tasks.get()
            error = None
            try:
                _fill(*known.find(stream, block), step, first, end)
            except Exception as caught:
                error = _sendable(caught)
            try:
                with lock:
                    done.send((stream, step, error))
            except BrokenPipeError:  # the parent is gone
                os._exit(1)

    for _ in range(_THREADS_OF_WORKER - 1):
        threading.Thread(target=work, daemon=True).start()
    work()


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note, as far as it can be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some exceptions take other arguments than they keep
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a process that decodes images:\n{trace}")
    return error


def _follow_parent() -> None:
    """Ends this worker process once its parent is gone, and not much earlier.

    Ctrl-C and a cluster send their signal to all processes of a run, but the parent
    needs some more batches before it ends. So workers start with SIGINT and SIGTERM
    blocked. SIGTERM is handled late rather than never, for whoever sends it to workers
    alone.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
