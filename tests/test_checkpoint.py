import gc
import json
import logging
import math
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_mixer import checkpoint, orbax_io, processes
from mlp_mixer.checkpoint import Checkpointer, CheckpointError, restore_variables
from mlp_mixer.fingerprints import fingerprint


def restore_params(*arguments, **options):
    """The step, and the parameters alone."""
    step, variables = restore_variables(*arguments, **options)
    return step, variables["params"]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


TX = optax.chain(optax.clip(1.0), optax.adam(1e-3, mu_dtype=jnp.bfloat16))


def init(step=0, width=512):
    key = jax.random.key(step)
    # Random bits do not compress, so a flipped bit of the file is one of the array.
    bits = jax.random.bits(key, (1024, width), jnp.uint32)
    weights = {
        "w": jax.random.normal(key, (512, width)),
        "b": jnp.arange(16.0) + step,
        "half": jnp.full((8,), step, jnp.bfloat16),
    }
    moments = jax.tree.map(lambda x: x + step, TX.init(weights))
    return State(jnp.int32(step), {"bits": bits, **weights}, moments)


def target(devices=1, sharded=True, **kwargs):
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def place(a):
        spec = P("data") if sharded and a.ndim == 2 else P()
        return jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, jax.eval_shape(lambda: init(**kwargs)))


def state_at(step, devices=1, **kwargs):
    shardings = jax.tree.map(lambda a: a.sharding, target(devices, **kwargs))
    return jax.device_put(init(step, **kwargs), shardings)


def write(directory, *steps, **kwargs):
    with Checkpointer(directory, every_steps=10, keep_latest=5, **kwargs) as c:
        for step in steps:
            assert c.save(step, state_at(step))


def restored_step(directory, **kwargs):
    """Restores, checks every array, and returns the step."""
    with Checkpointer(directory, every_steps=10) as c:
        state = c.restore(target(**kwargs))
    assert isinstance(state, State)
    assert_equal(state, init(int(state.step)))
    return int(state.step)


def assert_equal(got, expected):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, got, expected)


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 16
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def folder(directory, step):
    return pathlib.Path(directory) / f"{step:08d}"


def large_file(step_folder):
    files = step_folder.glob("state/ocdbt.process_0/d/*")
    return max(files, key=lambda p: p.stat().st_size)


def small_file(step_folder):
    return max(step_folder.glob("state/d/*"), key=lambda p: p.stat().st_size)


def flip_an_element(step_folder, array):
    """Flips a bit of an array, found by its bytes, whichever process wrote them."""
    needle = np.asarray(array).tobytes()[4096:4128]
    for path in step_folder.glob("state/ocdbt.process_*/d/*"):
        position = path.read_bytes().find(needle)
        if position > 0:
            return flip(path, position)
    raise LookupError("the bytes of the array are in no file")


def names(directory):
    return sorted(p.name for p in pathlib.Path(directory).iterdir())


def damaged(directory):
    return [name for name in names(directory) if name.startswith("damaged-")]


# Retention and the decision to save.


def test_the_latest_the_periodic_and_the_best_are_kept(tmp_path):
    scores = {10: float("nan"), 20: 0.9, 30: 0.2, 40: 0.3, 50: 0.2, 60: 0.1, 70: 0.1}
    with Checkpointer(
        tmp_path, every_steps=10, keep_latest=2, keep_every_steps=40, keep_best="top1"
    ) as c:
        for step, score in scores.items():
            assert c.due(step)
            assert not c.due(step + 1)
            assert not c.save(step + 1, state_at(step))
            assert c.save(step, state_at(step), {"top1": np.float32(score)})
    assert names(tmp_path) == [f"{s:08d}" for s in (20, 40, 60, 70)]


def test_the_best_is_still_known_after_a_restart(tmp_path):
    options: dict[str, Any] = {"every_steps": 10, "keep_latest": 1, "keep_best": "top1"}
    with Checkpointer(tmp_path, **options) as c:
        c.save(10, state_at(10), {"top1": 0.9})
        c.save(20, state_at(20), {"top1": 0.1})
    with Checkpointer(tmp_path, **options) as c:
        assert int(c.restore(target()).step) == 20
        c.save(30, state_at(30))
        c.save(40, state_at(40), {"top1": 0.8})
    assert names(tmp_path) == ["00000010", "00000040"]


def test_a_checkpoint_that_may_be_the_best_is_not_removed(tmp_path):
    options: dict[str, Any] = {"every_steps": 10, "keep_latest": 1, "keep_best": "top1"}
    with Checkpointer(tmp_path, **options) as c:
        c.save(10, state_at(10), {"top1": 0.9})
        c.save(20, state_at(20), {"top1": 0.1})
    flip(folder(tmp_path, 10) / "meta" / "metadata")
    with Checkpointer(tmp_path, **options) as c:
        c.restore(target())
        c.save(30, state_at(30), {"top1": 0.5})
    assert names(tmp_path) == ["00000010", "00000030"]


@pytest.mark.parametrize(
    ("more_is_better", "best"), [(True, 20), (False, 30)], ids=["more", "less"]
)
def test_the_best_is_the_highest_or_the_lowest(more_is_better, best, tmp_path):
    scores = {10: math.inf, 20: 0.9, 30: -0.2, 40: 0.3, 50: math.nan, 60: -math.inf}
    direction: dict[str, Any] = {"more_is_better": more_is_better}
    options = {"every_steps": 10, "keep_latest": 1, "keep_best": "m", **direction}
    with Checkpointer(tmp_path, **options) as c:
        for step, score in scores.items():
            c.save(step, state_at(step), {"m": score})
    assert names(tmp_path) == [f"{best:08d}", "00000060"]
    with Checkpointer(tmp_path, **options) as c:  # known after a restart, too
        c.restore(target())
        c.save(70, state_at(70), {"m": 0.0})
    assert names(tmp_path) == [f"{best:08d}", "00000070"]
    assert restore_params(tmp_path, best="m", **direction)[0] == best


def test_of_equals_the_later_one_is_the_best_in_both_directions(tmp_path):
    with Checkpointer(tmp_path, every_steps=10, keep_latest=3) as c:
        for step in (10, 20, 30):
            c.save(step, state_at(step), {"loss": 1.0})
    for more in (True, False):
        got = restore_params(tmp_path, best="loss", more_is_better=more)[0]
        assert got == 30


def test_metrics_that_are_added_later_choose_the_best_also_after_a_restart(tmp_path):
    options: dict[str, Any] = {"every_steps": 10, "keep_latest": 1, "keep_best": "top1"}
    with Checkpointer(tmp_path, **options) as c:
        c.save(10, state_at(10), {"loss": 3.0, "top1": 0.1})
        c.add_metrics(10, {"top1": np.float32(0.5)})
        c.add_metrics(10, {"top5": 0.75})
        c.save(20, state_at(20), {"top1": 0.2})
        c.save(30, state_at(30))
    assert names(tmp_path) == ["00000010", "00000030"]
    assert not [f for f in names(folder(tmp_path, 10)) if f.startswith(".")]
    with Checkpointer(tmp_path, **options) as c:
        c.restore(target())
        c.add_metrics(30, {"top1": 0.4})
        c.save(40, state_at(40), {"top1": 0.3})
        assert restore_params(tmp_path, best="top1")[0] == 10
        assert restore_params(tmp_path, best="top5")[0] == 10
    assert names(tmp_path) == ["00000010", "00000040"]


def test_metrics_are_added_to_what_is_saved_only(tmp_path):
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state_at(10))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 20 .*only \[10\]"):
            c.add_metrics(20, {"top1": 0.5})


@pytest.mark.parametrize("harm", ["flip", "empty", "other", "bytes"])
def test_damaged_metrics_are_told_and_are_no_scores(harm, tmp_path, caplog):
    options: dict[str, Any] = {"every_steps": 10, "keep_latest": 1, "keep_best": "top1"}
    with Checkpointer(tmp_path, **options) as c:
        c.save(10, state_at(10), {"top1": 0.9})
        c.save(20, state_at(20), {"top1": 0.1})
        c.add_metrics(10, {"top1": 0.8})
    [file] = folder(tmp_path, 10).glob("*metrics*")
    text = file.read_text()
    changed = {
        "flip": text.replace("0.8", "0.9").encode(),
        "empty": b"",
        "other": b"[0.8]",
        "bytes": b"\xff" + text.encode(),
    }
    file.write_bytes(changed[harm])
    assert restore_params(tmp_path, best="top1")[0] == 20
    assert "Checkpoint 10" in caplog.text
    assert file.name in caplog.text
    with Checkpointer(tmp_path, **options) as c:
        # It may have been the best, and its arrays are intact.
        c.restore(target())
        c.save(30, state_at(30), {"top1": 0.5})
        c.add_metrics(10, {"top1": 0.7})
        assert names(tmp_path) == ["00000010", "00000030"]
    assert restore_params(tmp_path, best="top1")[0] == 10
    assert damaged(tmp_path) == []


def test_the_last_step_is_saved_whatever_its_number_and_only_once(tmp_path):
    with Checkpointer(tmp_path, every_steps=10) as c:
        assert c.save(10, state_at(10))
        assert not c.save(10, state_at(10), force=True)
        assert not c.save(13, state_at(13))
        assert c.save(13, state_at(13), force=True)
        assert c.all_steps() == [10, 13]
        assert c.latest_step() == 13
    assert restored_step(tmp_path) == 13


def test_a_step_that_orbax_would_skip_silently_is_an_error(tmp_path):
    write(tmp_path, 20)
    with Checkpointer(tmp_path, every_steps=10) as c:
        for step in (10, 20):
            with pytest.raises(ValueError, match="already holds step 20"):
                c.save(step, state_at(step))
        c.restore(target())
        assert not c.save(20, state_at(20), force=True)
        assert c.save(30, state_at(30))


def test_a_best_metric_that_is_not_measured_is_named(tmp_path, caplog):
    with Checkpointer(tmp_path, every_steps=10, keep_best="val/top1") as c:
        c.save(10, state_at(10), {"val/top-1": 0.5})
    assert "has no 'val/top1', only ['val/top-1']" in caplog.text


@pytest.fixture
def clock(monkeypatch):
    """The minutes on the checkpointer's clock, which a test sets."""
    minutes = [0.0]
    watch = types.SimpleNamespace(
        monotonic=lambda: 60 * minutes[0], time_ns=time.time_ns
    )
    monkeypatch.setattr(checkpoint, "time", watch)
    return minutes


def test_a_save_is_due_by_time_too_at_the_next_step_at_which_the_clock_is_read(
    tmp_path, clock
):
    options = {"every_steps": 1000, "every_minutes": 30.0, "clock_every_steps": 10}
    with Checkpointer(tmp_path, **options) as c:
        clock[0] = 29.9
        assert not c.save(10, state_at(10))
        clock[0] = 30.0
        assert not c.due(11)
        assert c.save(20, state_at(20))
        clock[0] = 59.9  # since that save
        assert not c.due(30)
        assert c.due(1000)
        clock[0] = 60.0
        assert c.save(40, state_at(40))
        assert not c.due(50)
    with Checkpointer(tmp_path, **options) as c:
        clock[0] = 80
        assert c.restore(target()).step == 40
        clock[0] = 100  # the time before the restoring does not count
        assert not c.due(50)
        clock[0] = 110
        assert c.due(50)
    with Checkpointer(tmp_path, every_steps=1000) as c:
        clock[0] = 1e6
        assert not c.due(60)


def test_of_several_processes_the_first_one_s_clock_decides(
    tmp_path, clock, monkeypatch
):
    asked = []

    def first(value):
        asked.append(value)
        return not value

    monkeypatch.setattr(processes, "first", first)
    with Checkpointer(
        tmp_path, every_steps=9, every_minutes=1.0, clock_every_steps=4
    ) as c:
        assert [step for step in range(1, 13) if c.due(step)] == [4, 8, 9, 12]
        clock[0] = 2
        assert [step for step in range(1, 13) if c.due(step)] == [9]
    assert asked == [False] * 3 + [True] * 3  # and not at any other step


def test_useless_numbers_are_refused(tmp_path):
    for name in ("every_steps", "keep_latest", "keep_every_steps"):
        with pytest.raises(ValueError, match="1 or more"):
            Checkpointer(tmp_path, **dict[str, Any]({"every_steps": 1, name: 0}))


def test_a_state_with_leaves_that_are_not_arrays_is_refused(tmp_path):
    with (
        Checkpointer(tmp_path, every_steps=10) as c,
        pytest.raises(TypeError, match="params/w"),
    ):
        c.save(10, {"params": {"w": np.zeros(3)}})


INFINITE = {
    "params": lambda s: s._replace(params={**s.params, "b": s.params["b"] / 0}),
    "one element of bfloat16": lambda s: s._replace(
        params={**s.params, "half": s.params["half"].at[3].set(jnp.nan)}
    ),
    "optimiser state": lambda s: s._replace(
        opt_state=jax.tree.map(
            lambda x: x.at[0, 0].set(-jnp.inf) if x.ndim == 2 else x, s.opt_state
        )
    ),
}
WHERE = ["params/b", "params/half", "opt_state/1/0/mu/w"]


@pytest.mark.parametrize(("what", "where"), list(zip(INFINITE, WHERE, strict=True)))
@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_that_is_not_finite_is_not_saved(what, where, devices, tmp_path):
    with Checkpointer(tmp_path, every_steps=10, keep_best="top1") as c:
        with pytest.raises(FloatingPointError, match="is no checkpoint yet"):
            c.save(10, INFINITE[what](state_at(10, devices)), {"top1": 1.0})
        c.save(10, state_at(10, devices), {"top1": 0.5})
        broken = INFINITE[what](state_at(20, devices))
        with pytest.raises(FloatingPointError, match="of step 10") as error:
            c.save(20, broken, {"top1": 1.0}, force=True)
        assert "After step 20" in str(error.value)
        assert where in str(error.value)
        assert str(tmp_path) in str(error.value)
        assert c.all_steps() == [10]
        assert c.save(20, state_at(20, devices), {"top1": 0.4})
    assert restored_step(tmp_path) == 20
    assert restore_params(tmp_path, best="top1")[0] == 10


def test_keys_and_integers_of_any_bits_are_saved(tmp_path):
    tree = {
        "key": jax.random.wrap_key_data(jnp.full((2,), 0x7FC00000, jnp.uint32)),
        "bits": jnp.full((4,), 0x7F800000, jnp.uint32),
        "large": jnp.float32(3.4e38),
    }
    with Checkpointer(tmp_path, every_steps=1) as c:
        assert c.save(1, tree)


# What is restored.


@pytest.mark.parametrize("devices", [8, 4, 1])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_state_of_eight_devices_is_restored_on(devices, sharded, tmp_path):
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state_at(10, devices=8))
    wanted = target(devices, sharded)
    with Checkpointer(tmp_path, every_steps=10) as c:
        state = c.restore(wanted)
    assert isinstance(state, State)
    assert_equal(state, init(10))
    assert state.opt_state[1][0].mu["w"].dtype == jnp.bfloat16
    jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim) or
                 pytest.fail(f"{x.sharding}"), state, wanted)  # fmt: skip


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    state = state_at(10, devices=8)
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
    assert restored_step(tmp_path) == 10


def test_nothing_saved_is_none_and_a_relative_directory_stays_where_it_was(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run/checkpoints", every_steps=10) as c:
        assert c.restore(target()) is None
        assert c.latest_step() is None
        monkeypatch.chdir("/")
        c.save(10, state_at(10))
    assert restored_step(tmp_path / "run" / "checkpoints") == 10


ODD_NAMES = [
    "lr=[0.1]", "a*b?", "{x,y}", "[!a]**", "back\\slash", "it's \"q\"", " spaces ",
    "-dash", "100%20", "new\nline", "tab\t", "\x1b[31mred", "näïve 日本 🙂", "~", "a~",
    "$HOME", "#1;&|<>", "gs:", "logs:", "file:", "x.orbax-checkpoint-tmp", "00000007",
    "damaged-x", ".hidden", os.fsdecode(b"caf\xe9"), "%s{}", "e\u0301", "n" * 200,
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_path_is_a_path(name, tmp_path, monkeypatch, caplog):
    """Whatever a folder's own name, relative and absolute: nothing is a pattern."""
    monkeypatch.chdir(tmp_path)
    tree = {"params": {"w": jnp.arange(6.0)}}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
    )
    relative = f"{name}/checkpoints"
    options: dict[str, Any] = {"every_steps": 1, "keep_latest": 2, "keep_best": "m"}
    with Checkpointer(relative, **options) as c:
        for step in range(1, 6):
            c.save(step, tree, {"m": -step})
        c.add_metrics(5, {"m": -4.5})
    here = tmp_path / relative
    assert names(here) == ["00000001", "00000004", "00000005"]
    # What a pattern of that name would match is somebody else's.
    (tmp_path / "aXbY/checkpoints/00000099.orbax-checkpoint-tmp").mkdir(parents=True)
    left = here / "00000006.orbax-checkpoint-tmp"
    shutil.copytree(folder(here, 5), left)
    truncate(folder(here, 5) / "state" / "manifest.ocdbt")
    for directory in (relative, here):
        assert restore_params(directory, best="m")[0] == 1
        assert restore_params(directory)[0] == 4
    assert left.exists()
    with Checkpointer(here, **options) as c:
        assert_equal(c.restore(shapes), tree)
        assert c.all_steps() == [1, 4]
    assert left.name in caplog.text
    assert "00000099" not in caplog.text
    assert len(damaged(here)) == 1


@pytest.mark.parametrize("name", ["back\\slash", "logs:", os.fsdecode(b"caf\xe9")])
def test_what_tensorstore_cannot_name_is_refused_where_it_has_no_alias(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(orbax_io, "_ALIASES", str(tmp_path / "no proc"))
    with pytest.raises(ValueError, match="Use a folder with another name"):
        Checkpointer(tmp_path / name, every_steps=10)
    assert names(tmp_path) == []


def test_a_folder_that_is_made_anew_is_another_one(tmp_path):
    """Its alias, too."""
    for step in (10, 20):
        write(tmp_path / "back\\slash", step)
        assert restored_step(tmp_path / "back\\slash") == step
        shutil.rmtree(tmp_path / "back\\slash")
    assert names(tmp_path) == []


def test_dots_after_a_link_lead_where_the_system_says(tmp_path, monkeypatch):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    with Checkpointer("link/../run", every_steps=10) as c:
        c.save(10, state_at(10))
    assert names(tmp_path / "far" / "run") == ["00000010"]
    assert restored_step("link/../run") == 10


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gcs://bucket/run", "begins with gcs://; expected a folder, or a bucket"),
        ("/gs/bucket/run", "would be taken for gs://bucket/run"),
    ],
)
def test_a_name_that_cannot_be_opened_is_refused_at_once(name, says):
    with pytest.raises(ValueError, match=says):
        Checkpointer(name, every_steps=10)
    with pytest.raises(ValueError, match=says):
        restore_params(name)


def with_tests_on_the_path():
    here = str(pathlib.Path(__file__).parent)
    return os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])


LOCALE = """
import os, sys
import jax
import test_checkpoint as cases
from mlp_mixer.checkpoint import Checkpointer, restore_variables
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
what, directory = sys.argv[1:]
if what == "named in the program":
    directory = os.fsencode(directory).decode()
if what == "damaged":
    cases.truncate(cases.large_file(cases.folder(directory, 20)))
with Checkpointer(directory, every_steps=10, keep_latest=5) as c:
    step = int(c.restore(cases.target()).step)
    c.save(step + 10, cases.state_at(step + 10))
print("restored", step, "and", restore_variables(directory)[0])
"""


@pytest.mark.parametrize("what", ["damaged", "named in the program"])
def test_a_locale_without_utf8_makes_no_checkpoint_damaged(what, tmp_path):
    directory = tmp_path / "lr=[0.1] \\ ä日"
    write(directory, 10, 20)
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": with_tests_on_the_path(),
    }
    result = subprocess.run(
        [sys.executable, "-c", LOCALE, what, str(directory)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if what == "named in the program":
        assert result.returncode == 1
        assert "Set LC_ALL=C.UTF-8 or PYTHONUTF8=1" in result.stderr
        assert names(directory) == ["00000010", "00000020"]
        return
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "restored 10 and 20"
    [name] = damaged(directory)
    assert name.startswith("damaged-00000020")
    assert restored_step(directory) == 20


def test_a_bucket_is_not_made_a_local_path():
    assert str(orbax_io.locate("gs://bucket/run")) == "gs://bucket/run"


def test_typed_keys_and_bools_round_trip(tmp_path):
    tree = {"key": jax.random.key(3), "mask": jnp.arange(5) > 2}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
    )
    with Checkpointer(tmp_path, every_steps=1) as c:
        c.save(1, tree)
        c.wait()
        got = c.restore(shapes)
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(tree["key"])).all()
    assert_equal(got["mask"], tree["mask"])


# The fingerprint.


def test_the_fingerprint_is_the_same_on_every_topology():
    expected = fingerprint(init(3))
    assert set(expected) >= {"step", "params/w", "opt_state/1/0/mu/half"}
    for devices in (1, 4, 8):
        assert fingerprint(state_at(3, devices)) == expected


# Damage.


def test_a_flipped_bit_is_noticed_and_the_older_checkpoint_is_used(tmp_path, caplog):
    write(tmp_path, 10, 20)
    flip_an_element(folder(tmp_path, 20), init(20).params["bits"])
    assert restored_step(tmp_path) == 10
    [name] = damaged(tmp_path)
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "wrong bits in ['params/bits']" in record.message
    assert "Checkpoint 20" in record.message
    assert name in record.message
    assert large_file(tmp_path / name).stat().st_size > 2**20


@pytest.mark.parametrize("which", [large_file, small_file])
@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
def test_a_damaged_array_file_is_noticed(which, harm, tmp_path):
    write(tmp_path, 10, 20)
    harm(which(folder(tmp_path, 20)))
    assert restored_step(tmp_path, devices=4) == 10
    assert len(damaged(tmp_path)) == 1


@pytest.mark.parametrize("item", ["", "state", "meta", "state/_METADATA"])
def test_an_empty_folder_or_a_missing_item_is_damage(item, tmp_path):
    write(tmp_path, 10, 20)
    path = folder(tmp_path, 20) / item
    path.unlink() if path.is_file() else shutil.rmtree(path)
    folder(tmp_path, 20).mkdir(exist_ok=True)
    assert restored_step(tmp_path) == 10
    assert len(damaged(tmp_path)) == 1


def test_a_changed_description_is_damage_not_another_model(tmp_path):
    write(tmp_path, 10, 20)
    path = folder(tmp_path, 20) / "meta" / "metadata"
    path.write_text(path.read_text().replace("[1024, 512]", "[1024, 513]"))
    assert restored_step(tmp_path) == 10


@pytest.mark.slow
def test_no_damaged_file_gives_wrong_arrays(tmp_path):
    write(tmp_path / "good", 10, 20)
    good = folder(tmp_path / "good", 20)
    files = [p.relative_to(good) for p in sorted(good.rglob("*")) if p.is_file()]
    assert len(files) > 10
    noticed = set()
    for file in files:
        for harm in (flip, truncate, os.unlink):
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "good", run)
            harm(folder(run, 20) / file)
            if restored_step(run) == 10:
                noticed.add(str(file.parent))
            shutil.rmtree(run)
    assert noticed >= {"meta", "state", "state/d", "state/ocdbt.process_0/d"}


def old(directory, step):
    """Makes a checkpoint one of a version that noted neither step nor files."""
    (folder(directory, step) / "meta" / "files").unlink()
    path = folder(directory, step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["step"], meta["checksum"]
    path.write_text(json.dumps(orbax_io._with_checksum(meta)))


@pytest.mark.parametrize("move", [shutil.copytree, os.rename])
@pytest.mark.parametrize("to", [30, 5])
@pytest.mark.parametrize("version", ["new", "old"])
def test_a_folder_with_the_name_of_another_step_is_an_error(
    version, to, move, tmp_path
):
    write(tmp_path, 10, 20)
    if version == "old":
        old(tmp_path, 20)
    move(folder(tmp_path, 20), folder(tmp_path, to))
    if move is shutil.copytree and to < 20:
        shutil.rmtree(folder(tmp_path, 20))
    held = "step 20" if version == "new" else "another step"
    says = f"{to:08d} holds {held}, not step {to}"
    with pytest.raises(ValueError, match=says):
        restore_params(tmp_path, step=to)
    if to > 10:  # the newest: no older one may silently stand for it
        before = names(tmp_path)
        with (
            Checkpointer(tmp_path, every_steps=10) as c,
            pytest.raises(ValueError, match=says),
        ):
            c.restore(target())
        with pytest.raises(ValueError, match=says):
            restore_params(tmp_path)
        assert names(tmp_path) == before
    shutil.rmtree(folder(tmp_path, 20), ignore_errors=True)
    os.rename(folder(tmp_path, to), folder(tmp_path, 20))
    assert restored_step(tmp_path) == 20


def test_a_checkpoint_of_an_older_version_still_opens(tmp_path):
    write(tmp_path, 10, 20)
    for step in (10, 20):
        old(tmp_path, step)
    assert restored_step(tmp_path) == 20
    assert restore_params(tmp_path, step=10)[0] == 10
    truncate(folder(tmp_path, 20) / "state" / "_METADATA")
    assert restored_step(tmp_path) == 10


def test_training_goes_on_over_the_steps_of_a_damaged_checkpoint(tmp_path):
    write(tmp_path, 10, 20, 30)
    for step in (20, 30):
        truncate(large_file(folder(tmp_path, step)))
    with Checkpointer(tmp_path, every_steps=10) as c:
        assert int(c.restore(target()).step) == 10
        assert c.all_steps() == [10]
        assert c.save(20, state_at(20))
    assert restored_step(tmp_path) == 20
    assert len(damaged(tmp_path)) == 2


def test_only_damaged_ones_left_is_an_error_at_this_start_and_the_next(tmp_path):
    write(tmp_path, 10, 20)
    for step in (10, 20):
        truncate(large_file(folder(tmp_path, step)))
    for _ in range(2):
        with Checkpointer(tmp_path, every_steps=10) as c:
            with pytest.raises(FileNotFoundError, match="move them all away") as error:
                c.restore(target())
            assert len(damaged(tmp_path)) == 2
            assert all(name in str(error.value) for name in damaged(tmp_path))
    with pytest.raises(FileNotFoundError, match="damaged-00000010"):
        restore_params(tmp_path)


def test_another_model_is_an_error_that_lists_the_arrays(tmp_path):
    write(tmp_path, 10)
    with Checkpointer(tmp_path, every_steps=10) as c:
        with pytest.raises(ValueError, match="another model") as error:
            c.restore(target(width=256))
        lines = str(error.value).splitlines()
        assert "  params/w: got [[512, 512], 'float32'], " in lines[2] + lines[3]
        assert "expected [[512, 256], 'float32']" in str(error.value)
        wrong = target()
        wrong.params["more"] = wrong.params.pop("b")
        with pytest.raises(ValueError, match="more: got nothing, expected"):
            c.restore(wrong)
        half = target()
        half.params["w"] = half.params["half"]
        with pytest.raises(ValueError, match="bfloat16"):
            c.restore(half)
    assert names(tmp_path) == ["00000010"]


@pytest.mark.parametrize("error", [
    MemoryError(), PermissionError(13, "no"), ConnectionError("no"), TimeoutError("no"),
    OSError(5, "Input/output error"), OSError(24, "Too many open files"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
    ValueError("PERMISSION_DENIED: Error opening zarr driver"),
    # What nobody has foreseen: another version of a library, another locale.
    RuntimeError("Unable to cast Python instance of type <class 'str'> to C++"),
    UnicodeEncodeError("ascii", "\xe4", 0, 1, "ordinal not in range(128)"),
    AttributeError("module 'numpy' has no attribute 'bool8'"), TypeError("no argument"),
    KeyError("value_metadata"), ValueError("a version that is not supported"),
    FileNotFoundError(2, "No such file or directory", "/usr/lib/libcodec.so"),
    ImportError("no module"), AssertionError(), RecursionError(), StopIteration(),
])  # fmt: skip
def test_only_damage_is_damage(error, tmp_path, monkeypatch):
    write(tmp_path, 10)

    def fail(*args, **kwargs):
        raise error

    def fail_within(*args, **kwargs):
        raise Exception("Encountered error while reading array index") from error

    for trouble in (fail, fail_within):
        monkeypatch.setattr(ocp.CheckpointManager, "restore", trouble)
        with Checkpointer(tmp_path, every_steps=10) as c:
            with pytest.raises(Exception) as raised:  # noqa: PT011
                c.restore(target())
            assert error in (raised.value, raised.value.__cause__)
            # Nothing says more about it than where it arose.
            assert "00000010" in raised.value.__notes__[0]
        with pytest.raises(Exception) as raised:  # noqa: PT011
            restore_params(tmp_path)
        assert error in (raised.value, raised.value.__cause__)
    assert names(tmp_path) == ["00000010"]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("_METADATA", "value_metadata"),
        ("array_metadatas/process_0", "param_name"),
        ("array_metadatas/process_0", "write_shape"),
    ],
)
def test_a_changed_name_in_a_file_of_orbax_is_damage(file, key, tmp_path):
    """Still JSON, and Orbax raises whatever its code happens to meet."""
    write(tmp_path, 10, 20)
    path = folder(tmp_path, 20) / "state" / file
    text = path.read_text()
    assert key in text
    path.write_text(text.replace(key, key.upper()))
    assert restored_step(tmp_path) == 10
    assert len(damaged(tmp_path)) == 1


def test_a_folder_that_may_not_be_read_is_not_damage(tmp_path, monkeypatch):
    write(tmp_path, 10)
    forbidden = folder(tmp_path, 10) / "meta"
    if os.getuid() == 0:  # root may read everything
        list_all = orbax_io._list_recursively

        def refuse(path):
            if os.fspath(path) == os.fspath(forbidden):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            list_all(path)

        monkeypatch.setattr(orbax_io, "_list_recursively", refuse)
        (forbidden / "metadata").unlink()
    else:
        forbidden.chmod(0)
    with (
        Checkpointer(tmp_path, every_steps=10) as c,
        pytest.raises(PermissionError),
    ):
        c.restore(target())
    forbidden.chmod(0o755)
    assert names(tmp_path) == ["00000010"]


def test_a_target_that_cannot_be_restored_is_not_damage(tmp_path):
    write(tmp_path, 10)
    bare = jax.eval_shape(init)
    with (
        Checkpointer(tmp_path, every_steps=10) as c,
        pytest.raises(TypeError, match="sharding"),
    ):
        c.restore(bare)
    assert names(tmp_path) == ["00000010"]


# Reading beside a training run.


def test_params_alone_are_restored_without_reading_the_moments(tmp_path):
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state_at(10, devices=8))
    gigabytes = []

    def listen(event, value, **kwargs):
        if event == "/jax/checkpoint/read/gbytes":
            gigabytes.append(value)

    jax.monitoring.register_scalar_listener(listen)
    try:
        step, params = restore_params(tmp_path)
    finally:
        jax.monitoring.unregister_scalar_listener(listen)
    assert step == 10
    assert_equal(params, init(10).params)
    size = sum(x.nbytes for x in jax.tree.leaves(init().params))
    assert sum(gigabytes) * 2**30 == pytest.approx(size, rel=1e-3)


def test_params_of_the_latest_of_a_step_and_of_the_best(tmp_path):
    with Checkpointer(tmp_path, every_steps=10, keep_latest=5) as c:
        for step, score in ((10, 0.3), (20, 0.7), (30, 0.5)):
            c.save(step, state_at(step), {"top1": score})
        c.save(40, state_at(40))
    assert restore_params(tmp_path)[0] == 40
    step, got = restore_params(tmp_path, best="top1")
    assert step == 20
    assert_equal(got, init(20).params)
    assert_equal(restore_params(tmp_path, step=10)[1], init(10).params)
    with pytest.raises(ValueError, match=r"has the metric 'top5', only \['top1'\]"):
        restore_params(tmp_path, best="top5")
    with pytest.raises(FileNotFoundError, match=r"checkpoint 15 .*\[40, 30, 20, 10\]"):
        restore_params(tmp_path, step=15)
    with pytest.raises(ValueError, match="one of them"):
        restore_params(tmp_path, step=10, best="top1")


def test_params_of_nothing_are_an_error_and_create_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        restore_params(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has the run saved one"):
        restore_params(tmp_path)
    assert names(tmp_path) == []


def test_reading_changes_nothing_however_damaged(tmp_path, caplog):
    write(tmp_path, 10, 20)
    flip_an_element(folder(tmp_path, 20), init(20).params["bits"])
    # What looks like a left-over may be what a training run is writing.
    shutil.copytree(folder(tmp_path, 10), tmp_path / "00000030.orbax-checkpoint-tmp")
    before = sorted(p for p in tmp_path.rglob("*"))
    step, got = restore_params(tmp_path)
    assert step == 10
    assert_equal(got, init(10).params)
    assert "wrong bits in ['bits']" in caplog.text
    with pytest.raises(CheckpointError, match="Choose another"):
        restore_params(tmp_path, step=20)
    truncate(large_file(folder(tmp_path, 10)))
    with pytest.raises(FileNotFoundError, match=r"only damaged ones: .*20.*10"):
        restore_params(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def training_drops(monkeypatch, directory, times, slowly=False):
    """Before each read, a training run saves the next step and drops that one."""
    read = orbax_io.read_checkpoint
    dropped: list[int] = []

    def remove(path):
        shutil.rmtree(path / "state" / "d")
        time.sleep(0.3 * slowly)
        shutil.rmtree(path)

    def read_late(manager, step, *args, **kwargs):
        if len(dropped) < times:
            dropped.append(step)
            newest = max(int(n) for n in names(directory) if n.isdigit())
            write(directory, newest + 10)
            path = folder(directory, step)
            thread = threading.Thread(target=remove, args=(path,))
            thread.start()
            thread.join(0.1 if slowly else None)
        return read(manager, step, *args, **kwargs)

    monkeypatch.setattr(orbax_io, "read_checkpoint", read_late)
    return dropped


@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_what_a_training_run_drops_meanwhile_is_not_damaged(
    times, slowly, tmp_path, monkeypatch, caplog
):
    write(tmp_path, 10)
    dropped = training_drops(monkeypatch, tmp_path, times, slowly)
    step, params = restore_params(tmp_path)
    assert len(dropped) == times
    assert step == 10 * (times + 1)
    assert_equal(params, init(step).params)
    assert "damaged" not in caplog.text


def test_a_step_or_a_best_one_that_is_dropped_meanwhile_is_told_or_chosen_again(
    tmp_path, monkeypatch, caplog
):
    with Checkpointer(tmp_path, every_steps=10, keep_latest=5) as c:
        for step, score in ((10, 0.9), (20, 0.8), (30, 0.1)):
            c.save(step, state_at(step), {"top1": score})
    training_drops(monkeypatch, tmp_path, 1)
    assert restore_params(tmp_path, best="top1")[0] == 20
    training_drops(monkeypatch, tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 20 .*\[50, 40, 30\]"):
        restore_params(tmp_path, step=20)
    assert "damaged" not in caplog.text
    assert "readable" not in caplog.text


def test_what_is_dropped_while_the_directory_is_opened_is_not_missed(
    tmp_path, monkeypatch
):
    write(tmp_path, 10, 20)
    is_dir = orbax_io._Path.is_dir

    def dropped_before(path):
        asks = sys._getframe(1).f_code.co_name  # after it has seen that it exists
        if asks == "_sanitize_metadata_path" and path.name == "00000010":
            shutil.rmtree(path)
        return is_dir(path)

    monkeypatch.setattr(orbax_io._Path, "is_dir", dropped_before)
    assert restore_params(tmp_path)[0] == 20
    assert not folder(tmp_path, 10).exists()


def test_a_reader_gives_up_where_each_checkpoint_is_dropped(tmp_path, monkeypatch):
    write(tmp_path, 10)
    training_drops(monkeypatch, tmp_path, 1000)
    with pytest.raises(CheckpointError, match="faster than they are read"):
        restore_params(tmp_path)


def test_an_older_checkpoint_that_stays_damaged_is_called_so(tmp_path, caplog):
    write(tmp_path, 10, 20, 30)
    for step in (10, 30):
        shutil.rmtree(folder(tmp_path, step) / "state")
    assert restore_params(tmp_path)[0] == 20
    with pytest.raises(CheckpointError, match=r"10 .* damaged .*Choose another"):
        restore_params(tmp_path, step=10)


TRAINING = """
import sys, time
import test_checkpoint as cases
from mlp_mixer.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], every_steps=1, keep_latest=1) as c:
    step = 0
    while not c.stop_requested(step):
        step += 1
        c.save(step, cases.state_at(step))
        time.sleep(0.02)
"""


def test_a_checkpoint_that_gets_its_name_while_they_are_listed_is_found(
    tmp_path, monkeypatch
):
    write(tmp_path, 10)
    path = folder(tmp_path, 10)
    opened = orbax_io.open_for_reading

    def open_too_early(directory):
        monkeypatch.setattr(orbax_io, "open_for_reading", opened)
        path.rename(path.with_name("10.orbax-checkpoint-tmp"))
        manager = opened(directory)
        path.with_name("10.orbax-checkpoint-tmp").rename(path)
        return manager

    monkeypatch.setattr(orbax_io, "open_for_reading", open_too_early)
    step, params = restore_params(tmp_path)
    assert step == 10
    assert_equal(params, init(10).params)


@pytest.mark.slow
def test_a_hundred_reads_beside_a_training_run_are_all_right(tmp_path, caplog):
    run = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": with_tests_on_the_path()},
    )
    try:
        while not list(tmp_path.glob("run/0*[0-9]")):
            assert run.poll() is None
            time.sleep(0.1)
        steps = set()
        for _ in range(100):
            step, params = restore_params(tmp_path / "run")
            assert_equal(params, init(step).params)
            steps.add(step)
    finally:
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    assert len(steps) > 10
    assert caplog.text == ""


def test_params_that_orbax_does_not_find_are_damage(tmp_path):
    write(tmp_path, 10)
    path = folder(tmp_path, 10) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["arrays"]["params/more"] = [[16], "float32"]
    meta["fingerprints"]["params/more"] = 0
    del meta["checksum"]
    meta["checksum"] = orbax_io._checksum(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(FileNotFoundError, match="only damaged"):
        restore_params(tmp_path)


# Failing saves.


@pytest.fixture
def small_files_only():
    """No file may grow beyond 1 MB, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if on else soft, hard))

    yield limit
    limit(False)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("when", ["save", "wait", "close", "restore"])
def test_a_save_that_fails_is_an_error_at_the_latest_at(
    when, tmp_path, small_files_only, caplog
):
    c = Checkpointer(tmp_path, every_steps=10)
    c.save(10, state_at(10))
    c.save(20, state_at(20))
    c.wait()
    small_files_only(True)
    c.save(30, state_at(30))
    with pytest.raises(CheckpointError) as error:
        {
            "save": lambda: c.save(40, state_at(40)),
            "wait": c.wait,
            "close": c.close,
            "restore": lambda: c.restore(target()),
        }[when]()
    small_files_only(False)
    assert f"step 30 in {tmp_path} failed" in str(error.value)
    assert "intact: [10, 20]" in str(error.value)
    c.close()
    assert [r for r in caplog.records if r.name in ("absl", "asyncio")] == []
    unfinished = [name for name in names(tmp_path) if "tmp" in name]
    assert len(unfinished) == 1
    assert restored_step(tmp_path) == 20
    assert f"Removing unfinished saves in {tmp_path}: {unfinished}" in caplog.text


def poll(checkpointer, seconds=20):
    for _ in range(100 * seconds):
        checkpointer.complete_step()
        time.sleep(0.01)


def test_a_save_that_fails_in_the_background_is_an_error_once_it_has_ended(
    tmp_path, small_files_only
):
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state_at(10))
        c.wait()
        assert c.complete_step() == 10
        small_files_only(True)
        c.save(20, state_at(20))
        with pytest.raises(CheckpointError, match=r"step 20 .* \[10\]") as error:
            poll(c)
        assert "File too large" in str(error.value)
        small_files_only(False)
    assert restored_step(tmp_path) == 10


def test_a_save_that_fails_at_the_end_covers_no_earlier_error(
    tmp_path, small_files_only, caplog
):
    def training():
        with Checkpointer(tmp_path, every_steps=10) as c:
            small_files_only(True)
            c.save(10, state_at(10))
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError, match="loss is nan"):
        training()
    small_files_only(False)
    assert "Saving step 10" in caplog.text


def test_after_a_failed_save_the_same_step_can_be_saved(tmp_path, small_files_only):
    with Checkpointer(tmp_path, every_steps=10) as c:
        c.save(10, state_at(10))
        c.wait()
        small_files_only(True)
        c.save(20, state_at(20))
        with pytest.raises(CheckpointError):
            c.wait()
        small_files_only(False)
        assert c.all_steps() == [10]
        assert c.save(20, state_at(20))
    assert restored_step(tmp_path) == 20


def test_a_full_disk_leaves_the_older_checkpoints_intact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with Checkpointer(disk / "run", every_steps=10) as c:
            c.save(10, state_at(10))
            c.save(20, state_at(20))
            c.wait()
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - 2**20))
            c.save(30, state_at(30))
            with pytest.raises(CheckpointError, match=f"step 30 in {disk}/run failed"):
                c.wait()
            assert c.all_steps() == [10, 20]
            (disk / "filler").unlink()
        assert restored_step(disk / "run") == 20
    finally:
        subprocess.run(["umount", str(disk)], check=True)


FULL_DISK = """
import pathlib, resource, signal, sys
import test_checkpoint as cases
from mlp_mixer import console, program
from mlp_mixer.checkpoint import Checkpointer
console.log_to_terminal()
directory, limit = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with program.errors_in_one_line(), Checkpointer(directory, every_steps=1) as c:
    c.save(10, cases.state_at(10))
    c.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if limit == 10:
        c.add_metrics(10, {"top1": 0.5})
    c.save(20, cases.state_at(20))
    c.save(30, cases.state_at(30))
"""


@pytest.mark.parametrize(
    "limit",
    [0, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (200, 2000, 1_000_000))],
)
def test_a_full_disk_is_one_line_that_says_what_is_intact(limit, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)],
        env={**os.environ, "PYTHONPATH": with_tests_on_the_path()},
        stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    what = "Adding metrics to checkpoint 10" if limit == 10 else "Saving step 20"
    assert line.startswith(f"{what} in {tmp_path} failed: ")
    assert "File too large" in line
    assert "intact" in line
    assert len(line) < 800
    assert restored_step(tmp_path) == 10


def test_unfinished_saves_are_named_and_removed(tmp_path, caplog):
    write(tmp_path, 10)
    name = "00000020.orbax-checkpoint-tmp"
    shutil.copytree(folder(tmp_path, 10), tmp_path / name)
    assert restored_step(tmp_path) == 10
    assert f"Removing unfinished saves in {tmp_path}: ['{name}']" in caplog.text
    deadline = time.monotonic() + 10
    while (tmp_path / name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert names(tmp_path) == ["00000010"]


# Signals and logs.


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop_the_second_does_what_it_did_before(
    signum, tmp_path, caplog
):
    received = []
    before = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        with Checkpointer(tmp_path, every_steps=10) as c:
            assert not c.stop_requested(1)
            os.kill(os.getpid(), signum)
            assert c.stop_requested(2)
            assert received == []
            assert f"{signum.name} received: saving and stopping" in caplog.text
            os.kill(os.getpid(), signum)
            assert received == [signum]
            assert c.save(2, state_at(2), force=c.stop_requested(2))
    finally:
        signal.signal(signum, before)
    assert restored_step(tmp_path) == 2


def test_the_signal_handlers_are_given_back(tmp_path):
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(s) for s in signals]
    with Checkpointer(tmp_path, every_steps=10):
        assert [signal.getsignal(s) for s in signals] != before
    assert [signal.getsignal(s) for s in signals] == before


def test_the_signals_are_heard_before_the_folder_appears(tmp_path, monkeypatch):
    """And are given back if it cannot be opened."""
    before, heard = signal.getsignal(signal.SIGTERM), []

    def fail(directory, **options):
        heard.append((signal.getsignal(signal.SIGTERM) != before, directory.exists()))
        raise PermissionError(directory)

    monkeypatch.setattr(orbax_io, "_open", fail)
    with pytest.raises(PermissionError):
        Checkpointer(tmp_path / "new", every_steps=10)
    assert heard == [(True, False)]
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Checkpointer(tmp_path, every_steps=10) as c:
            os.kill(os.getpid(), signal.SIGINT)
            assert not c.stop_requested(1)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("why", ["in another thread", "under jax.distributed"])
def test_no_handler_is_installed(why, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use():
        with Checkpointer(tmp_path, every_steps=10) as c:
            seen.append(signal.getsignal(signal.SIGTERM))
            if why == "in another thread":
                assert not c.stop_requested(1)

    if why == "in another thread":
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        use()
    assert seen == [before]


def test_our_lines_are_seen_and_the_chatter_of_orbax_is_not(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        write(tmp_path, 10, 20)
        for file in folder(tmp_path, 20).glob("state/d/*"):
            truncate(file)
        restored_step(tmp_path)
        restore_params(tmp_path)
        gc.collect()  # what failed unheard would speak now
        logging.getLogger("absl").info("a line of another user of absl")
        logging.getLogger("asyncio").error("Task exception was never retrieved: mine")
        logging.getLogger("asyncio").error(
            "Future exception was never retrieved\nfuture: <Future finished exception="
            "ValueError('DATA_LOSS: Error reading \"w/.zarray\" in OCDBT database …')>"
        )
    ours = [r.levelname for r in caplog.records if r.name.startswith("mlp_mixer.")]
    assert ours == ["ERROR", "INFO"]
    assert "a line of another user of absl" in caplog.text
    late = [r.message for r in caplog.records if "never retrieved" in r.message]
    assert late == ["Task exception was never retrieved: mine"]
    assert [r for r in caplog.records if f"{os.sep}orbax{os.sep}" in r.pathname] == []


def test_a_removal_that_fails_is_one_line_and_what_is_raised_too_is_none(
    tmp_path, caplog
):
    """A removal that the end of the program overtakes is done by the next start."""
    with Checkpointer(tmp_path, every_steps=10):
        pass
    path = f"a{os.sep}orbax{os.sep}checkpoint{os.sep}futures.py"
    try:
        raise PermissionError(13, "Permission denied", "x")
    except PermissionError:
        trouble = sys.exc_info()
    for said in (
        "Failed to remove checkpoint (x)",
        "Failed to remove: cannot schedule new futures after shutdown",
        "_SignalingThread.run() raised an exception",
    ):
        record = logging.LogRecord("absl", logging.ERROR, path, 1, said, (), trouble)
        logging.getLogger("absl").handle(record)
    [record] = [r for r in caplog.records if r.name == "absl"]
    assert record.getMessage().startswith("Failed to remove checkpoint (x): Permission")
    assert not record.exc_info


# Several processes.


def run_workers(mode, directory, count=2, devices=2, send=None):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    worker = pathlib.Path(__file__).with_name("checkpoint_worker.py")
    command = [sys.executable, str(worker), mode, str(directory)]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(count), str(devices), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        if send is not None:
            assert processes[0].stdout
            for line in processes[0].stdout:
                if "running" in line:
                    break
            processes[0].send_signal(send)
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_two_processes_save_and_restore_and_one_restores_what_they_saved(tmp_path):
    outputs = run_workers("save", tmp_path)
    assert all("is not finite" in output for output in outputs), "\n".join(outputs)
    run_workers("restore", tmp_path)
    assert restored_step(tmp_path, devices=8) == 20
    assert restore_params(tmp_path, best="top1")[0] == 10
    truncate(folder(tmp_path, 20) / "state" / "array_metadatas" / "process_1")
    assert restored_step(tmp_path) == 10


@pytest.mark.slow
def test_two_processes_walk_back_in_place_from_a_wrong_fingerprint(tmp_path):
    run_workers("save", tmp_path)
    path = folder(tmp_path, 20)
    flip_an_element(path, init(20).params["bits"])
    outputs = run_workers("restore", tmp_path)
    assert all("restored 10" in output for output in outputs), "\n".join(outputs)
    assert len(damaged(tmp_path)) == 1


@pytest.mark.slow
def test_two_processes_stop_together_after_a_signal_to_one(tmp_path):
    write(tmp_path, 10)
    outputs = run_workers("train", tmp_path, send=signal.SIGTERM)
    [a, b] = [o.split("stopped at ")[1].split()[0] for o in outputs]
    assert a == b
    assert restored_step(tmp_path) == int(a)


@pytest.mark.slow
def test_a_save_that_fails_on_one_of_two_processes_is_told_at_once(tmp_path):
    run_workers("fill", tmp_path)
    told = (tmp_path / "told").read_text()
    assert f"Saving step 20 in {tmp_path} failed" in told
    assert "intact: [10]" in told
