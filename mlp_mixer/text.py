"""Text from outside, made fit to print."""

from collections.abc import Sequence


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(text: object, most: int = 200) -> str:
    """`text` in one printable line of at most `most` characters."""
    line = printable(str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def listed(lines: Sequence[str], most: int = 18) -> str:
    """The first `most` lines, each indented and brief, and how many more there are."""
    shown = [f"  {brief(line)}" for line in lines[:most]]
    more = [f"  and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n".join(shown + more)
