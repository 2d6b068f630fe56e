"""Slurm without Slurm: `srun` that starts real processes, and `scontrol requeue`."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(
        command,
        env=os.environ
        | {{
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
        }},
    )
    for index in range(count)
]

def forward(signum, frame):
    for task in tasks:
        task.send_signal(signum)

signal.signal(signal.SIGTERM, forward)
# The greatest exit status, as Slurm's; 128 and the signal of a killed task.
sys.exit(max(code if code >= 0 else 128 - code for code in [t.wait() for t in tasks]))
"""
SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$2" >> "$FAKE_SLURM/requeued"
"""


class FakeSlurm:
    """Runs a batch script as one job, with so many tasks on this machine.

    Args:
      folder: an empty folder, for the programs.
      tasks: number of tasks.
    """

    def __init__(self, folder: pathlib.Path, tasks: int):
        self._folder, self._tasks = folder, tasks
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = folder / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, script, *arguments, cwd, **variables):
        """Starts the job's script; with variables of the environment."""
        environment = os.environ | {
            "PATH": f"{self._folder}/bin{os.pathsep}{os.environ['PATH']}",
            "FAKE_SLURM": str(self._folder),
            "SLURM_JOB_ID": str(_job_with_a_free_port()),
            "SLURM_NTASKS": str(self._tasks),
            "SLURM_GPUS_ON_NODE": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "VENV": sys.prefix,
        }
        return subprocess.Popen(
            ["bash", script, *arguments],
            cwd=cwd,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def requeued(self):
        """How often the job was put back into the queue."""
        path = self._folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


def _job_with_a_free_port():
    """A number of a job: JAX makes a port of it."""
    for number in range(os.getpid() % 2**12, 2**14):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", number % 2**12 + 61440)):
                return number
    raise RuntimeError("no port is free")


def kill_all(process):
    """Kills a job with all its tasks."""
    os.killpg(process.pid, signal.SIGKILL)
