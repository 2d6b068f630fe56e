"""Several processes find one another; here threads."""

import concurrent.futures
import socket
import threading
import time

import pytest
from set_up import free_port

from mlp_mixer import joining


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def roll(monkeypatch, port):
    """roll(index, count): (the roll, what its call will return)."""
    monkeypatch.setattr(joining, "_AGAIN", 0.02)
    monkeypatch.setattr(joining, "_NEWS", 0.05)

    def call(index, count=3):
        one = joining.RollCall("localhost", port, index, count)
        hosts: concurrent.futures.Future[list[str]] = concurrent.futures.Future()

        def wait():
            try:
                hosts.set_result(one.call())
            except ValueError as error:
                hosts.set_exception(error)

        # What waits for ever must not keep the tests from their end.
        threading.Thread(target=wait, daemon=True).start()
        return one, hosts

    return call


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_each_process_learns_who_is_missing_and_at_last_the_hosts_of_all(roll, port):
    host = socket.gethostname()
    second, seconds = roll(2)
    time.sleep(0.1)
    assert second.missing == f"process 0 at localhost:{port}"
    first, firsts = roll(0)
    assert first.missing in ("processes 1, 2 of 3", "process 1 of 3")
    wait_until(lambda: first.missing == second.missing == "process 1 of 3")
    _, others = roll(1)
    for hosts in (firsts, seconds, others):
        assert hosts.result(10) == [host] * 3
    socket.create_server(("", port)).close()  # the port is free for JAX


def test_a_process_that_ends_meanwhile_is_missing_again(roll, port):
    first, hosts = roll(0)
    wait_until(lambda: _is_open(port))
    with socket.create_connection(("localhost", port)) as caller:
        joining._send(caller, index=1, count=3, host="here")
        wait_until(lambda: first.missing == "process 2 of 3")
    wait_until(lambda: first.missing == "processes 1, 2 of 3")
    for index in (1, 2):
        roll(index)
    assert len(hosts.result(10)) == 3


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (1, 3, "process 1 is there already, on here"),
        (1, 2, "process 0 on .* is one of 3"),
    ],
)
def test_a_process_that_is_none_of_them_is_told_why(roll, port, index, count, message):
    first, hosts = roll(0)
    wait_until(lambda: _is_open(port))
    with socket.create_connection(("localhost", port)) as caller:
        joining._send(caller, index=1, count=3, host="here")
        wait_until(lambda: first.missing == "process 2 of 3")
        _, refused = roll(index, count)
        with pytest.raises(ValueError, match=message):
            refused.result(10)
        roll(2)
        joining._send(caller, ready=True)
        assert hosts.result(10)[1] == "here"


def test_a_process_that_called_and_was_stopped_is_missing_until_it_answers(roll, port):
    first, hosts = roll(0)
    wait_until(lambda: _is_open(port))
    with socket.create_connection(("localhost", port)) as caller:
        joining._send(caller, index=2, count=3, host="here")
        wait_until(lambda: first.missing == "process 1 of 3")
        second, _ = roll(1)
        wait_until(lambda: first.missing == second.missing == "process 2 of 3")
        assert not hosts.done()
        joining._send(caller, ready=True)
        assert hosts.result(10)[2] == "here"


@pytest.mark.parametrize(
    "text", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b"\xff\n", b"", b"1" * 100]
)
def test_another_program_that_calls_disturbs_nothing(roll, port, text):
    first, hosts = roll(0, 2)
    wait_until(lambda: _is_open(port))
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(text)
    assert first.missing == "process 1 of 2"
    roll(1, 2)
    assert len(hosts.result(10)) == 2


def _is_open(port):
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


def test_many_missing_processes_are_counted():
    roll = joining.RollCall("localhost", 1, 0, 100)
    assert roll.missing == "processes 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 89 more of 100"
