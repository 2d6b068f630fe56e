"""One error for whatever the reader of a format raises of a file that is damaged."""

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator

from mlp_mixer.text import brief

ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def reported(
    path: str | os.PathLike[str], kind: str, *more: type[Exception]
) -> Iterator[None]:
    """Raises a ValueError that names the file, in one line, for each of these errors.

    Args:
      path: the file.
      kind: what it should be a whole one of, e.g. "npz file".
      *more: errors of its reader besides `ERRORS`.
    """
    errors: tuple[type[Exception], ...] = (*ERRORS, *more)
    try:
        yield
    except errors as error:
        reason = brief((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(
            f"{path} is not a whole {kind} ({reason}); copy or download it again."
        ) from error
