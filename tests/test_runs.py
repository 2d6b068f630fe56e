"""A run's folder explains itself; that a run of another recipe is refused is in
test_train.
"""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from test_files import DAMAGED, one_line
from test_recipe import load

from mlp_mixer import ownership, pretrained, recipe, runs


def test_a_workdir_gives_its_recipe_back(root, tmp_path):
    config = load(root, "mixer_b16")
    runs.claim(config, tmp_path, ("cat", "dog"))
    assert runs.load(tmp_path).to_dict() == config.to_dict()
    assert runs.load_class_names(tmp_path) == ["cat", "dog"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.load(tmp_path / "nowhere")


def test_another_recipe_may_take_a_folder_until_there_is_a_result(root, tmp_path):
    """A run that could not start, for a wrong path say, is started again corrected."""
    config = load(root, "mixer_b16")
    runs.claim(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    config.init_from = "corrected.npz"
    runs.claim(config, tmp_path)
    assert runs.load(tmp_path).init_from == "corrected.npz"
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    config.init_from = "other.npz"
    with pytest.raises(
        ValueError, match=r"init_from: corrected\.npz there, other\.npz"
    ):
        runs.claim(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "00000010").mkdir()
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        runs.claim(config, tmp_path)


# --- One owner ------------------------------------------------------------------------


def contents(folder):
    """Every file below the folder, with what is in it."""
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("name", "has_locks"),
    [("run", True), ("lr=[0.1] ü*", True), ("a\\b?", True), ("lr=[0.1] ü*", False)],
)
def test_a_second_owner_is_told_of_the_first_and_changes_nothing(
    tmp_path, monkeypatch, name, has_locks
):
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # a process that is alive
    with ownership.owned(tmp_path / name):
        if not has_locks:
            monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
        before = contents(tmp_path)
        with (
            pytest.raises(ownership.OwnedError) as caught,
            ownership.owned(tmp_path / name),
        ):
            pass
        assert contents(tmp_path) == before
    said = str(caught.value)
    assert str(tmp_path / name) in said
    assert f"on {socket.gethostname()}, since 20" in said
    assert "pytest" in said
    assert "--workdir" in said
    assert "--distributed" not in said
    assert ("remove" in said) == (not has_locks)
    with ownership.owned(tmp_path / name):  # free again
        pass
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_of_one_job_are_told_how_to_be_one_run(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with ownership.owned(tmp_path):
        with (
            pytest.raises(ownership.OwnedError, match="--distributed=auto"),
            ownership.owned(tmp_path),
        ):
            pass
        monkeypatch.setenv(variable, "1")
        with (
            pytest.raises(ownership.OwnedError) as caught,
            ownership.owned(tmp_path),
        ):
            pass
        assert "--distributed" not in str(caught.value)


OWNER = """
import os, sys, time
from mlp_mixer import ownership
with ownership.owned(sys.argv[1]):
    child = 0 if sys.argv[2] == "alone" else os.fork()
    if sys.argv[2] == "alone" or child:
        print("owns", child, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("company", ["alone", "forked"])
def test_a_killed_owner_owns_nothing_and_neither_do_its_children(tmp_path, company):
    owner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER, tmp_path, company],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    _, child = owner.stdout.readline().split()
    with (
        pytest.raises(ownership.OwnedError, match=f"process {owner.pid} on"),
        ownership.owned(tmp_path),
    ):
        pass
    owner.kill()
    owner.wait()
    with ownership.owned(tmp_path):
        pass
    if int(child):
        os.kill(int(child), signal.SIGKILL)  # it was there until now
    owner.stdout.close()


@pytest.mark.parametrize(
    ("there", "is_taken"),
    [
        ({"host": "elsewhere", "process": 7}, True),
        ({"host": socket.gethostname(), "process": 1}, True),
        ({"host": socket.gethostname(), "process": 2**22 + 1}, False),
        ({"host": socket.gethostname(), "process": "odd"}, True),
        (["odd"], False),
    ],
)
def test_without_locks_a_file_owns_until_its_process_is_known_to_be_gone(
    tmp_path, monkeypatch, there, is_taken
):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    path = tmp_path / ownership.FILE
    path.write_text(json.dumps(there))
    if is_taken:
        with (
            pytest.raises(ownership.OwnedError, match=r"remove .*owner\.json"),
            ownership.owned(tmp_path),
        ):
            pass
        assert json.loads(path.read_text()) == there
    else:
        with ownership.owned(tmp_path):
            assert json.loads(path.read_text())["process"] == os.getpid()
        assert not path.exists()


def test_weights_are_not_written_into_a_run_that_begins(weights, tmp_path):
    with ownership.owned(tmp_path), pytest.raises(ownership.OwnedError):
        runs.write(weights, tmp_path)
    assert contents(tmp_path) == {}
    runs.write(weights, tmp_path)
    assert runs.open_run(tmp_path).step == 0


# --- A past that is not begun over ----------------------------------------------------


@pytest.fixture
def past(tiny, tmp_path):
    """past(records, checkpoints, saved): a run that has come so far, without arrays."""

    def make(last_record=None, checkpoints=(), saved=..., folder="run"):
        run = tmp_path / folder
        runs.claim(tiny, run)  # saves every 4 steps
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
        runs.claim(tiny, run)
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
    runs.claim(tiny, run)
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
        runs.claim(tiny, run)
    assert contents(run) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"saved": "4"}', '{"saved": [4]}'])
def test_a_damaged_note_of_the_saved_step_is_named(tiny, past, text):
    run = past(last_record=3)
    (run / "saved.json").write_text(text)
    with pytest.raises(ValueError, match=r"saved\.json .*remove it"):
        runs.claim(tiny, run)


# --- Damaged files --------------------------------------------------------------------


def changed(path, change):
    """Writes a file of JSON again, changed."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.fixture
def run(root, tmp_path):
    """A run that has begun, without a checkpoint."""
    config = load(root, "mixer_b16")
    runs.claim(config, tmp_path, [f"class {i}" for i in range(1000)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_recipe_of_a_run_is_one_line(kind, run, root):
    (run / "config.json").write_bytes(DAMAGED[kind])
    for read in (runs.load, runs.open_run, pretrained.read):
        with pytest.raises(ValueError, match=r"config\.json") as error:
            read(run)
        assert one_line(error, "config.json")
    with pytest.raises(ValueError, match=r"config\.json") as error:
        runs.claim(load(root, "mixer_b16"), run)
    assert one_line(error, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "it does not say batch_size, checkpoint, dataset"),
        (lambda c: c.pop("model"), "it does not say model"),
        (lambda c: c["model"].pop("gelu"), "it does not say model.gelu"),
        (lambda c: c.update(model=[]), "model is .*; expected a section"),
        (lambda c: c.update(model=None), "model is None; expected a section"),
        (lambda c: c.update(batch_size="64"), "batch_size is 64; expected as in"),
        (lambda c: c.update(batch_size=None), "batch_size is None; expected as in"),
        (lambda c: c["model"].update(gelu=["tanh"]), "model.gelu is .*; expected as"),
        (lambda c: c["model"].update(image_size=16), "model.image_size is 16; exp"),
        (lambda c: c["optim"].update({"a.b": 1}), "optim.a.b is 1; expected as in"),
        (lambda c: c.update(evals={"val": 3}), "evals.val is no evaluator of type"),
        (lambda c: c["evals"]["val"].pop("type"), "evals.val is no evaluator of type"),
        (lambda c: c["evals"]["val"].update(type=[]), "config.json is no recipe"),
        (lambda c: c["evals"]["val"].update(dataset=1), "evals.val.dataset is 1; exp"),
        (lambda c: c.update({"\x1b[31m": {"\n": 1}, "seed": ""}), "seed is"),
    ],
)
def test_a_recipe_of_other_fields_is_one_line(change, message, run):
    changed(run / "config.json", change)
    for read in (runs.load, runs.open_run, pretrained.read):
        with pytest.raises(ValueError, match=message) as error:
            read(run)
        assert one_line(error, "config.json")


def test_a_field_of_a_later_version_has_its_default(run, root, caplog):
    """An older version's run opens and goes on, and the log says what is taken."""

    def older(tree):
        del tree["input"]["max_broken_images"], tree["evals"]["val"]["ece_bins"]
        tree["field_of_another_version"] = 3

    changed(run / "config.json", older)
    config = runs.load(run)
    assert config.input.max_broken_images == recipe.base().input.max_broken_images
    assert config.evals.val.ece_bins == 0
    assert config.field_of_another_version == 3
    assert "does not say evals.val.ece_bins, input.max_broken_images" in caplog.text
    changed(run / "config.json", lambda tree: tree.pop("field_of_another_version"))
    runs.check(load(root, "mixer_b16"), run)


@pytest.mark.parametrize("kind", DAMAGED.keys() - {"null"})
def test_damaged_names_of_classes_are_one_line(kind, run):
    (run / "class_names.json").write_bytes(DAMAGED[kind])
    for read in (
        lambda: runs.load_class_names(run, 1000),
        lambda: pretrained.read(run),
    ):
        with pytest.raises(ValueError, match=r"class_names\.json") as error:
            read()
        assert one_line(error, "class_names.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", 3], "holds a number among the names"),
        (["a", None], "holds null among the names"),
        (["a", ["b"]], "holds a list among the names"),
        (["a"], "has 1 names, but the model 1,000 classes"),
        ({"a": 1}, "holds an object; expected a list or null"),
    ],
)
def test_names_that_are_none_are_one_line(names, message, run):
    (run / "class_names.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=message) as error:
        pretrained.read(run)
    assert one_line(error, "class_names.json")


def test_names_that_are_not_there_are_one_line(run):
    (run / "class_names.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*class_names\.json"):
        pretrained.read(run)


def test_a_recipe_of_many_other_fields_is_told_in_20_lines(run, root):
    def many(tree):
        tree["optim"].update({f"x{i}\x1b": i for i in range(5000)})

    changed(run / "config.json", many)
    with pytest.raises(ValueError, match="another recipe") as error:
        runs.claim(load(root, "mixer_b16"), run)
    lines = str(error.value).splitlines()
    assert len(lines) == 20
    assert all(map(str.isprintable, lines))
