"""What is wrong with a file is one line; a file is written whole or not at all."""

import json
import logging
import multiprocessing
import os

import pytest
from set_up import DAMAGED, one_line

from mlp_mixer import files
from mlp_mixer.text import brief, listed


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


# --- Writing --------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with files.writing(path, "w") as file:
        file.write("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"before")

    def fail():
        with files.writing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    """As /dev/stdout is; here a pipe, for a fault must not harm the machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        with files.writing(path) as file:
            file.write(b"through")
        assert os.read(pipe, 100) == b"through"
    finally:
        os.close(pipe)
    assert path.is_fifo()


def test_a_draft_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Else a machine that loses power could leave the name and nothing in it."""
    path, synced = tmp_path / "x.json", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.exists()))
    files.write_json(path, {"a": 1})
    assert synced == [False]
    assert files.read_json(path) == {"a": 1}


def test_a_link_stays_one_and_the_longest_name_has_a_draft(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / ("é" * 127))
    files.write_text(tmp_path / "link", "through the link\udcff")
    assert (tmp_path / "link").is_symlink()
    (path,) = (tmp_path / "there").iterdir()
    assert path.read_bytes() == b"through the link\xff"


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    """It may be another run's now."""
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "gone" / "x", "")
    assert not list(tmp_path.iterdir())


def hold(path, begun, ended):
    with files.locked(path, "holds it"):
        begun.set()
        ended.wait(60)


def test_who_finds_a_lock_held_says_so_and_waits(tmp_path, caplog):
    context = multiprocessing.get_context("spawn")
    begun, ended = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lock", begun, ended))
    other.start()
    assert begun.wait(60)
    caplog.set_level("INFO")
    waiting = "Another process holds it; waiting for it."

    class Release(logging.Handler):
        def emit(self, record):
            ended.set()

    handler = Release()
    files.logger.addHandler(handler)
    try:
        with files.locked(tmp_path / "lock", "holds it"):
            assert [r.message for r in caplog.records] == [waiting]
            assert ended.is_set()
    finally:
        files.logger.removeHandler(handler)
        other.join(60)
    assert other.exitcode == 0


def test_room_is_counted(tmp_path):
    files.check_room(tmp_path, 1, "It", "--there")
    with pytest.raises(OSError, match=r"It needs 1,000,000,000\.000 GB .* --there"):
        files.check_room(tmp_path, 10**18, "It", "--there")
