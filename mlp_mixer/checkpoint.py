"""Checkpoints: saved asynchronously, verified when read, restored on any mesh.

This module decides which checkpoint is saved, kept, restored or set aside; `orbax_io`
writes and reads them. A damaged checkpoint is renamed to `damaged-<step>-…`, never
deleted, and the one before it is tried.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsFloat

import jax
from etils import epath
from jax.experimental import multihost_utils

from mlp_mixer import orbax_io, processes
from mlp_mixer.fingerprints import PyTree, examine, leaves
from mlp_mixer.orbax_io import DamagedError
from mlp_mixer.signals import AgreedStop, StopFlag
from mlp_mixer.text import quoted

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A save failed, or a checkpoint that was asked for is damaged."""


class Checkpointer:
    """Saves and restores the training state in one directory; a context manager.

    One training run writes to a directory; others read with `restore_variables`. If a
    run has several processes, all must call each method, after
    `jax.distributed.initialize`.

    Example:
        with Checkpointer(workdir / "checkpoints", every_steps=1000) as checkpointer:
            state = checkpointer.restore(shapes)
            if state is None:
                state = init()
            while step < num_steps:
                ...
                stop = checkpointer.stop_requested(step)
                checkpointer.save(step, state, force=stop or step == num_steps)

    Args:
      directory: local folder or one on a bucket (`gs://…`); created if missing.
      every_steps: number of steps; `save` acts on its multiples.
      every_minutes: minutes since the last save or the start; `save` also acts on the
        next multiple of `clock_every_steps`. None: the clock is not read.
      clock_every_steps: number of steps; at its multiples process 0 reads its clock and
        tells the others.
      keep_latest: number of the newest checkpoints that are kept.
      keep_every_steps: number of steps; checkpoints at its multiples are kept for ever.
      keep_best: name of a metric; the checkpoint with its best value is kept.
      more_is_better: whether the best value of that metric is the highest.
      stop_after: number of seconds since the start of the process, after which
        `stop_requested` says so.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_steps: int,
        every_minutes: float | None = None,
        clock_every_steps: int = 50,
        keep_latest: int = 2,
        keep_every_steps: int | None = None,
        keep_best: str | None = None,
        more_is_better: bool = True,
        stop_after: float | None = None,
    ):
        counts = (every_steps, clock_every_steps, keep_latest, keep_every_steps)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError(
                f"every_steps, clock_every_steps, keep_latest, keep_every_steps are "
                f"{counts}; each must be 1 or more."
            )
        self.directory = orbax_io.locate(directory)
        self._every_steps, self._clock_every_steps = every_steps, clock_every_steps
        self._every_minutes = every_minutes
        self._saved_at = time.monotonic()  # of the last save, restoring or the start
        self._keep_best, self._more_is_better = keep_best, more_is_better
        self._position: int | None = None  # the step last saved or restored
        self._complete: int | None = None  # the newest known to be whole
        self._saving = 0  # the step of the save that is under way
        self._scores: dict[int, float] = {}
        # Orbax removes them in the background, without a word.
        unfinished = orbax_io.unfinished_saves(self.directory)
        if unfinished and jax.process_index() == 0:
            logger.warning("Removing unfinished saves in %s: %s", directory, unfinished)
        # Before the folder appears, which shows others that the run can be stopped.
        several = jax.distributed.is_initialized()
        self._stop = AgreedStop(stop_after) if several else StopFlag(stop_after)
        try:
            self._manager = orbax_io.open_for_writing(
                self.directory,
                keep_latest=keep_latest,
                keep_every_steps=keep_every_steps,
                keep_also=self._may_be_best,
                saving=lambda: self._saving,
            )
            if keep_best is not None:
                metrics = _read_metrics(self.directory, self.all_steps())
                self._scores.update(_scores(metrics, keep_best))
        except BaseException:
            self._stop.uninstall()
            raise

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            if not isinstance(error, CheckpointError):  # it would say the same again
                logger.error("%s", late)

    def close(self) -> None:
        """Waits for the unfinished save and restores the signal handlers.

        Raises:
          CheckpointError: if the unfinished save failed.
        """
        self._stop.uninstall()
        try:
            self.wait()
        finally:
            with self._failure_named():  # a save may also fail here
                self._manager.close()

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, sorted, also one that is being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.all_steps(), default=None)

    def complete_step(self) -> int | None:
        """The step last saved or restored completely, as known without waiting.

        Raises:
          CheckpointError: the save in the background has failed; see `wait`.
        """
        step = self._position
        saved = step != self._complete and not self._manager.is_saving_in_progress()
        if step is not None and saved:
            # At once, now that it has ended: Orbax's `check_for_errors` does not tell
            # what its own thread has been told.
            self.wait()
            if orbax_io.step_folder(self.directory, step).exists():
                self._complete = step
        return self._complete

    def due(self, step: int) -> bool:
        """Whether `save` acts on this step without `force`.

        Several processes all ask, with the same steps, and get the same answer.
        """
        if step % self._every_steps == 0:
            return True
        if self._every_minutes is None or step % self._clock_every_steps:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return processes.first(minutes >= self._every_minutes)

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: Mapping[str, SupportsFloat] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Starts to save the state; when this returns, its buffers may be donated.

        Args:
          step: position of the run, after which the checkpoint is named.
          state: a tree of `jax.Array`, global ones if there are several processes.
          metrics: metrics that are saved too, among them `keep_best`'s.
          force: whether to save also if the step is not due.

        Returns:
          Whether a save was started; it is not if this step is saved already.

        Raises:
          CheckpointError: this save, or the one before it, failed.
          FloatingPointError: the state holds inf or nan; nothing is saved.
          ValueError: the directory holds this or a later step of another run.
        """
        if not (force or self.due(step)) or step == self._position:
            return False
        self.wait()
        self._complete = self._position
        newest = self.latest_step()
        if newest is not None and step <= newest:
            # Orbax would skip such a save without a word.
            raise ValueError(
                f"Step {step} cannot be saved in {self.directory}: it already holds "
                f"step {newest}. Restore from it before training, or use another "
                f"directory."
            )
        if foreign := [n for n, x in leaves(state) if not isinstance(x, jax.Array)]:
            raise TypeError(f"The state must be a tree of jax.Array; not so: {foreign}")
        prints, not_finite = examine(state)
        if not_finite:
            raise FloatingPointError(self._not_finite(step, not_finite))
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if self._keep_best is not None:
            self._scores[step] = values.get(self._keep_best, math.nan)
            if values and self._keep_best not in values:
                logger.warning(
                    "Checkpoint %d cannot be the best: it has no %r, only %s",
                    step,
                    self._keep_best,
                    sorted(values),
                )
        self._position = self._saving = step
        self._saved_at = time.monotonic()
        with self._failure_named():
            orbax_io.start_saving(self._manager, step, state, prints, values)
        return True

    def _not_finite(self, step: int, arrays: Sequence[str]) -> str:
        good = self.latest_step()
        return (
            f"After step {step} these arrays are not finite: "
            f"{quoted(arrays, 3)}. Nothing is saved in {self.directory}. "
            + (
                "There is no checkpoint yet. "
                if good is None
                else f"The last good checkpoint is that of step {good}. "
            )
            + "Try a lower learning rate, a longer warm-up, or another seed."
        )

    def add_metrics(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds metrics to a checkpoint that is saved, e.g. those of a late evaluation.

        They are on disk when this returns. `keep_best` and `restore_variables(best=)`
        use them beside those given to `save`; they replace metrics of the same name.

        Raises:
          FileNotFoundError: there is no checkpoint of that step.
          CheckpointError: they could not be written, or the last save failed.
        """
        self.wait()
        if step not in self.all_steps():
            raise FileNotFoundError(
                f"There is no checkpoint {step} in {self.directory} to add metrics to, "
                f"only {self.all_steps()}."
            )
        values = {name: float(value) for name, value in metrics.items()}
        if jax.process_index() == 0:
            try:
                folder = orbax_io.step_folder(self.directory, step)
                orbax_io.add_metrics(folder, step, values)
            except OSError as error:
                raise CheckpointError(
                    f"Adding metrics to checkpoint {step} in {self.directory} failed: "
                    f"{orbax_io.first_line(error)}. The checkpoint itself is intact. "
                    f"Check the free space and the permissions there, then start again."
                ) from error
        if self._keep_best in values:
            self._scores[step] = values[self._keep_best]

    def wait(self) -> None:
        """Blocks until the last save is complete.

        Raises:
          CheckpointError: if it failed; the checkpoints before it are intact.
        """
        with self._failure_named():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any error of the writing threads
            self._position = None
            self._manager.reload()
            raise CheckpointError(
                f"Saving step {self._saving} in {self.directory} failed: "
                f"{orbax_io.first_line(error)}. The checkpoints before it are intact: "
                f"{self.all_steps()}. Check the free space and the permissions there, "
                f"then start again."
            ) from error

    def restore(self, target: PyTree) -> PyTree:
        """Returns the newest intact checkpoint, or None if there never was one.

        A damaged checkpoint is logged and renamed, and the one before it is tried. If
        only some of several processes see the damage, the job ends, because the others
        wait for them; the next start takes the checkpoint before.

        Args:
          target: a tree of `jax.ShapeDtypeStruct` with shardings on the mesh to use,
            which may differ from the mesh that wrote the checkpoint.

        Raises:
          ValueError: the checkpoint holds another model, or another step.
          FileNotFoundError: only damaged checkpoints are left.
          CheckpointError: damage was found by this process alone.
        """
        self.wait()
        _check_target(target)
        for step in reversed(self.all_steps()):
            try:
                state = orbax_io.read_checkpoint(self._manager, step, target)
            except DamagedError as damage:
                self._set_aside(step, damage)
                if not damage.agreed and jax.process_count() > 1:
                    raise CheckpointError(
                        f"Checkpoint {step} in {self.directory} is damaged and set "
                        f"aside. Start all processes again: they will take the one "
                        f"before."
                    ) from damage
            else:
                logger.info("Restored step %d from %s", step, self.directory)
                self._position = step
                self._saved_at = time.monotonic()
                return state
        if damaged := orbax_io.list_names(self.directory, "damaged-*"):
            raise FileNotFoundError(_none_left(self.directory, damaged))
        return None

    def _set_aside(self, step: int, damage: DamagedError) -> None:
        # Orbax counts a damaged step as the latest until it is renamed.
        folder = orbax_io.step_folder(self.directory, step)
        aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns():x}")
        if jax.process_index() == 0 or not damage.agreed:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                folder.rename(aside)
                logger.error(
                    "Checkpoint %d in %s is damaged (%s); set aside as %s",
                    step,
                    self.directory,
                    damage,
                    aside.name,
                )
        if damage.agreed and jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._scores.pop(step, None)
        self._manager.reload()

    def _may_be_best(self, steps: Sequence[int]) -> list[bool]:
        if self._keep_best is None:
            return [False] * len(steps)
        best = _best(
            {s: x for s, x in self._scores.items() if s in steps}, self._more_is_better
        )
        # A step without a score has unreadable metrics: it may have been the best.
        return [step == best or step not in self._scores for step in steps]

    def stop_requested(self, step: int) -> bool:
        """Whether to save and stop: SIGTERM, SIGINT, or `stop_after` is over.

        Several processes agree on a call some time after the signal to one of them, so
        all must call this equally often.
        """
        return self._stop.requested(step)


def restore_variables(
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    best: str | None = None,
    more_is_better: bool = True,
    ema: bool = False,
) -> tuple[int, PyTree]:
    """Returns the step of one checkpoint and its variables: {"params": …, …}.

    They are NumPy arrays in nested dicts. Nothing in the directory changes, so this may
    be used while a training run writes there. The optimiser state is not read, but for
    the average of the parameters.

    Args:
      directory: folder of a `Checkpointer`.
      step: step of the checkpoint; None is the newest intact one.
      best: name of a metric, whose best value chooses the step instead.
      more_is_better: whether the best value of that metric is the highest.
      ema: whether the averaged variables are returned instead of the last ones.

    Raises:
      FileNotFoundError: there is no such checkpoint, or only damaged ones.
      ValueError: the checkpoint holds another step, or no average; or none has that
        metric.
      CheckpointError: the checkpoint that `step` or `best` names is damaged.
    """
    if step is not None and best is not None:
        raise ValueError(f"Got step={step} and best={best!r}; give one of them.")
    folder = orbax_io.locate(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no directory {folder}.")
    dropped: list[str] = []
    while len(dropped) < 10:
        try:
            return _restore_variables(folder, step, best, more_is_better, ema)
        except _DroppedError as error:
            if jax.process_count() > 1:  # another process may have read it
                raise CheckpointError(
                    f"A training run in {folder} has dropped checkpoint {error} while "
                    f"it was read. Start all processes again."
                ) from error
            dropped.append(f"{error}")
    raise CheckpointError(
        f"A training run in {folder} drops its checkpoints faster than they are read: "
        f"{dropped} were there and are not any more. Raise its checkpoint.keep_latest."
    )


class _DroppedError(Exception):
    """A training run drops the checkpoint of this step while it is read."""


def _restore_variables(
    folder: epath.Path,
    step: int | None,
    best: str | None,
    more_is_better: bool,
    ema: bool,
) -> tuple[int, PyTree]:
    try:
        manager = orbax_io.open_for_reading(folder)
        if not manager.all_steps():
            # A listing may miss a folder that just got its name, and one that goes.
            manager.close()
            manager = orbax_io.open_for_reading(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # Orbax lists the folders, then looks at each, which may be gone by then.
        raise _DroppedError(os.path.basename(error.filename or "?")) from error
    with manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps or step not in (None, *steps):
            wanted = "checkpoint" if step is None else f"checkpoint {step}"
            others = (
                steps
                or orbax_io.list_names(folder)
                or "nothing: has the run saved one?"
            )
            raise FileNotFoundError(f"There is no {wanted} in {folder}, only {others}")
        if best is not None:
            metrics = _read_metrics(folder, steps)
            step = _best(_scores(metrics, best), more_is_better)
            if step is None:
                known = sorted({name for values in metrics.values() for name in values})
                raise ValueError(
                    f"None of the checkpoints {steps} in {folder} has the metric "
                    f"{best!r}, only {known}; choose one of them, or a step."
                )
        for candidate in steps if step is None else [step]:
            try:
                branch = orbax_io.branch_of_average(manager, candidate) if ema else ""
                params, stats = (
                    orbax_io.read_checkpoint(
                        manager, candidate, None, subtree=f"{branch}{name}"
                    )
                    for name in ("params", "stats")
                )
                return candidate, {"params": params, **stats}
            except Exception as error:
                if orbax_io.is_dropped(orbax_io.step_folder(folder, candidate)):
                    raise _DroppedError(candidate) from error
                if not isinstance(error, DamagedError):
                    raise
                logger.error(
                    "Checkpoint %d in %s is damaged (%s); left as it is",
                    candidate,
                    folder,
                    error,
                )
                alone = jax.process_count() > 1 and not error.agreed
                if alone or step is not None:
                    raise CheckpointError(
                        f"Checkpoint {candidate} in {folder} is damaged ({error}). "
                        f"Choose another step: {steps}."
                    ) from error
    raise FileNotFoundError(_none_left(folder, [str(s) for s in steps]))


def _read_metrics(
    directory: epath.Path, steps: Sequence[int]
) -> dict[int, dict[str, float]]:
    """{step: metrics} if they can be read; _DroppedError if the step is gone."""
    found = {}
    for step in steps:
        folder = orbax_io.step_folder(directory, step)
        try:
            found[step] = orbax_io.read_metrics(folder)
        except DamagedError as damage:
            if orbax_io.is_dropped(folder):
                raise _DroppedError(step) from damage
            logger.error("Checkpoint %d has no readable metrics (%s)", step, damage)
    return found


def _scores(metrics: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    """{step: metric}; nan if it was not measured."""
    return {step: values.get(name, math.nan) for step, values in metrics.items()}


def _best(scores: Mapping[int, float], more_is_better: bool) -> int | None:
    """The step of the best score, the latest one if several are equal."""
    sign = 1 if more_is_better else -1
    known = [(sign * x, step) for step, x in scores.items() if math.isfinite(x)]
    return max(known)[1] if known else None


def _none_left(directory: epath.Path, damaged: Sequence[str]) -> str:
    return (
        f"No intact checkpoint is left in {directory}, only damaged ones: "
        f"{list(damaged)}. Put a copy back under its step's name of eight digits, or "
        f"move them all away to start from scratch."
    )


def _check_target(target: PyTree) -> None:
    """Raises if a leaf has no sharding, or none that fits its shape."""
    for name, x in leaves(target):
        if getattr(x, "sharding", None) is None:
            raise TypeError(
                f"The target's {name} is {x!r}; expected a jax.ShapeDtypeStruct with "
                f"a sharding."
            )
        x.sharding.shard_shape(x.shape)  # a ValueError if they do not fit
