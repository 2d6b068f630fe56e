"""What a run tells, and what of it survives a kill."""

import io
import json
import logging
import re
import sys

import jax.numpy as jnp
import pytest
import rich.console
from odd_names import NAMES

from mlp_mixer import metrics, text


def writer(workdir, first_step=0, total_steps=10, every_steps=2, last_good=4):
    return metrics.Writer(
        workdir,
        first_step=first_step,
        total_steps=total_steps,
        batch_size=8,
        every_steps=every_steps,
        learning_rate=lambda update: 0.1 * update,
        last_good=lambda: last_good,
    )


def scalars(value):
    return {"loss": jnp.float32(value), "grad_norm": jnp.float32(1.0)}


def test_metrics_are_recorded_a_step_late_and_at_the_cadence(tmp_path):
    with writer(tmp_path) as w:
        for step in range(1, 6):
            w.train(step, scalars(step))
            # What is pending is the newest step; every older one is on the disk.
            assert [r["step"] for r in metrics.read(tmp_path)] == list(
                range(2, step, 2)
            )
        w.flush()
    assert [r["step"] for r in metrics.read(tmp_path)] == [2, 4]
    first = metrics.read(tmp_path)[0]
    assert (first["train/loss"], first["train/grad_norm"]) == (2.0, 1.0)
    assert first["train/lr"] == pytest.approx(0.1)  # update 1, counted from 0
    assert first["images_per_second"] > 0


def test_the_last_step_is_always_recorded(tmp_path):
    with writer(tmp_path, total_steps=5, every_steps=3) as w:
        for step in range(1, 6):
            w.train(step, scalars(step))
        w.flush()
    assert [r["step"] for r in metrics.read(tmp_path)] == [3, 5]


def test_what_will_be_done_again_is_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "train/loss": 1.0 * s}) + "\n" for s in range(1, 8)]
    path.write_text("".join(lines) + '{"step": 8, "tra')
    assert [r["step"] for r in metrics.read(tmp_path)] == list(range(1, 8))
    with writer(tmp_path, first_step=4) as w:
        assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4]
        w.evaluation(6, "val", {"top1": 0.5, "count": 10})
    last = metrics.read(tmp_path)[-1]
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


def test_a_counter_speaks_in_plain_lines_without_a_terminal(caplog):
    caplog.set_level("INFO")
    with metrics.counter(
        "tars", 4 * 10**9, "bytes", 10**9, every_seconds=0.0
    ) as advance:
        advance(10**9)
    with metrics.counter("images", 3000, "examples") as advance:
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
    metrics.table("8 × 8 [bold] \udcff :cat:", ["", "[red]"], rows)
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
    console = rich.console.Console(file=shown, force_terminal=True, width=999)
    monkeypatch.setattr(metrics, "_CONSOLE", console)
    assert list(metrics.progress(name)(iter([1, 2]), 2)) == [1, 2]
    with metrics.counter(name, 2, "[images]") as advance:
        advance(2)
    assert text.printable(name)[:9] in shown.getvalue()
    assert "2 [images]" in shown.getvalue()


def test_a_line_of_the_log_obeys_nothing_in_a_name(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        metrics.log_to_terminal()
        logging.getLogger("any").warning("%s and\n%s", "a\x1b[2J", "\udcff\r")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    assert said.getvalue()[9:] == "a\\x1b[2J and\n\\udcff\\r\n"
