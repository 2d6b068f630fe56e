"""What a run tells, and what of it survives a kill."""

import json
import logging
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from set_up import DAMAGED, one_line, told
from tensorboardX.proto import event_pb2

from mlp_mixer import goodput, metrics


def writer(workdir, first_step=0, total_steps=10, every_steps=2, last_good=4):
    return metrics.Writer(
        workdir,
        first_step=first_step,
        total_steps=total_steps,
        batch_size=8,
        every_steps=every_steps,
        learning_rate=lambda update: 0.1 * update,
        last_good=lambda: last_good,
        clock=goodput.Clock(),
    )


def scalars(value):
    return {"loss": jnp.float32(value), "grad_norm": jnp.float32(1.0)}


def test_metrics_are_recorded_a_step_late_and_at_the_cadence(tmp_path):
    with writer(tmp_path) as w:
        for step in range(1, 6):
            w.train(step, scalars(step))
            # What is pending is the newest step; every older one is on the disk.
            assert [r["step"] for r in told(tmp_path)] == list(range(2, step, 2))
        w.flush()
    assert [r["step"] for r in told(tmp_path)] == [2, 4]
    first = next(r for r in metrics.read(tmp_path) if "train/loss" in r)
    assert (first["train/loss"], first["train/grad_norm"]) == (2.0, 1.0)
    assert first["train/lr"] == pytest.approx(0.1)  # update 1, counted from 0
    assert first["images_per_second"] > 0


def test_the_last_step_is_always_recorded(tmp_path):
    with writer(tmp_path, total_steps=5, every_steps=3) as w:
        for step in range(1, 6):
            w.train(step, scalars(step))
        w.flush()
    assert [r["step"] for r in told(tmp_path)] == [3, 5]


def test_what_will_be_done_again_is_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "train/loss": 1.0 * s}) + "\n" for s in range(1, 8)]
    path.write_text("".join(lines) + '{"step": 8, "tra')
    assert [r["step"] for r in told(tmp_path)] == list(range(1, 8))
    with writer(tmp_path, first_step=4) as w:
        assert [r["step"] for r in told(tmp_path)] == [1, 2, 3, 4]
        w.evaluation(6, "val", {"top1": 0.5, "count": 10})
    last = told(tmp_path)[-1]
    assert last == {"step": 6, "val/top1": 0.5, "val/count": 10}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("good", "said"), [(4, "checkpoint is that of step 4"), (None, "no checkpoint yet")]
)
def test_what_is_not_finite_stops_the_run(tmp_path, value, good, said):
    with writer(tmp_path, last_good=good) as w:
        w.train(3, scalars(float(value)))
        with pytest.raises(FloatingPointError, match=rf"At step 3 .*{value}.*{said}"):
            w.train(4, scalars(1.0))


def test_progress_is_a_plain_line_without_a_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO), writer(tmp_path) as w:
        w.train(2, scalars(1.5))
        w.flush()
    assert "step 2/10  loss 1.5000" in caplog.text
    assert "images/s" in caplog.text
    assert "left" in caplog.text


@pytest.mark.parametrize(
    "steps", ["3", "5:3", "0:2", "a:b", ":", "²:3", "1:2:3", "61:62"]
)
def test_a_profile_needs_two_steps_in_order(tmp_path, steps):
    with pytest.raises(ValueError, match="expected START:STOP"):
        metrics.Profiler(str(tmp_path), steps, total_steps=60)


LINES = {
    **DAMAGED,
    "no step": b'{"train/loss": 1.0}',
    "a step of text": b'{"step": "1"}',
    "half a step": b'{"step": 1.5}',
    "a step below 0": b'{"step": -1}',
    "true as a step": b'{"step": true}',
    "text": b'{"step": 1, "train/loss": "\\u001b[31m"}',
    "a list of losses": b'{"step": 1, "train/loss": [1.0]}',
    "a name that commands": b'{"step": 1, "\\u001b[31m\\n": null}',
    "nothing": b"",
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_no_record_is_named(kind, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "val/top1": 0.5}\n' + LINES[kind] + b"\n")
    for read in (metrics.read, lambda folder: writer(folder, first_step=4)):
        with pytest.raises(ValueError, match=r"Line \d of .*metrics\.jsonl") as error:
            read(tmp_path)
        assert one_line(error, "metrics.jsonl")
    assert path.read_bytes().startswith(b'{"step": 1, "val/top1": 0.5}\n')


def test_records_in_a_folder_of_their_name_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be read"):
        metrics.read(tmp_path)


def test_a_value_that_is_not_finite_stays_a_record(tmp_path):
    """As evaluations write them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "val/loss": Infinity}\n{"step": 2, "val/loss": NaN')
    assert metrics.read(tmp_path) == [{"step": 1, "val/loss": float("inf")}]
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for the line's end
    assert metrics.read(tmp_path) == [{"step": 1}, {"step": 2}]


# --- A disk that is full --------------------------------------------------------------

# A limit of the process stands for the disk's: no file may become longer.
FULL = """
import resource, sys
from mlp_mixer import goodput, metrics

case, workdir = sys.argv[1:]
record = {"train/loss": 1.0, "a long name " * 9: 2.0}

def fill(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def train(w):
    w.write_scalars(1, record)
    if case == "records":
        fill(1000)
        for step in range(2, 100):
            w.write_scalars(step, record)
    if case == "board":  # what is buffered for TensorBoard alone finds no place
        w._board.write_scalars(1, {f"a long name {i}": 1.0 for i in range(500)})
    fill(3000 if case == "board" else 100)
    if case == "first":
        raise FloatingPointError("At step 3 loss is nan.")

with metrics.Writer(
    workdir, first_step=0, total_steps=9, batch_size=8, every_steps=2,
    learning_rate=lambda update: 0.1, last_good=lambda: 4, clock=goodput.Clock(),
) as w:
    train(w)
"""


@pytest.mark.parametrize(
    ("case", "last"),
    [
        ("records", r"OSError: .*metrics\.jsonl failed: File too large.* of step 4"),
        ("board", r"OSError: .*tensorboard failed: File too large.* of step 4"),
        ("first", r"FloatingPointError: At step 3 loss is nan\."),
    ],
)
def test_a_full_disk_is_named_and_covers_no_earlier_error(tmp_path, case, last):
    ran = subprocess.run(
        [sys.executable, "-c", FULL, case, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.match(last, ran.stderr.strip().splitlines()[-1]), ran.stderr
    assert "Exception ignored" not in ran.stderr
    records = told(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert records


def test_tensorboard_reads_what_is_written_and_hides_what_is_done_again(tmp_path):
    with writer(tmp_path) as w:
        w.write_scalars(1, {"train/loss": 1.5})
    with writer(tmp_path, first_step=1) as w:
        w.write_scalars(2, {"train/loss": 0.5, "val/count": 10})
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert events(first)[0].file_version == "brain.Event:2"
    assert values(first) == [(1, "train/loss", 1.5)]
    starts = [e.step for e in events(second) if e.HasField("session_log")]
    assert starts == [2]
    assert values(second) == [(2, "train/loss", 0.5), (2, "val/count", 10.0)]


def events(path):
    """The events of a TFRecord file: length and checksum, event, checksum."""
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def values(path):
    return [
        (e.step, v.tag, v.simple_value) for e in events(path) for v in e.summary.value
    ]
