"""Trains a tiny run in real processes, breaks it at random, and checks the result.

    python scripts/soak.py --minutes=10 --seed=0

In each round a small Mixer learns the digits for some steps, in one process with two
devices, in two processes, or in one or two, drawn for each start. Meanwhile faults
happen, a function of the seed but for their moment, to which the machine adds its own
chance. Whenever all processes have ended, no intact checkpoint may be lost, none may be
set aside unharmed, and the records up to the newest one must be there. Each start must
go on from the newest intact checkpoint. At the end parameters, moments and records must
be those of the uninterrupted run: the same bits, or, where the number of processes
changed, up to the order of float additions.

On a violation it exits with 1, keeps the folder, and says how to repeat the round. It
needs Linux.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import arguments
import jax
import numpy as np
import soak_job
import soak_round
from soak_job import Job, ViolationError

from mlp_mixer import checkpoint, experiment, recipe, sharding, workdir
from mlp_mixer.data import pipeline

# Name of a round → numbers of processes of which each start has one, and tolerances of
# records and of the state.
ROUNDS: dict[str, tuple[list[int], float, float]] = {
    "one process": ([1], 0, 0),
    "two processes": ([2], 0, 0),
    "one or two processes": ([1, 2], 0.05, 0.02),
}
DISK_BYTES = 48 * 2**20
_INSIDE = "SOAK_HAS_OWN_MOUNTS"


def enter_own_mounts() -> None:
    """Starts this program again where it may mount a disk, if the system allows that.

    What is mounted there is gone when the last process of it ends, however it ends.
    """
    enter = ["unshare", "--map-root-user", "--mount"]
    if _INSIDE in os.environ or not shutil.which(enter[0]):
        return
    if subprocess.run([*enter, "true"], capture_output=True).returncode == 0:
        os.environ[_INSIDE] = "1"
        os.execvp(enter[0], [*enter, sys.executable, *sys.argv])


def mount_disk(folder: pathlib.Path) -> soak_round.Disk:
    """Makes a folder for the runs, on a small disk of its own where that is allowed."""
    folder.mkdir()
    size = f"size={DISK_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    is_own = _INSIDE in os.environ and not subprocess.run(mount).returncode
    return soak_round.Disk(folder, is_own)


def state_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Path → array of the newest checkpoint of a run, all of its training state."""
    config = workdir.load(folder)
    mesh, total_steps = sharding.make_mesh(1), recipe.total_steps(config)
    example = pipeline.example(config.model.image_size)
    target = experiment.build(config, mesh, example, total_steps).target
    with checkpoint.Checkpointer(folder / "checkpoints", every_steps=1) as reader:
        state = reader.restore(target)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def check_states(
    mine: dict[str, np.ndarray], reference: dict[str, np.ndarray], tolerance: float
) -> None:
    """Raises ViolationError unless two states are equal, to an absolute tolerance."""
    for name, array in reference.items():
        if not np.allclose(mine[name], array, rtol=tolerance, atol=tolerance):
            difference = np.abs(mine[name] - array).max()
            raise ViolationError(f"{name} differs by up to {difference}.")


class Soak:
    """Rounds of one seed, in one folder.

    Args:
      folder: an empty folder.
      seed: seed of the faults.
    """

    def __init__(self, folder: pathlib.Path, seed: int):
        self.happened: collections.Counter[str] = collections.Counter()
        self.starts = 0
        self.rounds = 0
        self.next_fault = self.first_fault = 0
        self._folder, self._seed = folder, seed
        self._disk = mount_disk(folder / "disk")
        self._references: dict[int, tuple[list[dict], dict[str, np.ndarray]]] = {}

    def say(self, line: str) -> None:
        """Prints a line and keeps it."""
        line = f"{time.strftime('%H:%M:%S')}  {line}"
        print(line, flush=True)
        with (self._folder / "soak.txt").open("a") as file:
            file.write(f"{line}\n")

    def run(self, first_fault: int, first_round: int, minutes: float) -> None:
        """Does rounds until the time is up; the last one is trained to its end.

        Raises:
          ViolationError: a promise is broken.
        """
        until = time.monotonic() + 60 * minutes
        self.next_fault, self.rounds = first_fault, first_round
        disk = "a small disk of its own" if self._disk.is_own else "a limit of files"
        self.say(f"seed {self._seed}, in {self._folder}; full is {disk}")
        while time.monotonic() < until:
            self._do_round([*ROUNDS][self.rounds % len(ROUNDS)], until)
            self.rounds += 1

    def _do_round(self, name: str, until: float) -> None:
        counts, of_records, of_state = ROUNDS[name]
        records, state = self._reference(counts[0])
        self.first_fault = self.next_fault
        self.say(f"round {self.rounds}: {name}, from fault {self.first_fault}")
        with self._job(f"round_{self.rounds}") as job:
            trial = soak_round.Round(
                job, counts, records, of_records, self._disk, self.say
            )
            try:
                trial.run(self._deal(), until, self._count)
            finally:
                self.starts += job.starts
            check_states(state_of(job.workdir), state, of_state)
        self.say(
            f"round {self.rounds}: trained after {job.starts} starts, the same run"
        )
        shutil.rmtree(job.workdir)

    def _count(self, kind: str) -> None:
        self.happened[kind] += 1

    def _deal(self) -> Iterator[soak_round.Fault]:
        for fault in soak_round.faults(self._seed, self.next_fault):
            self.next_fault = fault.number + 1
            yield fault

    def _reference(self, count: int) -> tuple[list[dict], dict[str, np.ndarray]]:
        """Records and state of the uninterrupted run, which is trained at first use."""
        if count not in self._references:
            began = time.monotonic()
            with self._job(f"reference_{count}") as job:
                job.start(count)
                if any(job.wait(600)):
                    raise ViolationError(f"It fails without faults: {job.output()}")
            workdir = job.workdir
            self._references[count] = soak_job.records_of(workdir), state_of(workdir)
            seconds = time.monotonic() - began
            self.say(f"{count} process(es) without faults: {seconds:.0f} seconds")
        return self._references[count]

    @contextlib.contextmanager
    def _job(self, name: str) -> Iterator[Job]:
        folder, logs = self._disk.folder / name, self._folder / "output" / name
        job = Job(folder, self._folder / "data", logs)
        with soak_job.ended_at_last(job):
            yield job

    def table(self) -> str:
        """How often each fault has happened."""
        lines = [f"{self.happened[kind]:5}  {kind}" for kind in soak_round.KINDS]
        return "\n".join([*lines, f"{sum(self.happened.values()):5}  in all"])

    def copy_kept(self) -> None:
        """Copies the runs from a disk that will be gone to one that stays."""
        if self._disk.is_own:
            shutil.copytree(self._disk.folder, self._folder / "kept", symlinks=True)


def main(argv: list[str] | None = None) -> None:
    """Prints each fault and the table; exits with 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = arguments.whole(0)
    parser.add_argument("--minutes", type=arguments.real(0.01), default=10.0)
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--first_fault", type=whole, default=0, help="to repeat one")
    parser.add_argument("--first_round", type=whole, default=0, help="to repeat one")
    args = parser.parse_args(argv)
    enter_own_mounts()
    jax.config.update("jax_platforms", "cpu")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(folder, args.seed)
    began = time.monotonic()
    violation = None
    try:
        soak.run(args.first_fault, args.first_round, args.minutes)
    except ViolationError as error:
        violation = error
        soak.copy_kept()
    print(f"\n{soak.table()}")
    print(
        f"{soak.rounds - args.first_round} rounds, {soak.starts} starts, "
        f"{time.monotonic() - began:.0f} seconds, seed {args.seed}"
    )
    if violation:
        sys.exit(
            f"\nBroken: {violation}\nEverything is in {folder}: soak.txt, output/, "
            f"kept/. To repeat it: python scripts/soak.py --seed={args.seed} "
            f"--first_round={soak.rounds} --first_fault={soak.first_fault}"
        )
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
