"""Laws of a training step: the same on any mesh, and no device does another's work."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import literal_mixer
import numpy as np
import pytest
import session
from jax.sharding import AxisType, Mesh
from step_program import (
    ADAM,
    EXAMPLE,
    FIELDS,
    GRADIENT,
    IMAGE,
    LARGEST_PARAMETER,
    NOISE,
    ROWS,
    STRATEGIES,
    Program,
    adam,
    assert_close,
    assert_same_training,
    batches,
    compiled,
    flops,
    held,
    named,
    optimiser,
    random_params,
    temporaries,
    travels,
)

from mlp_mixer import augment, losses, sharding, steps
from mlp_mixer.models import Model, Run
from mlp_mixer.models.mixer import MlpMixer

# --- One device or many ---------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eight_devices_equal_one(strategy):
    """With everything random switched on."""
    one, eight = compiled(1, **NOISE), compiled(8, strategy, **NOISE)
    assert_same_training(eight.trained, one.trained)
    # What was compared has moved, and is no longer what the first step made of it.
    change = jax.tree.map(
        lambda x, y: abs(x - y).max(), *[one.trained[0].params, random_params()]
    )
    assert min(named(change).values()) > 1e-3


def test_with_fsdp_a_device_holds_an_eighth_of_parameters_and_moments():
    """And of the 2 % that are vectors, all: biases and LayerNorms stay whole."""
    cut, whole = compiled(8, "fsdp", **NOISE), compiled(8, "replicated", **NOISE)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(random_params()))
    state, _ = cut.step(cut.state(), cut.batch())
    for device in cut.mesh.devices.flat:
        for tree in (state.params, adam(state).mu, adam(state).nu):
            assert 0.125 <= held(tree, device) / total < 0.15

    def arguments(program):
        batch = (IMAGE + 4) * ROWS // 8
        return program.step.memory_analysis().argument_size_in_bytes - batch

    assert arguments(whole) >= 3 * total
    assert 0.125 <= arguments(cut) / arguments(whole) < 0.15


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_device_computes_an_eighth(strategy):
    """5 %: what the devices do alike is the update of parameters that are not cut."""
    total = flops(compiled(1, **NOISE))
    assert 8 * flops(compiled(8, strategy, **NOISE)) == pytest.approx(total, rel=0.05)


def test_merging_a_sharded_axis_is_seen():
    """Flat products are for one device: here, eight gather the batch and each does the
    work of all. Results are right, so only these two numbers tell."""
    bad = compiled(8, "replicated", flat=True)
    assert 8 * flops(bad) > 3 * flops(compiled(1))
    assert travels(bad)["all-gather"] > LARGEST_PARAMETER


@pytest.mark.parametrize(
    "fields",
    [NOISE, {"scan": True, "remat": "pre_gelu"}],
    ids=["unrolled, noise", "scan"],
)
def test_no_activation_travels(fields):
    moves = travels(compiled(8, "replicated", **fields))
    # Gradients are summed; mixup passes one image, and its label, to the next device.
    assert moves.pop("all-reduce") == LARGEST_PARAMETER
    assert moves.pop("collective-permute", 0) == ("mixup" in fields) * IMAGE
    assert not moves

    moves = travels(compiled(8, "fsdp", **fields))
    assert moves["all-gather"] == LARGEST_PARAMETER
    assert max(moves.values()) == LARGEST_PARAMETER


# A model that is larger than what one step makes of a few small images.
DEEP: dict[str, Any] = {
    "num_blocks": 16,
    "hidden_dim": 128,
    "channels_mlp_dim": 1024,
    "patch_size": (32, 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "pre_gelu"])
def test_no_device_ever_holds_the_whole_model(remat):
    """Nor a whole gradient: of one scanned block at a time, read from the program."""
    this = Program(8, "fsdp", scan=True, remat=remat, rows=8, **DEEP)
    memory = this.step.memory_analysis()
    model = sum(4 * leaf.size for leaf in jax.tree.leaves(this.target.params))
    # Parameters and their two moments; and one image.
    assert memory.argument_size_in_bytes < 1.2 * 3 / 8 * model
    assert memory.temp_size_in_bytes < 0.6 * model
    whole = Program(8, "replicated", scan=True, remat=remat, rows=8, **DEEP)
    assert whole.step.memory_analysis().temp_size_in_bytes > 1.9 * model


@pytest.mark.parametrize("remat", ["none", "pre_gelu"])
def test_unrolled_blocks_are_gathered_again_for_the_backward_pass(remat):
    """What was gathered is not kept; when it is gathered, the compiler decides."""
    gathers = compiled(8, "fsdp", remat=remat).step.as_text().count(" all-gather(")
    kernels = len([x for x in jax.tree.leaves(random_params()) if x.size >= 4096])
    blocks = 4 * FIELDS["num_blocks"]
    # The stem's once; the head's is too small to be cut.
    assert (kernels, gathers) == (blocks + 1, 2 * blocks + 1)


# --- Ways to say a mesh ---------------------------------------------------------------


UNROLLED, SCANNED = NOISE, {"scan": True, "remat": "pre_gelu", "accumulate": 2}


@pytest.mark.parametrize(
    ("fields", "axis_type", "strategy"),
    [
        # Each pair of values is among the first four.
        (UNROLLED, AxisType.Auto, "replicated"),
        (UNROLLED, AxisType.Explicit, "fsdp"),
        (SCANNED, AxisType.Auto, "fsdp"),
        (SCANNED, AxisType.Explicit, "replicated"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (UNROLLED, AxisType.Auto, "fsdp"),
                (UNROLLED, AxisType.Explicit, "replicated"),
                (SCANNED, AxisType.Auto, "replicated"),
                (SCANNED, AxisType.Explicit, "fsdp"),
            )
        ),
    ],
)
def test_a_step_is_the_same_with_a_set_mesh_of_either_type(
    fields, axis_type, strategy, monkeypatch
):
    plain = sharding.make_mesh(4, 2)
    mesh = Mesh(plain.devices, plain.axis_names, axis_types=(axis_type,) * 3)
    monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh)
    with jax.set_mesh(mesh):
        trained = Program(8, strategy, **fields).trained
    monkeypatch.undo()
    noise = {name: value for name, value in NOISE.items() if name in fields}
    assert_same_training(trained, compiled(1, **noise).trained)


REMAT3 = "jax_remat3"


@pytest.mark.skipif(not hasattr(jax.config, REMAT3), reason=f"JAX without {REMAT3}")
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_is_the_same_under_the_next_rematerialisation(scan):
    before = getattr(jax.config, REMAT3)
    jax.config.update(REMAT3, True)
    try:
        this = Program(8, "fsdp", scan=scan, remat="pre_gelu", **NOISE)
        trained = this.trained
    finally:
        jax.config.update(REMAT3, before)
    assert_same_training(trained, compiled(1, **NOISE).trained)


# --- Accumulation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "strategy"), [(1, "replicated"), (8, "replicated"), (8, "fsdp")]
)
def test_micro_batches_make_the_big_batchs_update(devices, strategy):
    """Loss, norm of the gradient, moments and parameters."""
    whole, parts = compiled(1), compiled(devices, strategy, accumulate=4)
    assert_same_training(parts.trained, whole.trained)


@pytest.mark.parametrize(
    ("devices", "parts", "images"),
    [
        (1, {"images_at_once": 10}, "[4,8,64,64,3]"),
        (8, {"images_at_once": 1, "accumulate": 2}, "[4,1,64,64,3]"),
    ],
)
def test_images_a_few_at_a_time_make_the_big_batchs_update(devices, parts, images):
    few = compiled(devices, "replicated", **parts)
    assert_same_training(few.trained, compiled(1).trained)
    assert f"f32{images}" in few.step.as_text()


@pytest.mark.parametrize("noise", [{"stochastic_depth": 0.5}, {"dropout": 0.5}])
def test_images_a_few_at_a_time_draw_the_same_noise(noise):
    """Parts of a batch would draw other noise than the whole, so there are none."""
    whole, few = compiled(1, **noise), compiled(1, images_at_once=4, **noise)
    jax.tree.map(np.testing.assert_array_equal, few.trained, whole.trained)


def test_micro_batches_need_less_memory():
    whole = temporaries(compiled(1))
    assert temporaries(compiled(1, accumulate=4)) < 0.5 * whole
    assert temporaries(compiled(1, images_at_once=10)) < 0.5 * whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches_are_cut_where_the_images_are(strategy):
    moves = travels(compiled(8, strategy, accumulate=4))
    assert (
        set(moves)
        == {
            "replicated": {"all-reduce"},
            "fsdp": {"all-reduce", "all-gather"},
        }[strategy]
    )
    # The micro-batch of all devices is eight images; even one would be too much.
    assert set(moves.values()) == {LARGEST_PARAMETER}


# --- (seed, step) is the whole position -----------------------------------------------


@pytest.mark.parametrize(
    ("devices", "strategy"), [(1, "replicated"), (8, "replicated"), (8, "fsdp")]
)
def test_a_step_is_bitwise_a_function_of_state_and_batch(devices, strategy):
    """So a run that goes on from a saved state is the run that was not interrupted."""
    this = compiled(devices, strategy, **NOISE)
    after, _ = this.step(this.state(), this.batch(0))
    saved = jax.device_get(after)
    resumed = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), saved, this.target
    )
    uninterrupted = this.step(after, this.batch(1))
    again = this.step(resumed, this.batch(1))
    jax.tree.map(np.testing.assert_array_equal, again, uninterrupted)
    assert again[0].step == 2


@pytest.mark.parametrize(
    ("noise", "seeds"),
    [("mixup", (0,)), ("erasing", (0,)), ("stochastic_depth", (0, 1))],
)
def test_another_seed_or_step_draws_other_noise(noise, seeds):
    """Of a loss, parameters and batch being the same, noise is all that can change."""
    field = {noise: NOISE[noise]}

    def loss(this, step):
        return float(this.step(this.state(step), this.batch())[1]["loss"])

    noisy = [loss(compiled(1, seed=seed, **field), n) for seed in seeds for n in (0, 7)]
    assert len(set(noisy)) == len(noisy)
    assert loss(compiled(1), 0) == loss(compiled(1), 7)
    assert loss(compiled(1), 0) not in noisy


def test_the_state_is_donated():
    """Old and new parameters and moments are never in memory at the same time."""
    this = compiled(8, "fsdp", **NOISE)
    state, batch = this.state(), this.batch()
    leaves = jax.tree.leaves(state)
    # The compiled program itself writes each over its old one: not only the step does.
    assert this.step.as_text().partition("\n")[0].count("-alias") == len(leaves)
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert this.step.memory_analysis().alias_size_in_bytes == on_one_device
    this.step(state, batch)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not batch["image"].is_deleted()


def init_state(devices, strategy, seed, params=None):
    mesh = sharding.make_mesh(devices)
    model, tx = MlpMixer(**FIELDS | {"num_blocks": 1}), optimiser(**ADAM)
    target = steps.state_shapes(model, tx, mesh, EXAMPLE, strategy=strategy)
    state = steps.init_state(model, tx, target, EXAMPLE, seed=seed, params=params)
    for leaf, asked in zip(
        jax.tree.leaves(state), jax.tree.leaves(target), strict=True
    ):
        assert leaf.sharding == asked.sharding
    return jax.device_get(state)


def test_a_run_begins_the_same_on_every_mesh():
    one = init_state(1, "replicated", 3)
    assert one.step == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(one.opt_state))
    for strategy in STRATEGIES:
        eight = init_state(8, strategy, 3)
        jax.tree.map(np.testing.assert_array_equal, eight, one)
    other = init_state(1, "replicated", 4)
    assert (other.params["stem"]["kernel"] != one.params["stem"]["kernel"]).all()


def test_a_run_begins_the_same_however_much_its_initialisation_is_optimised(
    monkeypatch,
):
    fully = {"xla_backend_optimization_level": 3}
    assert session.INIT_OPTIONS.keys() == {"cpu"}
    assert session.INIT_OPTIONS["cpu"] != fully
    states = []
    for options in (session.INIT_OPTIONS["cpu"], fully):
        monkeypatch.setitem(steps.INIT_OPTIONS, "cpu", options)
        states.append(init_state(1, "replicated", 3))
    jax.tree.map(np.testing.assert_array_equal, *states)


# --- What a step computes -------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_from_weights_begins_as_one_that_drew_them(strategy):
    drawn = init_state(8, strategy, 3)
    given = init_state(8, strategy, 4, params=jax.device_get(drawn.params))
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(given), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_gradient_is_the_literal_flax_models():
    this = Program(optim=GRADIENT)
    state, metrics = this.step(this.state(), this.batch())
    (grads,) = (s.trace for s in state.opt_state if hasattr(s, "trace"))
    batch = batches()[0]

    def objective(params):
        image = batch["image"].astype(np.float32) / 255 * 2 - 1
        logits, _ = literal_mixer.LiteralMixer(**FIELDS).apply(
            {"params": params}, image
        )
        labels = np.eye(8, dtype=np.float32)[batch["label"]]
        entropy = jnp.logaddexp(0.0, logits) - labels * logits
        return entropy.sum(1).mean()

    loss, expected = jax.jit(jax.value_and_grad(objective))(random_params())
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(grads, expected, 1e-4)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    for i in range(2):
        dead = grads[f"MixerBlock_{i}"]["token_mixing"]["Dense_1"]["bias"]
        assert abs(dead).max() < 1e-6 * norm


class Penalised(Model):
    """A linear model that asks for small weights."""

    patch_size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.mean((1, 2))
        logits = nn.Dense(self.num_classes, name="head")(x)
        kernel = self.variables["params"]["head"]["kernel"]
        return logits, {"pre_logits": x, "penalty": 0.5 * (kernel**2).sum()}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_models_penalty_is_added_to_the_loss(accumulate):
    model, tx = Penalised(num_classes=8), optimiser(**GRADIENT)
    mesh = sharding.make_mesh(1)
    target = steps.state_shapes(model, tx, mesh, EXAMPLE, strategy="replicated")
    fixed = {"seed": 0, "mixup": 0.0, "loss": "softmax_xent"}
    step = steps.make_train_step(
        model, tx, mesh, target, accumulate=accumulate, **fixed
    )
    state = steps.init_state(model, tx, target, EXAMPLE, seed=0)
    kernel = np.asarray(state.params["head"]["kernel"])

    def entropy(kernel):
        image = steps.value_range(jnp.asarray(batches()[0]["image"]))
        log_p = jax.nn.log_softmax(image.mean((1, 2)) @ kernel)
        return -log_p[np.arange(len(image)), batches()[0]["label"]].mean()

    value, gradient = jax.value_and_grad(entropy)(kernel)
    state, metrics = step(state, sharding.place_rows(batches()[0], mesh))
    expected = value + 0.5 * (kernel**2).sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    (found,) = (s.trace for s in state.opt_state if hasattr(s, "trace"))
    np.testing.assert_allclose(
        found["head"]["kernel"], gradient + kernel, rtol=1e-4, atol=1e-6
    )


def test_labels_are_smoothed_and_images_erased_before_both_are_mixed(monkeypatch):
    """As timm does: read from what the step calls as it is traced."""
    calls = []

    def watch(module, name):
        real = getattr(module, name)

        def watched(*arguments, **options):
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(losses, "smoothed")
    watch(augment, "erase")
    watch(augment, "mix")
    model, tx = Penalised(num_classes=8), optimiser(**GRADIENT)
    mesh = sharding.make_mesh(1)
    target = steps.state_shapes(model, tx, mesh, EXAMPLE, strategy="replicated")
    fixed = {"seed": 0, "accumulate": 1, "loss": "softmax_xent", "mixup": 0.0}
    every = {"label_smoothing": 0.1, "erasing": 0.25, "cutmix": 1.0}
    for given, expected in (({}, []), (every, ["smoothed", "erase", "mix"])):
        calls.clear()
        step = steps.make_train_step(model, tx, mesh, target, **fixed, **given)
        jax.eval_shape(step, target, batches()[0])
        assert calls == expected


def test_thirty_steps_learn_sixteen_images_by_heart():
    """In the formulation of one CPU device."""
    fast = {"learning_rate": 3e-3}
    this = Program(rows=16, flat=True, loss="softmax_xent", optim=fast)
    batch = {name: x[:16] for name, x in batches()[0].items()}
    state, batch = this.state(), sharding.place_rows(batch, this.mesh)
    history = []
    for _ in range(31):
        state, metrics = this.step(state, batch)
        history.append(float(metrics["loss"]))
    assert history[0] > 1
    assert history[30] < 0.1 * history[0]


@pytest.mark.parametrize("rows", [24, 48])
def test_a_batch_that_does_not_divide_is_explained(rows):
    message = f"A batch of {rows} does not divide among 4 micro-batches on 8 dev.*32"
    with pytest.raises(ValueError, match=message):
        Program(8, accumulate=4, rows=rows)


def test_an_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match="'xent' is unknown; try s"):
        Program(1, loss="xent")


def test_value_range_maps_bytes_to_minus_one_and_one():
    every = np.arange(256, dtype=np.uint8)
    image = np.broadcast_to(every[:, None, None, None], (256, 1, 1, 3))
    for form in (steps.value_range, jax.jit(steps.value_range)):
        out = np.asarray(form(jnp.asarray(image)))
        assert out.dtype == np.float32
        assert (out[0] == -1).all()
        assert (out[255] == 1).all()
        np.testing.assert_allclose(out, image / 255 * 2 - 1, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("devices", "strategy", "rows", "images_at_once"),
    [
        (1, "replicated", 3, None),
        (1, "replicated", 24, 7),
        (8, "replicated", 8, None),
        (8, "fsdp", 24, 1),
    ],
)
def test_predict_is_the_model_without_noise(devices, strategy, rows, images_at_once):
    mesh = sharding.make_mesh(devices)
    run = Run(images_at_once=images_at_once)
    model = MlpMixer(**FIELDS, dropout=0.5, stochastic_depth=0.5, run=run)
    params = jax.tree.map(
        jax.device_put,
        random_params(),
        sharding.shardings(random_params(), mesh, strategy, model.declared_axes()),
    )
    image = batches()[0]["image"][:rows]
    found = steps.make_predict(model, mesh)(
        {"params": params}, sharding.place_rows({"image": image}, mesh)
    )
    assert found.keys() == {"logits", "pre_logits"}
    for x in found.values():
        assert x.sharding.shard_shape(x.shape) == (rows // devices, x.shape[1])

    @jax.jit
    def apply(image):
        plain = MlpMixer(**FIELDS)
        return plain.apply({"params": random_params()}, steps.value_range(image))

    expected, out = apply(image)
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found["pre_logits"], out["pre_logits"], rtol=1e-5, atol=1e-5
    )
