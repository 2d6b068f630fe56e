"""One run in two real processes."""

import json
import math
import os
import socket

import jax
import numpy as np
import pytest
from test_train import state_of, told

from mlp_mixer import pretrained, runs

RUN = [
    "--config=configs/digits.py",
    "--config.mesh.data=-1",
    "--config.total_steps=12",
    "--config.optim.warmup_steps=2",
    "--config.log_every_steps=1",
    "--config.evals.test.every_steps=6",
    "--config.checkpoint.every_steps=6",
]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", "fsdp"])
def test_two_processes_equal_one(program, tmp_path, data_dir, strategy):
    """The same batches, row for row; one checkpoint; every example counted once."""
    two, one = tmp_path / "two", tmp_path / "one"
    common = [*RUN, f"--data_dir={data_dir}", f"--config.sharding={strategy}"]
    single = program("train", *common, f"--workdir={one}", devices=2)
    said, _ = single.communicate(timeout=300)
    assert single.returncode == 0, said

    port = free_port()
    pair = [
        program(
            "train",
            *common,
            f"--distributed=localhost:{port},{i},2",
            f"--workdir={two}",
            # More devices than cores may wait for one another's collectives for ever.
            devices=1,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    # Only the first one speaks.
    assert "step 12/12" in said[0]
    assert "step 12/12" not in said[1]
    assert sorted(os.listdir(two / "checkpoints")) == ["00000006", "00000012"]
    for a, b in zip(told(two), told(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert told(two)[-1]["test/count"] == 297
    # And so are features, for few-shot evaluation.
    port = free_port()
    everything = ["--only=all", f"--data_dir={data_dir}"]
    pair = [
        program(
            "evaluate",
            *everything,
            f"--distributed=localhost:{port},{i},2",
            f"--workdir={two}",
            devices=1,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    single = program("evaluate", *everything, f"--workdir={one}", devices=2)
    assert single.wait(300) == 0
    results = [
        json.loads((run / "evaluate.json").read_text())["results"] for run in (one, two)
    ]
    assert results[0]["fewshot"]["count"] == 297
    for name in ("test", "fewshot"):
        assert results[1][name] == pytest.approx(results[0][name], rel=0.02)
    config = runs.load(one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3),
        *(state_of(config, run).params["head"] for run in (one, two)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_processes_start_from_the_same_weights_or_not_at_all(
    seeds, make_params, program, tmp_path, data_dir
):
    """Each reads a file of its own, as from its own disk."""
    port, pair = free_port(), []
    for i, seed in enumerate(seeds):
        params = make_params(
            seed=seed,
            image_size=(8, 8),
            patch_size=(2, 2),
            num_blocks=4,
            hidden_dim=64,
            tokens_mlp_dim=32,
            channels_mlp_dim=256,
        )
        weights = pretrained.Weights(params, "made")
        pretrained.write_npz(weights, tmp_path / f"{i}.npz")
        pair.append(
            program(
                "train",
                *RUN,
                "--config.sharding=fsdp",
                f"--config.init_from={tmp_path / f'{i}.npz'}",
                f"--data_dir={data_dir}",
                f"--distributed=localhost:{port},{i},2",
                f"--workdir={tmp_path / 'run'}",
                devices=1,
            )
        )
    said = [process.communicate(timeout=300)[0] for process in pair]
    codes = [process.returncode for process in pair]
    if seeds == (0, 0):
        assert codes == [0, 0], "\n".join(said)
        # A fresh head of zeros would begin at ln 10.
        assert abs(told(tmp_path / "run")[0]["train/loss"] - math.log(10)) > 0.05
    else:
        assert 0 not in codes
        assert "The processes read different weights at" in "".join(said)
