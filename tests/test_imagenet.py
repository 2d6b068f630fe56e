"""ImageNet from its tars to the report, in small: every program, nothing mocked."""

import json

import compare_runs
import pytest
import tensorflow_datasets as tfds
import toy_imagenet

from mlp_mixer.data.preparation import imagenet, writing

EVALUATORS = ("val", "minival", "real", "v2", "fewshot")
# The recipe, but for what the size of toys forbids.
SHRUNK = [
    "--config.dataset.split=train[:75%]",
    "--config.dataset.num_examples=36",
    "--config.evals.minival.dataset.split=train[75%:]",
    "--config.evals.fewshot.train.split=train",
    "--config.evals.fewshot.shots=(1,5)",
    "--config.batch_size=8",
    "--config.total_steps=100",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=50",
    "--config.optim.warmup_steps=20",
    "--config.model.image_size=(32,32)",
    "--config.model.patch_size=(8,8)",
    "--config.model.num_blocks=2",
    "--config.model.hidden_dim=32",
    "--config.model.tokens_mlp_dim=16",
    "--config.model.channels_mlp_dim=128",
    *(f"--config.evals.{name}.every_steps=50" for name in EVALUATORS),
]


def write_v2(data_dir):
    """ImageNet-v2's layout; its own builder needs TensorFlow and a download."""
    job = writing.Job("imagenet_v2", "3.0.0", data_dir, data_dir, False)
    images = [(toy_imagenet.photo(7 + i), name) for i, name in enumerate("abcdef")]

    def read(start, stop):
        for i in range(start, stop):
            data, name = images[i]
            label = toy_imagenet.CLASSES[i % 4]
            yield {"image": data, "label": label, "file_name": f"{name}.jpeg"}

    features = imagenet._features() | {
        "label": tfds.features.ClassLabel(names=toy_imagenet.WNIDS)
    }
    job.partial.mkdir(parents=True)
    writing.write_splits(job, features, {"test": writing.Split(6, 9999, read)})
    (data_dir / "imagenet_v2" / "matched-frequency").mkdir()
    job.target.rename(data_dir / "imagenet_v2" / "matched-frequency" / job.version)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Prepared, trained and evaluated by the commands that README shows."""
    from conftest import start_program

    folder = tmp_path_factory.mktemp("imagenet")
    tars, data_dir, workdir = (folder / name for name in ("tars", "data", "run"))
    toy_imagenet.write_imagenet(tars, per_class=12)
    data_dir.mkdir()
    write_v2(data_dir)
    commands = [
        (
            "prepare",
            ["imagenet2012", "imagenet2012_real", f"--manual_dir={tars}", "--noverify"],
        ),
        ("train", ["--config=configs/mixer_b16.py", f"--workdir={workdir}", *SHRUNK]),
        ("evaluate", [f"--workdir={workdir}", "--only=all"]),
    ]
    said = ""
    for name, arguments in commands:
        process = start_program(name, *arguments, f"--data_dir={data_dir}")
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said
    return workdir, said


def test_from_the_tars_to_the_report(run):
    workdir, table = run
    report = json.loads((workdir / "evaluate.json").read_text())
    assert report["step"] == 100
    results = report["results"]
    assert set(results) == set(EVALUATORS)
    assert report["evaluators"]["real"]["preprocess"] == "big_vision"
    assert results["val"]["count"] == 9
    assert results["minival"]["count"] == 12
    assert (results["real"]["count"], results["real"]["unlabelled"]) == (8, 1)
    assert results["v2"]["count"] == 6
    assert 0 <= results["fewshot"]["1shot"] <= 1
    assert "5shot" in results["fewshot"]
    assert "broken" not in str(results)  # CMYK, grey and the PNG named .JPEG included
    for name in EVALUATORS:
        assert name in table
        assert name in (workdir / "evaluate.md").read_text()
    assert (workdir / "report.png").stat().st_size > 10_000


def test_evaluation_inside_training_is_that_of_the_program(run):
    workdir, _ = run
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    last = {k: v for r in records if r["step"] == 100 for k, v in r.items()}
    results = json.loads((workdir / "evaluate.json").read_text())["results"]
    for name, metrics in results.items():
        for metric, value in metrics.items():
            assert last[f"{name}/{metric}"] == pytest.approx(value, rel=1e-5)


def test_the_first_steps_are_the_recorded_ones(run, root):
    workdir, _ = run
    rows = compare_runs.differences(
        compare_runs.read_ledger(workdir),
        compare_runs.read_ledger(root / "docs/ledgers/toy_imagenet.jsonl"),
    )
    assert [row[0] for row in rows[::2]] == [1, 10, 100]
    assert compare_runs.differing(rows) == []
