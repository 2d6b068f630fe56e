"""What a person reads who mistypes: one clear message, no page of traceback."""

import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from odd_names import NAMES
from PIL import Image

from mlp_mixer import (
    checkpoint,
    convert,
    evaluate,
    goodput,
    metrics,
    models,
    pretrained,
    recipe,
    text,
    train,
)
from mlp_mixer import program as program_module
from mlp_mixer.workdir import claim

BEFORE_ANYTHING = {
    "an unknown word": (
        ["--config=configs/mixer_b16.py:imagenet22k"],
        "does not know the word 'imagenet22k'; it knows: imagenet21k",
    ),
    "an unknown recipe": (
        ["--config=configs/mixr_b16.py"],
        "There is no recipe 'configs/mixr_b16.py'; shipped are: configs/mixer_b16.py",
    ),
    "a misspelt key": (
        ["--config=configs/digits.py", "--config.optim.learing_rate=1"],
        "config.optim.learing_rate is no field of the recipe; try optim.learning_rate",
    ),
    "a wrong image size": (
        ["--config=configs/digits.py", "--config.model.image_size=(9,9)"],
        "image_size 9 is not divisible by patch_size 2; try 8 or 10.",
    ),
    "a missing data set": (
        ["--config=configs/mixer_b16.py"],
        "ILSVRC2012_img_train.tar",
    ),
    "a wrong process": (
        ["--config=configs/digits.py", "--distributed=here"],
        "expected auto or HOST:PORT,INDEX,COUNT",
    ),
    "no recipe": ([], "Flag --config must have a value"),
    "a question": (["--help"], "--workdir: Folder of the run; runs/<recipe> if not"),
    "a divisor of nothing": (
        ["--config=configs/digits.py", "--config.accumulate=0"],
        "config.accumulate is 0; expected a whole number from 1",
    ),
    "no cluster": (
        ["--config=configs/digits.py", "--distributed=auto"],
        "--distributed=auto finds no cluster",
    ),
    "a wrong class count": (
        ["--config=configs/digits.py", "--config.dataset.num_classes=7"],
        "has num_classes=10, but the recipe states 7",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "message"), BEFORE_ANYTHING.values(), ids=BEFORE_ANYTHING
)
def test_a_mistake_gets_one_clear_message(
    arguments, message, program, tmp_path, data_dir
):
    if "digits" not in str(arguments):
        data_dir = tmp_path / "empty"
        data_dir.mkdir()
    start = time.time()
    process = program(
        "train", *arguments, f"--data_dir={data_dir}", f"--workdir={tmp_path}/run"
    )
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    # Fifteen seconds on an idle machine, starting Python included.
    assert time.time() - start < 60


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, data_dir):
    """A short run of the shipped recipe, by the command that README shows."""
    from conftest import start_program

    workdir = tmp_path_factory.mktemp("runs") / "digits"
    process = start_program(
        "train",
        "--config=configs/digits.py",
        "--config.total_steps=150",
        "--config.evals.test.every_steps=75",
        f"--data_dir={data_dir}",
        f"--workdir={workdir}",
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return workdir, said


def test_training_speaks_in_plain_lines_without_a_terminal(digits_run):
    _, said = digits_run
    lines = said.splitlines()
    assert any("step 150/150  loss " in line and "images/s" in line for line in lines)
    assert any("test: top1" in line for line in lines)
    # Ours alone: Orbax and TFDS would add a hundred of theirs.
    assert len(lines) < 25, said


def test_evaluate_prints_a_table_and_writes_it_and_a_picture(
    digits_run, program, data_dir
):
    workdir, _ = digits_run
    process = program("evaluate", f"--workdir={workdir}", f"--data_dir={data_dir}")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "Left out: fewshot (--only=all runs everything)" in said
    results = json.loads((workdir / "evaluate.json").read_text())
    (test,) = results["results"].values()
    assert results["step"] == 150
    assert results["evaluators"] == {
        "test": {"data": "digits test", "preprocess": "vision_transformer"}
    }
    first, second = (workdir / "evaluate.md").read_text().split("\n\n# ")
    title, _, head, _, *rows = first.splitlines()
    assert title == f"# {workdir} at step 150: mixer_s16, 8 × 8"
    assert cells(head) == ["", "test"]
    found = dict(map(cells, rows))
    assert found == {
        "data": "digits test",
        "preprocess": "vision_transformer",
        "top1": f"{100 * test['top1']:.2f} %",
        "top5": f"{100 * test['top5']:.2f} %",
        "loss": f"{test['loss']:.4f}",
        "nll": f"{test['nll']:.4f}",
        "count": "297",
    }
    assert test["count"] == 297
    assert test["top1"] > 0.6
    assert test["top1"] <= test["top5"] <= 1
    assert f"{100 * test['top1']:.2f} %" in said
    *_, whole = map(cells, second.splitlines())
    assert whole == [
        "all",
        goodput.duration(sum(results["seconds"].values())),
        "100.0 %",
    ]
    assert "compilation" in said
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    # The number is the one that training recorded at its last step.
    (*_, record) = (r for r in metrics.read(workdir) if "test/top1" in r)
    assert record["test/top1"] == pytest.approx(test["top1"])
    assert record["test/loss"] == pytest.approx(test["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """An untrained run on folders whose names are taken for something else."""
    folder = tmp_path_factory.mktemp("odd")
    data, workdir = folder / "a|b $x$ [red]", folder / "_run_ \x1b[31m"
    classes = [name.replace("/", "") for name in (*NAMES.values(),) if name]
    classes = sorted({name[:80] for name in classes if "\ud83d" not in name})
    for i, name in enumerate(classes):
        (data / name).mkdir(parents=True)
        for j in range(2):
            image = Image.new("RGB", (8, 8), (10 * i, 9 * j, 0))
            image.save(data / name / f"{j}.png")
    config = recipe.base()
    config.batch_size = 8
    config.dataset.update(name=f"folder:{data}", split="all")
    config.dataset.num_classes = len(classes)
    config.dataset.num_examples = 2 * len(classes)
    config.model.update(name="mixer_s16", image_size=(8, 8), patch_size=(4, 4))
    config.model.update(num_blocks=1, hidden_dim=8, tokens_mlp_dim=4)
    config.model.update(channels_mlp_dim=8)
    config.run.update(scan=False, remat="none")
    config.evals.test = recipe.evaluation("all", preprocess="vision_transformer")
    config = recipe.completed(config, 2 * len(classes), len(classes))
    claim(config, workdir, classes)
    model = models.create(**config.model, num_classes=len(classes))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    with checkpoint.Checkpointer(workdir / "checkpoints", every_steps=1) as saver:
        saver.save(1, {"params": params}, force=True)
    return workdir, data, len(classes)


def test_evaluate_takes_any_name_and_a_stdout_without_utf_8(odd_run, monkeypatch):
    workdir, data, classes = odd_run
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    monkeypatch.setenv("COLUMNS", "200")
    text.accept_any_text(sys.stdout)
    evaluate.evaluate(workdir)
    said = " ".join(printed.getvalue().decode("ascii").split())
    assert "mixer_s16, 8 x 8" in said
    assert f"folder:{data} all" in said
    assert r"_run_ \x1b[31m at step 1" in said
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((workdir / "evaluate.json").read_text(encoding="utf-8"))
    assert results["workdir"] == str(workdir)
    assert results["evaluators"]["test"]["data"] == f"folder:{data} all"
    assert results["results"]["test"]["count"] == 2 * classes
    title, *_ = table = (workdir / "evaluate.md").read_text("utf-8").splitlines()
    assert r"/\_run\_ \\x1b\[31m at step 1: mixer_s16, 8 × 8" in title
    assert any(r"/a\|b \$x\$ \[red\] all |" in line for line in table)
    # An unescaped bar would be a cell more.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table[2:]} == {3}


def test_results_are_kept_if_stdout_is_full(odd_run):
    workdir, *_ = odd_run
    for name in ("evaluate.json", "evaluate.md", "report.png"):
        (workdir / name).unlink(missing_ok=True)
    variables = {"JAX_PLATFORMS": "cpu", "LC_ALL": "C", "PYTHONUTF8": "0"}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "mlp_mixer.evaluate", f"--workdir={workdir}"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | variables | {"PYTHONCOERCECLOCALE": "0"},
            check=False,
        )
    assert process.returncode == 1
    *said, last = process.stderr.decode("ascii").splitlines()
    assert last == "stdout cannot be written: No space left on device."
    assert len(said) <= 4, said
    assert "\x1b" not in "".join(said)
    assert all((workdir / f"evaluate.{kind}").exists() for kind in ("json", "md"))
    assert (workdir / "report.png").exists()


def test_results_are_kept_if_the_picture_cannot_be_drawn(odd_run, caplog, capsys):
    workdir = shutil.copytree(odd_run[0], odd_run[0].with_name("copied"))
    (workdir / "report.png").unlink(missing_ok=True)
    (workdir / "report.png").mkdir()
    (workdir / "metrics.jsonl").write_text("[]\n")
    results = evaluate.evaluate(workdir)
    assert 0 <= results["test"]["top1"] <= 1
    assert "copied" in capsys.readouterr().out
    warned = [m for m in caplog.messages if "report.png is not drawn: " in m]
    assert len(warned) == 1
    assert any(
        "Neither curves nor times are shown: Line 1 of" in m for m in caplog.messages
    )
    assert (workdir / "evaluate.json").exists()


def test_results_are_seen_if_they_cannot_be_written(odd_run, capsys):
    workdir = shutil.copytree(odd_run[0], odd_run[0].with_name("unwritable"))
    for name in ("evaluate.json", "evaluate.md"):
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).mkdir()
    with pytest.raises(IsADirectoryError, match=r"evaluate\.json"):
        evaluate.evaluate(workdir)
    assert "top1" in capsys.readouterr().out


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_evaluators_that_training_left_out_run_by_name(digits_run, data_dir):
    workdir, _ = digits_run
    results = evaluate.evaluate(
        workdir, only=["fewshot", "test"], preprocess="timm", data_dir=data_dir
    )
    said = json.loads((workdir / "evaluate.json").read_text())
    assert said["results"] == results
    assert said["evaluators"] == {
        "test": {"data": "digits test", "preprocess": "timm"},
        "fewshot": {"data": "digits train → test", "preprocess": "timm"},
    }
    shots = results["fewshot"]
    assert list(shots) == ["1shot", "5shot", "10shot", "25shot", "count"]
    assert 0.2 < shots["1shot"] < shots["25shot"] < 1
    table = (workdir / "evaluate.md").read_text()
    assert f"| {100 * shots['5shot']:.2f} % |" in table
    with pytest.raises(ValueError, match="no evaluator 'few'; try fewshot, "):
        evaluate.evaluate(workdir, only=["few"], data_dir=data_dir)


def test_a_sweep_reports_the_chosen_l2(digits_run, data_dir, tmp_path):
    workdir = shutil.copytree(digits_run[0], tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["evals"]["fewshot"] |= {"seeds": 0, "l2_exponents": [-10, 4, 19]}
    (workdir / "config.json").write_text(json.dumps(config))
    (results,) = evaluate.evaluate(
        workdir, only=["fewshot"], data_dir=data_dir
    ).values()
    for shots in (1, 5, 10, 25):
        accuracies = {2.0**e: results[f"{shots}shot_l2_{e}"] for e in (-10, 4, 19)}
        assert results[f"{shots}shot"] == max(accuracies.values())
        assert results[f"{shots}shot"] == accuracies[results[f"{shots}shot_l2"]]
    table = (workdir / "evaluate.md").read_text()
    assert "\n| 5shot_l2 | " in table
    assert "l2_4" not in table


def test_missing_data_is_named_and_the_others_are_evaluated(
    digits_run, program, data_dir, tmp_path
):
    workdir = shutil.copytree(digits_run[0], tmp_path / "run")
    (workdir / "report.png").unlink(missing_ok=True)
    config = json.loads((workdir / "config.json").read_text())
    for split in ("train", "test"):
        config["evals"]["fewshot"][split]["name"] = "uc_merced"
    (workdir / "config.json").write_text(json.dumps(config))
    process = program(
        "evaluate", f"--workdir={workdir}", f"--data_dir={data_dir}", "--only=all"
    )
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "fewshot is left out: its data is not here" in said
    assert "fewshot was not evaluated: No prepared data set 'uc_merced'" in said
    assert "Traceback" not in said
    results = json.loads((workdir / "evaluate.json").read_text())["results"]
    assert set(results) == {"test"}
    assert (workdir / "report.png").exists()


def test_predict_names_digits_and_skips_what_is_broken(
    digits_run, program, root, tmp_path
):
    workdir, _ = digits_run
    folder = tmp_path / "images"
    shutil.copytree(root / "docs" / "digits", folder)
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not looked at")
    process = program("predict", f"--workdir={workdir}", folder, "--top=2")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "broken.png: cannot decode" in said
    assert "preprocessed by vision_transformer" in said
    assert "1 of 11 images could not be read" in said
    lines = [line for line in said.splitlines() if ".png  " in line and "%" in line]
    assert len(lines) == 10
    right = sum(line.split("/")[-1][0] == line.split()[1] for line in lines)
    assert right >= 6
    assert all(line.count("%") == 2 for line in lines)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--workdir={empty}"], "holds no run (no config.json)"),
        (
            "evaluate",
            ["--workdir={run}", "--only=test", "--preprocess=tim"],
            "protocol 'tim' is unknown; try timm",
        ),
        ("predict", ["--weights={run}", "--step=7", "{digits}"], "no checkpoint 7"),
        ("evaluate", ["--workdir={run}", "--only=test", "few"], "'few' is no flag"),
        ("train", ["--config=configs/digits.py", "config.seed=3"], "is no flag"),
    ],
)
def test_mistakes_after_training_are_explained(
    name, arguments, message, program, digits_run, tmp_path, root
):
    places = {"empty": tmp_path, "run": digits_run[0], "digits": root / "docs/digits"}
    process = program(name, *(word.format(**places) for word in arguments))
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert message in said
    assert "Traceback" not in said


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `predict … | head -1`."""
    script = """
from mlp_mixer import program
program.run(lambda arguments: [print("a line") for _ in range(100_000)])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout
    assert process.stderr
    with process.stdout as out:
        assert out.readline() == b"a line\n"
    with process.stderr as errors:
        said = errors.read()
    assert process.wait(timeout=100) == 1
    assert said == b""


def test_another_pipe_that_breaks_is_an_error():
    """A worker's, say."""
    with pytest.raises(BrokenPipeError), program_module.errors_in_one_line():
        raise BrokenPipeError


@pytest.mark.parametrize("words", [[], ["224", "x"], ["1", "2", "3"], ["-1", "2"]])
def test_a_size_is_two_numbers_or_a_squares_side(words, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_list("image_size", None, "HEIGHT,WIDTH", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    assert program_module.size("image_size") is None
    values["image_size"].value = ["224", "160"]
    assert program_module.size("image_size") == (224, 160)
    values["image_size"].value = ["512"]
    assert program_module.size("image_size") == (512, 512)
    values["image_size"].value = words
    with pytest.raises(ValueError, match=r"--image_size is .*; expected HEIGHT,WIDTH"):
        program_module.size("image_size")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("3h50m", 13_800), ("1d2h", 93_600), ("1m1s", 61)],
)
def test_a_duration_is_days_hours_minutes_and_seconds(text, seconds):
    values = flags.FlagValues()
    program_module.define_duration("limit", None, "A time.", flag_values=values)
    values(["program", f"--limit={text}"])
    assert values["limit"].value == seconds


@pytest.mark.parametrize("text", ["", "0s", "90", "50m3h", "3h 50m", "-1s", "1.5h"])
def test_a_wrong_duration_says_what_it_may_be(text):
    values = flags.FlagValues()
    program_module.define_duration("limit", None, "A time.", flag_values=values)
    with pytest.raises(flags.Error, match=r"limit=.*90s, 15m, 3h50m or 1d12h"):
        values(["program", f"--limit={text}"])


def test_an_interruption_ends_a_program_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, program_module.errors_in_one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130  # what shells expect
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("words", [["²", "1"], ["", "1"]])
def test_what_only_looks_like_a_number_is_none(words, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_list("image_size", words, "HEIGHT,WIDTH", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(ValueError, match="expected HEIGHT,WIDTH"):
        program_module.size("image_size")


def test_a_bucket_whose_library_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://b/run .* pip install .*\[gcs\]"):
        program_module.path("gs://b/run")
    assert program_module.path("/b/run") == "/b/run"


def test_a_tilde_is_the_home_folder_in_flags_and_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = flags.FlagValues()
    program_module.define_path("out", "~/default", "A path.", flag_values=values)
    assert values(["program"]) == ["program"]
    assert values["out"].value == "/home/me/default"
    values(["program", "--out=~/x/~"])
    assert values["out"].value == "/home/me/x/~"
    assert program_module.path("~") == "/home/me"
    assert program_module.path("./~") == "./~"
    assert program_module.path("s3://bucket/~x") == "s3://bucket/~x"
    with pytest.raises(
        ValueError, match=r"~nobody else/x begins .* written \./~nobody"
    ):
        program_module.path("~nobody else/x")


PATHS = {
    "train": ["workdir", "data_dir"],
    "evaluate": ["workdir", "data_dir"],
    "predict": ["weights", "labels", "out", "features", "sheet"],
    "prepare": ["data_dir", "manual_dir"],
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_of_a_program_is_one(name, root):
    """Among the flags of text, none that is a path is left."""
    source = (root / "mlp_mixer" / f"{name}.py").read_text()
    found = re.findall(r'define_path\(\s*"(\w+)"', source)
    assert found == PATHS[name]
    texts = set(re.findall(r'DEFINE_string\(\s*"(\w+)"', source))
    assert texts <= {"profile", "best", "preprocess"}


@pytest.mark.parametrize("arguments", [["{0}", "~/y.npz"], ["~/x.npz", "{1}/y.npz"]])
def test_convert_reads_and_writes_in_the_home_folder(
    arguments, weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pretrained.write_npz(weights, tmp_path / "x.npz")
    source, target = (word.format(tmp_path / "x.npz", tmp_path) for word in arguments)
    convert.convert(source, target)
    assert (tmp_path / "y.npz").is_file()
    assert not (tmp_path / "~").exists()


def test_a_run_lives_in_the_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.total_steps, tiny.optim.warmup_steps = 1, 0
    tiny.evals.val.every_steps = 1
    train.train(tiny, "~/run")
    assert evaluate.evaluate("~/run")["val"]["count"] == 37
    assert os.listdir(tmp_path) == ["run"]


# --- One of several processes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "expected auto or HOST:PORT,INDEX,COUNT"),
        ("localhost,0,2", "expected auto or HOST:PORT"),
        ("localhost:abc,0,2", "expected auto or HOST:PORT"),
        ("localhost:²,0,2", "expected auto or HOST:PORT"),
        ("localhost:1,0", "expected auto or HOST:PORT"),
        ("localhost:1,0,2,3", "expected auto or HOST:PORT"),
        ("localhost:1,-1,2", "expected auto or HOST:PORT"),
        ("localhost:1,a,2", "expected auto or HOST:PORT"),
        (":1,0,2", "expected auto or HOST:PORT"),
        ("[::1:1,0,2", "expected auto or HOST:PORT"),
        ("localhost:0,0,2", r"port 0 is not one of 1 \.\.\. 65535"),
        ("localhost:65536,1,2", r"port 65536 is not one of"),
        ("localhost:1,2,2", r"of 2 processes the INDEX is one of 0 \.\.\. 1"),
        ("localhost:1,0,0", "the COUNT is 1 or more"),
        ("nowhere.invalid:1,0,2", "the host 'nowhere.invalid' is not known here"),
        ("no where:1,1,2", "the host 'no where' is not known here"),
    ],
)
def test_a_wrong_place_among_processes_is_named(where, message, monkeypatch):
    monkeypatch.delattr(program_module.jax.distributed, "initialize")
    with pytest.raises(ValueError, match=message):
        program_module._join(where, 10, 10)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("heartbeat_timeout_seconds=4", "integer >= 5"),
        ("join_timeout_seconds=0", "a positive integer"),
    ],
)
def test_a_time_out_that_is_too_short_is_refused(flag, expected):
    values = flags.FlagValues()
    program_module._define_distributed(values)
    with pytest.raises(flags.Error, match=f"{flag}: . is not {expected}"):
        values(["program", f"--{flag}"])


def test_a_port_that_is_taken_is_named(monkeypatch):
    monkeypatch.delattr(program_module.jax.distributed, "initialize")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on port {port} .Address"):
            program_module._join(f"localhost:{port},0,2", 10, 10)


def test_nobody_waits_for_ever_or_without_a_word():
    """Neither for process 0, nor process 0 for the others."""
    with socket.create_server(("", 0)) as free, socket.create_server(("", 0)) as other:
        ports = [s.getsockname()[1] for s in (free, other)]
    script = """
import sys
from mlp_mixer import program
program.ANNOUNCE_EVERY = 0.4
program._join(sys.argv[1], 1, 10)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"localhost:{port},{index},3"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index, port in enumerate(ports)
    ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for printed, others in zip(
        said,
        ("processes 1, 2 of 3", f"process 0 at localhost:{ports[1]}"),
        strict=True,
    ):
        *waiting, last = printed.splitlines()
        assert waiting, printed
        for line in waiting:
            assert re.fullmatch(f"Waiting for {others}, . seconds so far\\.", line)
        assert last.startswith(f"Waited 1 seconds in vain for {others}. All processes")
