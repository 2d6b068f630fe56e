"""Rows of batches that say where they belong, for threads and worker processes."""

import dataclasses
import os
from typing import Any

import numpy as np


class TwoArgumentsError(Exception):
    """Cannot be unpickled, as it keeps one of its two arguments."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


@dataclasses.dataclass(frozen=True)
class Counted:
    """Rows filled with (step, row), and who made them; one of them may fail."""

    rows: int = 5
    steps: int = 2**40
    broken_step: int = -1
    error: type = ValueError

    @property
    def blank(self) -> dict[str, Any]:
        """A row of zeros."""
        return {"image": np.zeros((3, 2), np.uint8), "place": np.zeros(2), "by": 0}

    def row(self, step: int, row: int) -> dict[str, Any]:
        """The row of this place."""
        if (step, row) == (self.broken_step, self.rows - 1):
            if self.error is TwoArgumentsError:
                raise TwoArgumentsError("row", "broken")
            raise self.error(f"row {row} of step {step} is broken")
        image = np.full((3, 2), step % 251, np.uint8)
        return {"image": image, "place": np.array([step, row]), "by": os.getpid()}
