"""A run's folder explains itself; that a run of another recipe is refused is in
test_train.
"""

import dataclasses
import shutil
import threading
from typing import Any

import coloured
import jax
import numpy as np
import PIL.Image
import pytest

from mlp_mixer import (
    checkpoint,
    evaluate,
    predict,
    pretrained,
    processes,
    recipe,
    runs,
    sharding,
    train,
    workdir,
)
from mlp_mixer.data import sources


def test_a_workdir_gives_its_recipe_back(tmp_path):
    config = recipe.load("configs/mixer_b16.py")
    workdir.claim(config, tmp_path, ("cat", "dog"))
    assert workdir.load(tmp_path) == recipe.completed(config)
    assert workdir.load_class_names(tmp_path) == ["cat", "dog"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        workdir.load(tmp_path / "nowhere")


def test_another_recipe_may_take_a_folder_until_there_is_a_result(tmp_path):
    """A run that could not start, for a wrong path say, is started again corrected."""
    config = recipe.load("configs/mixer_b16.py")
    workdir.claim(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    config.init_from = "corrected.npz"
    workdir.claim(config, tmp_path)
    assert workdir.load(tmp_path).init_from == "corrected.npz"
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    config.init_from = "other.npz"
    with pytest.raises(
        ValueError, match=r"init_from: corrected\.npz there, other\.npz"
    ):
        workdir.claim(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "00000010").mkdir()
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        workdir.claim(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("digits.py", False),
        ("family/digits.py:resmlp", False),
        ("family/digits.py:gmlp", False),
        ("family/digits.py:smlpnet", True),
    ],
)
def test_only_with_batchnorm_is_another_accumulate_another_run(name, refused, tmp_path):
    """It normalises each micro-batch by itself, which `mesh` does not change."""
    config = recipe.load(f"configs/{name}")
    config.dataset.num_classes = 10
    workdir.claim(config, tmp_path)
    begun(tmp_path)
    config.mesh.data = config.mesh.fsdp = 2
    workdir.claim(config, tmp_path)
    config.accumulate = 2
    if not refused:
        workdir.claim(config, tmp_path)
        return
    with pytest.raises(ValueError, match="holds a run of another recipe") as caught:
        workdir.claim(config, tmp_path)
    _, line, advice = str(caught.value).splitlines()
    assert line == "  accumulate: 1 there, 2 here"
    assert "--config.run.remat=full saves memory" in advice
    assert workdir.load(tmp_path).accumulate == 1


# --- The classes and the data of a run ------------------------------------------------


def begun(folder):
    (folder / "checkpoints" / "00000010").mkdir(parents=True)


def resumed(config, folder, name, split="all", **options):
    """What a start would do with the data before anything is trained."""
    source = sources.open_source(name, split, data_dir=options.pop("data_dir", None))
    data = sources.fingerprint(source)
    config.dataset.num_examples = len(source)
    source = runs.training_data(source, config, folder, data, **options)
    workdir.claim(config, folder, source.class_names, data, **options)
    return source


@pytest.fixture
def run(tmp_path):
    """(its recipe, its folder, its data), begun with images of three classes."""
    name = coloured.write_folder(tmp_path / "images", ("ant", "bee", "cat"))
    config = recipe.load("configs/digits.py")
    resumed(config, tmp_path / "run", name)
    begun(tmp_path / "run")
    resumed(config, tmp_path / "run", name)
    return config, tmp_path / "run", tmp_path / "images"


def said(folder):
    """What the run says of its data, as it is on disk."""
    return {n: (folder / n).read_text() for n in ("class_names.json", "data.json")}


def rename_a_class(images):
    (images / "bee").rename(images / "cow")


def swap_two_classes(images):
    (images / "bee").rename(images / "tmp")
    (images / "cat").rename(images / "bee")
    (images / "tmp").rename(images / "cat")


def write_a_name_in_capitals(images):
    (images / "bee").rename(images / "Bee")


def replace_a_class(images):
    shutil.rmtree(images / "cat")
    coloured.write_folder(images, {"dog": "cat"})


OTHER_CLASSES = {
    rename_a_class: r"Only .*: 'cow'\.\n  Only the run in .*: 'bee'",
    write_a_name_in_capitals: r"Only .*: 'Bee'\.\n  Only the run in .*'bee'",
    replace_a_class: r"Only .*: 'dog'\.\n  Only the run in .*: 'cat'",
}


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("change", OTHER_CLASSES)
def test_a_run_does_not_go_on_with_other_classes(change, accepted, run):
    config, folder, images = run
    before = said(folder)
    change(images)
    with pytest.raises(ValueError, match=OTHER_CLASSES[change]):
        resumed(config, folder, f"folder:{images}", accept_changed_data=accepted)
    with pytest.raises(ValueError, match="Only"):
        workdir.claim(config, folder, ("ant", "cow", "cat"))
    assert said(folder) == before


def test_one_class_more_is_named_and_not_only_counted(tmp_path):
    config = recipe.load("configs/digits.py")
    folder, images = tmp_path / "run", tmp_path / "images"
    for count, names in ((3, ("ant", "bee", "cat")), (4, ("dog",))):
        name = coloured.write_folder(images, names)
        config.dataset.num_classes = count
        if count == 3:
            resumed(config, folder, name)
            begun(folder)
    with pytest.raises(ValueError, match=r"(?s)Only .*'dog'"):
        resumed(config, folder, name)
    config.optim.learning_rate = 0.5  # another recipe is said first
    with pytest.raises(ValueError, match=r"another recipe:\n  optim\.learning_rate"):
        resumed(config, folder, name)


@pytest.mark.parametrize("names", [("cat", "ant", "bee"), ("0", "1", "2"), None])
def test_the_names_of_a_run_that_has_begun_are_not_written_again(names, run):
    config, folder, _ = run
    workdir.claim(config, folder, names)
    assert workdir.load_class_names(folder) == ["ant", "bee", "cat"]


def test_a_run_that_has_not_begun_takes_the_names_of_today(run):
    config, folder, images = run
    shutil.rmtree(folder / "checkpoints")
    (folder / "saved.json").unlink()
    rename_a_class(images)
    resumed(config, folder, f"folder:{images}")
    assert workdir.load_class_names(folder) == ["ant", "cat", "cow"]
    assert '"cow"' in said(folder)["data.json"]


def test_the_same_classes_in_another_order_keep_the_runs_labels(tmp_path, caplog):
    caplog.set_level("INFO")
    config, folder = recipe.load("configs/digits.py"), tmp_path / "run"
    for place, names in (
        ("one", ("ant", "bee", "cat")),
        ("two", ("cat", "ant", "bee")),
    ):
        coloured.write_prepared(tmp_path / place, "toys", names)
    first = resumed(config, folder, "toys", "test", data_dir=tmp_path / "one")
    begun(folder)
    before = said(folder)
    assert "another order" not in caplog.text
    second = resumed(config, folder, "toys", "test", data_dir=tmp_path / "two")
    assert caplog.text.count("another order") == 1
    assert first.class_names == second.class_names == ("ant", "bee", "cat")
    for i in range(12):
        called = second.class_names[second.label(i)]
        assert second[i]["image"] == coloured.image(called, i)
    assert said(folder)["class_names.json"] == before["class_names.json"]


def remove_an_image(images):
    (images / "ant" / "0.png").unlink()


def add_an_image(images):
    (images / "cat" / "new.png").write_bytes(coloured.image("cat"))


def cut_an_image(images):
    path = images / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:-7])


CHANGES = {
    swap_two_classes: r"\n  bee: .*\n  cat: ",
    remove_an_image: r"num_examples: 12 there, 11 here\n  ant: 4 images, .* 3 images,",
    add_an_image: r"num_examples: 12 there, 13 here\n  cat: 4 images, .* 5 images,",
    cut_an_image: r"changed:\n  bee: 4 images, \d+ bytes, .* there, 4 images, ",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_training_data_is_refused_and_named_or_accepted(change, run, caplog):
    config, folder, images = run
    name, before = f"folder:{images}", said(folder)
    change(images)
    with pytest.raises(ValueError, match=CHANGES[change]) as caught:
        resumed(config, folder, name)
    assert "--accept_changed_data" in str(caught.value)
    assert said(folder) == before
    resumed(config, folder, name, accept_changed_data=True)
    assert caplog.text.count("goes on with changed data") == 1
    caplog.clear()
    resumed(config, folder, name)  # from now on it is the run's
    assert not caplog.text


def test_moved_training_data_is_the_same(run):
    config, folder, images = run
    moved = images.rename(images.with_name("elsewhere"))
    resumed(config, folder, f"folder:{moved}")


def test_what_the_runs_data_is_may_be_damaged(run):
    config, folder, images = run
    for text in ("[1, 2]", "{", "5"):
        (folder / "data.json").write_text(text)
        with pytest.raises(ValueError, match=r"data\.json (is no JSON|holds)"):
            resumed(config, folder, f"folder:{images}")


def test_a_run_of_an_older_version_says_once_that_its_data_is_not_compared(run, caplog):
    config, folder, images = run
    (folder / "data.json").unlink()
    caplog.set_level("INFO")
    for _ in range(2):
        resumed(config, folder, f"folder:{images}")
    assert caplog.text.count("does not say what its training data was") == 1
    assert (folder / "data.json").exists()


def test_the_best_of_no_metric_is_refused_before_anything_is_read(tmp_path):
    config = recipe.load("configs/digits.py")
    workdir.claim(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("test/top_1", "nll", "fewshot/10shot", "test/count"):
        with pytest.raises(ValueError, match=r"No checkpoint can be the best by"):
            runs.open_model(tmp_path, best=name)


def one_value_more(weights):
    params = jax.tree.map(np.copy, weights.params)
    params["head"]["bias"][3] += 1
    return dataclasses.replace(weights, params=params)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_value_more, "arrays.params/head/bias: "),
        (lambda w: pretrained.with_fields(w, gelu="tanh"), 'model.gelu: "exact" on'),
        (
            lambda w: dataclasses.replace(w, class_names=tuple("abcdefghiJ")),
            'class_names.9: "j" on process 0; "J" on process 1',
        ),
        (
            lambda w: dataclasses.replace(w, preprocess="big_vision"),
            'preprocess: "timm" on process 0; "big_vision" on process 1',
        ),
        (None, "nowhere"),
    ],
)
def test_processes_that_open_different_files_all_fail(
    change, said, weights, tmp_path, monkeypatch
):
    """Two threads are the processes; each has its own disk."""
    values: list[Any] = [None, None]
    everybody = threading.Barrier(2, timeout=60)

    def gather(value):
        values[int(threading.current_thread().name)] = value
        everybody.wait()
        gathered = list(values)
        everybody.wait()
        return gathered

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    errors: list[Exception | None] = [None, None]

    def start(index):
        try:
            runs.open_model(tmp_path / str(index) / "w.safetensors")
        except (OSError, RuntimeError, ValueError) as error:
            errors[index] = error

    for folder in "01":
        (tmp_path / folder).mkdir()
    pretrained.write_safetensors(weights, tmp_path / "0" / "w.safetensors")
    if change is not None:
        pretrained.write_safetensors(change(weights), tmp_path / "1" / "w.safetensors")
    both = [threading.Thread(target=start, args=(i,), name=str(i)) for i in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if change is None:
        assert "Process 1 failed on" in str(errors[0])
        assert isinstance(errors[1], FileNotFoundError)
    else:
        for error in errors:
            first, *lines = str(error).splitlines()
            assert first.startswith("The processes of one run must agree")
            assert len(lines) == 1
            assert lines[0].startswith(f"  {said}")


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_evaluation_and_prediction_see_one_model(
    dtype, tiny, tmp_path, data_dir, monkeypatch, caplog
):
    """The recipe's, bit for bit, unless a flag says otherwise; and the log says it."""
    tiny.run.dtype, tiny.total_steps = dtype, 3
    train.train(tiny, tmp_path / "run", data_dir=data_dir)
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    PIL.Image.fromarray(images[0]).save(folder / "0.png")
    opened, open_model = [], runs.open_model

    def recorded(*arguments, **options):
        opened.append(open_model(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(runs, "open_model", recorded)
    caplog.set_level("INFO")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    evaluate.evaluate(tmp_path / "run", data_dir=data_dir)
    evaluate.evaluate(tmp_path / "run", data_dir=data_dir, dtype=other)
    list(predict.predict(tmp_path / "run", [folder]))
    list(predict.predict(tmp_path / "run", [folder], dtype=other))
    said = [r.getMessage() for r in caplog.records if "computed in" in r.getMessage()]
    assert [line.rpartition(" ")[2] for line in said] == [dtype, other] * 2
    logits = []
    for model in opened:
        batch = sharding.place_rows({"image": images}, model.mesh)
        logits.append(np.asarray(model.predict(model.variables, batch)["logits"]))
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[1], logits[3])
    assert (logits[0] != logits[1]).any()


def test_a_run_or_a_file_without_an_average_says_so(weights, tmp_path):
    runs.write_run(weights, tmp_path / "run")
    pretrained.write_npz(weights, tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"run keeps no average of its .* without --"):
        runs.open_model(tmp_path / "run", ema=True)
    with pytest.raises(ValueError, match="it has no averaged parameters"):
        runs.open_model(tmp_path / "w.npz", ema=True)
    with pytest.raises(ValueError, match="holds no average of the parameters"):
        checkpoint.restore_variables(tmp_path / "run" / "checkpoints", ema=True)
    for ema in (None, False):
        assert runs.open_model(tmp_path / "run", ema=ema).step == 0
