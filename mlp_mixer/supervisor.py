"""A small parent of each of several processes, which explains their ends.

JAX ends a process that has lost another with a page of text and a core dump. So with
`--distributed` a program starts itself again as a child. The parent passes on what the
child prints, hands on signals, and says in one line which process on which host is
lost. It is there before JAX is imported, so that a signal is never too early.

The child needs nothing of this module but three functions: `hosts_known`,
`take_signals` and `signals_received`. They do nothing in a process without a parent.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from typing import Any

# The descriptor of the child's end of a connection with its parent.
_CONNECTION = "MLP_MIXER_SUPERVISOR"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL = 1.0  # seconds in which a signal may arrive twice, e.g. as its group's
_PATIENCE = 10.0  # seconds between JAX's first line about an error and its last
_PR_SET_PDEATHSIG = 1

_connection: socket.socket | None = None  # the child's


def supervise(*, saves: bool) -> None:
    """Goes on in a child if this is one of several processes; then never returns.

    Args:
      saves: whether the program saves and stops when it receives SIGTERM; one that does
        not is ended at once.
    """
    if _CONNECTION in os.environ:
        _begin_as_child()
    elif _is_one_of_several(sys.argv[1:]):
        sys.exit(_Supervisor(saves).status())


def _is_one_of_several(words: Sequence[str]) -> bool:
    flags = words[: words.index("--")] if "--" in words else words
    # Another program may run this one with arguments of its own: it has no such parent.
    can_start_again = sys.orig_argv[len(sys.orig_argv) - len(words) :] == [*words]
    return can_start_again and any(
        re.match(r"--?distributed(=|$)", word) for word in flags
    )


# --- The child ------------------------------------------------------------------------


def _begin_as_child() -> None:
    global _connection
    _connection = socket.socket(fileno=int(os.environ.pop(_CONNECTION)))
    _connection.set_inheritable(False)
    _connection.setblocking(False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _connection in select.select([_connection], [], [], 0)[0]:
        with contextlib.suppress(OSError):
            if not _connection.recv(1, socket.MSG_PEEK):  # it died before that call
                sys.exit(1)
    # A terminal sends SIGINT to both; the parent turns its own into SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def hosts_known(index: int, hosts: Sequence[str]) -> None:
    """Tells the parent the number of this process and the hosts of all."""
    if _connection:
        message = json.dumps({"index": index, "hosts": list(hosts)}) + "\n"
        _connection.setblocking(True)
        _connection.sendall(message.encode())
        _connection.setblocking(False)


def take_signals() -> None:
    """Lets SIGTERM through; it waits until then, so that JAX can tell the others."""
    if _connection:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def signals_received() -> list[str]:
    """Names of the signals that the parent has received since the last call."""
    if _connection:
        with contextlib.suppress(BlockingIOError):
            return _connection.recv(4096).decode().split()
    return []


def process_id() -> int:
    """The number by which the system knows this process, or its parent."""
    return os.getppid() if _connection else os.getpid()


# --- The parent -----------------------------------------------------------------------


class _Supervisor:
    def __init__(self, saves: bool):
        self._saves = saves
        self._first_signal: float | None = None
        self._killed_by: int | None = None
        self._index: int | None = None
        self._hosts: list[str] = []
        self._heard = b""
        self._page = OutputFilter()
        with _blocked():  # until the child can be told; it inherits that
            for signum in _SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    signal.signal(signum, self._on_signal)
            self._connection, theirs = socket.socketpair()
            self._stderr, write_end = _pipe_or_terminal()
            self._child = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                stderr=write_end,
                pass_fds=[theirs.fileno()],
                env=os.environ | {_CONNECTION: str(theirs.fileno())},
            )
            theirs.close()
            os.close(write_end)

    def _on_signal(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        name = signal.Signals(signum).name
        if self._saves and self._first_signal is None:
            self._first_signal = now
            _print(f"{name} received: all processes save and stop; again to stop now")
            with contextlib.suppress(OSError):  # it has ended
                self._connection.sendall(f"{name}\n".encode())
            self._child.send_signal(signal.SIGTERM)
        elif not self._saves or now - (self._first_signal or now) > _SAME_SIGNAL:
            self._killed_by = signum
            self._child.kill()

    def status(self) -> int:
        """Waits for the end of the child, and returns the status to exit with."""
        sources = [self._connection.fileno(), self._stderr]
        while True:
            if not sources:  # it has closed all, so it is about to end
                self._child.wait()
            ended = self._child.poll() is not None  # asked first: then all is there
            ready = select.select(sources, [], [], 0 if ended else 0.5)[0]
            if self._connection.fileno() in ready and not self._hear():
                sources.remove(self._connection.fileno())
            if self._stderr in ready:
                text = _read(self._stderr)
                if not text:
                    sources.remove(self._stderr)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._child.wait(1)  # its end follows at once
                elif not _print_bytes(self._page.passed(text)):
                    os.close(self._stderr)  # nobody reads: the child is to notice
                    sources.remove(self._stderr)
            elif ended:
                break
            _print_bytes(self._page.released())
        return self._explained(self._child.returncode)

    def _hear(self) -> bytes:
        """Receives what the child says of itself; nothing more if it has ended."""
        try:
            more = self._connection.recv(1 << 16)
        except ConnectionError:
            return b""
        self._heard += more
        if self._heard.endswith(b"\n"):
            known = json.loads(self._heard)
            self._index, self._hosts = known["index"], known["hosts"]
        return more

    def _explained(self, status: int) -> int:
        me = process_name(self._index, self._hosts)
        lost = self._page.lost(self._hosts) if status == -signal.SIGABRT else None
        if lost:
            _print(
                f"{lost}, so {me} ends too. Start all processes again: the run goes "
                "on from its last checkpoint."
            )
            return 1
        _print_bytes(self._page.held)
        if self._killed_by:
            return 128 + self._killed_by
        if status < 0:
            _print(f"{me[0].upper()}{me[1:]} was killed by {_signal_name(-status)}.")
            return 128 - status
        return status


class OutputFilter:
    """What a child prints, without the page of text with which JAX ends it.

    Attributes:
      held: the beginning of that page, or what looks like it.
    """

    def __init__(self) -> None:
        self.held = b""
        self._since = 0.0
        self._begins_line = True  # what comes next

    def passed(self, text: bytes) -> bytes:
        """Returns what can be printed of the text; the rest is held."""
        if not self.held:
            self._since = time.monotonic()
        text = self.held + text
        begin = 0 if self._begins_line else 1
        found = _PAGE.search(text, begin) or _PART.search(text, begin)
        end = found.start() if found else len(text)
        if end:
            self._begins_line = text[end - 1 : end] == b"\n"
        self.held = text[end:]
        return text[:end]

    def released(self) -> bytes:
        """Returns what was held, and did not become the page."""
        text = self.held
        waits = time.monotonic() - self._since < _PATIENCE
        if not text or waits or _FATAL in text:
            return b""
        self.held, self._begins_line = b"", text.endswith(b"\n")
        return text

    def lost(self, hosts: Sequence[str]) -> str | None:
        """Says which processes are lost by what JAX says, or None if it does not.

        Args:
          hosts: names of the hosts of all processes, as far as they are known.
        """
        if _FATAL not in self.held:
            return None
        text = self.held[self.held.index(_FATAL) :].decode(errors="replace")
        if found := re.search(r"stopped sending heartbeats\):\n((?:.*\d+\n)+)", text):
            numbers = re.findall(r"(\d+)$", found[1], re.MULTILINE)
            processes = [process_name(int(number), hosts) for number in numbers]
            who = " and ".join(processes)
            return f"{who[0].upper()}{who[1:]} stopped answering"
        first = process_name(0, hosts)
        if "Failed to send RPC to coordination service" in text:
            return f"{first[0].upper()}{first[1:]} has ended, or cannot be reached"
        if "CoordinationService/Heartbeat" in text and "DEADLINE_EXCEEDED" in text:
            return f"{first[0].upper()}{first[1:]} stopped answering"
        return None


# JAX's last line before it ends a process, and those that may come just before it.
_FATAL = b"Terminating process because the JAX distributed service detected fatal"
_PAGE = re.compile(
    rb"^[WEF]\d{4} \S+ +\d+ (?:coordination_service|preemption_sync|client\.h)",
    re.MULTILINE,
)
# The beginning of such a line, at the end of the text.
_PART = re.compile(rb"^[WEF](?:\d{0,4}|\d{4} [\d:. ]*[a-z_.]*)\Z", re.MULTILINE)


def process_name(index: int | None, hosts: Sequence[str]) -> str:
    """Names a process by its number and its host, as far as they are known."""
    if index is None:
        return "this process"
    host = f" on {hosts[index]}" if index < len(hosts) else ""
    return f"process {index}{host}"


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pipe_or_terminal() -> tuple[int, int]:
    """Returns two descriptors: what is written to the second is read from the first.

    If stderr is a terminal, the second is one too: the child draws its progress bar.
    """
    if not os.isatty(2):
        return os.pipe()
    read_end, write_end = os.openpty()
    modes = termios.tcgetattr(write_end)
    modes[1] &= ~termios.OPOST  # the real one ends lines
    termios.tcsetattr(write_end, termios.TCSANOW, modes)
    termios.tcsetwinsize(write_end, termios.tcgetwinsize(2))
    return read_end, write_end


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # a terminal that nobody writes to any more
        return b""


def _print(line: str) -> None:
    _print_bytes(f"{line}\n".encode())


def _print_bytes(text: bytes) -> bool:
    """Writes to stderr, and returns whether somebody reads it."""
    try:
        while text:
            text = text[os.write(2, text) :]
    except BrokenPipeError:
        return False
    return True
