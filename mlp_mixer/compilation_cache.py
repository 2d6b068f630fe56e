"""Keeps compiled programs in a folder, so that the next start need not compile again.

JAX writes and reads the files (its persistent compilation cache). A file's name is a
digest of the program, the compiler's options, the devices and the version of jaxlib, so
versions do not meet. What JAX leaves out is here: a folder, a limit to its size, and
the CPU for which programs of CPUs are compiled. A file that cannot be read or written
costs a warning of JAX's and a compilation.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import tempfile
from typing import Any

import jax
from etils import epath

from mlp_mixer import files

logger = logging.getLogger(__name__)

OFF = "off"
# Compressed, a program of this project has 0.1 to 5 MB: hundreds of programs.
MAX_BYTES = 2**30
# Programs that compile faster are not kept: there are many, and reading them takes as
# long. JAX's own limit of a second leaves out half of what a small run compiles.
MIN_SECONDS = 0.1


def keep_programs(folder: str | os.PathLike[str] | None) -> None:
    """Makes JAX keep what it compiles from here on, and says where in the log.

    Of a run with several processes, JAX lets the first one write and all read. So the
    folder must be one that all see, and nobody but its user knows which that is, or
    who else may write there: without a choice of theirs, such a run keeps nothing.

    Args:
      folder: where, also on a bucket (`gs://…`); "off" compiles everything anew. None:
        the folder of JAX's own settings (JAX_COMPILATION_CACHE_DIR), else, of a single
        process, one in the user's cache folder.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and (_chosen_by_jax() or jax.process_count() > 1):
        return
    place = epath.Path(folder or files.default_cache_dir() / "compiled") / _device()
    try:
        _prepare(place)
    except OSError as error:
        logger.warning("Compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    logger.info("Compiled programs are kept in %s.", place)


def _prepare(place: epath.Path) -> None:
    """Makes the folder, and room in it; on a bucket that is its lifecycle rules' work.

    Raises:
      OSError: it cannot be written.
    """
    if "://" in os.fspath(place):
        return
    # Whoever may write here may have this process run anything.
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if jax.process_index() == 0:
        tempfile.TemporaryFile(dir=place).close()
        remove_oldest(pathlib.Path(place), MAX_BYTES)


def _chosen_by_jax() -> bool:
    """Whether JAX's own settings name a folder, or switch its cache off."""
    config: Any = jax.config
    return bool(
        config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache
    )


def _device() -> str:
    """A name for the devices that compiled programs are for.

    Programs of CPUs use the instructions of the CPU that compiled them, which is no
    part of JAX's digest: hosts that share a home folder may have different ones.
    """
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    about = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        about += sorted({line for line in lines if line.startswith(names)})
    digest = hashlib.sha256("\n".join(about).encode()).hexdigest()
    return f"cpu-{digest[:12]}"


def remove_oldest(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the oldest programs of a folder until the others have `max_bytes`.

    JAX's own limit needs a lock, and a process that is killed while it writes makes
    every later write fail.

    Raises:
      OSError: one cannot be removed.
    """
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process removes too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
