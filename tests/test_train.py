"""Laws of whole runs: resume, stop, refuse."""

import json
import os
import pathlib
import random
import signal
import time

import coloured
import jax
import numpy as np
import pytest
from set_up import assert_equal_runs, told

from mlp_mixer import (
    checkpoint,
    evaluate,
    metrics,
    orbax_io,
    ownership,
    pretrained,
    recipe,
    records,
    runs,
    steps,
    train,
)
from mlp_mixer.data import pipeline
from mlp_mixer.evaluators import accuracy
from mlp_mixer.evaluators.evaluator import Result
from mlp_mixer.workdir import load, load_class_names


@pytest.fixture
def straight(tiny, tmp_path):
    """The uninterrupted run, on eight devices."""
    workdir = str(tmp_path / "straight")
    train.train(tiny, workdir)
    return workdir


def stopping_after(monkeypatch, step):
    """Makes the next run stop as by a signal once `step` is done."""
    monkeypatch.setattr(
        checkpoint.Checkpointer, "stop_requested", lambda self, now: now >= step
    )


def test_a_run_records_evaluates_and_checkpoints(tiny, straight):
    records = metrics.read(straight)
    trained = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in trained] == list(range(1, 13))
    assert {"train/loss", "train/grad_norm", "train/lr", "images_per_second"} <= set(
        trained[0]
    )
    # t counts from 0: the first update has learning rate 0, the third the peak.
    assert trained[0]["train/lr"] == 0.0
    assert trained[2]["train/lr"] == pytest.approx(0.001)
    evaluated = {r["step"]: r for r in records if "val/top1" in r}
    assert set(evaluated) == {6, 12}
    assert evaluated[12]["val/count"] == 37
    assert 0 <= evaluated[12]["val/top1"] <= evaluated[12]["val/top5"] <= 1
    assert sorted(os.listdir(f"{straight}/checkpoints")) == ["00000008", "00000012"]
    assert any(pathlib.Path(straight, "tensorboard").iterdir())
    assert load(straight) == recipe.completed(tiny)


@pytest.mark.slow
def test_a_run_with_the_fields_recipe_resumes_and_gives_its_average(
    tiny, tmp_path, monkeypatch
):
    """Cut over devices, stopped and gone on with: bit for bit, the average included."""
    tiny.sharding, tiny.loss, tiny.label_smoothing = "fsdp", "softmax_xent", 0.1
    tiny.cutmix, tiny.erasing, tiny.optim.ema = 1.0, 0.25, 0.9
    tiny.optim.decayed, tiny.optim.warmup_learning_rate = "matrices", 1e-6
    tiny.optim.layer_decay, tiny.optim.rates = 0.9, ("head/*=2", "stem/bias=0")
    tiny.evals.last = tiny.evals.val.copy_and_resolve_references()
    tiny.evals.last.ema = False
    folders = [tmp_path / name for name in ("straight", "stopped")]
    state = train.train(tiny, folders[0])
    with monkeypatch.context() as patch:
        stopping_after(patch, 7)
        assert int(train.train(tiny, folders[1]).step) == 7
    train.train(tiny, folders[1])
    assert_equal_runs(tiny, *map(str, folders))

    kernels = [x for x in jax.tree.leaves(state.averaged) if x.size >= 4096]
    assert kernels
    assert not any(x.sharding.is_fully_replicated for x in kernels)
    for ema, expected in ((None, state.averaged), (False, state.variables)):
        found = pretrained.read(folders[0], ema=ema).variables
        jax.tree.map(np.testing.assert_array_equal, found, dict(expected))
    assert pretrained.read(folders[0]).origin == "run at step 12, averaged"
    losses = {
        name: r[f"{name}/loss"]
        for r in metrics.read(folders[0])
        for name in ("val", "last")
        if r["step"] == 12 and f"{name}/loss" in r
    }
    assert losses["val"] != losses["last"]
    results = evaluate.evaluate(folders[0])
    found = {name: results[name]["loss"] for name in losses}
    assert found == pytest.approx(losses, rel=1e-5)
    results = evaluate.evaluate(folders[0], ema=False)
    assert results["val"] == results["last"]


def test_training_runs_few_shot_evaluation_too(tiny, tmp_path):
    tiny.total_steps, tiny.optim.warmup_steps = 2, 1
    tiny.evals.val.every_steps = 0
    tiny.evals.shots = recipe.fewshot(
        "train", "val", every_steps=2, preprocess="vision_transformer", shots=(1, 3)
    )
    for split in ("train", "test"):
        tiny.evals.shots[split].num_examples = 40
        tiny.evals.shots[split].num_classes = 8
    train.train(tiny, str(tmp_path))
    (record,) = [r for r in metrics.read(tmp_path) if "shots/count" in r]
    # Both splits are the same noise: what was a shot is recognised.
    assert 1 / 8 <= record["shots/1shot"] < record["shots/3shot"] <= 1
    assert not any("val/top1" in r for r in metrics.read(tmp_path))


def test_an_evaluator_without_data_ends_a_run_before_it_begins(tiny, tmp_path):
    tiny.evals.other = recipe.evaluation("test", dataset={"name": "cifar10"})
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="No prepared data set 'cifar10'"):
        train.train(tiny, str(run), data_dir=str(tmp_path))
    assert not run.exists()


# Step 6 and the last one, 12, are stopped before they are evaluated.
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 6, 8, 12])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(
    tiny, straight, tmp_path, monkeypatch, caplog, stop
):
    workdir = str(tmp_path / "lr=[0.1] stopped")
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        stopping_after(patch, stop)
        assert int(train.train(tiny, workdir).step) == stop
    assert "is trained" not in caplog.text
    assert f"Stopped after step {stop};" in caplog.text
    train.train(tiny, workdir)
    assert_equal_runs(tiny, straight, workdir)


def test_of_several_evaluations_those_that_a_stop_left_out_are_made_up_for(
    tiny, tmp_path, monkeypatch
):
    tiny.evals.val2 = tiny.evals.val.copy_and_resolve_references()
    tiny.checkpoint.keep_best = "val2/loss"
    workdir = str(tmp_path / "run")

    def recorded(step):
        return [
            next(name for name in r if name != "step").partition("/")[0]
            for r in told(workdir)
            if r["step"] == step
        ]

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.Checkpointer,
            "stop_requested",
            lambda self, now: now == 6 and "val" in recorded(6),
        )
        assert int(train.train(tiny, workdir).step) == 6
    assert recorded(6) == ["train", "val"]
    with monkeypatch.context() as patch:
        stopping_after(patch, 7)
        assert int(train.train(tiny, workdir).step) == 7
    assert recorded(6) == ["train", "val", "val2"]
    assert [r["step"] for r in told(workdir)] == [*range(1, 7), 6, 6, 7]
    best, _ = checkpoint.restore_variables(
        f"{workdir}/checkpoints", best="val2/loss", more_is_better=False
    )
    assert best == 6
    # One that is new on the command line is due too.
    tiny.evals.new = tiny.evals.val.copy_and_resolve_references()
    tiny.evals.new.every_steps = 7
    with monkeypatch.context() as patch:
        stopping_after(patch, 8)
        train.train(tiny, workdir)
    assert recorded(7) == ["train", "new"]


@pytest.mark.slow
def test_of_two_trainings_started_at_once_one_trains_and_the_other_ends(
    tmp_path, program, data_dir
):
    run = tmp_path / "lr=[0.1]"
    arguments = [*STOPPABLE[:2], f"--data_dir={data_dir}", f"--workdir={run}"]
    pair = [program("train", *arguments, "--config.total_steps=60") for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 1], "\n".join(said)
    refusal = said[codes.index(1)]
    assert f"{run} is in use by process {pair[codes.index(0)].pid} on" in refusal
    assert len(refusal.strip().splitlines()) <= 3
    trained = [r["step"] for r in metrics.read(run) if "train/loss" in r]
    assert trained == list(range(1, 61))


def test_a_run_whose_folder_is_renamed_ends_and_makes_no_second_one(
    tiny, tmp_path, monkeypatch
):
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    ask = checkpoint.Checkpointer.stop_requested

    def asked(self, step):
        if step == 10 and not renamed.exists():
            self.wait()
            run.rename(renamed)
        return ask(self, step)

    monkeypatch.setattr(checkpoint.Checkpointer, "stop_requested", asked)
    with pytest.raises(ownership.OwnedError, match="not this run's any more"):
        train.train(tiny, str(run))
    assert not run.exists()
    train.train(tiny, str(renamed))
    assert sorted(os.listdir(renamed / "checkpoints")) == ["00000008", "00000012"]


def test_a_finished_run_is_left_as_it_is(tiny, straight):
    before = pathlib.Path(straight, "metrics.jsonl").read_text()
    state = train.train(tiny, straight)
    assert int(state.step) == 12
    assert pathlib.Path(straight, "metrics.jsonl").read_text() == before


def test_four_devices_continue_what_eight_began_with_the_same_batches(
    tiny, straight, tmp_path, monkeypatch
):
    seen = []
    original = pipeline.train_batches

    def recorded(*args, **kwargs):
        for batch in original(*args, **kwargs):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", recorded)
    train.train(tiny, str(tmp_path / "all"))
    uninterrupted, seen[:] = seen[:12], []
    workdir = str(tmp_path / "moved")
    with monkeypatch.context() as patch:
        stopping_after(patch, 5)
        train.train(tiny, workdir)
    seen[5:] = []
    tiny.mesh.data = 4
    tiny.sharding = "fsdp"
    train.train(tiny, workdir)
    for one, other in zip(uninterrupted, seen[:12], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    for one, other in zip(told(straight), told(workdir), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_killed_at_three_random_steps_ends_bitwise_equal(
    tmp_path, program, data_dir
):
    """SIGKILL, as a machine that is taken away: nothing can be said or saved."""
    arguments = [
        "--config=configs/digits.py",
        f"--data_dir={data_dir}",
        "--config.total_steps=120",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=10",
        "--config.evals.test.every_steps=30",
    ]
    folders = {name: tmp_path / name for name in ("straight", "killed")}
    whole = program("train", *arguments, f"--workdir={folders['straight']}")
    assert whole.wait(200) == 0, whole.stdout.read()
    draw = random.Random(0)
    for at in (draw.randrange(5, 35), draw.randrange(45, 75), draw.randrange(85, 110)):
        victim = program("train", *arguments, f"--workdir={folders['killed']}")
        while max((r["step"] for r in metrics.read(folders["killed"])), default=0) < at:
            assert victim.poll() is None, victim.stdout.read()
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
    again = program("train", *arguments, f"--workdir={folders['killed']}")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert_equal_runs(load(str(folders["killed"])), *map(str, folders.values()))


def stop_in_the_middle(process, workdir, moment):
    """Sends SIGTERM at `moment` and returns what the program said until its end."""
    deadline = time.time() + 120
    while not moment():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "the same command goes on from there" in said
    saved = sorted(os.listdir(f"{workdir}/checkpoints"))
    assert saved, said
    return said, int(saved[-1])


STOPPABLE = [
    "--config=configs/digits.py",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=100000",
    "--config.evals.test.every_steps=5",
    "--config.evals.test.batch_size=1",
]


def test_sigterm_during_evaluation_saves_and_exits(tmp_path, program, data_dir):
    process = program(
        "train", *STOPPABLE, f"--data_dir={data_dir}", f"--workdir={tmp_path}"
    )

    def evaluating():
        return any(r["step"] == 5 for r in metrics.read(tmp_path))

    said, saved = stop_in_the_middle(process, tmp_path, evaluating)
    assert saved == 5, said
    assert not any("test/top1" in r for r in metrics.read(tmp_path))


@pytest.mark.slow
def test_sigterm_during_the_first_compilation_saves_and_exits(
    tmp_path, program, data_dir
):
    process = program(
        "train", *STOPPABLE, f"--data_dir={data_dir}", f"--workdir={tmp_path}"
    )
    # The folder appears before the state and the step are compiled.
    moment = (tmp_path / "checkpoints").exists
    _, saved = stop_in_the_middle(process, tmp_path, moment)
    assert saved == 1


@pytest.mark.slow
def test_sigint_between_steps_saves_and_exits(tmp_path, program, data_dir):
    process = program(
        "train",
        *STOPPABLE[:3],
        "--config.evals.test.every_steps=100000",
        f"--data_dir={data_dir}",
        f"--workdir={tmp_path}",
    )
    while len(metrics.read(tmp_path)) < 20:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert int(sorted(os.listdir(tmp_path / "checkpoints"))[-1]) >= 20


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    tiny, tmp_path, monkeypatch
):
    workdir = str(tmp_path / "nan")
    make = steps.make_train_step

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def train_step(state, batch):
            state, scalars = step(state, batch)
            if int(state.step) == 8:
                scalars["loss"] = scalars["loss"] * np.float32("nan")
            return state, scalars

        return train_step

    monkeypatch.setattr(steps, "make_train_step", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"At step 8 .*loss is nan.*last good .* step 4"
    ):
        train.train(tiny, workdir)
    assert os.listdir(f"{workdir}/checkpoints") == ["00000004"]


def test_a_save_that_fails_in_the_background_ends_the_run_before_the_next_one(
    tiny, tmp_path, monkeypatch
):
    write, flush = orbax_io._record_files, metrics.Writer.flush
    workdir, recorded = tmp_path / "run", {}

    def fails(directory, step):
        steps = [r["step"] for r in metrics.read(workdir) if "train/loss" in r]
        recorded[step] = steps[:step]
        if step == 8:
            time.sleep(0.1)  # seconds, until after the note that 4 is saved
            raise PermissionError(13, "Permission denied", f"{directory}")
        write(directory, step)

    def slow(self):
        step = self._pending[0] if self._pending else 0
        time.sleep(0.3 if step > 8 else 0)  # until after the failure
        flush(self)

    monkeypatch.setattr(orbax_io, "_record_files", fails)
    monkeypatch.setattr(metrics.Writer, "flush", slow)
    monkeypatch.setattr(checkpoint.Checkpointer, "due", lambda self, n: n in (4, 8))
    # As on a bucket, where records are written every half minute.
    monkeypatch.setattr(records, "open_for_appending", records._Parts)
    with pytest.raises(checkpoint.CheckpointError, match=r"step 8 .* \[4\]") as error:
        train.train(tiny, str(workdir))
    assert "Permission denied" in str(error.value)
    # A start from a checkpoint finds the records up to its step.
    assert recorded == {4: [1, 2, 3, 4], 8: [*range(1, 9)]}
    assert 8 <= max(record["step"] for record in metrics.read(workdir)) < 12
    assert json.loads((workdir / "saved.json").read_text()) == {"saved": 4}
    names = os.listdir(workdir / "checkpoints")
    assert [name for name in sorted(names) if "tmp" not in name] == ["00000004"]


def test_a_learning_rate_that_is_too_high_really_stops_the_run(tiny, tmp_path):
    tiny.optim.learning_rate = 1e38
    tiny.optim.clip_norm = None
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet"):
        train.train(tiny, str(tmp_path / "run"))


def test_another_recipe_is_refused_with_the_fields_that_differ(
    tiny, tmp_path, monkeypatch
):
    workdir = str(tmp_path / "run")
    stopping_after(monkeypatch, 1)
    train.train(tiny, workdir)
    tiny.optim.b1 = 0.8
    tiny.model.dropout = 0.1
    with pytest.raises(ValueError, match="another recipe") as caught:
        train.train(tiny, workdir)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  model.dropout: 0.0 there, 0.1 here",
        "  optim.b1: 0.9 there, 0.8 here",
    ]


def test_fields_that_move_no_result_may_change(tiny, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        stopping_after(patch, 1)
        train.train(tiny, workdir)
    tiny.mesh.data = 2
    tiny.sharding = "fsdp"
    tiny.run.scan = False
    tiny.run.remat = "none"
    tiny.accumulate = 2
    tiny.log_every_steps = 3
    tiny.checkpoint.keep_latest = 1
    del tiny.evals.val
    assert int(train.train(tiny, workdir).step) == 12


def test_damage_is_set_aside_and_the_run_goes_on_from_before(
    tiny, straight, tmp_path, caplog
):
    folder = pathlib.Path(straight, "checkpoints", "00000012")
    # Every array file: which of them is read depends on how they were merged.
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stale = folder.with_name("00000014.orbax-checkpoint-tmp")
    stale.mkdir()
    expected = told(straight)
    state = train.train(tiny, straight)
    assert int(state.step) == 12
    assert told(straight) == expected
    names = sorted(p.name.split("-")[0] for p in folder.parent.iterdir())
    assert names == ["00000008", "00000012", "damaged"]
    assert "12" in caplog.text
    assert stale.name in caplog.text


def test_another_model_in_the_workdir_is_an_error_and_not_damage(tiny, straight):
    saved = json.loads(pathlib.Path(straight, "config.json").read_text())
    tiny.model.hidden_dim = saved["model"]["hidden_dim"] = 64
    pathlib.Path(straight, "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"params/MixerBlock_0"):
        train.train(tiny, straight)
    names = sorted(os.listdir(f"{straight}/checkpoints"))
    assert names == ["00000008", "00000012"]


def test_a_profile_is_written(tiny, tmp_path):
    tiny.total_steps = 4
    train.train(tiny, str(tmp_path), profile="2:3")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"'3:2'; expected START:STOP"):
        train.train(tiny, str(tmp_path / "other"), profile="3:2")


# --- Classes, data and the best by name -----------------------------------------------


@pytest.fixture
def few(tiny):
    """A run of four steps on images of three colours."""
    del tiny.evals.val
    tiny.total_steps = 4
    tiny.batch_size = 8
    tiny.mesh.data = 1
    tiny.model.num_blocks = 1
    tiny.dataset.num_examples = tiny.dataset.num_classes = None
    tiny.dataset.name, tiny.dataset.split = "toys", "test"
    tiny.evals.val = recipe.evaluation(
        "test", every_steps=4, preprocess="vision_transformer"
    )
    return tiny


def test_a_run_goes_on_with_the_same_classes_in_another_order_as_if_in_its_own(
    few, tmp_path, monkeypatch
):
    """Bitwise."""
    del few.evals.val
    coloured.write_prepared(tmp_path / "one", "toys", ("ant", "bee", "cat"))
    coloured.write_prepared(tmp_path / "two", "toys", ("cat", "ant", "bee"))
    straight, moved = str(tmp_path / "straight"), str(tmp_path / "moved")
    train.train(few, straight, data_dir=str(tmp_path / "one"))
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        train.train(few, moved, data_dir=str(tmp_path / "one"))
    train.train(few, moved, data_dir=str(tmp_path / "two"))
    one, other = (pretrained.load(workdir) for workdir in (straight, moved))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert told(straight) == told(moved)
    assert load_class_names(moved) == ["ant", "bee", "cat"]


def test_a_run_whose_data_has_changed_stops_before_its_next_step(
    few, tmp_path, monkeypatch
):
    images, workdir = tmp_path / "images", str(tmp_path / "run")
    few.dataset.name = coloured.write_folder(images, ("ant", "bee", "cat"))
    few.dataset.split = few.evals.val.dataset.split = "all"
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        train.train(few, workdir)
    before = told(workdir)
    (images / "bee").rename(images / "cow")
    for accepted in (False, True):
        with pytest.raises(ValueError, match=r"'cow'\.\n  Only the run in .*: 'bee'"):
            train.train(few, workdir, accept_changed_data=accepted)
    (images / "cow").rename(images / "bee")
    (images / "ant" / "0.png").unlink()
    with pytest.raises(
        ValueError, match="num_examples: 12 there, 11 here\n  ant: 4 im"
    ):
        train.train(few, workdir)
    assert told(workdir) == before
    assert int(train.train(few, workdir, accept_changed_data=True).step) == 4


def test_an_evaluator_with_other_classes_ends_a_run_before_it_begins(few, tmp_path):
    coloured.write_prepared(tmp_path, "toys", ("ant", "bee", "cat"))
    coloured.write_prepared(tmp_path, "others", ("ant", "bee", "dog"))
    few.evals.val.dataset.name = "others"
    with pytest.raises(ValueError, match=r"(?s)Only others test: 'dog'.*model: 'cat'"):
        train.train(few, str(tmp_path / "run"), data_dir=str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_a_kept_head_in_the_order_of_its_own_classes(
    few, make_params, tmp_path
):
    """A learning rate of zero shows what it began with."""
    del few.evals.val
    few.total_steps, few.optim.warmup_steps = 1, 0
    few.optim.learning_rate = few.optim.end_learning_rate = 0.0
    few.init_from = str(tmp_path / "w.safetensors")
    params = make_params(
        num_classes=3,
        num_blocks=1,
        hidden_dim=32,
        tokens_mlp_dim=16,
        channels_mlp_dim=128,
    )
    weights = pretrained.Weights(params, "made", class_names=("cat", "ant", "bee"))
    pretrained.write_safetensors(weights, few.init_from)
    coloured.write_prepared(tmp_path, "toys", ("ant", "bee", "cat"))
    state = train.train(few, str(tmp_path / "run"), data_dir=str(tmp_path))
    for name, x in params["head"].items():
        np.testing.assert_array_equal(state.params["head"][name], x[..., [1, 2, 0]])


@pytest.mark.parametrize(
    ("metric", "best"),
    [("val/nll", 3), ("val/top1", 2)],
)
def test_the_best_by_a_metric_is_kept_and_opened(
    few, tmp_path, monkeypatch, metric, best
):
    scores = {"nll": [3, 2, 1, 4], "top1": [2, 4, 1, 3]}
    monkeypatch.setattr(
        accuracy.Accuracy,
        "run",
        lambda self, *_, **__: Result({k: float(v.pop(0)) for k, v in scores.items()}),
    )
    coloured.write_prepared(tmp_path, "toys", ("ant", "bee", "cat"))
    few.evals.val.every_steps = few.checkpoint.every_steps = 1
    few.checkpoint.keep_latest, few.checkpoint.keep_best = 1, metric
    workdir = str(tmp_path / "run")
    train.train(few, workdir, data_dir=str(tmp_path))
    assert [int(name) for name in sorted(os.listdir(f"{workdir}/checkpoints"))] == [
        best,
        4,
    ]
    assert runs.open_model(workdir, best=metric).step == best
    assert pretrained.read(workdir, best=metric).step == best


@pytest.mark.parametrize(
    ("measured", "saved", "is_said"),
    [(3, 2, True), (4, 3, True), (2, 3, True), (2, 1, False), (1, 3, False)],
)
def test_it_is_said_if_no_checkpoint_but_the_last_can_be_the_best(
    few, tmp_path, caplog, measured, saved, is_said
):
    coloured.write_prepared(tmp_path, "toys", ("ant", "bee", "cat"))
    few.checkpoint.keep_best = "val/nll"
    few.evals.val.every_steps, few.checkpoint.every_steps = measured, saved
    (tmp_path / "run").touch()  # it goes no further
    with pytest.raises(OSError, match="run"):
        train.train(few, str(tmp_path / "run"), data_dir=str(tmp_path))
    assert ("No checkpoint but the last can be the best" in caplog.text) == is_said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("val/top_1", "try one of val/top1"),
        ("train/loss", "try one of val/loss"),
        ("rare/top1", "rare never runs in training"),
    ],
)
def test_the_best_of_what_is_not_measured_ends_a_run_before_it_begins(
    few, tmp_path, name, message
):
    coloured.write_prepared(tmp_path, "toys", ("ant", "bee", "cat"))
    few.evals.rare = recipe.evaluation("test", every_steps=0)
    few.checkpoint.keep_best = name
    with pytest.raises(ValueError, match=message):
        train.train(few, str(tmp_path / "run"), data_dir=str(tmp_path))
    assert not (tmp_path / "run").exists()
