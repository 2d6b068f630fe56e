"""Makes names of files, classes and data sets readable where they are shown.

Names may hold any character, and bytes that are no text (Python's lone surrogates).
"""

import codecs
import contextlib
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

# Controls, line separators, marks that turn the direction of what follows them, and
# lone surrogates, which no encoding can write.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Lone surrogates that do not stand for a byte.
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# Stand-ins for this project's own characters, for encodings that lack them.
_PLAIN = {"×": "x", "→": "->", "…": "~", "−": "-", "Δ": "d", "│": "|", "─": "-"}
# Markup in GitHub's Markdown; an underscore only where emphasis could begin or end.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|$~#]|(?<!\w)_|_(?!\w)")


def printable(text: str, keep: str = "") -> str:
    r"""The text on one line, for any terminal; what cannot be shown is escaped.

        >>> printable("a\nb\x1b[31m \udcff")
        'a\\nb\\x1b[31m \\udcff'

    Args:
      text: may hold control characters and lone surrogates.
      keep: characters that stay as they are, e.g. the line ends of a message.
    """
    return _UNPRINTABLE.sub(
        lambda match: match[0] if match[0] in keep else _escaped(match[0]), text
    )


def brief(text: object, most: int = 200) -> str:
    """`text` in one printable line of at most `most` characters."""
    line = printable(str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def listed(lines: Sequence[str], most: int = 18) -> str:
    """The first `most` lines, each indented and brief, and how many more there are."""
    shown = [f"  {brief(line)}" for line in lines[:most]]
    more = [f"  and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n".join(shown + more)


def quoted(names: Sequence[str], most: int = 10) -> str:
    """The first `most` names on one line, in quotes, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:most]) + more


def width(text: str) -> int:
    """How many columns of a terminal the text takes: two for each ideogram."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def shortened(text: str, room: int, end: int = 0) -> str:
    """The text on one line, at most `room` columns wide.

        >>> shortened("a long name", 7), shortened("a long name", 7, end=2)
        ('a long…', 'a lo…me')

    Args:
      text: any text; what cannot be shown is escaped.
      room: width in columns of a terminal.
      end: number of columns that show the end of a text that is longer.
    """
    text = printable(text)
    if width(text) <= room:
        return text
    return f"{_beginning(text, room - end - 1)}…{_beginning(text[::-1], end)[::-1]}"


def padded(text: str, room: int) -> str:
    """The text with blanks up to `room` columns."""
    return text + " " * (room - width(text))


def encodable(text: str) -> str:
    r"""The text, escaped where `errors="surrogateescape"` cannot encode it.

    Bytes that are no text stay those bytes; halves of surrogate pairs, which JSON can
    hold, are written like \ud83d.
    """
    return _HALVES.sub(lambda match: _escaped(match[0]), text)


def _beginning(text: str, room: int) -> str:
    widths = itertools.accumulate(map(width, text))
    return text[: sum(so_far <= room for so_far in widths)]


def markdown(text: str) -> str:
    r"""The text as a cell of a Markdown table shows it: nothing in it is markup.

    >>> markdown("a|b_c")
    'a\\|b_c'
    """
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def accept_any_text(*streams: object) -> None:
    """Lets text files replace or escape what their encoding lacks.

    Args:
      streams: e.g. `sys.stdout`; only text files that encode to bytes are changed.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_STAND_IN)


@contextlib.contextmanager
def flushed(stdout: Any) -> Iterator[None]:
    """Flushes stdout when the block ends; Python does not report a failure again.

    Args:
      stdout: `sys.stdout`; None if it is closed.

    Raises:
      BrokenPipeError: nobody reads it any more.
      OSError: it cannot be written, e.g. its disk is full.
    """
    try:
        yield
        if stdout:
            stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would try at the exit to write what is left, and fail again.
        if stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        raise OSError(f"stdout cannot be written: {error.strerror}.") from error


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _escaped(c) for c in lacking), error.end


_STAND_IN = "mlp_mixer.stand_in"
codecs.register_error(_STAND_IN, _stand_in)
