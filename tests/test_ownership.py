"""One process at a time trains in a run's folder."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath
from set_up import contents

from mlp_mixer import ownership, runs


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("name", "has_locks"),
    [("run", True), ("lr=[0.1] ü*", True), ("a\\b?", True), ("lr=[0.1] ü*", False)],
)
def test_a_second_owner_is_told_of_the_first_and_changes_nothing(
    tmp_path, monkeypatch, name, has_locks
):
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # a process that is alive
    with ownership.owned(tmp_path / name):
        if not has_locks:
            monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
        before = contents(tmp_path)
        with (
            pytest.raises(ownership.OwnedError) as caught,
            ownership.owned(tmp_path / name),
        ):
            pass
        assert contents(tmp_path) == before
    said = str(caught.value)
    assert str(tmp_path / name) in said
    assert f"on {socket.gethostname()}, since 20" in said
    assert "pytest" in said
    assert "--workdir" in said
    assert "--distributed" not in said
    assert ("remove" in said) == (not has_locks)
    with ownership.owned(tmp_path / name):  # free again
        pass
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("what", ["removed", "renamed", "taken", "its file removed"])
def test_an_owner_notices_that_its_folder_is_not_its_own_any_more(tmp_path, what):
    folder = tmp_path / "lr=[0.1] ü*"
    with contextlib.ExitStack() as second, ownership.owned(folder) as check:
        check()
        if what == "its file removed":
            (folder / ownership.FILE).unlink()
        else:
            folder.rename(tmp_path / "aside")
            if what == "taken":
                second.enter_context(ownership.owned(folder))
            elif what == "removed":
                shutil.rmtree(tmp_path / "aside")
        before = contents(tmp_path)
        with pytest.raises(ownership.OwnedError, match="not this run's any more"):
            check()
        assert contents(tmp_path) == before


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_of_one_job_are_told_how_to_be_one_run(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with ownership.owned(tmp_path):
        with (
            pytest.raises(ownership.OwnedError, match="--distributed=auto"),
            ownership.owned(tmp_path),
        ):
            pass
        monkeypatch.setenv(variable, "1")
        with (
            pytest.raises(ownership.OwnedError) as caught,
            ownership.owned(tmp_path),
        ):
            pass
        assert "--distributed" not in str(caught.value)


OWNER = """
import os, sys, time
from mlp_mixer import ownership
with ownership.owned(sys.argv[1]):
    alone = sys.argv[2] == "alone"
    child = alone or os.fork() == 0
    if child:  # the child speaks for both: it has let go of the lock by then
        print("owns", 0 if alone else os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("company", ["alone", "forked"])
def test_a_killed_owner_owns_nothing_and_neither_do_its_children(tmp_path, company):
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER, tmp_path, company],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    _, child = owner.stdout.readline().split()
    with (
        pytest.raises(ownership.OwnedError, match=f"process {owner.pid} on"),
        ownership.owned(tmp_path),
    ):
        pass
    owner.kill()
    owner.wait()
    with ownership.owned(tmp_path):
        pass
    if int(child):
        os.kill(int(child), signal.SIGKILL)  # it was there until now
    owner.stdout.close()


@pytest.mark.parametrize(
    ("there", "is_taken"),
    [
        ({"host": "elsewhere", "process": 7}, True),
        ({"host": socket.gethostname(), "process": 1}, True),
        ({"host": socket.gethostname(), "process": 2**22 + 1}, False),
        ({"host": socket.gethostname(), "process": "odd"}, True),
        (["odd"], False),
    ],
)
def test_without_locks_a_file_owns_until_its_process_is_known_to_be_gone(
    tmp_path, monkeypatch, there, is_taken
):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    path = tmp_path / ownership.FILE
    path.write_text(json.dumps(there))
    if is_taken:
        with (
            pytest.raises(ownership.OwnedError, match=r"remove .*owner\.json"),
            ownership.owned(tmp_path),
        ):
            pass
        assert json.loads(path.read_text()) == there
    else:
        with ownership.owned(tmp_path):
            assert json.loads(path.read_text())["process"] == os.getpid()
        assert not path.exists()


@pytest.fixture
def impatient(monkeypatch):
    """No locks, and every second of theirs is a hundredth."""
    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(ownership, "_RENEWED_EVERY", 0.05)
    monkeypatch.setattr(ownership, "_ABANDONED_AFTER", 1.2)


def test_without_locks_an_owner_elsewhere_that_is_not_renewed_has_ended(
    tmp_path, impatient, caplog
):
    path = epath.Path(tmp_path / ownership.FILE)
    path.write_text(json.dumps({"host": "elsewhere", "token": "a", "renewed": 3}))
    with ownership.owned(tmp_path) as check_kept:
        assert "elsewhere trains there; waiting" in caplog.text
        assert "run on elsewhere has ended. Taking its folder" in caplog.text
        # And this one is renewed, until another has taken the folder.
        renewals: set[int | None] = set()
        while len(renewals) < 3:
            renewals.add(ownership._read(path).get("renewed"))
            check_kept()
        path.write_text(json.dumps({"host": "elsewhere", "token": "b"}))
        time.sleep(0.2)
        assert ownership._read(path)["token"] == "b"
        with pytest.raises(ownership.OwnedError, match="another process's"):
            check_kept()
    assert path.exists()


def test_without_locks_an_owner_elsewhere_that_is_renewed_keeps_its_folder(
    tmp_path, impatient, monkeypatch
):
    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
            stack.enter_context(ownership.owned(tmp_path))
        with (
            pytest.raises(ownership.OwnedError, match="on elsewhere"),
            ownership.owned(tmp_path),
        ):
            pass
    assert contents(tmp_path) == {}


def test_weights_are_not_written_into_a_run_that_begins(weights, tmp_path):
    with ownership.owned(tmp_path), pytest.raises(ownership.OwnedError):
        runs.write_run(weights, tmp_path)
    assert contents(tmp_path) == {}
    runs.write_run(weights, tmp_path)
    assert runs.open_model(tmp_path).step == 0
