"""Tests for console.py."""

import io
import logging
import re
import sys

import pytest
import rich.console
from odd_names import NAMES

from mlp_mixer import console, text


def test_a_counter_speaks_in_plain_lines_without_a_terminal(caplog):
    caplog.set_level("INFO")
    with console.counter(
        "tars", 4 * 10**9, "bytes", 10**9, every_seconds=0.0
    ) as advance:
        advance(10**9)
    with console.counter("images", 3000, "examples") as advance:
        advance(3000)  # within half a minute: no line between
    first, *others = [record.getMessage() for record in caplog.records]
    assert re.match(
        r"tars: 2.00 GB of 4.00 GB  [\d,.]+ GB/s  \d\d:\d\d:\d\d left", first
    )
    assert others == ["tars: 2.00 GB in 00:00:00", "images: 3,000 examples in 00:00:00"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", ["200", "20"])
def test_a_table_shows_any_name_in_any_encoding(encoding, columns, monkeypatch):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding))
    monkeypatch.setenv("COLUMNS", columns)
    text.accept_any_text(sys.stdout)
    rows = [[kind, name] for kind, name in NAMES.items()]
    console.Table("8 × 8 [bold] \udcff :cat:", ["", "[red]"], rows).show()
    said = data.getvalue().decode(encoding)
    assert ("8 × 8" if encoding != "ascii" else "8 x 8") in said
    if columns == "200":
        assert "Ba$$in $x_1^{2}$ \\frac{a" in said
        assert "[bold]red[/] [/] [link=x]" in said
        assert r"caf\udce9 \udcff" in said
        assert ":cat:" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_progress_takes_any_name(name, monkeypatch):
    shown = io.StringIO()
    drawn = rich.console.Console(file=shown, force_terminal=True, width=999)
    monkeypatch.setattr(console, "_CONSOLE", drawn)
    assert list(console.progress(name)(iter([1, 2]), 2)) == [1, 2]
    with console.counter(name, 2, "[images]") as advance:
        advance(2)
    assert text.printable(name)[:9] in shown.getvalue()
    assert "2 [images]" in shown.getvalue()


def test_a_line_of_the_log_obeys_nothing_in_a_name(monkeypatch):
    said, printed = io.StringIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    console.log_to_terminal()
    logging.getLogger("any").warning("%s and\n%s", "a\x1b[2J", "\udcff\r")
    print("é ×", end="", flush=True)
    assert printed.getvalue() == rb"\xe9 x"
    assert said.getvalue()[9:] == "a\\x1b[2J and\n\\udcff\\r\n"


def test_a_table_is_also_markdown_in_which_nothing_is_markup():
    table = console.Table("a_b_", ["", "*x*"], [["one|two", "1.5"]])
    assert table.markdown() == (
        "# a_b\\_\n\n|  | \\*x\\* |\n| --- | ---: |\n| one\\|two | 1.5 |\n"
    )
