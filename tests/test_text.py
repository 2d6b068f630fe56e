"""What people read: any name on one line, in any encoding, and no markup in it."""

import io

import pytest
from odd_names import NAMES

from mlp_mixer import text


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


def test_what_we_write_ourselves_keeps_its_width_in_any_encoding():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text.accept_any_text(stream)
    stream.write("max |Δlogit|, 8 × 8 → 4, − …")
    stream.flush()
    assert stream.buffer.getvalue() == b"max |dlogit|, 8 x 8 -> 4, - ~"


def test_markdown_shows_a_cell_as_it_is():
    assert text.markdown("a|b\nc") == r"a\|b\\nc"
    assert text.markdown("$x$ *y* `z` <b> [l]") == (r"\$x\$ \*y\* \`z\` \<b\> \[l\]")
    assert text.markdown("vision_transformer 5shot_l2") == "vision_transformer 5shot_l2"
    assert text.markdown("_emphasis_") == r"\_emphasis\_"


def test_a_width_counts_columns_of_a_terminal():
    assert [*map(text.width, ("abc", "日本", "e\u0301", "🐱"))] == [3, 4, 1, 2]


@pytest.mark.parametrize("end", [0, 3, 9])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_shortened_name_fits_and_keeps_both_ends(name, end):
    whole, short = text.printable(name), text.shortened(name, 10, end)
    assert text.width(text.padded(short, 10)) == 10
    begins, cut, ends = short.partition("…")
    assert (short == whole) == (not cut) == (text.width(whole) <= 10)
    assert whole.startswith(begins)
    assert whole.endswith(ends)


def test_what_is_encodable_keeps_bytes_and_escapes_halves():
    name = "caf\udce9 \ud83d é"
    said = text.encodable(name).encode("utf-8", "surrogateescape")
    assert said == b"caf\xe9 \\ud83d " + "é".encode()


def test_a_stdout_that_fails_is_one_error_that_says_why():
    stream = open("/dev/full", "w")  # noqa: SIM115
    said = r"stdout cannot be written: No space left"
    with pytest.raises(OSError, match=said), text.flushed(stream):
        stream.write("a result")
    stream.close()  # it writes what is left, and does not fail again
    with text.flushed(None):
        pass
