"""What a run's folder says of its past, so that no start begins over it.

`saved.json` beside the checkpoints keeps the newest step that was saved whole: without
it, a run whose checkpoints are gone (a disk that is not mounted) looks like one that
was killed before its first save.
"""

import contextlib
import json
import logging
import re
import uuid
from typing import NamedTuple

from etils import epath

from mlp_mixer import metrics

logger = logging.getLogger(__name__)

FILE = "saved.json"
# Whole, unfinished and damaged ones; a disk of its own also has a lost+found.
_CHECKPOINT = re.compile(r"\d|damaged-")


class History(NamedTuple):
    """What has happened in a folder."""

    recorded: int | None  # the newest step in metrics.jsonl
    checkpoints: tuple[str, ...]  # the names in checkpoints/, unfinished ones too
    saved: int | None  # the newest step that was saved; None if not known
    is_noted: bool  # whether there is a saved.json: runs of old have none

    @property
    def has_begun(self) -> bool:
        """Whether there is a result to lose; a wrong field may have prevented any."""
        return bool(self.checkpoints) or (self.recorded, self.saved) != (None, None)

    def __str__(self) -> str:
        shown = ", ".join(self.checkpoints[-3:])
        facts = {
            f"records up to step {self.recorded}": self.recorded is not None,
            f"a checkpoint saved at step {self.saved}": self.saved is not None,
            f"in checkpoints/ {shown}": bool(self.checkpoints),
        }
        return (
            ", ".join(fact for fact, is_true in facts.items() if is_true) or "nothing"
        )


def read(workdir: epath.PathLike) -> History:
    """Returns the past of the run in `workdir`.

    Raises:
      ValueError: a file that tells it is damaged.
    """
    folder = epath.Path(workdir)
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # a link to nowhere, too
        found = [path.name for path in (folder / "checkpoints").iterdir()]
        names = sorted(filter(_CHECKPOINT.match, found))
    steps = [record["step"] for record in metrics.read(workdir)]
    note = folder / FILE
    saved = None
    if is_noted := note.exists():
        try:
            saved = json.loads(note.read_text())["saved"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{note} is damaged ({error}). If the checkpoints beside it are there, "
                "remove it."
            ) from error
    return History(max(steps, default=None), tuple(names), saved, is_noted)


def check(workdir: epath.PathLike, past: History, every_steps: int) -> None:
    """Passes unless a start would begin again though the run was saved.

    Args:
      workdir: folder of the run.
      past: of `read`.
      every_steps: steps between two saves, as the run was started last.

    Raises:
      FileNotFoundError: its checkpoints are gone.
    """
    unfinished = [name for name in past.checkpoints if ".orbax-checkpoint-tmp" in name]
    if len(unfinished) < len(past.checkpoints):
        return  # also if they are damaged: the place is the right one
    # Runs of old have no note, but the records tell when the first save was due.
    by_records = not past.is_noted and (past.recorded or 0) > every_steps
    if past.saved is None and (unfinished or not by_records):
        return
    step = every_steps if past.saved is None else past.saved
    raise FileNotFoundError(
        f"The checkpoints of the run in {workdir} are gone: step {step} was saved, and "
        "checkpoints/ is missing or empty. Is its disk mounted? Bring them back, or "
        "choose another --workdir. To begin again at step 0, remove metrics.jsonl and "
        f"{FILE} there."
    )


class Saved:
    """Notes in a run's folder which step was saved last."""

    def __init__(self, workdir: epath.PathLike, past: History):
        """Begins with what is there."""
        self._path = epath.Path(workdir) / FILE
        steps = [int(name) for name in past.checkpoints if name.isdigit()]
        self._step = max(steps, default=past.saved)
        if not past.is_noted:
            self._write()

    def note(self, step: int | None) -> None:
        """Writes the step if it is another one; None: nothing was saved yet."""
        if step is not None and step != self._step:
            self._step = step
            self._write()

    def _write(self) -> None:
        # Whole or not at all, also if the process is killed here.
        partial = self._path.with_name(f".{FILE}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps({"saved": self._step}) + "\n")
        partial.replace(self._path)
