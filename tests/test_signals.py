"""When a run stops before its last step."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from set_up import run_pair

from mlp_mixer import metrics, signals, supervisor

RUN = [
    "--config=configs/digits.py",
    "--config.mesh.data=-1",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=100000",
]


@pytest.mark.slow
def test_a_process_knows_how_long_it_runs():
    """Imports included: the limit of a queue counts them too."""
    script = """
import time
began = time.time()
time.sleep(1)
from mlp_mixer import signals
print(began, time.time() - signals.seconds_since_start())
"""
    before = time.time()
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, timeout=60
    ).stdout
    began, started = map(float, printed.split())
    assert before - 0.1 < started < began + 0.1


def test_a_process_with_a_supervisor_began_with_it(monkeypatch):
    alone = signals.seconds_since_start()
    monkeypatch.setattr(supervisor, "process_id", os.getppid)
    assert signals.seconds_since_start() > alone


def test_the_time_that_is_over_asks_to_stop(caplog):
    now = signals.seconds_since_start()
    flag, late = signals.StopFlag(now + 0.2), signals.StopFlag(now + 1000)
    assert not flag.requested(6)
    time.sleep(0.25)
    assert flag.requested(7)
    assert flag.requested(8)
    assert not late.requested(8)
    assert caplog.text.count("is over: saving and stopping after step 7") == 1


def arguments(folder, data_dir, *more):
    return [*RUN, *more, f"--data_dir={data_dir}", f"--workdir={folder}"]


@pytest.mark.slow
def test_two_processes_stop_when_the_time_of_the_first_is_over(
    program, tmp_path, data_dir
):
    """At the same step, with the status that lets a job script start them again."""
    run = arguments(tmp_path, data_dir)
    codes, said = run_pair(
        program, "train", [[*run, "--stop_after=10s"], [*run, "--stop_after=1h"]]
    )
    assert codes == [os.EX_TEMPFAIL] * 2, "\n".join(said)
    (saved,) = os.listdir(tmp_path / "checkpoints")
    for text in said:
        assert re.search(r"Process 0 \(.*\): the time of --stop_after is over\n", text)
        assert f"All processes save and stop after step {int(saved)}\n" in text


@pytest.mark.slow
def test_a_limit_of_time_tells_by_the_status_whether_steps_are_left(
    program, tmp_path, data_dir
):
    run = arguments(tmp_path / "run", data_dir, "--stop_after=1h")
    process = program("train", *run)
    while not metrics.read(tmp_path / "run"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL, said
    few = ["--config.total_steps=2", "--config.optim.warmup_steps=0"]
    short = arguments(tmp_path / "short", data_dir, *few, "--stop_after=1h")
    process = program("train", *short)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
