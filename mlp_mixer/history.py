"""What a run's folder says of its past, so that no start begins over it.

`saved.json` beside the checkpoints keeps the newest step that was saved whole: without
it, a run whose checkpoints are gone (a disk that is not mounted) looks like one that
was killed before its first save.
"""

import re

from etils import epath

from mlp_mixer import files, metrics

FILE = "saved.json"
_REMOVE = "If the checkpoints are there, remove it; it is written anew."
# Whole, unfinished, damaged and renamed ones; a disk of its own also has a lost+found.
_CHECKPOINT = re.compile(r"\d|damaged-")
# What a start restores, or says that it is damaged.
_TO_RESTORE = re.compile(r"\d{8,}$|damaged-")


def has_begun(workdir: epath.PathLike) -> bool:
    """Whether there is a result to lose; a wrong field may have prevented any."""
    return (
        bool(checkpoints(workdir))
        or _noted_step(workdir) is not None
        # At step 0 a start has noted its time alone.
        or any(record["step"] > 0 for record in metrics.read(workdir))
    )


def check_kept(workdir: epath.PathLike, every_steps: int) -> None:
    """Passes unless a start would begin again though the run was saved.

    Args:
      workdir: folder of the run.
      every_steps: steps between two saves, as the run was started last.

    Raises:
      FileNotFoundError: its checkpoints are gone.
    """
    found = checkpoints(workdir)
    if any(map(_TO_RESTORE.match, found)):
        return  # also if they are damaged: the place is the right one
    step = _noted_step(workdir)
    if step is None:
        if (
            any(".orbax-checkpoint-tmp" in name for name in found)
            or (epath.Path(workdir) / FILE).exists()
        ):
            return
        # Runs of old have no note, but the records tell when the first save was due.
        if max((r["step"] for r in metrics.read(workdir)), default=0) <= every_steps:
            return
        step = every_steps
    there = f"has only {found[:10]}" if found else "is missing or empty"
    raise FileNotFoundError(
        f"The checkpoints of the run in {workdir} are gone: step {step} was saved, and "
        f"checkpoints/ {there}. Is its disk mounted? Bring them back, each under its "
        "step's name of eight digits, or choose another --workdir. To begin again at "
        f"step 0, remove metrics.jsonl or metrics/, and {FILE} there."
    )


def checkpoints(workdir: epath.PathLike) -> list[str]:
    """The names in checkpoints/, unfinished and damaged ones too."""
    try:
        found = [path.name for path in (epath.Path(workdir) / "checkpoints").iterdir()]
    except FileNotFoundError:  # also a link to a place that is not there
        return []
    return sorted(filter(_CHECKPOINT.match, found))


def _noted_step(workdir: epath.PathLike) -> int | None:
    """The step that is noted; None if none was saved, or nothing is noted."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    try:
        step = files.read_json(path)["saved"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. {_REMOVE}") from error
    if not isinstance(step, int | None):
        raise ValueError(f"{path} says that step {step!r:.50} was saved. {_REMOVE}")
    return step


class Saved:
    """Notes in a run's folder which step was saved last."""

    def __init__(self, workdir: epath.PathLike):
        """Begins with what is there."""
        self._path = epath.Path(workdir) / FILE
        steps = [int(name) for name in checkpoints(workdir) if name.isdigit()]
        self._step = max(steps, default=_noted_step(workdir))
        self._write_note()

    def note(self, step: int | None) -> None:
        """Writes the step if it is another one; None: nothing was saved yet."""
        if step is not None and step != self._step:
            self._step = step
            self._write_note()

    def _write_note(self) -> None:
        try:
            files.write_json(self._path, {"saved": self._step})
        except OSError as error:  # of a full disk, which names no file
            raise OSError(error.errno, error.strerror, str(self._path)) from error
