"""Text from outside (names of files, classes and data sets), for people to read.

Names are kept as they are, and are made readable where they are shown: any character is
allowed in them, and bytes that are no text too (Python's lone surrogates).
"""

import codecs
import io
import re

# Controls, line separators, marks that turn the direction of what follows them, and
# lone surrogates, which no encoding can write.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What this project writes itself, for an encoding that lacks it.
_PLAIN = {"×": "x", "→": "->", "…": "~", "−": "-", "│": "|", "─": "-"}
# In GitHub's Markdown; an underscore only where it could begin or end emphasis.
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


def markdown(text: str) -> str:
    r"""The text as a cell of a Markdown table shows it: nothing in it is markup.

    >>> markdown("a|b_c")
    'a\\|b_c'
    """
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def accept_any_text(*streams: object) -> None:
    """Lets text files print what their encoding lacks, with a stand-in or escaped.

    Args:
      streams: e.g. `sys.stdout`; what is no text file over bytes stays as it is.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_STAND_IN)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _escaped(c) for c in lacking), error.end


_STAND_IN = "mlp_mixer.stand_in"
codecs.register_error(_STAND_IN, _stand_in)
