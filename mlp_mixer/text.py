"""Text from outside (names of files, classes and data sets), for people to read."""

import re

# Controls, line separators, marks that turn the direction of what follows them, and
# lone surrogates, which no encoding can write.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text on one line, for any terminal; what cannot be shown is escaped."""
    return _UNPRINTABLE.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), text
    )
