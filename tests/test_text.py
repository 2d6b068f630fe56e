"""What people read: any name on one line, in any encoding, and no markup in it."""

import io
import os

import pytest

from mlp_mixer import text

# Every kind of name that a file system or a JSON file can hold.
NAMES = {
    "mathtext": "Ba$$in $x_1^{2}$ \\frac{a",
    "markup": "[bold]red[/] [/] [link=x]",
    "a table's": "a|b `c` *d* _e_ <f>",
    "percent": "100% %s {0} {x!r}",
    "lines": "a\nb\r\nc\td\x0b\x0c\x85\u2028e",
    "terminal": "\x1b[31mred\x1b[0m\x07\x9b2J",
    "bytes": os.fsdecode(b"caf\xe9 \xff"),
    "half a pair": "\ud83d and \ude00",
    "emoji": "🐱 👩‍🔬 :cat:",
    "CJK": "日本語のクラス",
    "right to left": "עברית العربية",
    "turned": "a\u202egnp.b\u2066c",
    "combining": "e\u0301\u0323\u0334 ",
    "nothing": "",
    "long": "a rather long name " * 26,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_what_is_printable_is_one_line_of_any_encoding(name):
    said = text.printable(name)
    assert len(said.splitlines()) <= 1
    assert not set(said) & {*map(chr, range(32)), "\x7f", "\x9b", "\u202e"}
    said.encode("utf-8")


def test_readable_names_stay_and_others_are_told_apart():
    for kind in ("mathtext", "markup", "percent", "emoji", "CJK", "right to left"):
        assert text.printable(NAMES[kind]) == NAMES[kind]
    assert text.printable("a\nb\x1b\udcff\u202e") == r"a\nb\x1b\udcff\u202e"
    assert text.printable("two\nlines\x1b", keep="\n") == "two\nlines\\x1b"
    assert len({*map(text.printable, NAMES.values())}) == len(NAMES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_stream_prints_any_name_in_its_encoding(name, encoding):
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding)
    text.accept_any_text(stream, None, io.StringIO())
    print(name, "8 × 8", "train → test", file=stream, flush=True)
    said = data.getvalue().decode(encoding)
    assert said.endswith(
        {"utf-8": "8 × 8 train → test\n", "ascii": "8 x 8 train -> test\n"}.get(
            encoding, "8 × 8 train -> test\n"
        )
    )


def test_markdown_shows_a_cell_as_it_is():
    assert text.markdown("a|b\nc") == r"a\|b\\nc"
    assert text.markdown("$x$ *y* `z` <b> [l]") == (r"\$x\$ \*y\* \`z\` \<b\> \[l\]")
    assert text.markdown("vision_transformer 5shot_l2") == "vision_transformer 5shot_l2"
    assert text.markdown("_emphasis_") == r"\_emphasis\_"
