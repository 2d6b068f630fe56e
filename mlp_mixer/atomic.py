"""Files that have their name only once they are complete."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], mode: str = "wb", **options: Any
) -> Iterator[IO[Any]]:
    """Opens `path` for writing; an error on the way leaves what was there before.

    Args:
      path: of the file; its folder is made.
      mode: "wb" or "w".
      **options: of `open`.
    """
    path = pathlib.Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():  # /dev/stdout, say: nothing to replace
        with open(path, mode, **options) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, mode, **options) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
