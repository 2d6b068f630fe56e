"""The ledger: what the first steps of a recipe give, recorded for everyone."""

import json

import compare_runs
import pytest

from mlp_mixer import checkpoint, recipe, train


@pytest.fixture
def stopping_at_100(monkeypatch):
    """The whole recipe's schedule, but only its first hundred steps."""
    monkeypatch.setattr(
        checkpoint.Checkpointer, "stop_requested", lambda self, step: step >= 100
    )


@pytest.mark.slow
def test_the_first_steps_of_the_digits_are_the_recorded_ones(
    root, tmp_path, data_dir, stopping_at_100
):
    config = recipe.load("configs/digits.py")
    config.mesh.data = 4  # recorded on one device
    config.log_every_steps = 1
    config.evals.test.every_steps = 0
    train.train(config, tmp_path, data_dir=data_dir)
    rows = compare_runs.differences(
        compare_runs.read_ledger(tmp_path),
        compare_runs.read_ledger(root / "docs/ledgers/digits.jsonl"),
    )
    assert [row[0] for row in rows[::2]] == [1, 10, 100]
    assert compare_runs.differing(rows) == []


def write(path, losses):
    lines = [
        json.dumps({"step": step, "train/loss": loss, "train/grad_norm": 1.0})
        for step, loss in losses.items()
    ]
    path.write_text("\n".join([*lines, '{"step": 10, "val/top1": 0.5}']) + "\n")
    return str(path)


def test_equal_runs_pass_and_other_runs_are_told_apart(tmp_path, capsys):
    one = write(tmp_path / "one.jsonl", {1: 7.9, 2: 7.8, 10: 7.0})
    near = write(tmp_path / "near.jsonl", {1: 7.9, 10: 7.001, 100: 3.0})
    far = write(tmp_path / "far.jsonl", {1: 7.9, 10: 7.1})
    compare_runs.main([one, near])
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit, match="different runs"):
        compare_runs.main([one, far])
    assert "more than 1e-03" in capsys.readouterr().out


def test_a_loss_of_nothing_is_compared_too(tmp_path):
    nothing = compare_runs.read_ledger(write(tmp_path / "a.jsonl", {1: 0.0}))
    other = compare_runs.read_ledger(write(tmp_path / "b.jsonl", {1: 0.5}))
    assert compare_runs.differing(compare_runs.differences(nothing, nothing)) == []
    assert len(compare_runs.differing(compare_runs.differences(other, nothing))) == 1


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"stop": 1}', '{"step": 1, "train/loss": "x"}']
)
def test_a_line_that_is_no_record_is_named(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "one.jsonl"
    write(path, {1: 7.9})
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(SystemExit, match="2"):
        compare_runs.main(["~/one.jsonl", str(path)])
    assert f"Line 3 of {path}" in capsys.readouterr().err


def test_a_run_without_its_first_step_says_what_to_do(tmp_path, capsys):
    late = write(tmp_path / "late.jsonl", {50: 1.0})
    with pytest.raises(SystemExit):
        compare_runs.main([late, late])
    assert "--config.log_every_steps=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no record of step 1"),
        ("[]\n", "holds a list; expected an object"),
        ('{"step": 1, "train/loss": 1.0}\n', "has no record of step 1"),
        ('{"step": [], "train/loss": 1.0}\n', "its step is"),
        ('{"step": 1, "train/loss": "a", "train/grad_norm": 1}\n', "is a string; exp"),
        ('{"step": 1\n', "is no JSON"),
        ("[" * 100_000 + "\n", "is no JSON"),
        (b"\xff\n", "is no JSON"),
    ],
)
def test_damaged_records_are_named(content, said, tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", {1: 7.9})
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        compare_runs.main([good, str(bad)])
    error = capsys.readouterr().err
    assert "bad.jsonl" in error
    assert said in error


def test_a_gradient_of_zero_is_compared(tmp_path):
    one, other = [{1: {"train/loss": 1.0, "train/grad_norm": x}} for x in (1.0, 0.0)]
    assert not compare_runs.differing(compare_runs.differences(other, other))
    (row,) = compare_runs.differing(compare_runs.differences(one, other))
    assert row[1] == "train/grad_norm"
