"""VTAB-1k is the mean of its 19 tasks, each at the resolution that Table 2 has."""

import types

import pytest
import run_vtab
import sweep as command
from test_sweep import result

from mlp_mixer import recipe, shipped
from mlp_mixer.data.preparation import vtab

SHIPPED = recipe.run_file(shipped.find(run_vtab.RECIPE)[0])
GROUPS = {task: group for task, (_, group) in SHIPPED["TASKS"].items()}


@pytest.fixture
def swept(monkeypatch):
    """What would be run: the arguments of `run_all`, and nothing is."""
    seen = types.SimpleNamespace()

    def run_all(tasks, args, means):
        seen.tasks, seen.args, seen.means = tasks, args, means

    monkeypatch.setattr(command, "run_all", run_all)
    return seen


def test_all_19_tasks_run_as_in_table_2(swept):
    run_vtab.main(["--words=l16,448", "--config.accumulate=16"])
    tasks = {
        task.final.dataset.name.removeprefix("vtab_"): task for task in swept.tasks
    }
    assert tasks.keys() == vtab.TASKS.keys()
    sides = {name: task.final.model.image_size[0] for name, task in tasks.items()}
    assert {name for name, side in sides.items() if side == 224} == {
        *("cifar100", "svhn", "eurosat", "dsprites_location", "dsprites_orientation")
    }
    for task in tasks.values():
        assert task.learning_rates == (0.003, 0.01, 0.03)
        assert task.select.dataset.split == "train800"
        assert task.select.evals.minival.dataset.split == "val200"
        assert task.final.dataset.split == "train800val200"
        assert task.final.model.name == "mixer_l16"
        assert task.final.accumulate == 16
    assert (swept.args.seeds, swept.args.workdir) == (3, "runs/vtab")


def test_some_tasks_may_be_named(swept):
    run_vtab.main(["--tasks=svhn, dtd", "--words=hyperrule"])
    assert [task.name for task in swept.tasks] == [
        *("finetune-vtab-dtd-hyperrule", "finetune-vtab-svhn-hyperrule")
    ]
    with pytest.raises(ValueError, match="word 'svnh'; it knows: svhn"):
        run_vtab.main(["--tasks=svnh"])


def test_tasks_that_are_not_prepared_are_named_up_front(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        run_vtab.main(["--tasks=svhn,resisc45", f"--data_dir={tmp_path}"])
    said = str(caught.value)
    assert f"Not prepared in {tmp_path}: vtab_svhn, vtab_resisc45." in said
    for task in ("svhn", "resisc45"):
        assert f"python -m mlp_mixer.prepare vtab_{task} --data_dir={tmp_path}" in said
    assert said.count("pip install") == 1
    assert "NWPU-RESISC45" in said


def test_the_score_is_the_mean_over_tasks_not_over_groups():
    scores = {
        task: {"natural": 0.8, "specialized": 0.9, "structured": 0.5}[group]
        for task, group in GROUPS.items()
    }
    results = [result(f"vtab_{task}", task, score) for task, score in scores.items()]
    found = run_vtab.means(results, GROUPS)
    assert found == {
        "VTAB-1k, mean of 19": pytest.approx((7 * 0.8 + 4 * 0.9 + 8 * 0.5) / 19),
        "VTAB-1k natural, mean of 7": pytest.approx(0.8),
        "VTAB-1k specialized, mean of 4": pytest.approx(0.9),
        "VTAB-1k structured, mean of 8": pytest.approx(0.5),
    }
    # Without one task there is no mean of 19, and none of its group.
    some = [r for r in results if r.dataset != "vtab_eurosat"]
    assert set(run_vtab.means(some, GROUPS)) == {
        *("VTAB-1k natural, mean of 7", "VTAB-1k structured, mean of 8")
    }
