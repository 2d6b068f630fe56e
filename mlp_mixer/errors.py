"""Which errors a person understands without a traceback."""

import dis
import errno
import os
from collections.abc import Sequence


def message(error: BaseException, modules: Sequence[str] = ()) -> str | None:
    """What to print of an error instead of its traceback; None: nothing explains it."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None:
            names = (error.filename, error.filename2)
            where = " → ".join(_as_text(name) for name in names if name is not None)
            return f"{where}: {error.strerror}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.strerror}."
    return str(error) or None if _raised_on_purpose(error, modules) else None


def _as_text(name: str | bytes | int) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _raised_on_purpose(error: BaseException, modules: Sequence[str] = ()) -> bool:
    """Whether a `raise` of this project, of a recipe or of `modules` made the error.

    What Python itself raised in our code, `int("x")` or a missing key, is a bug of
    ours: its message explains nothing, and its traceback is needed.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    where, code = trace.tb_frame.f_globals, trace.tb_frame.f_code.co_code
    instruction, count = code[trace.tb_lasti : trace.tb_lasti + 2]
    # Of no argument: a `raise` with nothing to raise again.
    if dis.opname[instruction] != "RAISE_VARARGS" or not count:
        return False
    name = where.get("__name__", "").partition(".")[0]
    # A recipe has some name or other, depending on how it was loaded.
    return "get_config" in where or name in ("mlp_mixer", "__main__", *modules)
