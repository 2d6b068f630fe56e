"""Compiled programs are kept: what a second start reads is what the first compiled."""

import collections
import logging
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from set_up import assert_equal_runs, free_port

from mlp_mixer import compilation_cache, metrics, recipe, train
from mlp_mixer.compilation_cache import keep_programs, remove_oldest

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX as it starts without settings, with an empty cache folder of the user."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.setenv("MLP_MIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compilation_cache, "MIN_SECONDS", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield tmp_path / "cache" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.fixture
def events():
    """How often JAX read and wrote programs, and asked for some, since `clear()`."""
    counts: collections.Counter[str] = collections.Counter()

    def count(event, **_):
        counts[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(count)
    yield counts
    jax.monitoring.unregister_event_listener(count)


def square_sum():
    """The result of a program that is compiled, or read, at every call."""
    jax.clear_caches()
    x = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0))(x))


def folder_of_jax():
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009


def entries(folder):
    return sorted(folder.rglob("*-cache"))


def test_a_program_is_compiled_once_and_read_with_the_same_bits(fresh, events):
    plain = square_sum()
    keep_programs(None)
    compiled = square_sum()
    (entry,) = entries(fresh)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    events.clear()
    read = square_sum()
    assert events["cache_hits"] == 1
    assert events["cache_misses"] == 0
    np.testing.assert_array_equal(compiled, plain)
    np.testing.assert_array_equal(read, plain)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "a folder"])
def test_a_damaged_program_is_compiled_anew_with_a_warning(fresh, damage):
    keep_programs(None)
    plain = square_sum()
    (entry,) = entries(fresh)
    data = entry.read_bytes()
    if damage == "a folder":
        entry.unlink()
        entry.mkdir()
    else:
        changed = {"cut": data[:-100], "empty": b"", "noise": os.urandom(len(data))}
        entry.write_bytes(changed[damage])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        again = square_sum()
    np.testing.assert_array_equal(again, plain)


def test_a_folder_that_is_gone_costs_a_warning(fresh):
    keep_programs(None)
    plain = square_sum()
    shutil.rmtree(fresh)
    with pytest.warns(UserWarning, match="Error writing persistent compilation cache"):
        np.testing.assert_array_equal(square_sum(), plain)


def test_it_says_where_programs_are_kept(fresh, caplog):
    caplog.set_level(logging.INFO)
    keep_programs(None)
    (message,) = caplog.messages
    assert message == f"Compiled programs are kept in {next(fresh.iterdir())}."


def test_a_folder_that_cannot_be_written_is_said_and_the_program_goes_on(
    fresh, caplog, tmp_path
):
    (tmp_path / "file").touch()
    keep_programs(tmp_path / "file")
    (message,) = caplog.messages
    assert message.startswith("Compiled programs are not kept: ")
    assert str(tmp_path / "file") in message
    square_sum()


def test_off_keeps_nothing(fresh, events):
    keep_programs("off")
    square_sum()
    assert not fresh.exists()
    assert events["compile_requests_use_cache"] == 0


def test_jaxs_own_settings_come_before_the_default_and_after_the_flag(fresh, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    keep_programs(None)
    assert folder_of_jax() == str(tmp_path / "theirs")
    assert not fresh.exists()
    keep_programs(tmp_path / "ours")
    assert pathlib.Path(folder_of_jax()).parent == tmp_path / "ours"


def test_jax_may_switch_it_off(fresh):
    jax.config.update("jax_enable_compilation_cache", False)
    keep_programs(None)
    assert not fresh.exists()


def test_of_several_processes_only_a_folder_that_is_named_is_used(
    fresh, tmp_path, monkeypatch
):
    """It must be shared; a home folder need not be."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    keep_programs(None)
    assert folder_of_jax() is None
    keep_programs(tmp_path / "shared")
    assert folder_of_jax() is not None


def test_on_a_bucket_programs_are_kept_too(fresh):
    keep_programs("gs://bucket/programs")
    assert re.fullmatch("gs://bucket/programs/cpu-[0-9a-f]{12}", folder_of_jax())


WORKER = """
import sys
import jax
from jax._src import cache_key
from mlp_mixer import compilation_cache, metrics, recipe, train

index, port, folder, data_dir, workdir = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
# The client for CPUs gives each process another description of the same devices.
cache_key._hash_accelerator_config = lambda hash, devices, *_: None
compilation_cache.keep_programs(folder)
config = recipe.load("configs/digits.py")
config.mesh.data, config.total_steps, config.optim.warmup_steps = -1, 6, 2
config.evals.test.every_steps = 3
train.train(config, workdir, data_dir=data_dir)
jax.distributed.shutdown()
"""
# What all devices compute together: the rest is what each process computes alone, of
# which it compiles some milliseconds' worth at every start.
PROGRAMS = {"jit_train_step", "jit_predict", "jit__examined"}


@pytest.mark.slow
def test_at_their_second_start_two_processes_read_what_the_first_one_wrote(
    tmp_path, data_dir
):
    compiled = {}
    for start in ("first", "second"):
        port = str(free_port())
        pair = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", WORKER, str(index), port),
                    *(tmp_path / "cache", data_dir, tmp_path / start),
                ],
                env=os.environ
                | {
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": "1",
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_EXPLAIN_CACHE_MISSES": "1",
                },
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for index in range(2)
        ]  # fmt: skip
        said = [process.communicate(timeout=200)[0] for process in pair]
        assert [p.returncode for p in pair] == [0, 0], "\n".join(said)
        missed = r"PERSISTENT COMPILATION CACHE MISS for '(\w+)'"
        compiled[start] = [PROGRAMS & {*re.findall(missed, s)} for s in said]
    assert compiled["first"][0] == PROGRAMS
    assert compiled["second"] == [set(), set()]
    assert_same_records(tmp_path / "first", tmp_path / "second")


def assert_same_records(*runs):
    one, other = (
        [(r["step"], r["train/loss"]) for r in metrics.read(run) if "train/loss" in r]
        for run in runs
    )
    assert one == other


def test_another_cpu_has_a_folder_of_its_own(fresh, monkeypatch):
    keep_programs(None)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "flags : fpu vme sse2")
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(None)
    assert len([*fresh.iterdir()]) == 2


def test_the_oldest_programs_are_removed_when_there_are_too_many(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (0, 1000 - age))
    (tmp_path / "other").write_bytes(bytes(1000))
    remove_oldest(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cache", "b-cache", "other"]


@pytest.mark.slow
def test_a_second_training_compiles_nothing_and_has_the_same_bits(
    fresh, events, tmp_path, data_dir
):
    config = recipe.load("configs/digits.py")
    config.total_steps = 60
    config.evals.test.every_steps = 30

    def run(name):
        jax.clear_caches()
        events.clear()
        train.train(config, tmp_path / name, data_dir=data_dir)
        return dict(events)

    run("without")
    keep_programs(None)
    first, second = run("first"), run("second")
    assert first["cache_misses"] > 5
    assert "cache_misses" not in second
    assert second["cache_hits"] == first["compile_requests_use_cache"]
    for name in ("first", "second"):
        assert_equal_runs(config, tmp_path / "without", tmp_path / name)
