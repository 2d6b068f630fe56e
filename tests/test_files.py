"""What is wrong with a file is one line that names it, whatever happened to it."""

import json

import pytest

from mlp_mixer import files
from mlp_mixer.text import brief, listed

DAMAGED = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "two values": b"{}{}",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "a number beyond any": b'{"a": 1e999}',
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "10 MB of lists": b"[" * 10_000_000,
    "10 MB of objects": b'{"a":' * 2_000_000,
    "deep": b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "zeros": bytes(100),
    "a key twice": b'{"a": 1, "b": {"c": 1, "\\u0063": 2}}',
    "a key that commands a terminal": b'{"\\u001b[31m": 1, "\\u001b[31m": 1}',
    "a key of 100 kB": b'{"%s": 1, "%s": 1}' % (b"a" * 100_000, b"a" * 100_000),
}


def one_line(error, name):
    said = str(error.value)
    return name in said and said.isprintable() and len(said) < 400


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_json_is_one_line_that_names_the_file(kind, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"x\.json") as error:
        files.read_json(path)
    assert one_line(error, "x.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder cannot be read: Is a directory"):
        files.read_json(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere"):
        files.read_json(tmp_path / "nowhere")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="sparse has more than 67,108,864 bytes"):
        files.read_json(tmp_path / "sparse")


def test_good_json_is_what_it_says(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\ud800"], "b": {"a": {}}}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert files.read_json(tmp_path / "x.json") == value
    assert files.parse_json("null", "it", list, type(None)) is None
    assert files.parse_json("[1e999]", "it", list, finite=False) == [float("inf")]
    with pytest.raises(ValueError, match="it holds true or false; expected a list or"):
        files.parse_json("true", "it", list, type(None))


def test_what_is_said_of_much_is_short():
    assert brief("a\n\x1b[31m" + "b" * 10**6) == "a\\n\\x1b[31m" + "b" * 188 + "…"
    lines = listed([f"line {i}" for i in range(1000)]).splitlines()
    assert len(lines) == 19
    assert lines[0] == "  line 0"
    assert lines[-1] == "  and 982 more"
