"""Checkpoints: saved asynchronously, verified when read, restored on any mesh.

The only module that knows Orbax. A checkpoint is a folder named after its step with
two items: `state` (the arrays) and `meta` (their names, shapes, dtypes and
fingerprints, and the metrics). Orbax notices most truncated files but no flipped bit,
and never tries an older checkpoint; both are added here. Files that do not hold what
was saved are set aside as `damaged-<step>-…`, never deleted.
"""

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from mlp_mixer.fingerprints import describe, differences, fingerprint, leaves
from mlp_mixer.signals import StopFlag

PyTree = Any

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A save that failed, or a checkpoint that was asked for and is damaged."""


class _DamagedError(Exception):
    """What was read is not what was saved; `agreed` if every process can tell."""

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


class Checkpointer:
    """Saves and restores the training state in one directory; a context manager.

    One training run writes to a directory; to read beside it use `restore_params`.
    In a run of several processes every method is to be called by all of them, after
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
        directory: relative, absolute or on a bucket (`gs://…`); created if missing.
        every_steps: `save` acts on the multiples of it.
        keep_latest: how many of the newest checkpoints are kept.
        keep_every_steps: checkpoints at multiples of it are kept for ever.
        keep_best: the name of a metric; the checkpoint with its best value is kept.
        more_is_better: whether that is the highest value, or the lowest.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_steps: int,
        keep_latest: int = 2,
        keep_every_steps: int | None = None,
        keep_best: str | None = None,
        more_is_better: bool = True,
    ):
        counts = (every_steps, keep_latest, keep_every_steps)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError(
                f"every_steps, keep_latest, keep_every_steps are {counts}; each must "
                f"be 1 or more."
            )
        self.directory = _absolute(directory)
        self._every_steps = every_steps
        self._keep_best = keep_best
        self._position: int | None = None  # the step last saved or restored
        self._complete: int | None = None  # the newest known to be whole

        policies = ocp.checkpoint_managers
        keep: list[Any] = [policies.LatestN(keep_latest)]
        if keep_every_steps is not None:
            keep.append(policies.EveryNSteps(keep_every_steps))
        self._scores: dict[int, float] = {}
        if keep_best is not None:
            keep.append(_KeepBest(self._scores, more_is_better))
        # Orbax removes what a killed save has left, in the background, without a word.
        unfinished = _names(self.directory, "*.orbax-checkpoint-tmp*")
        if unfinished and jax.process_index() == 0:
            logger.warning("Removing unfinished saves in %s: %s", directory, unfinished)
        # Before the folder appears: from then on the run is there to be stopped.
        # In a run of several processes JAX's own preemption notice would stay silent.
        self._stop = None if jax.distributed.is_initialized() else StopFlag()
        try:
            self._manager = _open(
                self.directory,
                cleanup_tmp_directories=True,
                preservation_policy=policies.AnyPreservationPolicy(keep),
            )
            if keep_best is not None:
                steps = self.all_steps()
                self._scores.update(_scores(self.directory, steps, keep_best))
        except BaseException:
            if self._stop:
                self._stop.uninstall()
            raise

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the unfinished save and gives the signal handlers back.

        Raises:
            CheckpointError: if the unfinished save failed.
        """
        if self._stop:
            self._stop.uninstall()
        try:
            self.wait()
        finally:
            self._manager.close()

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, with one being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.all_steps(), default=None)

    def complete_step(self) -> int | None:
        """The step last saved or restored whole, as far as is known without waiting."""
        step = self._position
        if step is not None and step != self._complete:
            done = not self._manager.is_saving_in_progress()
            # A save that failed has left none; `wait` will tell.
            if done and _folder(self.directory, step).exists():
                self._complete = step
        return self._complete

    def due(self, step: int) -> bool:
        """Whether `save` acts on this step without `force`."""
        return step % self._every_steps == 0

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
            step: the position of the run; a checkpoint is named after it.
            state: a tree of `jax.Array`, global ones if there are several processes.
            metrics: kept beside the state; `keep_best` is looked up in them.
            force: for the last step and before a stop: do not ask whether it is due.

        Returns:
            Whether a save was started: not if it is not due or already saved.

        Raises:
            CheckpointError: this save, or the one before it, failed.
            ValueError: the directory holds this or a later step of another run.
        """
        if not (force or self.due(step)) or step == self._position:
            return False
        self.wait()
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
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if self._keep_best is not None:
            self._scores[step] = values.get(self._keep_best, math.nan)
            if values and self._keep_best not in values:
                logger.warning(
                    "Checkpoint %d cannot be the best: it has no %r, only %s",
                    *(step, self._keep_best, sorted(values)),
                )
        prints = fingerprint(state)
        meta = {"arrays": describe(state), "fingerprints": prints, "metrics": values}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            meta=ocp.args.JsonSave(_sealed(meta)),
        )
        self._position = step
        with self._failure_named():
            # `force`: it is decided, and Orbax's own decision would be a silent one.
            self._manager.save(step, args=items, force=True)
        return True

    def add_metrics(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds metrics to a checkpoint that is saved, e.g. of a late evaluation.

        They are on disk when this returns, and `keep_best` and `restore_params(best=)`
        see them beside those given to `save`; of one name the later value counts.

        Raises:
            FileNotFoundError: there is no checkpoint of that step.
            CheckpointError: they, or the last save, could not be written.
        """
        self.wait()
        if step not in self.all_steps():
            raise FileNotFoundError(
                f"There is no checkpoint {step} in {self.directory} to add metrics to, "
                f"only {self.all_steps()}."
            )
        values = {name: float(value) for name, value in metrics.items()}
        folder = _folder(self.directory, step)
        if jax.process_index() == 0:
            try:
                before = _read_added(folder)
            except _DamagedError as damage:
                logger.error("Checkpoint %d: %s; they are replaced", step, damage)
                before = {}
            record = _sealed({"step": step, "metrics": {**before, **values}})
            try:
                _write_durably(folder / _ADDED, json.dumps(record))
            except OSError as error:
                raise CheckpointError(
                    f"Adding metrics to checkpoint {step} in {self.directory} failed: "
                    f"{_brief(error)}. The checkpoint itself is intact. Check the free "
                    f"space and the permissions there, then start again."
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
        except Exception as error:  # whatever the writing threads met
            step, self._position = self._position, None
            self._manager.reload()
            raise CheckpointError(
                f"Saving step {step} in {self.directory} failed: {_brief(error)}. The "
                f"checkpoints before it are intact: {self.all_steps()}. Check the "
                f"free space and the permissions there, then start again."
            ) from error

    def restore(self, target: PyTree) -> PyTree:
        """The newest intact checkpoint, or None if there never was one.

        A damaged checkpoint is reported and set aside under another name, and the one
        before it is tried. With several processes damage that only some can see ends
        the job, because the others wait for them: the next start takes the one before.

        Args:
            target: a tree of `jax.ShapeDtypeStruct` with shardings on the mesh to use,
                whatever mesh wrote the checkpoint.

        Raises:
            ValueError: the checkpoint holds another model.
            FileNotFoundError: only damaged checkpoints are left.
            CheckpointError: damage was found by this process alone.
        """
        self.wait()
        _check_target(target)
        for step in reversed(self.all_steps()):
            try:
                state = _read(self._manager, step, target)
            except _DamagedError as damage:
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
                return state
        if damaged := _names(self.directory, "damaged-*"):
            raise FileNotFoundError(_none_left(self.directory, damaged))
        return None

    def _set_aside(self, step: int, damage: _DamagedError) -> None:
        # Until it is renamed, Orbax takes a damaged step for the latest one.
        folder = _folder(self.directory, step)
        aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns():x}")
        if jax.process_index() == 0 or not damage.agreed:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                folder.rename(aside)
                logger.error(
                    "Checkpoint %d in %s is damaged (%s); set aside as %s",
                    *(step, self.directory, damage, aside.name),
                )
        if damage.agreed and jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._scores.pop(step, None)
        self._manager.reload()

    def stop_requested(self, step: int) -> bool:
        """Whether to save and stop: SIGTERM, SIGINT or a preemption notice came.

        With several processes all agree on a step, some time after the signal: ask
        with the same step numbers on each.
        """
        if self._stop:
            return self._stop.is_set
        return self._manager.reached_preemption(step)


def restore_params(
    directory: str | os.PathLike[str],
    target: PyTree = None,
    *,
    step: int | None = None,
    best: str | None = None,
    more_is_better: bool = True,
) -> tuple[int, PyTree]:
    """The `params` of one checkpoint, and its step; nothing in the directory changes.

    May be used while a training run writes there. The optimiser state is not read.

    Args:
        directory: of a `Checkpointer`.
        target: the tree of `params` as `jax.ShapeDtypeStruct` with shardings; without
            it whatever model is there, as NumPy arrays in nested dicts.
        step: which checkpoint; without it the newest intact one.
        best: instead of a step, the metric whose best value chooses it.
        more_is_better: whether that is the highest value, or the lowest.

    Raises:
        FileNotFoundError: there is no such checkpoint, or only damaged ones.
        ValueError: the checkpoint holds another model, or none has that metric.
        CheckpointError: the checkpoint that `step` or `best` names is damaged.
    """
    if step is not None and best is not None:
        raise ValueError(f"Got step={step} and best={best!r}; give one of them.")
    if target is not None:
        _check_target(target)
    folder = _absolute(directory)
    if not folder.exists():
        raise FileNotFoundError(f"There is no directory {folder}.")
    # Read-only: no clean-up, which would delete what a run is writing just now.
    with _open(folder, read_only=True) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps or step not in (None, *steps):
            wanted = "checkpoint" if step is None else f"checkpoint {step}"
            others = steps or _names(folder, "*") or "nothing: has the run saved one?"
            raise FileNotFoundError(f"There is no {wanted} in {folder}, only {others}")
        if best is not None:
            step = _best(_scores(folder, steps, best), more_is_better)
            if step is None:
                raise ValueError(
                    f"None of the checkpoints {steps} in {folder} has the metric "
                    f"{best!r}; choose one by its step."
                )
        for candidate in steps if step is None else [step]:
            try:
                return candidate, _read(manager, candidate, target, subtree="params")
            except _DamagedError as damage:
                if step is None and not _folder(folder, candidate).exists():
                    continue  # a run that trains has dropped it meanwhile
                logger.error(
                    "Checkpoint %d in %s is damaged (%s); left as it is",
                    *(candidate, folder, damage),
                )
                alone = jax.process_count() > 1 and not damage.agreed
                if alone or step is not None:
                    raise CheckpointError(
                        f"Checkpoint {candidate} in {folder} is damaged ({damage}). "
                        f"Choose another step: {steps}."
                    ) from damage
    raise FileNotFoundError(_none_left(folder, [str(s) for s in steps]))


def _read(
    manager: ocp.CheckpointManager, step: int, target: PyTree, subtree: str = ""
) -> PyTree:
    """One checkpoint, or a subtree of it, verified; ValueError if of another model."""
    folder = _folder(epath.Path(manager.directory), step)
    with _damage_recognised(folder):
        meta = _read_meta(folder)
    saved, prints = (_below(subtree, meta[k]) for k in ("arrays", "fingerprints"))
    on_host = target is None
    if on_host:
        shapes = {name: jax.ShapeDtypeStruct(*array) for name, array in saved.items()}
        target = unflatten_dict(shapes, sep="/")
    if different := differences(saved, describe(target)):
        raise ValueError(
            f"Checkpoint {step} in {manager.directory} holds another model or "
            f"optimiser; these arrays differ:\n{different}\nUse the recipe that wrote "
            f"it, or another directory."
        )
    item = {subtree: target} if subtree else target
    restore_args = (
        jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        if on_host
        else ocp.checkpoint_utils.construct_restore_args(item)
    )
    args = ocp.args.PyTreeRestore(
        item, restore_args=restore_args, partial_restore=bool(subtree)
    )
    with _damage_recognised(folder):
        state = manager.restore(step, args=ocp.args.Composite(state=args)).state
        state = state[subtree] if subtree else state
    # A partial restore leaves what it does not find as it was, without a word.
    array = np.ndarray if on_host else jax.Array
    if missing := [n for n, x in leaves(state) if not isinstance(x, array)]:
        raise _DamagedError(f"it lacks {missing}", agreed=True)
    found = fingerprint(state)
    if wrong := sorted(name for name in found if found[name] != prints[name]):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise _DamagedError(f"wrong bits in {wrong[:3]}{more}", agreed=True)
    return state


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    # A changed shape would otherwise pass for another model.
    return _unsealed((folder / "meta" / "metadata").read_text())


_ADDED = "added_metrics.json"


def _read_added(folder: epath.Path) -> dict[str, float]:
    """What `add_metrics` has added to the checkpoint in `folder`."""
    path = folder / _ADDED
    if not path.exists():
        return {}
    try:
        return _unsealed(path.read_text())["metrics"]
    except ValueError as error:  # no text, no JSON, or wrong bits
        raise _DamagedError(f"the metrics in {_ADDED} are damaged ({error})") from error


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own checksum."""
    return {**record, "checksum": _checksum(record)}


def _unsealed(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record, dict) or record.pop("checksum", None) != _checksum(
        record
    ):
        raise ValueError("wrong bits in its description")
    return record


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _write_durably(path: epath.Path, text: str) -> None:
    """Whole or not at all, also if the machine loses power."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            if hasattr(file, "fileno"):  # not on a bucket
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Trouble of this machine, not of the files: they may be good.
_TROUBLE = (MemoryError, ImportError, OSError, jax.errors.JaxRuntimeError)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore raises ValueError with the name of a status; Orbax a bare Exception.
_TROUBLE_STATUS = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE"
    "|DEADLINE_EXCEEDED|CANCELLED|ABORTED"
)


@contextlib.contextmanager
def _damage_recognised(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except _DamagedError:
        raise
    # Orbax shows damage as ValueError, KeyError, JSON errors or a bare Exception.
    except Exception as error:
        link: BaseException | None = error
        while link is not None:
            trouble = isinstance(link, _TROUBLE) and not isinstance(link, _MISSING)
            if trouble or _TROUBLE_STATUS.search(str(link)):
                raise
            link = link.__cause__ or link.__context__
        with contextlib.suppress(*_MISSING):
            _list_all(folder)
        raise _DamagedError(_brief(error)) from error


def _list_all(folder: epath.Path) -> None:
    """A PermissionError for what Orbax reports as missing."""
    for path in folder.iterdir():
        if path.is_dir():
            _list_all(path)


def _brief(error: BaseException) -> str:
    """Its type and first line: Orbax appends pages of storage specifications."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:200]}"


class _KeepBest:
    """Orbax's preservation policy by metrics of ours.

    Orbax keeps its own metrics in a file that, damaged, stops the manager from opening.
    """

    def __init__(self, scores: Mapping[int, float], more_is_better: bool):
        self._scores, self._more_is_better = scores, more_is_better

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        steps = [info.step for info in checkpoints]
        scores = {s: self._scores[s] for s in steps if s in self._scores}
        best = _best(scores, self._more_is_better)
        # Without a score its metrics could not be read: it may have been the best.
        return [step == best or step not in self._scores for step in steps]


def _scores(directory: epath.Path, steps: Sequence[int], name: str) -> dict[int, float]:
    """{step: metric} of those that can be read; nan if it was not measured."""
    scores = {}
    for step in steps:
        folder = _folder(directory, step)
        try:
            with _damage_recognised(folder):
                metrics = _read_meta(folder)["metrics"] | _read_added(folder)
            scores[step] = metrics.get(name, math.nan)
        except _DamagedError as damage:
            logger.error("Checkpoint %d has no readable metrics (%s)", step, damage)
    return scores


def _best(scores: Mapping[int, float], more_is_better: bool) -> int | None:
    """The step of the best score, the later one of equals."""
    sign = 1 if more_is_better else -1
    known = [(sign * x, step) for step, x in scores.items() if math.isfinite(x)]
    return max(known)[1] if known else None


def _open(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    _silence_orbax()
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(step_format_fixed_length=8, **options),
    )


def _silence_orbax() -> None:
    """Drops what Orbax says below an error, and nobody else's lines.

    It logs some hundred lines per save to absl's logger; absl's verbosity is left alone
    because under `app.run` it is the root logger's, where our own lines pass. After a
    read or write that failed, the others fail too, unheard, at some later time: each
    would print a page.
    """
    logging.getLogger("absl").addFilter(_is_not_chatter)
    hook = sys.unraisablehook
    if getattr(hook, "without_orbax", False):
        return

    def without_orbax(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        orbax = code is not None and _ORBAX in code.co_filename
        # TensorStore's threads name no object.
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not (orbax or (late and unraisable.object is None)):
            hook(unraisable)

    without_orbax.without_orbax = True  # type: ignore[attr-defined]
    sys.unraisablehook = without_orbax


_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


def _is_not_chatter(record: logging.LogRecord) -> bool:
    if _ORBAX not in record.pathname:
        return True
    # A clean-up that the end of the program overtakes: the next start does it.
    overtaken = "cannot schedule new futures" in record.getMessage()
    return record.levelno >= logging.ERROR and not overtaken


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    path = os.fspath(directory)
    return epath.Path(path if "://" in path else os.path.abspath(path))


def _folder(directory: epath.Path, step: int) -> epath.Path:
    return directory / f"{step:08d}"


def _names(directory: epath.Path, pattern: str) -> list[str]:
    return sorted(path.name for path in directory.glob(pattern))


def _none_left(directory: epath.Path, damaged: Sequence[str]) -> str:
    return (
        f"No intact checkpoint is left in {directory}, only damaged ones: "
        f"{list(damaged)}. Put a copy back under its step's name of eight digits, or "
        f"move them all away to start from scratch."
    )


def _check_target(target: PyTree) -> None:
    """What Orbax would only notice while reading must not pass for damage."""
    for name, x in leaves(target):
        if getattr(x, "sharding", None) is None:
            raise TypeError(
                f"The target's {name} is {x!r}; expected a jax.ShapeDtypeStruct with "
                f"a sharding."
            )
        x.sharding.shard_shape(x.shape)  # a ValueError if they do not fit


def _below(subtree: str, named: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{subtree}/" if subtree else ""
    return {n.removeprefix(start): v for n, v in named.items() if n.startswith(start)}
