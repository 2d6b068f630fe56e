"""Records in one file, and in numbered parts where nothing can be appended to."""

import errno
import json
import pathlib
import types

import pytest
from etils import epath
from set_up import told
from test_metrics import scalars, writer

from mlp_mixer import files, history, metrics, records


@pytest.fixture
def no_appending(monkeypatch):
    """A local disk that does not append, as some network disks."""
    opened = pathlib.Path.open

    def refuse(self, mode="r", *args, **options):
        if "a" in mode:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(self))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(type(epath.Path()), "open", refuse)


@pytest.fixture
def clock(monkeypatch):
    """The seconds on the clock of the records, which a test sets."""
    now = [0.0]
    watch = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(records, "time", watch)
    return now


@pytest.fixture
def written(monkeypatch):
    """The names of the files that are written, in their order."""
    names, write = [], files.write_text

    def note(path, text):
        names.append(pathlib.Path(path).name)
        write(path, text)

    monkeypatch.setattr(files, "write_text", note)
    return names


def record(step):
    return json.dumps({"step": step, "train/loss": 1.0 * step}) + "\n"


def steps_in(workdir):
    return [r["step"] for r in told(workdir)]


def names(workdir):
    return sorted(p.name for p in pathlib.Path(workdir, "metrics").glob("*"))


def test_where_appending_is_refused_a_run_has_the_same_records_in_parts(
    tmp_path, no_appending, clock, monkeypatch
):
    monkeypatch.setattr(records, "PART_BYTES", 300)
    with writer(tmp_path, total_steps=9, every_steps=1) as w:
        for step in range(1, 10):
            w.train(step, scalars(step))
        w.flush()
        w.evaluation(9, "val", {"top1": 0.5})
    assert steps_in(tmp_path) == [*range(1, 10), 9]
    assert len(names(tmp_path)) > 2
    assert not (tmp_path / "metrics.jsonl").exists()
    assert history.has_begun(tmp_path)
    with writer(tmp_path, first_step=4, total_steps=9, every_steps=1) as w:
        assert steps_in(tmp_path) == [1, 2, 3, 4]
        w.train(5, scalars(5))
        w.flush()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_the_last_part_is_written_every_half_minute_and_before_a_checkpoint(
    tmp_path, no_appending, clock, written
):
    with writer(tmp_path, total_steps=9, every_steps=1) as w:
        del written[:]
        w.train(1, scalars(1))
        w.train(2, scalars(2))  # has recorded the first
        assert written == []
        clock[0] = 29.9
        w.train(3, scalars(3))
        assert written == []
        clock[0] = 30.0
        w.train(4, scalars(4))
        assert written == ["00000.jsonl"]
        assert steps_in(tmp_path) == [1, 2, 3]
        w.store()
        assert steps_in(tmp_path) == [1, 2, 3, 4]
        w.store()
        assert written == ["00000.jsonl"] * 2
        w.train(5, scalars(5))
        w.flush()
    assert written == ["00000.jsonl"] * 3
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_one_form_becomes_the_other_and_a_kill_meanwhile_counts_nothing_twice(
    tmp_path, monkeypatch
):
    lines = [record(step) for step in range(1, 5)]
    monkeypatch.setattr(records, "PART_BYTES", 2 * len(lines[0]))
    records.open_for_appending(tmp_path, lines).close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path()), "unlink", lambda self, **_: None)
        records._Parts(epath.Path(tmp_path), lines).close()
        assert names(tmp_path) == ["00000.jsonl", "00001.jsonl"]
        assert steps_in(tmp_path) == [1, 2, 3, 4]
    records._Parts(epath.Path(tmp_path), lines[:2]).close()
    assert names(tmp_path) == ["00000.jsonl"]
    assert steps_in(tmp_path) == [1, 2]

    records.open_for_appending(tmp_path, lines).close()
    assert names(tmp_path) == []
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_part_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 1)
    records._Parts(epath.Path(tmp_path), [record(step) for step in (1, 2, 3)]).close()
    (tmp_path / "metrics/00001.jsonl").unlink()
    for read in (metrics.read, history.has_begun):
        with pytest.raises(FileNotFoundError, match=r"metrics/00001\.jsonl is missing"):
            read(tmp_path)


def test_a_folder_that_may_not_be_written_is_no_reason_for_parts(tmp_path, monkeypatch):
    def forbid(self, mode="r", **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(files, "write_text", lambda *_: None)
    monkeypatch.setattr(type(epath.Path()), "open", forbid)
    with pytest.raises(PermissionError):
        records.open_for_appending(tmp_path, [record(1)])
    assert not (tmp_path / "metrics").exists()
