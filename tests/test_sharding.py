"""Laws of the mesh and of where arrays live."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optimisers
import pytest

from mlp_mixer import models, sharding, steps
from mlp_mixer.data import pipeline


def test_a_mesh_takes_all_devices_or_the_first_ones():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "model": 1}
    mesh = sharding.make_mesh(4)
    assert mesh.shape == {"data": 4, "fsdp": 1, "model": 1}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_the_data_axis_takes_what_the_others_leave():
    mesh = sharding.make_mesh(fsdp=2, model=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "model": 2}
    assert sharding.rows(mesh) == 4
    assert sharding.make_mesh(1, 2, 3).size == 6


def test_a_mesh_can_be_of_devices_that_are_not_here():
    """Those of a pod that is only compiled for."""
    there = [mock.Mock(platform="gpu", id=i, slice_index=0) for i in range(32)]
    mesh = sharding.make_mesh(fsdp=8, devices=there)
    assert mesh.shape == {"data": 4, "fsdp": 8, "model": 1}
    assert set(mesh.devices.flat) == set(there)
    assert sharding.rows(mesh) == 32


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9,), "data is 9, mesh.fsdp 1, .*, but there are 8 devices; data -1 takes"),
        ((-1, 3), "fsdp 3, mesh.model 1, but there are 8 devices; fsdp x model must"),
        ((-1, 16), "fsdp 16, mesh.model 1, but there are 8 devices; fsdp x model"),
        ((2, 2, 4), "is 2, mesh.fsdp 2, mesh.model 4, but there are 8 devices"),
        ((0,), "mesh.data is 0, mesh.fsdp 1, mesh.model 1; expected numbers from 1"),
        ((-2,), "mesh.data is -2, mesh.fsdp 1, mesh.model 1; expected numbers from 1"),
        ((1, 0), "mesh.data is 1, mesh.fsdp 0, mesh.model 1; expected numbers from 1"),
    ],
)
def test_a_mesh_of_devices_that_are_not_there_is_explained(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_several_processes_use_all_devices(monkeypatch):
    """A process whose devices are not in the mesh could take no part."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="takes 4 of 8 devices; with 2 processes"):
        sharding.make_mesh(4)
    assert sharding.make_mesh(8).size == sharding.make_mesh().size == 8


def test_an_unknown_strategy_lists_the_known():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="'fdsp' is unknown; try fsdp, replicated"):
        sharding.shardings({"x": jnp.zeros(3)}, mesh, "fdsp", {})


def cut_axes(leaf):
    """Axis → number of parts, for every axis that is cut."""
    part = leaf.sharding.shard_shape(leaf.shape)
    return {
        axis: whole // piece
        for axis, (whole, piece) in enumerate(zip(leaf.shape, part, strict=True))
        if whole != piece
    }


def train_state(name, strategy, num_classes=1000):
    model = models.create(name, num_classes=num_classes)
    tx, _ = optimisers.create(total_steps=100, learning_rate=1e-3, warmup_steps=10)
    return steps.state_shapes(
        model, tx, sharding.make_mesh(), pipeline.example((224, 224)), strategy=strategy
    )


@pytest.mark.parametrize("name", models.mixer.SIZES)
def test_fsdp_cuts_every_kernel_of_table_1_eight_ways(name):
    """Token mixing's included, of whatever shape; only vectors stay whole."""
    # 21,843 classes: the head's kernel can only be cut along its other axis.
    params = train_state(name, "fsdp", num_classes=21_843).params
    cut = whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = cut_axes(leaf)
        if path[-1].key == "kernel":
            ((axis, parts),) = axes.items()
            assert parts == 8, path
            assert leaf.shape[axis] == max(n for n in leaf.shape if n % 8 == 0), path
            cut += leaf.size
        elif axes:  # The head's bias is no multiple of 8, H/14's hidden biases are.
            assert leaf.size >= sharding.FSDP_MIN_ELEMENTS
            cut += leaf.size
        else:
            whole += leaf.size
    assert cut / (cut + whole) > 0.97


@pytest.mark.parametrize("shape", [(), (4095,), (63, 65), (4097,), (91, 93)])
def test_fsdp_leaves_whole_what_is_small_or_does_not_divide(shape):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    result = sharding.shardings([leaf], sharding.make_mesh(), "fsdp", {})[0]
    assert result.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((4096,), (512,)),
        ((4, 1025, 8), (4, 1025, 1)),
        ((64, 128), (64, 16)),
        ((128, 64), (16, 64)),
        ((8, 4095), (1, 4095)),
    ],
)
def test_fsdp_cuts_the_largest_axis_that_the_devices_divide(shape, part):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    result = sharding.shardings([leaf], sharding.make_mesh(), "fsdp", {})[0]
    assert result.shard_shape(shape) == part


@pytest.mark.parametrize("strategy", sharding.STRATEGIES)
def test_moments_live_where_their_parameters_do(strategy):
    state = train_state("mixer_s32", strategy)
    (adam,) = (s for s in state.opt_state if hasattr(s, "mu"))
    where = [x.sharding for x in jax.tree.leaves(state.params)]
    for moment in (adam.mu, adam.nu):
        assert [x.sharding for x in jax.tree.leaves(moment)] == where
    assert state.step.sharding.is_fully_replicated
    assert all(s.is_fully_replicated for s in where) == (strategy == "replicated")


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_put_deals_rows_to_devices_in_order(devices):
    mesh = sharding.make_mesh(devices)
    batch: dict[str, np.ndarray] = {
        "image": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3),
        "label": np.arange(16),
    }
    cut = sharding.place_rows(batch, mesh)
    for name, whole in batch.items():
        assert cut[name].dtype == jnp.asarray(whole).dtype
        np.testing.assert_array_equal(cut[name], whole)
        shards = {shard.device: shard.data for shard in cut[name].addressable_shards}
        share = 16 // devices
        for i, device in enumerate(mesh.devices.flat):
            rows = whole[i * share : (i + 1) * share]
            np.testing.assert_array_equal(shards[device], rows)


@pytest.mark.parametrize(("rows", "near"), [(12, 8), (3, 8), (23, 16)])
def test_a_batch_that_the_devices_do_not_divide_is_explained(rows, near):
    message = f"A batch of {rows} does not divide among 8 devices; try {near}"
    with pytest.raises(ValueError, match=message):
        sharding.place_rows({"label": np.zeros(rows)}, sharding.make_mesh())
