"""Writes checkpoints with Orbax, and verifies them when they are read.

No other module uses Orbax or the files of a checkpoint. A checkpoint is a folder named
after its step with two items: `state` (the arrays) and `meta` (the description: step,
names, shapes, dtypes and fingerprints of the arrays, and the metrics). Orbax notices
most truncated files but no flipped bit; the description and the fingerprints notice
both. A checkpoint counts as damaged only if it contradicts a recorded checksum, or a
file is missing, cut or not in its format; any other error is passed on as it is.
"""

import contextlib
import fnmatch
import json
import logging
import os
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from mlp_mixer import files
from mlp_mixer.fingerprints import (
    PyTree,
    describe,
    differences,
    fingerprint,
    leaves,
)
from mlp_mixer.text import quoted

logger = logging.getLogger(__name__)


class DamagedError(Exception):
    """What was read is not what was saved.

    Attributes:
      agreed: whether every process can tell.
    """

    def __init__(self, reason: str, *, agreed: bool = False):
        super().__init__(reason)
        self.agreed = agreed


# --- Paths ----------------------------------------------------------------------------


@epath.register_path_cls  # so that Orbax does not convert it
class _Path(type(epath.Path())):  # type: ignore[misc]
    """A path whose name is never a pattern, with an alias for TensorStore if needed."""

    def glob(self, pattern: str) -> Iterator["_Path"]:
        """Yields the paths below that match; `pattern` has no "**"."""
        first, _, rest = pattern.partition("/")
        for path in sorted(self.iterdir()) if self.is_dir() else ():
            if fnmatch.fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else [path]

    def write_text(self, data: str, *args: Any, **options: Any) -> int:
        """Writes UTF-8 in any locale; Orbax writes paths, which may hold any bytes."""
        return self.write_bytes(data.encode("utf-8", "surrogateescape"))

    def as_posix(self) -> str:
        """The name that Orbax passes to TensorStore."""
        odd = [i for i, part in enumerate(self.parts) if _NEEDS_ALIAS.search(part)]
        if not odd or "://" in os.fspath(self):
            return os.fspath(self)
        return str(
            pathlib.PurePosixPath(
                _alias_of("/".join(self.parts[: odd[-1] + 1])),
                *self.parts[odd[-1] + 1 :],
            )
        )


# TensorStore reads "\\" as "/" and accepts only UTF-8; "gs:" is a bucket to Orbax.
_NEEDS_ALIAS = re.compile(r"\\|gs:$|[\ud800-\udfff]")
_ALIASES = "/proc/self/fd"
_open_folders: dict[tuple[int, int], int] = {}


def _alias_of(folder: str) -> str:
    """Another name of an existing folder, valid while this process lives."""
    found = os.stat(folder)
    inode = found.st_dev, found.st_ino
    if inode not in _open_folders:
        _open_folders[inode] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    return f"{_ALIASES}/{_open_folders[inode]}"


def locate(directory: str | os.PathLike[str]) -> epath.Path:
    """The directory as an absolute path, or a bucket's path (`gs://…`).

    Raises:
      ValueError: Python or TensorStore cannot open a directory of this name.
    """
    name = os.fspath(directory)
    if scheme := re.match(r"\w[\w+.-]*://", name):
        try:
            return _Path(epath.Path(name))
        except KeyError as error:
            raise ValueError(
                f"{name} begins with {scheme[0]}; expected a folder, or a bucket such "
                f"as gs://…"
            ) from error
    # After a link, ".." is not the folder before it in the name.
    dots = os.pardir in pathlib.PurePath(name).parts
    absolute = os.path.realpath(name) if dots else os.path.abspath(name)
    try:
        os.fsencode(absolute)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{absolute!a} cannot be named in this locale, whose encoding is "
            f"{sys.getfilesystemencoding()}. Set LC_ALL=C.UTF-8 or PYTHONUTF8=1."
        ) from error
    path = _Path(absolute)
    if os.fspath(path) != absolute:
        raise ValueError(
            f"{absolute} would be taken for {path}. Use a folder with another name."
        )
    if any(map(_NEEDS_ALIAS.search, path.parts)) and not os.path.isdir(_ALIASES):
        raise ValueError(
            f"{absolute!a} has a backslash, an end in gs:, or bytes that are not "
            f"UTF-8; TensorStore cannot open that. Use a folder with another name."
        )
    return path


def step_folder(directory: epath.Path, step: int) -> epath.Path:
    """The folder of one checkpoint."""
    return directory / f"{step:08d}"


def list_names(directory: epath.Path, pattern: str = "*") -> list[str]:
    """The names in the directory that match, sorted; none if it does not exist."""
    return [path.name for path in directory.glob(pattern)]


def unfinished_saves(directory: epath.Path) -> list[str]:
    """The names of unfinished saves that a killed process has left."""
    return list_names(directory, f"*{_UNFINISHED}*")


_UNFINISHED = ".orbax-checkpoint-tmp"


def is_dropped(folder: epath.Path, patience: float = 1.0) -> bool:
    """Whether a training run has dropped this checkpoint, or is dropping it now.

    The newest one is never dropped. A folder that does not change for `patience`
    seconds is taken to stay.
    """
    seen, since = None, time.monotonic()
    while folder.exists():
        if max(list_names(folder.parent, "[0-9]" * 8), default="") == folder.name:
            return False
        now = sorted(
            f"{root}/{name}" for root, _, files in folder.walk() for name in files
        )
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return False
        time.sleep(0.05)
    return True


# --- Opening and writing --------------------------------------------------------------


def open_for_reading(directory: epath.Path) -> ocp.CheckpointManager:
    """Opens a directory without deleting what a training run is writing there."""
    return _open(directory, read_only=True)


def open_for_writing(
    directory: epath.Path,
    *,
    keep_latest: int,
    keep_every_steps: int | None,
    keep_also: Callable[[Sequence[int]], Sequence[bool]],
    saving: Callable[[], int],
) -> ocp.CheckpointManager:
    """Opens a directory, makes it if needed, and removes unfinished saves.

    Args:
      directory: result of `locate`.
      keep_latest: number of the newest checkpoints that are kept.
      keep_every_steps: number of steps; checkpoints at its multiples are kept for ever.
      keep_also: steps → whether each is kept for another reason.
      saving: function that returns the step that is being saved.
    """
    policies = ocp.checkpoint_managers
    keep: list[Any] = [policies.LatestN(keep_latest), _KeepAlso(keep_also)]
    if keep_every_steps is not None:
        keep.append(policies.EveryNSteps(keep_every_steps))
    return _open(
        directory,
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy(keep),
        async_options=ocp.AsyncOptions(
            post_finalization_callback=lambda: _record_files(directory, saving()),
            barrier_sync_fn=_wait_for_the_others if jax.process_count() > 1 else None,
        ),
    )


def _wait_for_the_others(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not if the save of this one has just failed.

    Orbax waits here with the error in its hand, while the others wait elsewhere for
    this process to write: all for ten minutes. So it raises the error at once, and the
    job ends.
    """
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _KeepAlso:
    """A preservation policy of Orbax's that asks a function.

    Orbax's own policy for the best keeps metrics in a file; if that is damaged, the
    manager cannot be opened.
    """

    def __init__(self, keep: Callable[[Sequence[int]], Sequence[bool]]):
        self._keep = keep

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        return self._keep([info.step for info in checkpoints])


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Says no: `signals` decides when to stop.

        JAX takes what it is asked with for the caller's position, so nobody else may
        ask it.
        """
        return False


def _open(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    _silence_orbax()
    return _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(step_format_fixed_length=8, **options),
    )


def start_saving(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    fingerprints: Mapping[str, int],
    metrics: Mapping[str, float],
) -> None:
    """Saves in the background; after it returns, buffers of `state` may be donated."""
    description = {
        "step": step,
        "arrays": describe(state),
        "fingerprints": fingerprints,
        "metrics": metrics,
    }
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(_with_arrays(state)),
        meta=ocp.args.JsonSave(_with_checksum(description)),
    )
    # Without `force` Orbax would decide itself whether to save, without a word.
    manager.save(step, args=items, force=True)


_FILES = "meta/files"


def _record_files(directory: epath.Path, step: int) -> None:
    """Writes checksums of Orbax's files, before Orbax gives the folder its name.

    TensorStore checks the files of the arrays; nobody checks these.
    """
    if jax.process_index() > 0:
        return
    folder = step_folder(directory, step)  # on a bucket it has its name already
    [*written] = directory.glob(f"{folder.name}{_UNFINISHED}*")
    folder = written[0] if written else folder
    checksums = {
        f"{path.relative_to(folder)}": zlib.crc32(path.read_bytes())
        for pattern in ("state/*", "state/array_metadatas/*")
        for path in folder.glob(pattern)
        if path.is_file()
    }
    (folder / _FILES).write_text(json.dumps(_with_checksum({"files": checksums})))


def _changed_files(folder: epath.Path) -> list[str]:
    """The files that differ from the record of `_record_files`, if there is one."""
    if not (folder / _FILES).exists():
        return []
    try:
        checksums = _read_checked(folder / _FILES)["files"]
    except DamagedError as damage:
        return [str(damage)]
    return [
        f"{name} {'changed' if (folder / name).is_file() else 'is missing'}"
        for name, checksum in checksums.items()
        if not (folder / name).is_file()
        or zlib.crc32((folder / name).read_bytes()) != checksum
    ]


# --- Reading --------------------------------------------------------------------------


def read_checkpoint(
    manager: ocp.CheckpointManager, step: int, target: PyTree, subtree: str = ""
) -> PyTree:
    """Reads one checkpoint, or a subtree of it, and verifies it.

    Args:
      manager: result of `open_for_reading` or `open_for_writing`.
      step: step of the checkpoint.
      target: a tree of `jax.ShapeDtypeStruct` with shardings; None for NumPy arrays.
      subtree: path of the only branch of the state that is read, e.g. "params" or
        "opt_state/3/params"; all if empty.

    Raises:
      DamagedError: it is not what was saved.
      ValueError: it holds another model, or another step.
    """
    folder = step_folder(epath.Path(manager.directory), step)
    with _damage_recognised(folder):
        description = _read_description(folder)
        if not (folder / "state").is_dir():
            raise FileNotFoundError(f"{folder / 'state'} is missing")
    _check_step(folder, step, description)
    start = f"{subtree}/" if subtree else ""
    saved, prints = (
        {
            name.removeprefix(start): value
            for name, value in description[key].items()
            if name.startswith(start)
        }
        for key in ("arrays", "fingerprints")
    )
    if subtree and not saved and target is None:
        return {}
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
    item = _at(subtree, target) if subtree else _with_arrays(target)
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
    if subtree:
        for part in subtree.split("/"):
            state = state[int(part) if isinstance(state, list) else part]
    elif item is not target:
        state = target._replace(**state)
    # A partial restore returns the target itself for what it does not find.
    array = np.ndarray if on_host else jax.Array
    if missing := [n for n, x in leaves(state) if not isinstance(x, array)]:
        raise DamagedError(f"it lacks {missing}", agreed=True)
    found = fingerprint(state)
    if wrong := sorted(name for name in found if found[name] != prints[name]):
        raise DamagedError(f"wrong bits in [{quoted(wrong, 3)}]", agreed=True)
    return state


def _at(path: str, branch: PyTree) -> PyTree:
    """A branch with what it hangs on, as Orbax has it: tuples are lists."""
    for part in reversed(path.split("/")):
        branch = [*[None] * int(part), branch] if part.isdigit() else {part: branch}
    return branch


def branch_of_average(manager: ocp.CheckpointManager, step: int) -> str:
    """Returns where `optim.Average` is in a checkpoint: "opt_state/3/".

    Raises:
      DamagedError: the checkpoint does not describe itself.
      ValueError: it is not there.
    """
    folder = step_folder(epath.Path(manager.directory), step)
    with _damage_recognised(folder):
        names = list(_read_description(folder)["arrays"])
    for name in names:
        if found := re.match(r"opt_state/\d+/(?=params/)", name):
            return found[0]
    raise ValueError(
        f"Checkpoint {step} in {manager.directory} holds no average of the parameters; "
        "it is there if the run's recipe has an optim.ema above 0."
    )


def _with_arrays(state: PyTree) -> PyTree:
    """A named tuple as a dict without the fields that are {}, which Orbax would record.

    So checkpoints of a model without statistics are as they were before `stats`.
    """
    if not hasattr(state, "_asdict"):
        return state
    fields = state._asdict().items()
    return {k: v for k, v in fields if not isinstance(v, Mapping) or v}


def _check_step(folder: epath.Path, step: int, description: Mapping[str, Any]) -> None:
    held = description.get("step")
    if held == step:
        return
    if held is None:  # an old description has no step, but the state may have one
        shape, dtype = description["arrays"].get("step", (None, None))
        if shape != [] or not dtype.startswith(("int", "uint")):
            return
        expected = fingerprint({"step": jnp.asarray(step, dtype)})
        if expected["step"] == description["fingerprints"]["step"]:
            return
    raise ValueError(
        f"{folder} holds {'another step' if held is None else f'step {held}'}, not "
        f"step {step}: it was renamed or copied. Give it the name of its step "
        f"({'eight digits' if held is None else f'{held:08d}'}), or move it away."
    )


def read_metrics(folder: epath.Path) -> dict[str, float]:
    """The metrics of one checkpoint; raises DamagedError if they are damaged."""
    with _damage_recognised(folder):
        return _read_description(folder)["metrics"] | _read_added_metrics(folder)


def add_metrics(folder: epath.Path, step: int, metrics: Mapping[str, float]) -> None:
    """Writes metrics beside the description; raises OSError if that fails."""
    try:
        before = _read_added_metrics(folder)
    except DamagedError as damage:
        logger.error("Checkpoint %d: %s; they are replaced", step, damage)
        before = {}
    record = {"step": step, "metrics": {**before, **metrics}}
    files.write_text(folder / _ADDED, json.dumps(_with_checksum(record)))


_ADDED = "added_metrics.json"


def _read_added_metrics(folder: epath.Path) -> dict[str, float]:
    path = folder / _ADDED
    return _read_checked(path)["metrics"] if path.exists() else {}


def _read_description(folder: epath.Path) -> dict[str, Any]:
    return _read_checked(folder / "meta" / "metadata")


def _with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a checksum, so that damage does not look like another model."""
    return {**record, "checksum": _checksum(record)}


def _read_checked(path: epath.Path) -> dict[str, Any]:
    """The record in a file; raises DamagedError if its checksum is wrong."""
    where = f"{path.parent.name}/{path.name}"
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise DamagedError(f"{where} is no JSON: {first_line(error)}") from error
    if isinstance(record, dict) and record.pop("checksum", None) == _checksum(record):
        return record
    raise DamagedError(f"wrong bits in {where}")


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


# --- Which errors are damage ----------------------------------------------------------

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore raises ValueError with a status: wrong checksum, missing file, cut file,
# file of another size. It says "Error decoding" of bytes that it cannot decompress.
_DAMAGED = re.compile("(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION): ")


def _shows_damage(error: BaseException, folder: epath.Path) -> bool:
    if type(error) is Exception:  # Orbax's wrapper
        cause = error.__cause__ or error.__context__
        return cause is not None and _shows_damage(cause, folder)
    if isinstance(error, _MISSING):
        return folder.name in str(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return True
    message = str(error)
    return type(error) is ValueError and (
        _DAMAGED.match(message) is not None or "Error decoding" in message
    )


@contextlib.contextmanager
def _damage_recognised(folder: epath.Path) -> Iterator[None]:
    """Turns errors that show damage into DamagedError; adds the folder to others."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:
        try:
            changed = _changed_files(folder)
            if not changed and _shows_damage(error, folder):
                _list_recursively(folder)
                changed = [first_line(error)]
        except OSError as trouble:  # Orbax calls files missing that are forbidden
            if not isinstance(trouble, _MISSING):
                raise trouble from error
            changed = [first_line(error)]
        if changed:
            raise DamagedError("; ".join(changed[:3])) from error
        error.add_note(
            f"While {folder} was read; nothing was changed there. If another "
            f"checkpoint can be read, move this one away."
        )
        raise


def _list_recursively(folder: epath.Path) -> None:
    """Raises OSError if a folder cannot be listed."""
    for path in folder.iterdir():
        if path.is_dir():
            _list_recursively(path)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, without TensorStore's specifications."""
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec=")[0]
    if len(line) > 240:
        line = f"{line[:80]} … {line[-150:]}"
    return f"{type(error).__name__}: {line}"


# --- Orbax's logging ------------------------------------------------------------------


def _silence_orbax() -> None:
    """Silences Orbax below ERROR, and no other library.

    It logs some hundred lines per save to absl's logger, and a page for each error.
    absl's verbosity is not changed, because under `app.run` it is the root logger's,
    which also takes this project's lines. After one failed read or write the remaining
    ones fail later, in threads that nobody awaits: each would print a traceback.
    """
    logging.getLogger("absl").addFilter(_is_not_chatter)
    logging.getLogger("asyncio").addFilter(_is_not_late)
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
    # It also raises whatever else it logs as an error. If the program ends before a
    # removal, the next start repeats that.
    message = record.getMessage()
    if "Failed to remove" not in message or "cannot schedule new futures" in message:
        return False
    error = record.exc_info and record.exc_info[1]
    record.msg = f"{message}: {first_line(error)}" if error else message
    record.args = record.exc_info = None
    return True


def _is_not_late(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "never retrieved" not in message or not (
        _ORBAX in message or "OCDBT" in message
    )
