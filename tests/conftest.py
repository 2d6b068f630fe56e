"""Every test sees eight CPU devices and may not promote ranks silently."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mlp_mixer import recipe

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def tiny():
    """A run of seconds: synthetic 16-pixel images, two small blocks, all noise on."""
    config = recipe.base()
    config.dataset.name = "synthetic"
    config.dataset.num_examples = 96
    config.dataset.num_classes = 8
    config.batch_size = 16
    config.total_steps = 12
    config.mixup = 0.5
    config.log_every_steps = 1
    config.input.shift = 1
    config.model.name = "mixer_s16"
    config.model.image_size = (16, 16)
    config.model.patch_size = (4, 4)
    config.model.num_blocks = 2
    config.model.hidden_dim = 32
    config.model.tokens_mlp_dim = 16
    config.model.channels_mlp_dim = 128
    config.model.stochastic_depth = 0.2
    config.optim.warmup_steps = 2
    config.optim.weight_decay = 0.1
    config.checkpoint.every_steps = 4
    config.evals.val = recipe.evaluation(
        config, "val", every_steps=6, preprocess="vision_transformer"
    )
    config.evals.val.dataset.num_examples = 37
    return config


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One folder of prepared data sets for the whole session."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def program():
    """Starts `python -m mlp_mixer.NAME ARGUMENTS`, with two CPU devices."""
    started = []

    def start(name, *arguments, cwd=None, devices=2):
        process = subprocess.Popen(
            [sys.executable, "-m", f"mlp_mixer.{name}", *map(str, arguments)],
            cwd=cwd,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def root():
    """The clone."""
    return pathlib.Path(__file__).parents[1]
