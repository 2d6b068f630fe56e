"""Several processes find one another before JAX joins them, and say who is missing.

Process 0 listens where JAX will, the others call it. When all are there, each learns
the hosts of all, and the port is JAX's. JAX itself would wait without a word.
"""

import contextlib
import json
import socket
import time
from multiprocessing import connection
from typing import Any

_AGAIN = 0.5  # seconds between two calls of process 0
_NEWS = 5.0  # seconds between two messages to those that are there
_MOST = 1 << 20  # bytes of a line; more is not from one of us
_NAMED = 10  # processes in a message


class RollCall:
    """Who of the processes of one run is there.

    Args:
      host: name or address of the host of process 0.
      port: port there, on which JAX will listen.
      index: number of this process.
      count: number of processes.

    Attributes:
      missing: names of the processes that are not there yet, as far as this one knows.
    """

    def __init__(self, host: str, port: int, index: int, count: int):
        self._host, self._port = host.strip("[]"), port
        self._index, self._count = index, count
        self._my_host = socket.gethostname()
        first = f"process 0 at {host}:{port}"
        self.missing = first if index else _process_names(range(1, count), count)

    def call(self) -> list[str]:
        """Waits until all processes are there, and returns their hosts.

        Raises:
          ValueError: this process is not one that process 0 waits for.
          OSError: process 0 cannot listen on the port.
        """
        return self._wait_for_0() if self._index else self._wait_for_others()

    def _wait_for_others(self) -> list[str]:
        there: dict[int, tuple[socket.socket, str]] = {}
        asked: set[int] = set()
        ready: set[int] = set()
        told = time.monotonic()
        with contextlib.ExitStack() as opened:
            server = opened.enter_context(_listen(self._port))
            while len(ready) < self._count - 1:
                callers = [caller for caller, _ in there.values()]
                for heard in connection.wait([server, *callers], _NEWS):
                    if heard is server:
                        caller = opened.enter_context(server.accept()[0])
                        self._enrol(caller, there)
                        continue
                    index = next(i for i, (x, _) in there.items() if x is heard)
                    try:
                        _receive(there[index][0])
                        ready.add(index)
                    except (OSError, ValueError):  # it has ended
                        for group in (ready, asked):
                            group.discard(index)
                        there.pop(index)
                all_called = len(there) == self._count - 1
                # One that called early may have been stopped meanwhile.
                for index in (there.keys() - asked) if all_called else ():
                    _send(there[index][0], ready=True)
                    asked.add(index)
                present = ready if all_called else there.keys()
                self.missing = _process_names(
                    sorted({*range(1, self._count)} - present), self._count
                )
                if time.monotonic() - told > _NEWS:
                    told = time.monotonic()
                    for caller, _ in there.values():
                        _send(caller, missing=self.missing)
            hosts = [self._my_host, *(there[index][1] for index in sorted(there))]
            for caller, _ in there.values():
                _send(caller, hosts=hosts)
            # Who hangs up first keeps the port busy for a while: not this process.
            for caller, _ in there.values():
                caller.settimeout(_AGAIN)
                with contextlib.suppress(OSError):
                    caller.recv(1)
        return hosts

    def _enrol(
        self, caller: socket.socket, there: dict[int, tuple[socket.socket, str]]
    ) -> None:
        """Adds a caller to those that are there, if it is one of this run."""
        caller.settimeout(2)
        try:
            message = _receive(caller)
            index, count = message["index"], message["count"]
            host = str(message["host"])
        except (OSError, ValueError, TypeError, KeyError):
            caller.close()  # somebody else
            return
        wrong = ""
        if count != self._count:
            wrong = f"process 0 on {self._my_host} is one of {self._count}"
        elif index in there:
            wrong = f"process {index} is there already, on {there[index][1]}"
        if wrong:
            _send(caller, wrong=wrong)
            caller.close()
        else:
            there[index] = caller, host

    def _wait_for_0(self) -> list[str]:
        first = self.missing
        while True:
            # Process 0 is not there yet, has ended, or is still another program.
            with contextlib.suppress(OSError, ValueError):
                message = self._answer()
                if "wrong" in message:
                    break
                return message["hosts"]
            self.missing = first
            time.sleep(_AGAIN)
        raise ValueError(
            f"This is process {self._index} of {self._count}, but {message['wrong']}; "
            "all need the same --distributed but for the INDEX."
        )

    def _answer(self) -> dict[str, Any]:
        """Calls process 0, and returns the last thing that it says."""
        with socket.create_connection((self._host, self._port), timeout=5) as caller:
            if caller.getsockname() == caller.getpeername():
                raise ConnectionError("nobody listens, and the call reached itself")
            _send(caller, index=self._index, count=self._count, host=self._my_host)
            caller.settimeout(None)
            message: dict[str, Any] = {}
            while not {"hosts", "wrong"} & message.keys():
                message = _receive(caller)
                if "ready" in message:
                    _send(caller, ready=True)
                self.missing = message.get("missing", self.missing)
            return message


def _process_names(numbers: range | list[int], count: int) -> str:
    several = "es" * (len(numbers) > 1)
    more = f" and {len(numbers) - _NAMED} more" * (len(numbers) > _NAMED)
    return f"process{several} {', '.join(map(str, numbers[:_NAMED]))}{more} of {count}"


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _send(caller: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):  # who has hung up is noticed when it is heard
        caller.sendall(json.dumps(message).encode() + b"\n")


def _receive(caller: socket.socket) -> dict[str, Any]:
    """Receives a line; byte by byte, since what follows it is another one."""
    line = b""
    while not line.endswith(b"\n"):
        byte = caller.recv(1)
        if not byte:
            raise ConnectionError("it has hung up")
        line += byte
        if len(line) > _MOST:
            raise ValueError("it sends no line of ours")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("it sends no message of ours")
    return message
