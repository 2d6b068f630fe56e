"""Laws of the forward and backward pass."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import literal_mixer
import numpy as np
import pytest
from set_up import random_params

from mlp_mixer import sharding
from mlp_mixer.models import Run, layers
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.models.model import Noise

SMALL: dict[str, Any] = {
    "patch_size": (4, 4),
    "num_blocks": 3,
    "hidden_dim": 16,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 64,
    "num_classes": 5,
}
RNGS = {"dropout": jax.random.key(7)}


def images(n=3, h=16, w=16):
    return jax.random.uniform(jax.random.key(1), (n, h, w, 3), minval=-1, maxval=1)


def forward(model, params, image, train=False):
    """Compiled: operation by operation these tests would take minutes."""

    @jax.jit
    def apply(params, image):
        rngs = RNGS if train else None
        return model.apply({"params": params}, image, train=train, rngs=rngs)

    return apply(params, image)


def gradients(model, params, image, train=False):
    """Of a sum that weighs every logit differently."""

    def objective(params):
        rngs = RNGS if train else None
        both = model.apply({"params": params}, image, train=train, rngs=rngs)
        weights = jnp.arange(both[0].size, dtype=jnp.float32).reshape(both[0].shape)
        return jnp.sum(jnp.sin(weights) * both[0]), both

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)


def numpy_mixer(params, image, gelu="tanh"):
    """The paper's equations, token by token and channel by channel, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    image = np.asarray(image, np.float64)

    def activation(x):
        if gelu == "exact":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + np.tanh(inner))

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def mlp(x, p):
        hidden = activation(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    ph, pw, _, c = params["stem"]["kernel"].shape
    n, h, w, _ = image.shape
    patches = [
        image[:, y : y + ph, x : x + pw].reshape(n, -1)
        for y in range(0, h, ph)
        for x in range(0, w, pw)
    ]
    x = np.stack(patches, 1) @ params["stem"]["kernel"].reshape(-1, c)
    x = x + params["stem"]["bias"]
    states = [x]
    for i in range(sum(name.startswith("MixerBlock") for name in params)):
        p = params[f"MixerBlock_{i}"]
        y = norm(x, p["LayerNorm_0"]).swapaxes(1, 2)
        x = x + mlp(y, p["token_mixing"]).swapaxes(1, 2)
        x = x + mlp(norm(x, p["LayerNorm_1"]), p["channel_mixing"])
        states.append(x)
    features = norm(x, params["pre_head_layer_norm"]).mean(1)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"]
    return logits, states, features


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize(
    ("size", "patch"),
    [((16, 16), (4, 4)), ((8, 24), (4, 4)), ((12, 10), (6, 2))],
    ids=["square", "rectangular image", "rectangular patch"],
)
def test_the_forward_is_the_papers(size, patch, gelu):
    model = MlpMixer(**SMALL | {"patch_size": patch, "gelu": gelu})
    image = images(3, *size)
    params = random_params(model, image.shape[1:3])
    logits, out = forward(model, params, image)
    expected, states, features = numpy_mixer(params, image, gelu)
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)
    names = ["stem", "block_0", "block_1", "block_2", "pre_logits"]
    assert set(out) == set(names)
    for name, value in zip(names, [*states, features], strict=True):
        np.testing.assert_allclose(out[name], value, rtol=2e-5, atol=5e-5)


def test_tanh_and_exact_gelu_differ():
    image = images()
    params = random_params(MlpMixer(**SMALL), image.shape[1:3])
    tanh, exact = (
        forward(MlpMixer(**SMALL, gelu=kind), params, image)[0]
        for kind in ("tanh", "exact")
    )
    assert 1e-6 < abs(tanh - exact).max() < 1e-2


def test_initial_values_are_the_literal_flax_models():
    image, fields = images(), SMALL | {"num_blocks": 1}
    ours = MlpMixer(**fields, run=Run(scan=True)).init(jax.random.key(3), image)
    literal = literal_mixer.LiteralMixer(**fields).init(jax.random.key(3), image)
    jax.tree.map(np.testing.assert_array_equal, ours, literal)


def test_the_forward_is_the_literal_flax_models():
    image = images()
    params = random_params(MlpMixer(**SMALL), image.shape[1:3])
    ours, _ = forward(MlpMixer(**SMALL), params, image)
    literal, _ = forward(literal_mixer.LiteralMixer(**SMALL), params, image)
    np.testing.assert_allclose(ours, literal, rtol=1e-5, atol=1e-5)


def test_without_classes_features_come_first():
    model = MlpMixer(**SMALL | {"num_classes": None})
    variables = model.init(jax.random.key(0), images())
    first, out = model.apply(variables, images())
    assert "head" not in variables["params"]
    assert first.shape == (3, 16)
    np.testing.assert_array_equal(first, out["pre_logits"])


def test_gradients_agree_with_finite_differences():
    model, image = MlpMixer(**SMALL), images()
    params = random_params(model, image.shape[1:3])
    _, grads = gradients(model, params, image)

    def exact(params):
        logits = numpy_mixer(params, image)[0]
        weights = np.arange(logits.size, dtype=np.float64).reshape(logits.shape)
        return np.sum(np.sin(weights) * logits)

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.normal(size=grad.shape)

        def shifted(by, i=i, direction=direction):
            moved = [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1 :]]
            return exact(jax.tree.unflatten(tree, moved))

        numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        analytic = np.sum(np.asarray(grad, np.float64) * direction)
        np.testing.assert_allclose(analytic, numeric, rtol=2e-4, atol=2e-4)


def test_the_token_mixing_output_bias_changes_no_logit():
    """It adds one number to all channels of a token; every reader is a LayerNorm."""
    model, image = MlpMixer(**SMALL), images()
    params = random_params(model, image.shape[1:3])
    before, _ = forward(model, params, image)
    for i in range(3):
        dense = params[f"MixerBlock_{i}"]["token_mixing"]["Dense_1"]
        dense["bias"] = dense["bias"] + 3.0 + jnp.arange(16.0)
    after, _ = forward(model, params, image)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    # The channel-mixing bias does change them: the law is not empty.
    dense = params["MixerBlock_1"]["channel_mixing"]["Dense_1"]
    dense["bias"] = dense["bias"] + jnp.arange(16.0)
    changed, _ = forward(model, params, image)
    assert abs(changed - before).max() > 0.1


def shuffled_patches(image, order):
    """The image with its 4x4 patches in another order."""
    n, h, w, _ = image.shape
    x = image.reshape(n, h // 4, 4, w // 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, -1, 4, 4, 3)[:, order].reshape(n, h // 4, w // 4, 4, 4, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(image.shape)


def test_without_token_mixing_the_order_of_patches_does_not_matter():
    model, image = MlpMixer(**SMALL), images()
    params = random_params(model, image.shape[1:3])
    order = np.random.default_rng(0).permutation(16)
    shuffled = shuffled_patches(image, order)
    with_mixing = [forward(model, params, x)[0] for x in (image, shuffled)]
    assert abs(with_mixing[0] - with_mixing[1]).max() > 1e-2
    for i in range(3):
        block = params[f"MixerBlock_{i}"]
        block["token_mixing"] = jax.tree.map(jnp.zeros_like, block["token_mixing"])
    (a, out_a), (b, out_b) = (forward(model, params, x) for x in (image, shuffled))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        out_a["block_2"][:, order], out_b["block_2"], rtol=1e-5, atol=1e-5
    )


def test_permuting_patches_and_token_weights_together_changes_nothing():
    """The exact form of Figure 4's first permutation."""
    model, image = MlpMixer(**SMALL), images()
    params = random_params(model, image.shape[1:3])
    before, _ = forward(model, params, image)
    order = np.random.default_rng(0).permutation(16)
    for i in range(3):
        mlp = params[f"MixerBlock_{i}"]["token_mixing"]
        mlp["Dense_0"]["kernel"] = mlp["Dense_0"]["kernel"][order]
        mlp["Dense_1"]["kernel"] = mlp["Dense_1"]["kernel"][:, order]
        mlp["Dense_1"]["bias"] = mlp["Dense_1"]["bias"][order]
    after, _ = forward(model, params, shuffled_patches(image, order))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


ONE_CPU = sharding.make_mesh(1)  # where products are flat
FORMULATIONS = {
    "flat": Run(mesh=ONE_CPU),
    "scan": Run(scan=True),
    "scan, keep pre-GELU": Run(scan=True, remat="pre_gelu"),
    "scan, keep pre-GELU, flat": Run(scan=True, remat="pre_gelu", mesh=ONE_CPU),
    "scan, keep block inputs": Run(scan=True, remat="full"),
    "unrolled, keep pre-GELU": Run(remat="pre_gelu"),
}


@functools.cache
def plain_result(noise):
    model, image = MlpMixer(**SMALL, **dict(noise)), images()
    params = random_params(model, image.shape[1:3])
    return params, gradients(model, params, image, train=True)


@pytest.mark.parametrize(
    ("formulation", "noise"),
    [
        *((name, {}) for name in FORMULATIONS),
        ("scan", {"stochastic_depth": 0.4}),
        ("unrolled, keep pre-GELU", {"stochastic_depth": 0.4}),
        ("scan, keep pre-GELU, flat", {"stochastic_depth": 0.4}),
    ],
)
def test_every_formulation_computes_the_same(formulation, noise):
    params, (expected, expected_grads) = plain_result(tuple(noise.items()))
    model = MlpMixer(**SMALL, **noise, run=FORMULATIONS[formulation])
    result, grads = gradients(model, params, images(), train=True)

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)

    jax.tree.map(close, result, expected)
    jax.tree.map(close, grads, expected_grads)


def test_every_formulation_has_the_same_parameters():
    def shapes(run):
        model = MlpMixer(**SMALL, run=run)
        return jax.eval_shape(model.init, jax.random.key(3), images())

    for run in FORMULATIONS.values():
        assert shapes(run) == shapes(Run())


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_it_must(scan):
    image = images()
    model = MlpMixer(**SMALL, run=Run("bfloat16", scan=scan))
    params = random_params(model, image.shape[1:3])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, out = forward(model, params, image, train=True)
    assert out["block_0"].dtype == jnp.bfloat16
    assert (logits.dtype, out["pre_logits"].dtype) == (jnp.float32, jnp.float32)
    exact = numpy_mixer(params, image)[0]
    error = abs(np.asarray(logits) - exact).max() / abs(exact).max()
    assert 1e-5 < error < 3e-2
    _, grads = gradients(model, params, image, train=True)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_silently(dtype):
    image = images()
    model = MlpMixer(**SMALL, run=Run(dtype, scan=True, remat="pre_gelu"))
    params = random_params(model, image.shape[1:3])
    with jax.numpy_dtype_promotion("strict"):
        gradients(model, params, image, train=True)


def test_stochastic_depth_rises_linearly_from_zero_and_is_not_rescaled():
    """With s = 1 the last block is always dropped, the first never, the middle one
    for half of the images, and what survives is what it is without dropping."""
    image = images(64)
    plain = MlpMixer(**SMALL)
    params = random_params(plain, image.shape[1:3])
    model = MlpMixer(**SMALL, stochastic_depth=1.0)
    _, out = forward(model, params, image, train=True)
    _, whole = forward(plain, params, image)
    np.testing.assert_allclose(out["block_0"], whole["block_0"], atol=1e-5)
    np.testing.assert_array_equal(out["block_2"], out["block_1"])

    # Both branches of an image are kept or dropped on their own.
    kept_both = np.isclose(out["block_1"], whole["block_1"], atol=1e-4).all((1, 2))
    kept_none = np.isclose(out["block_1"], whole["block_0"], atol=1e-4).all((1, 2))
    assert 6 <= kept_both.sum() <= 28  # 16 expected of 64, 1/4 each
    assert 6 <= kept_none.sum() <= 28
    assert (kept_both | kept_none).sum() < 50  # the rest kept one branch


def test_rescaled_stochastic_depth_divides_by_the_probability_to_be_kept():
    """At the last of two blocks, p = 0.5: kept branches count double."""
    image = images(32)
    fields = SMALL | {"num_blocks": 2}
    plain = MlpMixer(**fields)
    params = random_params(plain, image.shape[1:3])
    _, whole = forward(plain, params, image)
    tokens_only = jax.tree.map(lambda x: x, params)
    block = tokens_only["MixerBlock_1"]
    block["channel_mixing"] = jax.tree.map(jnp.zeros_like, block["channel_mixing"])
    _, whole = forward(plain, tokens_only, image)
    branch = whole["block_1"] - whole["block_0"]
    for rescale, factor in ((False, 1.0), (True, 2.0)):
        model = MlpMixer(
            **fields, stochastic_depth=0.5, rescale_stochastic_depth=rescale
        )
        _, out = forward(model, tokens_only, image, train=True)
        np.testing.assert_allclose(out["block_0"], whole["block_0"], atol=1e-5)
        change = out["block_1"] - out["block_0"]
        kept = np.isclose(change, factor * branch, atol=1e-4).all((1, 2))
        dropped = (np.asarray(change) == 0).all((1, 2))
        assert (kept ^ dropped).all()
        assert 8 <= kept.sum() <= 24  # 16 expected of 32


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_keeps_the_mean_and_follows_its_key(scan):
    image = images(2)
    fields = SMALL | {"num_blocks": 2, "dropout": 0.3}
    model = MlpMixer(**fields, run=Run(scan=scan))
    params = random_params(model, image.shape[1:3])

    @jax.jit
    def features(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, image, train=True, rngs=rngs)[1]

    keys = jax.random.split(jax.random.key(0), 200)
    np.testing.assert_array_equal(
        features(keys[0])["pre_logits"], features(keys[0])["pre_logits"]
    )
    assert not np.array_equal(
        features(keys[0])["block_0"], features(keys[1])["block_0"]
    )
    layer = layers.MlpBlock(8, 0, dropout=0.3)
    y = jax.random.normal(jax.random.key(1), (4, 3, 5))
    variables = layer.init(jax.random.key(2), y)
    hidden = jax.jit(jax.vmap(lambda key: layer.apply(variables, y, Noise(rng=key))))(
        keys
    )
    dropped = (hidden == 0).mean()
    assert abs(dropped - 0.3) < 0.02
    np.testing.assert_allclose(hidden.mean(0), layer.apply(variables, y), atol=0.25)


def test_evaluation_needs_no_random_numbers():
    image = images()
    noisy = MlpMixer(**SMALL, dropout=0.5, stochastic_depth=0.5)
    params = random_params(noisy, image.shape[1:3])
    a, _ = forward(noisy, params, image)
    b, _ = forward(MlpMixer(**SMALL), params, image)
    np.testing.assert_array_equal(a, b)


def test_the_head_bias_starts_as_told():
    model = MlpMixer(**SMALL, head_bias=-6.9)
    params = model.init(jax.random.key(0), images())["params"]
    np.testing.assert_array_equal(params["head"]["bias"], np.full(5, -6.9, np.float32))
    np.testing.assert_array_equal(params["head"]["kernel"], 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 16, 18, 3),
            "image_size 18 is not divisible by patch_size 4; try 16 or 20",
        ),
        ((3, 16, 32, 3), "16x32 image makes 32 tokens.*parameters are for 16 tokens"),
        ((16, 16, 3), r"\(16, 16, 3\); expected \(n, h, w, 3\)"),
        ((3, 16, 16, 1), r"expected \(n, h, w, 3\)"),
    ],
)
def test_a_wrong_image_is_explained(shape, message):
    model = MlpMixer(**SMALL)
    params = random_params(model, (16, 16))
    with pytest.raises(ValueError, match=message):
        forward(model, params, jnp.zeros(shape))


def test_a_byte_image_is_refused():
    with pytest.raises(ValueError, match=r"dtype uint8; expected floats in \[-1, 1\]"):
        MlpMixer(**SMALL).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("field", "options"),
    [("gelu", {"gelu": "tnah"}), ("remat", {"run": Run(remat="tnah")})],
)
def test_an_unknown_option_lists_the_known(field, options):
    model = MlpMixer(**SMALL, **options)
    with pytest.raises(ValueError, match=f"{field} 'tnah' is unknown; try"):
        model.init(jax.random.key(0), images())
