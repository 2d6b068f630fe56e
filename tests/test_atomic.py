"""A file has its name once it is complete."""

import os

import pytest

from mlp_mixer import atomic


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with atomic.writing(path, "w") as file:
        file.write("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"before")

    def fail():
        with atomic.writing(path) as file:
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
        with atomic.writing(path) as file:
            file.write(b"through")
        assert os.read(pipe, 100) == b"through"
    finally:
        os.close(pipe)
    assert path.is_fifo()
