"""Runs whose folder is on a bucket, which a server on this machine stands for."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import fake_gcs
import jax
import numpy as np
import pytest
from set_up import state_of

from mlp_mixer import metrics, pretrained
from mlp_mixer.workdir import load

pytest.importorskip("gcsfs", reason="needs the extra gcs")
pytestmark = pytest.mark.slow
RECIPE = [
    "--config=configs/digits.py",
    "--config.total_steps=60",
    "--config.optim.warmup_steps=10",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=10",
    "--config.evals.test.every_steps=20",
]


@pytest.fixture
def bucket(monkeypatch):
    with fake_gcs.serving() as (bucket, url):
        for name, value in fake_gcs.environment(url).items():
            monkeypatch.setenv(name, value)
        yield bucket


def download(bucket, prefix, folder):
    for name, found in bucket.objects.items():
        if name.startswith(prefix):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(found.data)
    return folder / prefix


def measured(workdir):
    """The records without their times."""
    kinds = ("train/", "test/")
    records = [
        {k: v for k, v in record.items() if k == "step" or k.startswith(kinds)}
        for record in metrics.read(workdir)
    ]
    return [record for record in records if len(record) > 1]


def until(done, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_on_a_bucket_stops_resumes_and_is_used_as_a_local_one(
    bucket, program, data_dir, tmp_path
):
    data = f"--data_dir={data_dir}"
    straight = program("train", *RECIPE, data, f"--workdir={tmp_path}/straight")
    assert straight.wait(200) == 0, straight.stdout.read()

    workdir = "--workdir=gs://bucket/run"
    stopped = program("train", *RECIPE, data, workdir)
    saved = "run/checkpoints/00000010/commit_success.txt"
    until(lambda: saved in bucket.objects, stopped)
    assert "run/owner.json" in bucket.objects
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, said
    assert "the same command goes on from there" in said
    resumed = program("train", *RECIPE, data, workdir)
    said, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    assert "gs://bucket/run is trained to step 60" in said
    assert "Readahead" not in said

    here = download(bucket, "run", tmp_path / "copy")
    assert measured(here) == measured(tmp_path / "straight")
    config = load(tmp_path / "straight")
    jax.tree.map(
        np.testing.assert_array_equal,
        *(state_of(config, folder) for folder in (here, tmp_path / "straight")),
    )
    names = [name.removeprefix("run/") for name in bucket.objects]
    kept = {name.partition("/")[0] for name in names}
    assert kept == {
        *("config.json", "class_names.json", "data.json", "saved.json"),
        *("metrics", "tensorboard", "checkpoints"),
    }
    assert [name for name in names if name.startswith("metrics/")] == [
        "metrics/00000.jsonl"
    ]
    assert len([name for name in names if name.startswith("tensorboard/")]) == 2
    assert json.loads(bucket.objects["run/saved.json"].data) == {"saved": 60}

    evaluated = program("evaluate", workdir, data)
    predicted = program("predict", workdir, "docs/digits")
    for process in (evaluated, predicted):
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    table = json.loads(bucket.objects["run/evaluate.json"].data)
    assert "top1" in json.dumps(table)
    assert bucket.objects["run/report.png"].data.startswith(b"\x89PNG")


def test_a_file_of_weights_on_a_bucket_is_read_as_a_local_one(
    bucket, weights, tmp_path
):
    pretrained.write_npz(weights, tmp_path / "made.npz")
    bucket.put("made.npz", (tmp_path / "made.npz").read_bytes())
    script = (
        "from mlp_mixer import fingerprints, pretrained\n"
        "for name in sys.argv[1:]:\n"
        "  print(fingerprints.fingerprint(pretrained.read(name).params))\n"
    )
    files = "gs://bucket/made.npz", f"{tmp_path}/made.npz"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}", *files],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    there, here = result.stdout.splitlines()
    assert there == here


READER = """
import sys
from etils import epath
from mlp_mixer import files
path = epath.Path("gs://bucket/run/owner.json")
print([p.name for p in path.parent.iterdir()], flush=True)
sys.stdin.readline()
print([p.name for p in path.parent.iterdir()], path.read_text(), flush=True)
"""


def test_what_other_programs_write_on_a_bucket_is_seen(bucket):
    bucket.put("run/owner.json", b"one")
    process: Any = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "['owner.json']\n"
    bucket.put("run/owner.json", b"a longer one")
    bucket.put("run/saved.json", b"{}")
    said, _ = process.communicate("\n", timeout=60)
    assert said == "['owner.json', 'saved.json'] a longer one\n"


OWNER = """
import sys, time
from etils import epath
from mlp_mixer import ownership
go = epath.Path("gs://bucket/go")
print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
try:
    with ownership.owned("gs://bucket/run") as check_kept:
        print("owned", flush=True)
        sys.stdin.readline()
        check_kept()
except ownership.OwnedError as error:
    print(error, flush=True)
"""


def test_of_two_starts_at_once_on_a_bucket_one_is_refused(bucket):
    pair: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
    bucket.put("go", b"")
    said = [process.stdout.readline() for process in pair]
    assert said.count("owned\n") == 1, said
    owner, other = sorted(pair, key=lambda p: said[pair.index(p)] != "owned\n")
    [refusal] = [line for line in said if line != "owned\n"]
    assert f"gs://bucket/run is in use by process {owner.pid}" in refusal
    other.communicate(timeout=60)
    assert "run/owner.json" in bucket.objects  # not removed by the one that is refused
    owner.communicate("\n", timeout=60)
    assert owner.returncode == 0
    assert "run/owner.json" not in bucket.objects
