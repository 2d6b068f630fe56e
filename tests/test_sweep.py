"""A sweep chooses on held-out images, repeats nothing, and averages like the paper."""

import dataclasses
import json
import math
import pathlib
import sys

import pytest
import sweep as command

from mlp_mixer import (
    checkpoint,
    console,
    errors,
    metrics,
    pretrained,
    recipe,
    sweep,
    train,
)

RECIPE = '''
"""A tiny recipe to sweep: digits, and no hope at one of its learning rates."""

from mlp_mixer import recipe

LEARNING_RATES = (1e-6, 1e-2)


def get_config(argument=""):
    select = "select" in recipe.words(argument, ["select", "other"])
    config = recipe.base()
    config.dataset.name = "digits"
    config.dataset.split = "train[:80%]" if select else "train"
    config.batch_size = 48
    config.total_steps = 16
    config.loss = "softmax_xent"
    config.input.crop = "resize"
    config.input.flip = False
    config.model.name = "mixer_s16"
    config.model.image_size = (8, 8)
    config.model.patch_size = (2, 2)
    config.model.num_blocks = 1
    config.model.hidden_dim = 32
    config.model.tokens_mlp_dim = 16
    config.model.channels_mlp_dim = 128
    config.mesh.data = 1
    config.run.scan = False
    config.run.remat = "none"
    config.optim.warmup_steps = 1
    config.evals.seen = recipe.evaluation(
        "train[80%:]" if select else "test",
        every_steps=100,
        preprocess="vision_transformer",
    )
    return config
'''


@pytest.fixture
def value(tmp_path):
    """What stands behind --config."""
    path = tmp_path / "toy.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """The folders in which training was started, in order."""
    folders = []
    original = train.train

    def recorded(config, workdir, **kwargs):
        folders.append("/".join(workdir.split("/")[-2:]))
        return original(config, workdir, **kwargs)

    monkeypatch.setattr(train, "train", recorded)
    return folders


RUNS = [
    "toy/select-1e-06",
    "toy/select-0.01",
    "toy/final-0.01-seed-0",
    "toy/final-0.01-seed-1",
]


def told(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.mark.slow
def test_a_sweep_stopped_in_the_middle_goes_on_and_repeats_nothing(
    value, tmp_path, data_dir, trained, monkeypatch
):
    folder = tmp_path / "sweep"
    argv = [f"--config={value}", f"--workdir={folder}", f"--data_dir={data_dir}"]
    with monkeypatch.context() as patch:
        # As by a signal in the middle of the third run.
        patch.setattr(
            checkpoint.Checkpointer,
            "stop_requested",
            lambda self, step: "final" in str(self.directory) and step >= 5,
        )
        with pytest.raises(sweep.StoppedError, match=r"seed-0 was stopped before"):
            command.main([*argv, "--seeds=2"])
    assert trained == RUNS[:3]
    trained.clear()
    command.main([*argv, "--seeds=2"])
    assert trained == RUNS[2:]
    # Trained to its end once, evaluated there, and started from where it was.
    records = metrics.read(folder / RUNS[2])
    assert [r["step"] for r in records if "train/loss" in r] == [16]
    assert [r["step"] for r in records if "seen/top1" in r] == [16]
    said = told(folder)

    # Finished: nothing at all, also without the checkpoints of the grid.
    trained.clear()
    for _ in range(2):
        command.main([*argv, "--seeds=2", "--drop_checkpoints"])
    assert trained == []
    left = sorted(path.parent.name for path in folder.glob("*/*/checkpoints"))
    assert left == ["final-0.01-seed-0", "final-0.01-seed-1"]
    assert told(folder) == said

    (result,) = said["results"]
    assert result["learning_rate"] == 0.01
    assert result["grid"]["1e-06"] < 0.3 < result["grid"]["0.01"]
    scores = [
        r["seen/top1"]
        for name in RUNS
        for r in metrics.read(folder / name)
        if "seen/top1" in r
    ]
    assert [*result["grid"].values(), *result["seeds"].values()] == scores
    assert result["mean"] == pytest.approx(sum(scores[2:]) / 2)
    assert result["data"] == "digits test"
    assert (
        f"| toy | {100 * result['mean']:.2f} % |" in (folder / "sweep.md").read_text()
    )
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"

    # A seed more is a run more.
    command.main([*argv, "--seeds=3"])
    assert trained == ["toy/final-0.01-seed-2"]
    assert len(told(folder)["results"][0]["seeds"]) == 3


def test_a_run_stopped_in_its_last_evaluation_is_evaluated_once(
    value, tmp_path, data_dir, trained, monkeypatch
):
    config = sweep.open_task(value).final
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.Checkpointer, "stop_requested", lambda self, step: step == 16
        )
        with pytest.raises(sweep.StoppedError, match="was stopped before its end"):
            sweep.complete(config, workdir, data_dir=data_dir)
    assert int(pretrained.read(workdir).step or 0) == 16
    assert not any("seen/top1" in r for r in metrics.read(workdir))
    trained.clear()
    score = sweep.complete(config, workdir, data_dir=data_dir)
    assert 0 < score < 1
    # And then never again, whatever becomes of its checkpoints.
    trained.clear()
    (workdir / "checkpoints").rename(workdir / "gone")
    assert sweep.complete(config, workdir, data_dir=data_dir) == score
    assert trained == []


def test_a_rate_that_diverges_is_a_result_and_is_not_tried_again(
    value, tmp_path, data_dir, trained
):
    task = sweep.open_task(value, rates=[1e38, 1e-2])
    task.select.optim.clip_norm = task.final.optim.clip_norm = None
    for _ in range(2):
        result = sweep.run(task, tmp_path, seeds=1, data_dir=data_dir)
    assert trained == [
        *("toy/select-0.01", "toy/select-1e+38", "toy/final-0.01-seed-0")
    ]
    assert math.isnan(result.grid[1e38])
    assert result.learning_rate == 0.01
    sweep.write_results(tmp_path, [result], {})
    assert told(tmp_path)["results"][0]["grid"]["1e+38"] is None
    assert "1e+38: diverged" in (tmp_path / "sweep.md").read_text()


def test_a_final_run_that_diverges_is_an_error(value, tmp_path, monkeypatch):
    def diverge(config, workdir, **_):
        raise FloatingPointError("At step 3 loss is nan")

    monkeypatch.setattr(train, "train", diverge)
    with pytest.raises(FloatingPointError, match="At step 3"):
        sweep.complete(sweep.open_task(value).final, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"config": {}, "top1": "1"}', '{"config": 3, "top1": 0.5}'),
        *('{"config": {}, "top1": NaN}', '{"config": {}, "top1": 7}', "[" * 100_000),
    ],
)
def test_a_damaged_result_is_named(content, value, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json") as error:
        sweep.finished(sweep.open_task(value).final, tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("top1", [0.5, None])
def test_another_recipes_run_is_no_result(top1, value, tmp_path):
    """Nor is one that diverged with other fields, or was evaluated otherwise."""
    config = sweep.open_task(value).final
    assert sweep.finished(config, tmp_path) is None
    said = {"config": recipe.to_json(config), "top1": top1}
    (tmp_path / "result.json").write_text(json.dumps(said))
    score = sweep.finished(config, tmp_path)
    assert score == 0.5 if top1 else math.isnan(score)
    config.accumulate = 4  # which moves no result
    assert str(sweep.finished(config, tmp_path)) == str(score)  # nan too
    config.optim.clip_norm = 0.5
    with pytest.raises(ValueError, match=r"clip_norm: 1\.0 there, 0\.5 here"):
        sweep.complete(config, tmp_path)
    config.optim.clip_norm, config.evals.seen.preprocess = 1.0, "timm"
    with pytest.raises(ValueError, match=r"evals\.seen\.preprocess: vision_transf"):
        sweep.complete(config, tmp_path)


# --- Without training -----------------------------------------------------------------


def test_the_best_learning_rate_wins_and_of_equals_the_lowest():
    assert sweep.choose({0.003: 0.5, 0.01: 0.8, 0.03: 0.7}) == 0.01
    for rates in ((0.01, 0.03, 0.06), (0.06, 0.03, 0.01)):
        assert sweep.choose(dict.fromkeys(rates, 0.8) | {0.01: 0.2}) == 0.03
    assert sweep.choose({0.01: 0.2, 0.03: math.nan}) == 0.01
    with pytest.raises(ValueError, match=r"All learning rates diverged \(0.01, 0.03\)"):
        sweep.choose({0.01: math.nan, 0.03: math.nan})


def result(dataset, model, *scores):
    return sweep.Result(
        name=f"finetune-{dataset}",
        model=model,
        dataset=dataset,
        data=f"{dataset} test",
        preprocess="paper-resmall-crop",
        grid={0.01: 0.5, 0.03: scores[0]},
        learning_rate=0.03,
        seeds=dict(enumerate(scores)),
    )


FIVE = {
    "imagenet2012": 0.80,
    "cifar10": 0.98,
    "cifar100": 0.90,
    "oxford_iiit_pet": 0.92,
    "oxford_flowers102": 0.99,
}


def test_the_table_has_mean_and_deviation_over_seeds():
    (row,) = sweep.table(
        pathlib.Path("x"), [result("cifar10", "", 0.97, 0.98, 0.99)], {}
    ).rows
    assert dict(zip(sweep.COLUMNS, row, strict=True)) == {
        "": "finetune-cifar10",
        "top-1": "98.00 %",
        "±": "1.00",
        "runs": "3",
        "learning rate": "0.03",
        "tried on held-out images": "0.01: 50.00 %, 0.03: 97.00 %",
        "of": "cifar10 test (paper-resmall-crop)",
    }
    assert result("cifar10", "", 0.5).std is None


def test_avg_5_is_the_mean_of_the_five_sets_of_one_model():
    five = [
        result(name, "b16", score - 0.01, score + 0.01) for name, score in FIVE.items()
    ]
    b16, l16 = (f"{model}, paper-resmall-crop" for model in ("b16", "l16"))
    assert sweep.average_5(five) == {f"Avg 5 of {b16}": pytest.approx(0.918)}
    assert sweep.average_5(five[1:]) == {}
    # Another model's fifth set is another model's, and so is another protocol's.
    large = [result(name, "l16", score) for name, score in FIVE.items()]
    assert sweep.average_5([*five[1:], large[0]]) == {}
    other = dataclasses.replace(five[0], preprocess="paper-resize-crop")
    assert sweep.average_5([*five[1:], other]) == {}
    both = sweep.average_5([*five, *large, result("vtab_svhn", "l16", 0.1)])
    assert list(both) == [f"Avg 5 of {b16}", f"Avg 5 of {l16}"]
    (*_, last) = sweep.table(pathlib.Path("x"), five, sweep.average_5(five)).rows
    assert last[:2] == [f"Avg 5 of {b16}", "91.80 %"]


def test_the_table_of_five_has_a_row_for_each_model_like_the_papers():
    five = [result(name, "b16", score) for name, score in FIVE.items()]
    large = [result("cifar10", "l16", 0.5), result("vtab_svhn", "l16", 0.1)]
    assert sweep.table_of_five([*reversed(five), *large]) == [
        [
            *("b16, paper-resmall-crop", "80.00 %", "98.00 %", "90.00 %", "92.00 %"),
            *("99.00 %", "91.80 %"),
        ],
        ["l16, paper-resmall-crop", "", "50.00 %", "", "", "", ""],
    ]


def test_what_is_written_is_what_came_out(tmp_path):
    five = [result(name, "", score, score) for name, score in FIVE.items()]
    sweep.write_results(tmp_path / "new", five, sweep.average_5(five))
    said = told(tmp_path / "new")
    assert [*said["means"].values()] == [pytest.approx(0.918)]
    assert [r["mean"] for r in said["results"]] == pytest.approx([*FIVE.values()])
    assert said["results"][0]["grid"] == {"0.01": 0.5, "0.03": 0.8}
    lines = (tmp_path / "new" / "sweep.md").read_text().splitlines()
    assert len(lines) == (2 + 2 + 5 + 1) + (1 + 2 + 1)
    assert {line.count("|") for line in lines[2:10]} == {len(sweep.COLUMNS) + 1}
    assert lines[11].startswith("|  | ImageNet | CIFAR-10 |")


def test_the_shipped_recipes_bring_their_grids():
    task = sweep.open_task("configs/finetune/cifar10.py:l16", ["--config.accumulate=8"])
    assert task.name == "finetune-cifar10-l16"
    assert task.learning_rates == (0.003, 0.01, 0.03, 0.06)
    assert task.select.dataset.split == "train[:98%]"
    assert sweep.watched(task.select) == "minival"
    assert (task.final.dataset.split, sweep.watched(task.final)) == ("train", "test")
    for config in (task.select, task.final):
        assert config.accumulate == 8
        assert config.init_from == "imagenet21k/Mixer-L_16"
    pets = sweep.open_task("configs/finetune/pets.py", rates=[0.02])
    assert pets.learning_rates == (0.02,)


def test_one_learning_rate_needs_no_choice(value, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "complete", lambda *_, **__: 0.5)
    found = sweep.run(sweep.open_task(value, rates=[0.2]), tmp_path, seeds=2)
    assert (found.grid, found.learning_rate, found.seeds) == ({}, 0.2, {0: 0.5, 1: 0.5})
    sweep.write_results(tmp_path, [found], {})
    assert not (tmp_path / "sweep.png").exists()


def test_missing_data_is_named_before_anything_is_run(tmp_path, trained):
    names = ("cifar10", "pets")
    argv = [f"--config=configs/finetune/{name}.py" for name in names]
    with pytest.raises(FileNotFoundError) as caught:
        command.main([*argv, f"--data_dir={tmp_path}", f"--workdir={tmp_path}/runs"])
    for name in ("cifar10", "oxford_iiit_pet"):
        assert f"python -m mlp_mixer.prepare {name} --data_dir" in str(caught.value)
    assert trained == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--config=nowhere.py"], FileNotFoundError, "There is no recipe 'nowhere.py'"),
        (["--config=configs/digits.py"], ValueError, "has no LEARNING_RATES; give"),
        (
            ["--config=configs/finetune/pets.py", "--config.optim.learing_rate=1"],
            SystemExit,
            "learing_rate",
        ),
        (["--config={toy}", "--config={toy}"], ValueError, "toy would share a folder"),
        (["--config={toy}:select"], ValueError, "word select, which a sweep adds"),
        (
            ["--config={toy}", "--config.accumulate=0"],
            ValueError,
            "config.accumulate is 0; expected",
        ),
        (
            ["--config={toy}", "--config.model.image_size=(9,8)"],
            ValueError,
            "image_size 9 is not divisible by patch_size 2",
        ),
        (
            ["--config={toy}", "--config.evals.seen.every_steps=0"],
            ValueError,
            "evaluates nothing in training",
        ),
    ],
)
def test_mistakes_are_explained(arguments, error, message, value, tmp_path, data_dir):
    argv = [argument.format(toy=value) for argument in arguments]
    with pytest.raises(error, match=message):
        command.main([*argv, f"--workdir={tmp_path}/runs", f"--data_dir={data_dir}"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--sedes=2"],
        ["--config.seed", "1"],
        ["--config.optim.learning_rate=1"],
        ["--seeds=0"],
        ["--seeds=x"],
        ["--learning_rates=0.1,nan"],
        ["--learning_rates=0"],
        ["--learning_rates="],
        ["--workdir="],
        ["--data_dir=~no one/data"],
        [],
    ],
)
def test_a_wrong_command_line_is_refused(wrong, value, capsys):
    argv = wrong and [f"--config={value}", *wrong]
    with pytest.raises(SystemExit) as caught:
        command.main(argv)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_early_end_says_how_to_go_on(value, tmp_path, data_dir, monkeypatch, caplog):
    argv = [f"--config={value}", f"--workdir={tmp_path}/a b", f"--data_dir={data_dir}"]
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", *argv])
    monkeypatch.setattr(console, "log_to_terminal", lambda: None)

    def stopped(*_, **__):
        raise sweep.StoppedError("It was stopped.")

    monkeypatch.setattr(sweep, "complete", stopped)
    monkeypatch.setattr(errors, "message", lambda error, _: str(error))
    with pytest.raises(SystemExit, match="It was stopped"):
        command.start(command.main)
    assert "go on with\npython scripts/sweep.py --config=" in caplog.text
    assert f"'--workdir={tmp_path}/a b'" in caplog.text
