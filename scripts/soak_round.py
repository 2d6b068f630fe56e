"""Faults, for `soak.py`: one run is broken again and again until it is trained."""

import contextlib
import dataclasses
import pathlib
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import soak_job
from soak_job import Job, Ledger, ViolationError

# A moment of a fault: seconds after a start, or steps after the newest record.
START_SECONDS = 4.0
STEPS = 8
# The longest time that a start may take to its first step, or a step to the next.
PATIENCE_SECONDS = 180.0

Say = Callable[[str], None]


@dataclasses.dataclass
class Disk:
    """The disk of the runs.

    Attributes:
      folder: its folder.
      is_own: whether it is a small file system that may be filled.
    """

    folder: pathlib.Path
    is_own: bool


class Round:
    """Trains one run to its end, and breaks it on the way.

    Args:
      job: the run; nothing is in its folder.
      counts: numbers of processes of which each start has one.
      reference: records of the uninterrupted run.
      tolerance: largest difference of a value of a record; 0 if all bits are the same.
      disk: the disk of the run's folder.
      say: prints and keeps a line.
    """

    def __init__(
        self,
        job: Job,
        counts: Sequence[int],
        reference: Sequence[dict[str, Any]],
        tolerance: float,
        disk: Disk,
        say: Say,
    ):
        self.job, self.disk = job, disk
        self.draw = random.Random()
        self.what = ""  # what the last fault did, in words
        self._ledger = Ledger(job.workdir)
        self._counts = counts
        self._reference, self._tolerance = reference, tolerance
        self._say = say
        # What a failing start may say, and what a person then does.
        self._remedies: list[tuple[str, Callable[[], None]]] = []
        self._is_checked = False  # what the newest start has restored

    def run(
        self, faults: Iterator["Fault"], until: float, count: Callable[[str], None]
    ) -> None:
        """Injects faults until the run is trained or the time is up.

        Args:
          faults: what happens, in order.
          until: time of the monotonic clock.
          count: is called with the kind of each fault that has happened.

        Raises:
          ViolationError: a promise is broken.
        """
        while time.monotonic() < until:
            fault = next(faults)
            self.draw = fault.draw
            if fault.needs_several and max(self._counts) == 1:
                continue
            if fault.starts_anew and self.job.is_alive():
                self.stop_politely()
            if not self.job.is_alive():
                self.start(fault.variables(self.draw))
            if not self._reach_moment(can_be_soon=not fault.needs_checkpoint):
                break
            self.what = ""
            step = self.job.step()
            # The start that was meant may have ended, and others gone on.
            if fault.needs_several and self.job.count() == 1:
                continue
            if fault.needs_checkpoint and not self.unharmed():
                continue
            fault.inject(self)
            self._say(
                f"fault {fault.number:4}  {fault.kind:24} at step {step:3} of start "
                f"{self.job.starts}, {self.job.count()} process(es)  {self.what}"
            )
            count(fault.kind)
        while not self._is_trained():
            if not self.job.is_alive():
                self.start({})
            self._reach_moment(finish=True)
        soak_job.check_records(
            soak_job.records_of(self.job.workdir), self._reference, self._tolerance
        )

    def start(self, variables: Mapping[str, str]) -> None:
        """Starts the run, with as many processes as are drawn."""
        self.job.start(self.draw.choice(self._counts), variables)
        self._is_checked = False

    def is_saved_to_the_end(self) -> bool:
        """Whether there is a checkpoint of the last step."""
        return max(self._ledger.folders(), default=0) == soak_job.TOTAL_STEPS

    def _is_trained(self) -> bool:
        ended = self.job.starts > 0 and not self.job.is_alive()
        return ended and {*self.job.statuses()} == {0} and self.is_saved_to_the_end()

    def wait_until_owned(self) -> None:
        """Waits until the newest start owns its folder, or has ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.job.is_alive() and self.job.restored_step() is None:
            if time.monotonic() > until:
                raise ViolationError(
                    f"After {PATIENCE_SECONDS:g} seconds a start has not begun:\n"
                    f"{self.job.output()}"
                )
            time.sleep(0.05)

    def _reach_moment(self, can_be_soon: bool = True, finish: bool = False) -> bool:
        """Waits for a drawn moment; returns whether the run is not trained before.

        Args:
          can_be_soon: whether the moment may be before the first step.
          finish: whether to wait for the end instead.
        """
        soon = self.draw.random() < 0.3 and can_be_soon
        seconds = self.draw.uniform(0, START_SECONDS)
        steps, jitter = self.draw.randint(1, STEPS), self.draw.uniform(0, 0.3)
        started, newest = time.monotonic(), -1
        before = self.job.step()
        moved = time.monotonic()
        while True:
            if not self.job.is_alive():
                if not self.has_ended():
                    self.start({})
                    started = moved = time.monotonic()
                    continue
                return False
            self._check_restored()
            if None not in self.job.statuses() or any(self.job.statuses()):
                self.wait(self.patience())
                continue
            step = self.job.step()
            if step != newest:
                newest, moved = step, time.monotonic()
            elif time.monotonic() - moved > PATIENCE_SECONDS:
                raise ViolationError(
                    f"For {PATIENCE_SECONDS:g} seconds there was no step after {step}."
                )
            if not finish:
                if soon and time.monotonic() - started > seconds:
                    return True
                if not soon and self._is_checked and step >= before + steps:
                    time.sleep(jitter)
                    return True
            time.sleep(0.01)

    def _check_restored(self) -> None:
        """Checks, once for each start, from which step it goes on."""
        if not self._is_checked:
            step = self.job.restored_step()
            if step is not None:
                self._is_checked = True
                self._ledger.check_restored(step)

    # What may end, and how.

    def wait(self, seconds: float) -> list[int]:
        """Waits for the end of all processes, and looks at the folder."""
        statuses = self.job.wait(seconds)
        self._check_restored()
        self._check_folder()
        return statuses

    def patience(self) -> float:
        """The seconds after which all have ended that lost one, or were asked to."""
        began = self.job.restored_step() is not None
        waits = soak_job.HEARTBEAT_SECONDS if began else soak_job.JOIN_SECONDS
        return waits + soak_job.END_SECONDS

    def _check_folder(self) -> None:
        self._ledger.check_kept()
        newest = max(self._ledger.intact, default=0)
        soak_job.check_records(
            soak_job.until_step(soak_job.records_of(self.job.workdir), newest),
            soak_job.until_step(self._reference, newest),
            self._tolerance,
        )
        soak_job.check_times(self.job.workdir, self.job)

    def has_ended(self) -> bool:
        """Whether the run is trained; False if a person has to start it again.

        Raises:
          ViolationError: the start has failed without a reason.
        """
        statuses = self.wait(soak_job.END_SECONDS)
        if set(statuses) == {0}:
            if not self._is_trained():
                raise ViolationError("A start has ended with 0 before the last step.")
            return True
        if self.is_excused():
            return False
        raise ViolationError(
            f"A start has failed: {statuses}. Its output:\n{self.job.output()}"
        )

    def is_excused(self) -> bool:
        """Whether the newest start has failed by an older fault, which is remedied."""
        output = self.job.output()
        for remedy in reversed(self._remedies):
            if re.search(remedy[0], output):
                self._remedies.remove(remedy)
                remedy[1]()
                return True
        return False

    def expect(self, pattern: str, remedy: Callable[[], None] = lambda: None) -> None:
        """Lets a start fail once if it says so; then a person does `remedy`."""
        self._remedies.append((pattern, remedy))

    def stop_politely(self) -> None:
        """Asks all processes to end."""
        self.job.send(signal.SIGTERM, [self.job.started_pid(0)])
        self.check_stopped(self.wait(self.patience()))

    def check_stopped(self, statuses: Sequence[int]) -> None:
        """Checks how a run has ended that was asked to.

        Raises:
          ViolationError: it has not saved its newest step, or failed.
        """
        began = self.job.restored_step() is not None
        if 1 in statuses and self.is_excused():
            return
        if set(statuses) == {0}:
            saved = max(self._ledger.intact, default=0)
            if began and saved < self.job.step():
                raise ViolationError(
                    f"It was asked to stop and ended at step {self.job.step()}, but "
                    f"checkpoint {saved} is the newest."
                )
        elif began or any(status not in (0, -signal.SIGTERM) for status in statuses):
            raise ViolationError(
                f"It was asked to stop and ended with {statuses}. Its output:\n"
                f"{self.job.output()}"
            )

    # Checkpoints, harmed.

    def unharmed(self) -> list[pathlib.Path]:
        """The folders of checkpoints that no fault has damaged, the newest first."""
        folders = self._ledger.folders()
        steps = sorted(folders.keys() - self._ledger.harmed, reverse=True)
        return [folders[step] for step in steps]

    def harm(self, folder: pathlib.Path, change: Callable[[bytes], bytes]) -> str:
        """Changes one file of a checkpoint; returns its name and size."""
        every = sorted(p for p in folder.rglob("*") if p.is_file())
        path = self.draw.choice([p for p in every if p.stat().st_size])
        content = path.read_bytes()
        path.write_bytes(change(content))
        self._ledger.harmed.add(int(folder.name))
        self._ledger.intact.pop(int(folder.name), None)
        # Of several processes only some may see it, and end the others.
        self.expect("is damaged and set aside")
        return f"{path.relative_to(folder)} of {len(content)} bytes in {folder.name}"

    def keep_copy(self, folder: pathlib.Path) -> None:
        """Copies a checkpoint, and brings it back if a start finds none intact."""
        copy = self.disk.folder / "copy" / folder.name
        shutil.copytree(folder, copy, dirs_exist_ok=True)

        def bring_back() -> None:
            shutil.copytree(copy, folder)
            self._ledger.intact[int(folder.name)] = soak_job.digest(folder)
            self._ledger.harmed.discard(int(folder.name))

        self.expect("No intact checkpoint is left", bring_back)

    def rename(self, folder: pathlib.Path, name: str) -> None:
        """Renames a checkpoint, and back if a start fails since it is not there."""
        there = folder.with_name(name)
        folder.rename(there)
        step, other = int(folder.name), int(name) if len(name) == 8 else None
        self._ledger.intact.pop(step, None)
        if other is not None:  # it is no checkpoint of that step
            self._ledger.harmed.add(other)

        def bring_back() -> None:
            there.rename(folder)
            self._ledger.intact[step] = soak_job.digest(folder)
            self._ledger.harmed.discard(other or 0)

        gone = "The checkpoints of the run in .* are gone|No intact checkpoint is left"
        wrong = f"not step {other}: it was renamed or copied"
        self.expect(wrong if other else gone, bring_back)


# --- The faults -----------------------------------------------------------------------


def kill_all(trial: Round) -> None:
    """As a machine that loses its power."""
    pids = trial.job.pids()
    trial.job.send(signal.SIGKILL, pids)
    trial.wait(soak_job.END_SECONDS)


def kill_one(trial: Round) -> None:
    """As one host of several that is gone, or one process of it: the others end."""
    index = trial.draw.randrange(trial.job.count())
    pids = trial.job.pids(index)
    trial.job.send(signal.SIGKILL, trial.draw.choice([pids, pids[:1], pids[-1:]]))
    _check_others_end(trial, index)


def stop_one_for_long(trial: Round) -> None:
    """As a host that hangs: the others give it up, and once it goes on, it ends too."""
    index = trial.draw.randrange(trial.job.count())
    pids = trial.job.pids(index)
    trial.job.send(signal.SIGSTOP, pids)
    seconds = trial.patience()
    until = time.monotonic() + seconds
    while any(
        trial.job.pids(other) for other in range(trial.job.count()) if other != index
    ):
        if time.monotonic() > until:
            raise ViolationError(
                f"Process {index} was stopped, and after {seconds:g} "
                f"seconds others have not ended: {trial.job.statuses()}."
            )
        time.sleep(0.05)
    trial.job.send(signal.SIGCONT, pids)
    _check_others_end(trial, index)


def _check_others_end(trial: Round, index: int) -> None:
    """Checks how all processes end after one is lost."""
    began = time.monotonic()
    statuses = trial.wait(trial.patience())
    seconds = time.monotonic() - began
    trial.what = f"process {index}; {statuses} after {seconds:.0f} seconds"
    if trial.is_saved_to_the_end() or trial.is_excused():
        return  # it had ended, or was about to
    others = [status for i, status in enumerate(statuses) if i != index]
    if others != [1] * len(others):
        raise ViolationError(
            f"One was lost, and the others ended with {others}, not 1."
        )
    check_told(
        "Start all processes again|in vain for|failed",
        "".join(
            trial.job.log(i).read_text() for i in range(len(statuses)) if i != index
        ),
    )


def terminate_one(trial: Round) -> None:
    """As a host that is preempted: all save one step and end."""
    index = trial.draw.randrange(trial.job.count())
    trial.job.send(signal.SIGTERM, [trial.job.started_pid(index)])
    trial.check_stopped(trial.wait(trial.patience()))
    trial.what = f"process {index}; {trial.job.statuses()} at step {trial.job.step()}"


def terminate_all(trial: Round) -> None:
    """As a scheduler that ends a job: each process gets the signal."""
    count = trial.job.count()
    pids = [trial.job.started_pid(index) for index in range(count)]
    trial.job.send(signal.SIGTERM, pids)
    trial.check_stopped(trial.wait(trial.patience()))
    trial.what = f"{trial.job.statuses()} at step {trial.job.step()}"


def terminate_and_kill(trial: Round) -> None:
    """As a scheduler whose patience ends before the run has saved."""
    count = trial.job.count()
    pids = [trial.job.started_pid(index) for index in range(count)]
    trial.job.send(signal.SIGTERM, pids)
    seconds = trial.draw.uniform(0, 1)
    time.sleep(seconds)
    trial.job.send(signal.SIGKILL, trial.job.pids())
    trial.wait(soak_job.END_SECONDS)
    trial.what = f"{seconds:.2f} seconds between"


def stop_for_a_while(trial: Round) -> None:
    """As a host that swaps, or whose network is gone: the run goes on."""
    index = trial.draw.choice([None, *range(trial.job.count())])
    seconds = trial.draw.uniform(0.2, 4)
    pids = trial.job.pids(index)
    trial.job.send(signal.SIGSTOP, pids)
    time.sleep(seconds)
    trial.job.send(signal.SIGCONT, pids)
    trial.what = f"{'all' if index is None else index}, {seconds:.1f} seconds"


def truncate(trial: Round) -> None:
    """As a disk that lost the end of a file."""
    _harm(trial, lambda content: content[: trial.draw.randrange(len(content))])


def flip(trial: Round) -> None:
    """As a disk or a memory with a wrong bit."""

    def flipped(content: bytes) -> bytes:
        place = trial.draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    _harm(trial, flipped)


def _harm(trial: Round, change: Callable[[bytes], bytes]) -> None:
    """Harms one or two of the newest checkpoints of a killed run."""
    kill_all(trial)
    unharmed = trial.unharmed()
    harmed = unharmed[: trial.draw.choice([1, 1, 2])]
    if harmed == unharmed:  # the run refuses to start until a person brings one back
        for folder in harmed:
            trial.keep_copy(folder)
    trial.what = "; ".join(trial.harm(folder, change) for folder in harmed)


def rename(trial: Round) -> None:
    """As a person who tidies up a killed run."""
    kill_all(trial)
    if folders := trial.unharmed():
        folder = trial.draw.choice(folders)
        step = int(folder.name)
        names = [f"{step + 1:08d}", f"{step}", f"{folder.name}.old"]
        free = [name for name in names if not folder.with_name(name).exists()]
        if free:
            name = trial.draw.choice(free)
            trial.rename(folder, name)
            trial.what = f"{folder.name} is {name}"


def fill_disk(trial: Round) -> None:
    """The disk is full until the run has ended, or has written nothing for a while."""
    filler = trial.disk.folder / "filler"
    left = trial.draw.choice([0, 2**12, 2**16])
    pids = trial.job.pids()
    if trial.disk.is_own:
        # The run may take some of it meanwhile.
        with contextlib.suppress(OSError), filler.open("wb", 0) as file:
            free = shutil.disk_usage(trial.disk.folder).free
            file.write(bytes(max(0, free - left)))
    else:  # files may not grow
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (left, -1))
    until = time.monotonic() + 15
    while trial.job.is_alive() and time.monotonic() < until:
        time.sleep(0.05)
    ended = not trial.job.is_alive()
    filler.unlink(missing_ok=True)
    if ended:
        statuses = set(trial.wait(soak_job.END_SECONDS))
        if statuses != {0} and not trial.is_excused():  # else it ended just before
            if 0 in statuses:
                raise ViolationError(f"On a full disk one ended with 0: {statuses}.")
            check_told("No space left|File too large", trial.job.output())
    else:
        for pid in trial.job.pids() if not trial.disk.is_own else ():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))
    trial.what = f"{left} bytes left; {'it ended' if ended else 'nothing was written'}"


def check_told(pattern: str, output: str) -> None:
    """Raises ViolationError unless an output tells what failed, without a traceback."""
    if not re.search(pattern, output) or "Traceback" in output:
        raise ViolationError(f"This does not tell {pattern!r} in a line:\n{output}")


def start_second(trial: Round) -> None:
    """A second start in the same folder, which has to be refused."""
    trial.wait_until_owned()
    log = trial.job.log("second")
    second = trial.job.start_one([], log, {"JAX_NUM_CPU_DEVICES": "1"})
    began = time.monotonic()
    status = second.wait(PATIENCE_SECONDS)
    trial.what = f"exit status {status}"
    if not trial.job.is_alive() or trial.is_saved_to_the_end():
        trial.job.seconds += time.monotonic() - began
        return  # it ends, and the second one may have taken over
    if status != 1:
        raise ViolationError(f"A second start ended with {status}: {log.read_text()}")
    check_told("is in use by", log.read_text())


def go_on(trial: Round) -> None:
    """Nothing happens now: the start has its fault from the beginning."""


def slow_disk(draw: random.Random) -> dict[str, str]:
    """Variables of a start whose disk is slow."""
    return {"SOAK_SLOW_DISK": str(draw.random())}


def clock_goes_back(draw: random.Random) -> dict[str, str]:
    """Variables of a start whose clock goes back, by seconds or days."""
    after, back = draw.uniform(0, 6), 10 ** draw.uniform(0, 6)
    return {"SOAK_CLOCK": f"{after:.3f},{back:.3f}"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
      inject: breaks a round's run.
      needs_several: whether it is another fault if there is one process.
      needs_checkpoint: whether it cannot happen before there is a checkpoint.
      variables: variables of a start that has this fault from its beginning.
    """

    inject: Callable[[Round], None]
    needs_several: bool = False
    needs_checkpoint: bool = False
    variables: Callable[[random.Random], dict[str, str]] | None = None


KINDS = {
    "SIGKILL of all": Kind(kill_all),
    "SIGKILL of one": Kind(kill_one, needs_several=True),
    "SIGTERM to all": Kind(terminate_all),
    "SIGTERM to one": Kind(terminate_one, needs_several=True),
    "SIGTERM, then SIGKILL": Kind(terminate_and_kill),
    "SIGSTOP for a while": Kind(stop_for_a_while),
    "SIGSTOP of one for long": Kind(stop_one_for_long, needs_several=True),
    "a truncated file": Kind(truncate, needs_checkpoint=True),
    "a flipped bit": Kind(flip, needs_checkpoint=True),
    "a renamed step": Kind(rename, needs_checkpoint=True),
    "a full disk": Kind(fill_disk),
    "a second start": Kind(start_second),
    "a slow disk": Kind(go_on, variables=slow_disk),
    "a clock that goes back": Kind(go_on, variables=clock_goes_back),
}


class Fault:
    """Fault `number` of a seed: its kind, and draws of its own."""

    def __init__(self, seed: int, number: int):
        # A deck of all kinds after the other, so that none is rare.
        deck = list(KINDS)
        random.Random(f"{seed} deck {number // len(deck)}").shuffle(deck)
        self.number, self.kind = number, deck[number % len(deck)]
        self.draw = random.Random(f"{seed} fault {number}")
        kind = KINDS[self.kind]
        self.inject, self.needs_several = kind.inject, kind.needs_several
        self.needs_checkpoint = kind.needs_checkpoint
        self.starts_anew = kind.variables is not None
        self._variables = kind.variables

    def variables(self, draw: random.Random) -> dict[str, str]:
        """Variables of the start in which it happens."""
        return self._variables(draw) if self._variables else {}


def faults(seed: int, first: int = 0) -> Iterator[Fault]:
    """All faults of a seed, from number `first` on."""
    while True:
        yield Fault(seed, first)
        first += 1
