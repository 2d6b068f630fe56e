"""One run on any number of processes: the same rows, updates and evaluations."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from set_up import free_port, run_pair, state_of, told
from step_program import named

from mlp_mixer import workdir

# Three evaluations, and as many examples a step as two and three processes divide.
RUN = [
    "--config=configs/digits.py",
    "--config.mesh.data=-1",
    "--config.batch_size=96",
    "--config.total_steps=6",
    "--config.optim.warmup_steps=2",
    "--config.log_every_steps=1",
    "--config.evals.test.every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep_every_steps=2",
]


def assert_same_run(one, other):
    """Up to the order of additions; every evaluation counts every example."""
    for a, b in zip(told(other), told(one), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)
    evaluated = {r["step"]: r["test/count"] for r in told(one) if "test/count" in r}
    assert evaluated == dict.fromkeys(range(2, 7, 2), 297)
    config = workdir.load(one)
    ours, theirs = (named(state_of(config, run).params) for run in (one, other))
    for name, x in ours.items():
        np.testing.assert_allclose(theirs[name], x, rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    """A run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    command = [*RUN, f"--data_dir={data_dir}", f"--workdir={folder}"]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(
        [sys.executable, "-m", "mlp_mixer.train", *command],
        env=os.environ | environment,
        check=True,
        timeout=300,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        [],
        ["--config.mesh.model=2", "--config.mesh.fsdp=2", "--config.sharding=fsdp"],
        # Both processes hold all rows.
        ["--config.mesh.model=8"],
    ],
    ids=["data", "data, fsdp and model", "model over both processes"],
)
def test_two_processes_of_four_devices_equal_one_of_eight(
    mesh, uninterrupted, program, tmp_path, data_dir
):
    command = [*RUN, *mesh, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'two'}"]
    codes, said = run_pair(program, "train", [command] * 2, devices=4)
    assert codes == [0, 0], "\n".join(said)
    assert_same_run(uninterrupted, tmp_path / "two")


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(
    uninterrupted, program, tmp_path, data_dir
):
    """Two processes, killed after step 2; one, killed after 4; three to the end."""
    folder = tmp_path / "run"
    command = [*RUN, f"--data_dir={data_dir}", f"--workdir={folder}"]
    for count, last in ((2, 2), (1, 4), (3, 6)):
        codes, said = run_pair(program, "train", [command] * count)
        assert codes == [0] * count, "\n".join(said)
        for step in range(last + 2, 7, 2):  # as if it had been killed before
            shutil.rmtree(folder / "checkpoints" / f"{step:08}")
        (folder / "saved.json").write_text(json.dumps({"saved": last}))
    assert "Restored step 4" in said[0]
    assert_same_run(uninterrupted, folder)


@pytest.mark.slow
def test_statistics_of_batchnorm_are_the_global_batchs(program, tmp_path, data_dir):
    """Of two processes of four devices they are what one device makes of all rows."""
    command = [
        "--config=configs/family/digits.py:smlpnet",
        *RUN[1:],
        *("--config.total_steps=2", "--config.optim.warmup_steps=1"),
        "--config.model.num_blocks=(1,1,1,1)",
        f"--data_dir={data_dir}",
    ]
    one, two = (tmp_path / name for name in ("one", "two"))
    alone = program("train", *command, f"--workdir={one}", devices=1)
    assert alone.wait(300) == 0, alone.stdout.read()
    codes, said = run_pair(
        program, "train", [[*command, f"--workdir={two}"]] * 2, devices=4
    )
    assert codes == [0, 0], "\n".join(said)
    config = workdir.load(one)
    ours, theirs = (named(state_of(config, run).stats) for run in (two, one))
    for name, x in ours.items():
        np.testing.assert_allclose(theirs[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(told(two), told(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


WORKER = """
import sys
import jax, numpy as np
from mlp_mixer import recipe, sharding
from mlp_mixer.data import pipeline, sources

index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
source = sources.open_source("digits", "train", data_dir=sys.argv[3])

def first(rows):
    fields = {"image_size": (8, 8), "batch_size": 16, "seed": 3, "rows": rows}
    return next(pipeline.train_batches(source, **dict(recipe.base().input), **fields))

whole = first(None)
found = jax.devices()
for shape in ((8,), (2, 2, 2), (2, 1, 4), (1, 1, 8), (1, 4, 2), (4, 1, 2)):
    for devices in (found, found[::-1], found[::2] + found[1::2]):
        mesh = sharding.make_mesh(*shape, devices=devices)
        rows = sharding.process_rows(mesh, 16)
        batch = sharding.place_rows(first(rows), mesh)
        for name, x in batch.items():
            assert x.shape == whole[name].shape, (name, x.shape)
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[name][shard.index])
        print(shape, len(rows), flush=True)
"""


@pytest.mark.slow
def test_each_process_reads_the_rows_of_its_devices_and_no_others(tmp_path, data_dir):
    """For any mesh, and devices in any order."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    port = str(free_port())
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(i), port, data_dir],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    for text in said:
        lines = [line for line in text.splitlines() if line.startswith("(")]
        assert len(lines) == 18
        # With the model axis over both processes, each holds all rows.
        assert lines[0] == "(8,) 8"
        assert lines[9] == "(1, 1, 8) 16"
