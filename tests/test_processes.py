"""One run in two real processes."""

import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from set_up import free_port, run_pair, state_of, told

from mlp_mixer import pretrained, processes, workdir

RUN = [
    "--config=configs/digits.py",
    "--config.mesh.data=-1",
    "--config.total_steps=12",
    "--config.optim.warmup_steps=2",
    "--config.log_every_steps=1",
    "--config.evals.test.every_steps=6",
    "--config.checkpoint.every_steps=6",
]


RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "digits.py"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", "fsdp"])
def test_two_processes_equal_one(program, tmp_path, data_dir, strategy):
    """The same batches, row for row; one checkpoint; every example counted once."""
    two, one = tmp_path / "two", tmp_path / "one"
    common = [*RUN, f"--data_dir={data_dir}", f"--config.sharding={strategy}"]
    single = program("train", *common, f"--workdir={one}", devices=2)
    said, _ = single.communicate(timeout=300)
    assert single.returncode == 0, said

    codes, said = run_pair(program, "train", [[*common, f"--workdir={two}"]] * 2)
    assert codes == [0, 0], "\n".join(said)
    # Only the first one speaks.
    assert "step 12/12" in said[0]
    assert "step 12/12" not in said[1]
    assert sorted(os.listdir(two / "checkpoints")) == ["00000006", "00000012"]
    for a, b in zip(told(two), told(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert told(two)[-1]["test/count"] == 297
    config = workdir.load(one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3),
        *(state_of(config, run).params["head"] for run in (one, two)),
    )
    if strategy == "replicated":
        return
    # And so are features, for few-shot evaluation, of whatever is cut.
    everything = ["--only=all", f"--data_dir={data_dir}"]
    codes, said = run_pair(program, "evaluate", [[*everything, f"--workdir={two}"]] * 2)
    assert codes == [0, 0], "\n".join(said)
    single = program("evaluate", *everything, f"--workdir={one}", devices=2)
    assert single.wait(300) == 0
    results = [
        json.loads((run / "evaluate.json").read_text())["results"] for run in (one, two)
    ]
    assert results[0]["fewshot"]["count"] == 297
    for name in ("test", "fewshot"):
        assert results[1][name] == pytest.approx(results[0][name], rel=0.02)


WORKER = """
import os, sys
import jax
from mlp_mixer import ownership, processes

index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
# Values of any size, in the order of the processes.
mine = {"index": index, "name": "ü" * (1 + 1000 * index)}
first, second = processes.gather(mine)
if (first["index"], len(second["name"])) != (0, 1001) or processes.first(index) != 0:
    raise ValueError(f"gathered {first}, {second}")
processes.compare(same={"a": [1, 2, {}], "b": None, "nan": float("nan")})

def tell(work):
    try:
        work()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)

def fail():
    with processes.together():
        if index == 1:
            raise FileNotFoundError("no file here")

def own():
    with ownership.owned(f"{folder}/{index}"):
        pass

tell(lambda: processes.compare(
    recipe={"rate": 0.1 * (1 + index), "same": 1},
    names=["cat", "dog" if index else "cow"],
    **({"more": 1} if index else {}),
))
tell(fail)
tell(own)
"""


def test_processes_tell_one_another_what_differs_and_what_fails(tmp_path):
    port = str(free_port())
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(index), port, tmp_path],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said, errors = zip(*(p.communicate(timeout=120) for p in pair), strict=True)
    assert [p.returncode for p in pair] == [0, 0], "\n".join(errors)
    lines = [
        [line for line in text.splitlines() if "[Gloo]" not in line] for text in said
    ]
    for one in lines:
        assert one[1:4] == [
            "  more: absent on process 0; 1 on process 1",
            '  names.1: "cow" on process 0; "dog" on process 1',
            "  recipe.rate: 0.1 on process 0; 0.2 on process 1",
        ]
    host = socket.gethostname()
    missing = "FileNotFoundError: no file here"
    assert lines[0][4] == f"RuntimeError: Process 1 failed on {host}: {missing}"
    assert lines[1][4] == missing
    where = rf"--workdir: {tmp_path}/1 on {host} is not the folder of process 0"
    assert re.match(f"RuntimeError: Process 1 failed on {host}: .*{where}", lines[0][5])
    assert re.match(f"ValueError: {where}", lines[1][5])
    assert os.listdir(tmp_path / "0") == []


def differing(name, tmp_path):
    """Arguments and folders of two processes, and what each must say."""
    images, other = tmp_path / "0" / "images", tmp_path / "1" / "images"
    for folder in (images, other):
        for split in ("train", "val"):
            for i, label in enumerate(("ant", "bee")):
                path = folder / split / label
                path.mkdir(parents=True)
                for k in range(4):
                    noise = np.random.default_rng([i, k]).integers(0, 255, (8, 8, 3))
                    Image.fromarray(noise.astype(np.uint8)).save(path / f"{k}.png")
    run, said = [str(tmp_path / "run")] * 2, ""
    more: list[list[str]] = [[], []]
    if name == "recipe":
        more[1] = ["--config.optim.learning_rate=0.5"]
        said = r"recipe\.optim\.learning_rate: 0.* on process 0; 0\.5 on process 1"
    elif name == "a field that there is not":
        more[0], said = ["--config.nosuch=1"], r"config.nosuch is no field"
    elif name == "workdir":
        run, said = ["run", "run"], r"run on .* is not the folder of process 0"
    elif name == "class names":
        for split in ("train", "val"):
            (other / split / "bee").rename(other / split / "cow")
        said = r"  data\.class_names\.1: \"bee\" on process 0; \"cow\" on process 1"
    elif name == "data":
        (other / "train" / "bee" / "0.png").unlink()
        said = r"  data\.classes\.bee\.images: 4 on process 0; 3 on process 1"
    elif name == "data of an evaluator":
        (other / "val" / "bee" / "0.png").unlink()
        said = r"  evals\.test\.0\.classes\.bee\.images: 4 on process 0; 3 on process 1"
    elif name == "no data":
        images.rename(images.with_name("away"))
        said = r"No folder 'images'"
    elif name == "unreadable data":
        for path in [*(other / "train").rglob("*.png")]:
            path.unlink()
            path.symlink_to("/proc/self/mem")
        said = r"folder:images train cannot be read, .*Input/output error"
    elif name == "batch":
        more, said = [["--config.batch_size=7"]] * 2, "A batch of 7 does not divide"
    arguments = [
        [
            f"--config={RECIPE}",
            "--config.dataset.name=folder:images",
            "--config.dataset.num_examples=None",
            "--config.dataset.num_classes=None",
            "--config.evals.test.dataset.split=val",
            "--config.mesh.data=-1",
            "--config.batch_size=8",
            f"--workdir={workdir}",
            *options,
        ]
        for workdir, options in zip(run, more, strict=True)
    ]
    return arguments, (tmp_path / "0", tmp_path / "1"), said


def test_of_several_hosts_those_that_differ_are_named(monkeypatch):
    files = [300, 298, 300, 300, 299]
    rows = [[f"host{i}", {"data.images": n}] for i, n in enumerate(files)]
    monkeypatch.setattr(
        processes, "gather", lambda value: rows if isinstance(value, list) else files
    )
    with pytest.raises(ValueError, match="must agree") as error:
        processes.compare(data={"images": 300})
    assert str(error.value).endswith(
        "  data.images: 300 on processes 0 (host0), 2 (host2), 3 (host3); "
        "298 on process 1 (host1); 299 on process 4 (host4)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "recipe",
        "a field that there is not",
        "workdir",
        "class names",
        "data",
        "data of an evaluator",
        "no data",
        "unreadable data",
        "batch",
    ],
)
def test_processes_that_differ_all_end_at_once_and_say_in_what(program, tmp_path, name):
    arguments, folders, line = differing(name, tmp_path)
    codes, said = run_pair(program, "train", arguments, folders, seconds=60)
    assert codes == [1, 1], "\n".join(said)
    for text in said:
        assert len(re.findall(line, text)) == 1, text
        assert "Traceback" not in text
    assert not list(tmp_path.rglob("checkpoints"))
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.slow
def test_an_error_of_one_process_in_training_ends_the_others_too(program, tmp_path):
    arguments, folders, _ = differing("nothing", tmp_path)
    for path in (folders[1] / "images" / "train").rglob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))  # as many bytes, and no image
    arguments = [[*one, "--config.input.max_broken_images=3"] for one in arguments]
    codes, said = run_pair(program, "train", arguments, folders, seconds=90)
    assert codes == [1, 1], "\n".join(said)
    error = "More than max_broken_images=3 images are broken"
    assert error in said[1]
    assert f"Process 1 on {socket.gethostname()} failed: {error}" in said[0]
    assert "Traceback" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_processes_start_from_the_same_weights_or_not_at_all(
    seeds, make_params, program, tmp_path, data_dir
):
    """Each reads a file of its own, as from its own disk."""
    folders = [tmp_path / str(i) for i in range(2)]
    for folder, seed in zip(folders, seeds, strict=True):
        params = make_params(
            seed=seed,
            image_size=(8, 8),
            patch_size=(2, 2),
            num_blocks=4,
            hidden_dim=64,
            tokens_mlp_dim=32,
            channels_mlp_dim=256,
        )
        folder.mkdir()
        pretrained.write_npz(pretrained.Weights(params, "made"), folder / "made.npz")
    arguments = [
        *RUN,
        "--config.sharding=fsdp",
        "--config.init_from=made.npz",
        f"--data_dir={data_dir}",
        f"--workdir={tmp_path / 'run'}",
    ]
    codes, said = run_pair(program, "train", [arguments] * 2, folders)
    if seeds == (0, 0):
        assert codes == [0, 0], "\n".join(said)
        # A fresh head of zeros would begin at ln 10.
        assert abs(told(tmp_path / "run")[0]["train/loss"] - math.log(10)) > 0.05
    else:
        assert 0 not in codes
        assert "weights at made.npz.params/" in "".join(said)


GLOO = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error: Connection reset"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(GLOO), True),  # as jaxlib raises it
        (jax.errors.JaxRuntimeError(f"INTERNAL: NCCL operation failed: {GLOO}"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("no connection closed here"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_an_error_of_an_exchange_is_told_from_ones_own(error, expected):
    assert processes.is_of_an_exchange(error) == expected
    # An error that arose from it, as a save that could not go on.
    late = RuntimeError("Saving step 5 failed")
    late.__cause__ = error
    assert processes.is_of_an_exchange(late) == expected
