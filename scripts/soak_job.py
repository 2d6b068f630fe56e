"""The real processes of one run, for `soak.py`, and what their folder must hold."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlp_mixer import goodput, metrics

ROOT = pathlib.Path(__file__).parents[1]
TOTAL_STEPS = 60
KEEP_LATEST = 3
RECIPE = {
    "mesh.data": -1,
    "sharding": "fsdp",
    "batch_size": 24,
    "total_steps": TOTAL_STEPS,
    "log_every_steps": 1,
    "evals.test.every_steps": 12,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_latest": KEEP_LATEST,
    "optim.warmup_steps": 10,
    "model.num_blocks": 1,
    "model.hidden_dim": 16,
    "model.tokens_mlp_dim": 8,
    "model.channels_mlp_dim": 32,
    "model.stochastic_depth": 0.1,
}
FIELDS = [f"--config.{name}={value}" for name, value in RECIPE.items()]
HEARTBEAT_SECONDS = 20
JOIN_SECONDS = 40
# Beyond those, how long processes may take to end on a busy machine.
END_SECONDS = 60.0
# By how much the times of the records may exceed what the processes took, of which
# those that a kill cost are an estimate: a share, and seconds for each start.
EXCESS_SHARE, EXCESS_SECONDS = 0.02, 1.0


class ViolationError(Exception):
    """A promise of the project is broken."""


class Job:
    """One run in its folder, started again and again.

    Args:
      workdir: folder of the run.
      data_dir: folder of data sets.
      logs: folder for what the processes print; made here.
    """

    def __init__(
        self, workdir: pathlib.Path, data_dir: pathlib.Path, logs: pathlib.Path
    ):
        self.workdir = workdir
        self.starts = 0
        self.seconds = 0.0  # that the starts took whose end was waited for
        self._logs = logs
        logs.mkdir(parents=True)
        self._command = [
            *(sys.executable, "-m", "mlp_mixer.train", "--config=configs/digits.py"),
            *(*FIELDS, f"--workdir={workdir}", f"--data_dir={data_dir}"),
            f"--compilation_cache={data_dir}/compiled",
        ]
        # Every process that comes from this job has it in its environment.
        self._mark = f"SOAK_JOB={uuid.uuid4().hex}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._began = 0.0

    def start(self, count: int, variables: Mapping[str, str] | None = None) -> None:
        """Starts so many processes of the run; one alone has two devices."""
        self.starts += 1
        self._began = time.monotonic()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._processes = []
        for index in range(count):
            place = [
                f"--distributed=localhost:{port},{index},{count}",
                f"--heartbeat_timeout_seconds={HEARTBEAT_SECONDS}",
                f"--join_timeout_seconds={JOIN_SECONDS}",
            ]
            self._processes.append(
                self.start_one(
                    place if count > 1 else [],
                    self.log(index),
                    {"JAX_NUM_CPU_DEVICES": str(2 if count == 1 else 1)}
                    | {"SOAK_INDEX": str(index)}
                    | dict(variables or {}),
                )
            )

    def start_one(
        self, arguments: Sequence[str], log: pathlib.Path, variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts one process of the command, whose output goes to `log`."""
        paths = [str(ROOT / "scripts" / "soak_child"), str(ROOT)]
        name, _, value = self._mark.partition("=")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(paths),
            name: value,
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                [*self._command, *arguments],
                cwd=self._logs,
                env=environment | dict(variables),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def log(self, index: int | str) -> pathlib.Path:
        """Where a process of the newest start prints."""
        return self._logs / f"start_{self.starts:03d}_process_{index}.txt"

    def output(self) -> str:
        """What the processes of the newest start have printed."""
        logs = [self.log(index) for index in range(len(self._processes))]
        return "".join(log.read_text(errors="replace") for log in logs)

    def is_alive(self) -> bool:
        """Whether a process of the newest start has not ended."""
        return any(process.poll() is None for process in self._processes)

    def statuses(self) -> list[int | None]:
        """The exit statuses of the newest start; None of a process that runs."""
        return [process.poll() for process in self._processes]

    def count(self) -> int:
        """The number of processes of the newest start."""
        return len(self._processes)

    def pids(self, index: int | None = None) -> list[int]:
        """What lives of a process of the run, or of all, with its own children."""
        found = []
        marks = {self._mark} | ({f"SOAK_INDEX={index}"} if index is not None else set())
        for folder in pathlib.Path("/proc").iterdir():
            if folder.name.isdigit():
                # It may end meanwhile, or be another user's.
                with contextlib.suppress(OSError):
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    if marks <= {v.decode(errors="replace") for v in variables}:
                        found.append(int(folder.name))
        return sorted(found)

    def started_pid(self, index: int) -> int:
        """The process that was started as number `index`, without its children."""
        return self._processes[index].pid

    def send(self, signum: signal.Signals, pids: Sequence[int]) -> None:
        """Sends a signal to processes, of which some may have ended."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def wait(self, seconds: float) -> list[int]:
        """Waits for the end of all processes and returns their exit statuses.

        Raises:
          ViolationError: one is still there after so many seconds.
        """
        until = time.monotonic() + seconds
        while self.is_alive() or self.pids():
            if time.monotonic() > until:
                raise ViolationError(
                    f"After {seconds:g} seconds these processes have not ended: "
                    f"{self.pids()}; exit statuses: {self.statuses()}."
                )
            time.sleep(0.05)
        self.seconds += time.monotonic() - self._began
        self._began = time.monotonic()
        return [process.wait() for process in self._processes]

    def end(self) -> None:
        """Kills what is left."""
        while pids := self.pids():
            self.send(signal.SIGKILL, pids)
            for process in self._processes:
                process.wait()

    def step(self) -> int:
        """The newest step in the records, 0 if there is none."""
        try:
            with (self.workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                found = re.findall(rb'^\{"step": (\d+),', file.read(), re.M)
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def restored_step(self) -> int | None:
        """The step from which the newest start goes on, None as long as it is open."""
        found = re.search(r"parameters, from step (\d+) to", self.output())
        return int(found[1]) if found else None


# --- What the folder must hold --------------------------------------------------------


class Ledger:
    """Remembers which checkpoints are intact, and looks whether any is lost.

    Attributes:
      intact: step → digest of the checkpoints that the run must keep.
      harmed: steps of the checkpoints that a fault has damaged.
    """

    def __init__(self, workdir: pathlib.Path):
        self.intact: dict[int, str] = {}
        self.harmed: set[int] = set()
        self._folder = workdir / "checkpoints"
        self._aside: set[str] = set()

    def folders(self) -> dict[int, pathlib.Path]:
        """step → folder of the checkpoints that have their name."""
        found = self._folder.iterdir() if self._folder.exists() else ()
        return {int(p.name): p for p in found if re.fullmatch(r"\d{8}", p.name)}

    def check_kept(self) -> None:
        """Looks at the folder, in which no process works.

        Raises:
          ViolationError: a checkpoint is gone, or another, that no fault has damaged
            and that the newest ones do not replace; or one was set aside unharmed.
        """
        folders = self.folders()
        for step, known in self.intact.items():
            newer = [other for other in folders if other > step]
            if len(newer) < KEEP_LATEST and (
                step not in folders or digest(folders[step]) != known
            ):
                raise ViolationError(
                    f"The intact checkpoint {step} is lost; there are "
                    f"{sorted(folders)}."
                )
        aside = {p.name: p for p in self._folder.glob("damaged-*")}
        for name in aside.keys() - self._aside:
            if digest(aside[name]) in self.intact.values():
                raise ViolationError(f"An intact checkpoint was set aside as {name}.")
        self._aside = {*aside}
        unharmed = sorted(folders.keys() - self.harmed)[-KEEP_LATEST:]
        self.intact = {step: digest(folders[step]) for step in unharmed}

    def check_restored(self, step: int) -> None:
        """Checks the step from which a start goes on.

        Raises:
          ViolationError: a newer checkpoint is intact.
        """
        newest = max(self.intact, default=0)
        if step < newest:
            raise ViolationError(
                f"A start went on from step {step}, but checkpoint {newest} is intact."
            )
        # Damaged ones after it are set aside; damage of what was read did no harm.
        self.harmed = {other for other in self.harmed if other < step}


def digest(folder: pathlib.Path) -> str:
    """A checksum of the files of a checkpoint, but for metrics that come later."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name != "added_metrics.json":
            total.update(str(path.relative_to(folder)).encode())
            total.update(path.read_bytes())
    return total.hexdigest()


# --- Records --------------------------------------------------------------------------


def records_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run without times, which no two runs share."""
    told = [
        {k: v for k, v in r.items() if not goodput.is_time(k)} for r in _read(workdir)
    ]
    return [record for record in told if record.keys() != {"step"}]


def _read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return metrics.read(workdir)
    except ValueError as error:
        raise ViolationError(f"The records are damaged: {error}") from error


def check_times(workdir: pathlib.Path, job: Job) -> None:
    """Compares the times that the records tell with those of the processes.

    Raises:
      ViolationError: one is negative, or they are more than the processes took.
    """
    seconds = goodput.sums(_read(workdir))
    seconds.pop("not_running", None)
    told, most = sum(seconds.values()), job.seconds * (1 + EXCESS_SHARE)
    if (
        min(seconds.values(), default=0) < 0
        or told > most + job.starts * EXCESS_SECONDS
    ):
        raise ViolationError(
            f"The processes took {job.seconds:.1f} seconds in {job.starts} starts, "
            f"but the records tell {told:.1f}: {seconds}."
        )


def check_records(
    mine: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    tolerance: float,
) -> None:
    """Compares the records of two runs.

    Args:
      mine: records of the run that was broken.
      reference: records of the uninterrupted run.
      tolerance: largest difference of a value; 0 if all bits are the same.

    Raises:
      ViolationError: a record is missing, is there twice, or has other values.
    """
    for ours, theirs in zip(mine, reference, strict=False):
        if ours["step"] == theirs["step"] and ours.keys() == theirs.keys():
            wrong = [k for k in ours if abs(ours[k] - theirs[k]) > tolerance]
            if not wrong and all(map(math.isfinite, ours.values())):
                continue
        raise ViolationError(
            f"The records differ:\n  {json.dumps(ours)}\nof the uninterrupted run:\n"
            f"  {json.dumps(theirs)}"
        )
    if len(mine) != len(reference):
        raise ViolationError(
            f"There are {len(mine)} records, of the uninterrupted run {len(reference)}."
        )


def until_step(records: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The records before a step, of which none may be missing once it is saved."""
    return [record for record in records if record["step"] < step]


@contextlib.contextmanager
def ended_at_last(job: Job) -> Iterator[None]:
    """Kills what is left of a job when the block ends."""
    try:
        yield
    finally:
        job.end()
