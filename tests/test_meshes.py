"""Laws of the axis `model`, alone and with the others: MLPs are cut in pairs."""

import collections
import functools
import re

import jax
import numpy as np
import optimisers
import pytest
from step_program import (
    FIELDS,
    NOISE,
    ROWS,
    SIZE,
    Program,
    adam,
    assert_same_training,
    compiled,
    flops,
    held,
    temporaries,
)

from mlp_mixer import models, sharding, steps
from mlp_mixer.data import pipeline

SCANNED = {"scan": True, "remat": "pre_gelu"}


@pytest.mark.parametrize(
    ("shape", "strategy", "fields"),
    [
        ((2, 2, 2), "fsdp", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((2, 2, 2), "fsdp", NOISE | {"accumulate": 2, **SCANNED}),
                ((2, 2, 2), "replicated", {}),
                ((1, 4, 2), "fsdp", SCANNED),
                ((4, 1, 2), "fsdp", NOISE),
                ((2, 1, 4), "fsdp", {"accumulate": 4}),
                ((1, 1, 8), "replicated", NOISE | {"remat": "full", "scan": True}),
            )
        ),
    ],
)
def test_any_mesh_of_eight_devices_equals_one(shape, strategy, fields):
    noise = {name: value for name, value in NOISE.items() if name in fields}
    parts = {"accumulate": fields["accumulate"]} if "accumulate" in fields else {}
    one = compiled(1, **noise, **parts)
    assert_same_training(compiled(shape, strategy, **fields).trained, one.trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resmlp_12", "gmlp_ti16", "smlpnet_t"),
        *("asymmixer_s16", "ninformer_cifar", "s2mlp_deep", "ccs_mixer_b16"),
        *("spach_xxs_attn", "imlp_c32"),
    ],
)
def test_other_architectures_train_on_three_axes_as_on_one_device(name):
    """Their hidden units and classes are cut by the same letters."""
    few = (1, 1, 1, 1) if name == "smlpnet_t" else 2
    fields = {"num_blocks": few, "patch_size": (8, 8)}
    narrow = {"smlpnet_t": 16, "imlp_c32": 8, "spach_xxs_attn": 48}
    fields["hidden_dim"] = narrow.get(name, 64)
    # Summed where the parameters are cut.
    penalty = {"penalty": 0.1} if name == "asymmixer_s16" else {}
    tx, _ = optimisers.create(total_steps=9, learning_rate=1e-3, warmup_steps=0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, *SIZE, 3), np.uint8),
        "label": rng.integers(0, 8, 8, np.int32),
    }
    results = []
    for shape in ((1,), (2, 2, 2)):
        mesh = sharding.make_mesh(*shape)
        run = models.Run(mesh=mesh)
        model = models.create(name, num_classes=8, run=run, **fields, **penalty)
        example = pipeline.example(SIZE)
        target = steps.state_shapes(model, tx, mesh, example, strategy="fsdp")
        state = steps.init_state(model, tx, target, example, seed=0)
        fixed = {"seed": 0, "mixup": 0.0, "accumulate": 1, "loss": "softmax_xent"}
        step = steps.make_train_step(model, tx, mesh, target, **fixed)
        _, metrics = step(state, sharding.place_rows(batch, mesh))
        results.append(jax.device_get(metrics))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(results[1][key], results[0][key], rtol=1e-4)


# --- What a device holds and computes -------------------------------------------------


def test_the_model_axis_cuts_hidden_units_and_classes_and_fsdp_the_rest():
    """Every array of Mixer-B/16, moments included, on 2 x 2 x 2 devices."""
    model = models.create("mixer_b16", num_classes=1000)
    mesh = sharding.make_mesh(2, 2, 2)
    tx, _ = optimisers.create(total_steps=9, learning_rate=1e-3, warmup_steps=0)
    example = pipeline.example((224, 224))
    state = steps.state_shapes(model, tx, mesh, example, strategy="fsdp")
    expected = {
        "stem/kernel": (None, None, None, "fsdp"),
        "LayerNorm_0/scale": (None,),
        "token_mixing/Dense_0/kernel": ("fsdp", "model"),
        "token_mixing/Dense_0/bias": ("model",),
        "token_mixing/Dense_1/kernel": ("model", "fsdp"),
        "token_mixing/Dense_1/bias": (None,),
        "channel_mixing/Dense_0/kernel": ("fsdp", "model"),
        "channel_mixing/Dense_0/bias": ("model",),
        "channel_mixing/Dense_1/kernel": ("model", "fsdp"),
        "channel_mixing/Dense_1/bias": (None,),
        "head/kernel": ("fsdp", "model"),
        "head/bias": ("model",),
    }
    for tree in (state.params, adam(state).mu, adam(state).nu):
        seen = set()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = "/".join(key.key for key in path)
            for end in (end for end in expected if name.endswith(end)):
                assert tuple(leaf.sharding.spec) == expected[end], name
                seen.add(end)
        assert seen == expected.keys()


def test_an_axis_that_the_model_axis_does_not_divide_stays_whole():
    """21,843 classes on two devices; the hidden units beside them are cut."""
    model = models.create("mixer_s32", num_classes=21_843)
    mesh = sharding.make_mesh(4, 1, 2)
    shapes = {"head": {"kernel": jax.ShapeDtypeStruct((512, 21_843), np.float32)}}
    axes = model.declared_axes()
    found = sharding.shardings(shapes, mesh, "replicated", axes)
    assert found["head"]["kernel"].is_fully_replicated


PAIRS = [
    ((2, 2, 2), "fsdp"),
    pytest.param((2, 2, 2), "replicated", marks=pytest.mark.slow),
    pytest.param((1, 1, 8), "replicated", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "strategy"), PAIRS)
def test_bytes_of_parameters_and_moments_are_those_of_the_rules(shape, strategy):
    program = compiled(shape, strategy)
    state = program.state()
    for tree, shapes in (
        (state.params, program.target.params),
        (adam(state).mu, adam(program.target).mu),
    ):
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        parts = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(shapes)]
        expected = sum(4 * int(np.prod(part)) for part in parts)
        for device in program.mesh.devices.flat:
            assert held(tree, device) == expected
        # Hidden units are cut by `model`; kernels, with "fsdp", once more.
        assert expected / whole < (0.35 if strategy == "fsdp" else 0.7)


@pytest.mark.slow
def test_hidden_layers_shrink_with_the_model_axis():
    """What a step keeps is the states and, cut over `model`, hidden layers before and
    after GELU, the gradient of one of them at a time, and those of their kernels."""
    wide = {"tokens_mlp_dim": 128, "channels_mlp_dim": 1024}
    one, two, four = (temporaries(Program((1, 1, n), **wide)) for n in (1, 2, 4))
    s, c = (SIZE[0] // 8) * (SIZE[1] // 8), FIELDS["hidden_dim"]
    hidden = FIELDS["num_blocks"] * ROWS * (128 * c + s * 1024) * 4
    kernels = FIELDS["num_blocks"] * 2 * (128 * s + c * 1024) * 4
    shrinking = 2 * (one - two)
    assert shrinking == pytest.approx(4 * (two - four), rel=0.05)
    at_a_time = ROWS * s * 1024 * 4
    assert shrinking == pytest.approx(2 * hidden + at_a_time + kernels, rel=0.1)


def products(rows, **cut):
    """FLOPs of the products of a training step on one device, counted by hand."""
    s, p = (SIZE[0] // 8) * (SIZE[1] // 8), 8 * 8 * 3
    c, ds = FIELDS["hidden_dim"], FIELDS["tokens_mlp_dim"]
    dc, k = FIELDS["channels_mlp_dim"], FIELDS["num_classes"]
    ways = cut.get("model", 1)
    mlps = FIELDS["num_blocks"] * (2 * s * ds * c + 2 * s * c * dc) + c * k
    # Three products of each: forward, and back to the input and to the kernel. The
    # stem needs no gradient of its input, and every device along `model` does it.
    return 2 * rows * (3 * mlps / ways + 2 * s * p * c)


@pytest.mark.parametrize(("shape", "strategy"), PAIRS)
def test_a_device_computes_its_share_of_every_mlp(shape, strategy):
    data, fsdp, model = shape
    rows = ROWS // (data * fsdp)
    # Beside products: norms, GELU, residual lines, and Adam.
    rest = flops(compiled(1)) - products(ROWS)
    expected = products(rows, model=model) + rest / (data * fsdp)
    found = flops(compiled(shape, strategy))
    assert products(rows, model=model) < found < 1.02 * expected


# --- What travels ---------------------------------------------------------------------

LINE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter)\(")


def sent(program):
    """{(operation, shape): count} of the arrays that collectives of a step make."""
    found = collections.Counter[tuple[str, str]]()
    for line in program.step.as_text().splitlines():
        if match := LINE.search(line):
            for shape in re.findall(r"\w+\[[\d,]*\]", match[1]):
                found[match[2], shape] += 1
    return found


@functools.cache
def sent_by(shape, strategy):
    return sent(compiled(shape, strategy))


@pytest.mark.parametrize(("shape", "strategy"), PAIRS)
def test_an_mlp_makes_one_sum_over_the_model_axis_each_way(shape, strategy):
    """Of the state (s, n, c): forward after the second product, back after the first;
    and no activation is gathered."""
    data, fsdp, _ = shape
    rows, found = ROWS // (data * fsdp), sent_by(shape, strategy)
    s, c = (SIZE[0] // 8) * (SIZE[1] // 8), FIELDS["hidden_dim"]
    states = sum(
        count
        for (kind, array), count in found.items()
        if kind == "all-reduce"
        and array.count(",") == 2
        and sorted(map(int, re.findall(r"\d+", array[4:]))) == sorted((s, rows, c))
    )
    assert states == 2 * 2 * FIELDS["num_blocks"]
    gathered = {array: n for (kind, array), n in found.items() if kind == "all-gather"}
    if strategy == "replicated":
        assert not gathered
    assert not [kind for kind, _ in found if kind == "all-to-all"]


def test_with_fsdp_what_is_gathered_is_weights_cut_by_the_model_axis():
    """Those of one block for the forward pass, and again for the backward pass."""
    gathered = {
        array: n
        for (kind, array), n in sent_by((2, 2, 2), "fsdp").items()
        if kind == "all-gather"
    }
    c, dc = FIELDS["hidden_dim"], FIELDS["channels_mlp_dim"]
    blocks = FIELDS["num_blocks"]
    # The kernels of token mixing have 4,096 elements, and are cut too.
    token = f"f32[{FIELDS['tokens_mlp_dim']},{FIELDS['tokens_mlp_dim'] // 2}]"
    assert gathered.pop(f"f32[{c},{dc // 2}]") == 2 * blocks
    assert gathered.pop(f"f32[{dc // 2},{c}]") == 2 * blocks
    assert gathered.pop(token) + gathered.pop(token.replace("64,32", "32,64")) == (
        4 * blocks
    )
    assert gathered == {"f32[8,8,3,64]": 1}
