"""No start begins over a run's past."""

import json

import pytest
from set_up import contents

from mlp_mixer import workdir


@pytest.fixture
def past(tiny, tmp_path):
    """past(records, checkpoints, saved): a run that has come so far, without arrays."""

    def make(last_record=None, checkpoints=(), saved=..., folder="run"):
        run = tmp_path / folder
        workdir.claim(tiny, run)  # saves every 4 steps
        (run / "checkpoints").mkdir()
        for name in checkpoints:
            (run / "checkpoints" / name).mkdir()
        if last_record is not None:
            lines = [json.dumps({"step": s}) for s in range(1, last_record + 1)]
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if saved is None:
            (run / "saved.json").unlink()  # a run of before there was such a file
        elif saved is not ...:
            (run / "saved.json").write_text(json.dumps({"saved": saved}))
        return run

    return make


UNFINISHED = "00000004.orbax-checkpoint-tmp"


SAVED = [
    {"last_record": 12, "saved": 12},
    {"last_record": 12, "saved": None},
    {"saved": 4},
    {"saved": 4, "folder": "lr=[0.1]*"},
]
NOTHING_IN_IT = [
    {"saved": 8, "checkpoints": [UNFINISHED]},
    {"saved": 8, "checkpoints": ["lost+found"]},
    {"saved": 8, "checkpoints": ["00000004.bak", "00000008_old"]},
    {"last_record": 9, "saved": None, "checkpoints": ["8"]},
]


@pytest.mark.parametrize(
    ("begun", "folder_is"),
    [
        *((begun, "missing") for begun in SAVED),
        *((begun, "a link to nowhere") for begun in SAVED),
        *((begun, "there") for begun in SAVED + NOTHING_IN_IT),
    ],
    ids=str,
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    tiny, past, begun, folder_is
):
    run = past(**begun)
    if folder_is != "there":
        (run / "checkpoints").rmdir()
    if folder_is == "a link to nowhere":
        (run / "checkpoints").symlink_to(run / "not mounted")
    before = contents(run)
    with pytest.raises(FileNotFoundError, match=r"checkpoints of the run .* are gone"):
        workdir.claim(tiny, run)
    assert contents(run) == before


@pytest.mark.parametrize(
    "begun",
    [
        {"last_record": 3},
        {"last_record": 9},  # so long the first save took
        {"last_record": 9, "checkpoints": [UNFINISHED]},
        {"last_record": 9, "checkpoints": [UNFINISHED], "saved": None},
        {"last_record": 4, "saved": None},
        {"checkpoints": ["00000004"], "last_record": 5},
        {"checkpoints": ["damaged-00000004-1"], "saved": 4},  # `restore` will tell
    ],
    ids=str,
)
def test_a_run_that_was_never_saved_begins_again_and_others_go_on(tiny, past, begun):
    run = past(**begun)
    before = contents(run)
    workdir.claim(tiny, run)
    after = contents(run)
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"saved.json"}


@pytest.mark.parametrize(
    "begun",
    [
        {"last_record": 3},
        {"checkpoints": ["00000004"]},
        {"checkpoints": [UNFINISHED]},
        {"saved": 4},
        {"checkpoints": ["00000004"], "last_record": 5, "folder": "lr=[0.1]*"},
    ],
    ids=str,
)
def test_a_run_without_its_recipe_takes_no_other(tiny, past, begun):
    run = past(**begun)
    (run / "config.json").unlink()
    before = contents(run)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        workdir.claim(tiny, run)
    assert contents(run) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"saved": "4"}', '{"saved": [4]}'])
def test_a_damaged_note_of_the_saved_step_is_named(tiny, past, text):
    run = past(last_record=3)
    (run / "saved.json").write_text(text)
    with pytest.raises(ValueError, match=r"saved\.json .*remove it"):
        workdir.claim(tiny, run)
