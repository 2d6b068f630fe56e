"""Laws of a model's statistics: a step changes them, and predictions use them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optimisers
import pytest

from mlp_mixer import checkpoint, sharding, steps
from mlp_mixer.data import pipeline
from mlp_mixer.models import Model, Run

SIZE, ROWS, MOMENTUM = (8, 8), 32, 0.75
EXAMPLE = pipeline.example(SIZE)


class Normalised(Model):
    """The smallest model with BatchNorm: of pixels, before a linear head."""

    patch_size: tuple[int, int] = (1, 1)
    num_classes: int = 5
    # Which training leaves alone: a part of a batch has other statistics.
    run: Run = Run(images_at_once=2)

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.BatchNorm(not train, momentum=MOMENTUM, name="norm")(image)
        x = x.reshape(len(image), -1)
        return nn.Dense(self.num_classes, name="head")(x), {"pre_logits": x}


def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (ROWS, *SIZE, 3), np.uint8),
        "label": rng.integers(0, 5, ROWS, np.int32),
    }


def pixels():
    return steps.value_range(jnp.asarray(batch()["image"]))


def begin(devices=1, ema=0.0, **fields):
    """(mesh, train step, state of step 0)."""
    mesh = sharding.make_mesh(devices)
    model, (tx, _) = (
        Normalised(),
        optimisers.create(learning_rate=0.1, total_steps=10, warmup_steps=0, ema=ema),
    )
    target = steps.state_shapes(model, tx, mesh, EXAMPLE, strategy="replicated")
    step = steps.make_train_step(
        model,
        tx,
        mesh,
        target,
        loss="softmax_xent",
        seed=0,
        **{"mixup": 0.0, "accumulate": 1} | fields,
    )
    return mesh, step, steps.init_state(model, tx, target, EXAMPLE, seed=0)


def running(mean, x):
    """BatchNorm's running mean after a batch."""
    return MOMENTUM * mean + (1 - MOMENTUM) * x.mean((0, 1, 2))


@pytest.mark.parametrize("devices", [1, 8])
def test_statistics_are_those_of_the_global_batch(devices):
    mesh, step, state = begin(devices)
    assert not state.stats["batch_stats"]["norm"]["mean"].any()
    state, _ = step(state, sharding.place_rows(batch(), mesh))
    x = np.asarray(pixels())
    found = state.stats["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], running(0.0, x), rtol=1e-4, atol=1e-7)
    variance = MOMENTUM + (1 - MOMENTUM) * x.var((0, 1, 2))
    np.testing.assert_allclose(found["var"], variance, rtol=1e-4)
    assert found["mean"].sharding.is_fully_replicated


def test_micro_batches_change_the_statistics_one_after_the_other():
    mesh, step, state = begin(accumulate=4)
    state, _ = step(state, sharding.place_rows(batch(), mesh))
    x, mean = np.asarray(pixels()), np.zeros(3)
    for i in range(4):
        mean = running(mean, x[i::4])
    found = state.stats["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-7)


def test_the_average_is_of_parameters_and_statistics():
    """Of the first update: a tenth of what it began with."""
    mesh, step, state = begin(8, ema=0.99)
    jax.tree.map(np.testing.assert_array_equal, state.averaged, state.variables)
    before = jax.device_get(state.variables)
    state, _ = step(state, sharding.place_rows(batch(), mesh))
    expected = jax.tree.map(lambda x, y: 0.1 * x + 0.9 * y, before, state.variables)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        *(state.averaged, expected),
    )
    mean = state.averaged["batch_stats"]["norm"]["mean"]
    assert abs(mean - before["batch_stats"]["norm"]["mean"]).min() > 1e-4
    _, step, state = begin()
    assert state.averaged is not None
    jax.tree.map(np.testing.assert_array_equal, state.averaged, state.variables)


def test_predictions_use_the_statistics_and_leave_them_alone():
    mesh, step, state = begin()
    predict = steps.make_predict(Normalised(), mesh)
    images = sharding.place_rows({"image": batch()["image"]}, mesh)
    fresh = predict(state.variables, images)["pre_logits"]
    state, _ = step(state, sharding.place_rows(batch(), mesh))
    image = pixels()
    expected, out = Normalised().apply(state.variables, image)
    found = predict(state.variables, images)
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["pre_logits"], out["pre_logits"], rtol=1e-5)
    assert abs(found["pre_logits"] - fresh).max() > 0.01


def test_a_run_may_begin_with_the_statistics_of_its_weights():
    _, _, drawn = begin()
    drawn = jax.device_get(drawn)
    stats = jax.tree.map(lambda x: x + 1, drawn.stats)
    mesh, (tx, _) = (
        sharding.make_mesh(8),
        optimisers.create(learning_rate=0.1, total_steps=9, warmup_steps=0),
    )
    target = steps.state_shapes(Normalised(), tx, mesh, EXAMPLE, strategy="replicated")
    for given in (None, stats):
        state = steps.init_state(
            Normalised(), tx, target, EXAMPLE, seed=7, params=drawn.params, stats=given
        )
        jax.tree.map(np.testing.assert_array_equal, state.params, drawn.params)
        expected = drawn.stats if given is None else given
        jax.tree.map(np.testing.assert_array_equal, state.stats, expected)


class Without(Model):
    """A model without statistics."""

    patch_size: tuple[int, int] = (1, 1)
    num_classes: int = 5

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.reshape(len(image), -1)
        return nn.Dense(self.num_classes, name="head")(x), {"pre_logits": x}


@pytest.mark.parametrize("model", [Normalised(), Without()], ids=["with", "without"])
def test_statistics_are_saved_and_no_statistics_leave_no_trace(model, tmp_path):
    """A checkpoint of a model without any is what it was before there were any."""
    mesh, (tx, _) = (
        sharding.make_mesh(8),
        optimisers.create(learning_rate=0.1, total_steps=9, warmup_steps=0),
    )
    target = steps.state_shapes(model, tx, mesh, EXAMPLE, strategy="replicated")
    state = steps.init_state(model, tx, target, EXAMPLE, seed=7)
    with checkpoint.Checkpointer(tmp_path, every_steps=1) as saver:
        saver.save(1, state)
        saver.wait()
        restored = saver.restore(target)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert isinstance(restored, steps.TrainState)
    written = (tmp_path / "00000001/state/_METADATA").read_text()
    assert ("stats" in written) == isinstance(model, Normalised)
    named = state._asdict()
    del named["stats"]
    leaves = len(jax.tree.leaves(named)) + 2 * isinstance(model, Normalised)
    assert len(jax.tree.leaves(state)) == leaves
