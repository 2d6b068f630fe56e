"""One of two real processes is killed, stopped or told to stop: what the other does."""

import os
import pathlib
import re
import signal
import socket
import time

import pytest
from set_up import free_port

from mlp_mixer import metrics

HEARTBEAT = 8  # seconds
RUN = [
    "--config=configs/digits.py",
    "--config.mesh.data=-1",
    "--config.log_every_steps=1",
    "--config.evals.test.batch_size=2",
    f"--heartbeat_timeout_seconds={HEARTBEAT}",
]
# Settings with which a run is soon, and for long, in the moment of this name.
MOMENTS = {
    "compilation": [],
    "training": [],
    "evaluation": ["--config.evals.test.every_steps=3"],
    "a save": ["--config.checkpoint.every_steps=1"],
}


@pytest.fixture
def start(program, tmp_path, data_dir):
    """start(index, moment): one of two processes of a run in tmp_path."""
    port = free_port()

    def begin(index, moment="training"):
        return program(
            "train",
            *(*RUN, *MOMENTS[moment], f"--data_dir={data_dir}"),
            *(f"--workdir={tmp_path}", f"--distributed=localhost:{port},{index},2"),
            devices=1,
        )

    return begin


def wait_for(moment, folder, process):
    reached = {
        "compilation": lambda: (folder / "checkpoints").exists(),
        "training": lambda: len(metrics.read(folder)) >= 5,
        "evaluation": lambda: len(metrics.read(folder)) >= 3,
        "a save": lambda: len(metrics.read(folder)) >= 3,
    }[moment]
    until = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def children(process):
    """Numbers of the processes that it has started."""
    stats = (path.read_text() for path in pathlib.Path("/proc").glob("[0-9]*/stat"))
    fields = [(text.split()[0], text.rpartition(")")[2].split()[1]) for text in stats]
    return [int(number) for number, parent in fields if int(parent) == process.pid]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "signum", "moment"),
    [
        (0, signal.SIGKILL, "training"),
        (1, signal.SIGKILL, "training"),
        (0, signal.SIGSTOP, "training"),
        (1, signal.SIGSTOP, "evaluation"),
        (1, signal.SIGKILL, "compilation"),
    ],
)
def test_the_other_ends_in_time_with_one_line_that_names_who_is_lost(
    start, tmp_path, victim, signum, moment
):
    pair = [start(index, moment) for index in range(2)]
    wait_for(moment, tmp_path, pair[0])
    for number in children(pair[victim]) * (signum == signal.SIGSTOP):
        os.kill(number, signum)
    pair[victim].send_signal(signum)
    began = time.monotonic()
    said, _ = pair[1 - victim].communicate(timeout=HEARTBEAT + 60)
    assert time.monotonic() - began < HEARTBEAT + 20  # and some for a busy machine
    assert pair[1 - victim].returncode == 1, said
    host = socket.gethostname()
    lost = f"Process {victim} on {host} (has ended, or cannot be|stopped) "
    assert len(re.findall(lost, said)) == 1, said
    assert said.splitlines()[-1].startswith(f"Process {victim} on {host}")
    for noise in ("Traceback", "***", "absl::", "coordination"):
        assert noise not in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "moment"),
    [
        (1, "import"),
        (0, "joining"),
        (1, "compilation"),
        (0, "evaluation"),
        (1, "a save"),
    ],
)
def test_a_signal_to_one_stops_both_at_the_same_step_at_any_moment(
    start, tmp_path, index, moment
):
    during = moment if moment in MOMENTS else "training"
    told = start(index, during)
    if moment == "import":
        while not children(told):
            time.sleep(0.01)
        told.send_signal(signal.SIGTERM)
    elif moment == "joining":
        time.sleep(5)
        assert told.poll() is None
        told.send_signal(signal.SIGTERM)
    other = start(1 - index, during)
    if moment in MOMENTS:
        wait_for(moment, tmp_path, told)
        told.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=200)[0] for process in (told, other)]
    assert [told.returncode, other.returncode] == [0, 0], "\n".join(said)
    saved = max(os.listdir(tmp_path / "checkpoints"))
    name = rf"Process {index} \({socket.gethostname()}, process id {told.pid}\)"
    for text in said:
        assert re.search(f"{name}: received SIGTERM", text), text
        assert f"All processes save and stop after step {int(saved)}\n" in text
    if moment in ("import", "joining", "compilation"):
        assert int(saved) < 30
    if moment == "evaluation":
        assert saved == "00000003"
