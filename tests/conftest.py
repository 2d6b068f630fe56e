"""Every test sees eight CPU devices and may not promote ranks silently."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import session  # noqa: F401  (sets what they share)
from set_up import random_params

from mlp_mixer import models, pretrained, recipe, text

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test logs may hold names that are no text, which workers cannot send."""
    report = yield
    report.sections = [(t, text.printable(s, keep="\n")) for t, s in report.sections]
    return report


@pytest.fixture(autouse=True)
def same_log():
    """A program that a test runs sets up the log; the next test finds it as before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [*root.handlers]:
        if handler not in handlers:
            root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


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
        "val", every_steps=6, preprocess="vision_transformer"
    )
    config.evals.val.dataset.num_examples = 37
    return config


@pytest.fixture
def make_params():
    """make_params(name="mixer_s16", …): host arrays, every one of them random."""

    def make(
        name="mixer_s16", *, num_classes=10, image_size=(16, 16), seed=0, **fields
    ):
        sizes = {
            "patch_size": (4, 4),
            "num_blocks": 2,
            "hidden_dim": 8,
            "tokens_mlp_dim": 4,
            "channels_mlp_dim": 16,
        }
        model = models.create(
            name, num_classes=num_classes, image_size=image_size, **sizes | fields
        )
        return random_params(model, image_size, seed)

    return make


@pytest.fixture
def weights(make_params):
    """Of a small Mixer, with everything known."""
    return pretrained.Weights(
        make_params(),
        "made",
        model={"gelu": "exact"},
        image_size=(16, 16),
        class_names=tuple("abcdefghij"),
        preprocess="timm",
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One folder of prepared data sets for the whole session."""
    return str(tmp_path_factory.mktemp("data"))


def start_program(name, *arguments, cwd=None, devices=2):
    """Starts `python -m mlp_mixer.NAME ARGUMENTS` with so many CPU devices."""
    return subprocess.Popen(
        [sys.executable, "-m", f"mlp_mixer.{name}", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def program():
    """`start_program`, for processes that end with the test at the latest."""
    started = []

    def start(*arguments, **options):
        started.append(start_program(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def root():
    """The clone."""
    return pathlib.Path(__file__).parents[1]
