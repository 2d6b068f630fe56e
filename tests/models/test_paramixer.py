"""ParaMixer is its equations, in NumPy and float64; sym goes down its energy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mlp_mixer.models import Run, paramixer
from mlp_mixer.models.model import Noise
from mlp_mixer.models.paramixer import ParaMixer, ParaMixerBlock

S, N, C, DS, DC = 6, 3, 5, 4, 7
FORMS = list(paramixer.AXES)
every_form = pytest.mark.parametrize("mlp", FORMS)


def block(mlp, n_iter=1, dtype="float64"):
    return ParaMixerBlock(DS, DC, mlp, n_iter, gelu="exact", run=Run(dtype))


def state():
    return np.random.default_rng(1).normal(size=(S, N, C))


def weights(mlp):
    """Of one block, in float64, all random."""
    rng = np.random.default_rng(2)
    found: dict[str, Any] = {}
    for layer, (inner, hidden) in [
        ("token_mixing", (S, DS)),
        ("channel_mixing", (C, DC)),
    ]:
        kernels = {"Dense_0": (inner, hidden), "Dense_1": (hidden, inner)}
        if mlp == "sym":
            del kernels["Dense_1"]
        found[layer] = {
            name: {"kernel": rng.normal(size=shape) / math.sqrt(shape[0])}
            for name, shape in kernels.items()
        }
    for i in range(2 if mlp == "vanilla" else 1):
        scale, bias = rng.normal(size=(2, S, C))
        found[f"LayerNorm_{i}"] = {"scale": 1 + 0.3 * scale, "bias": 0.3 * bias}
    return found


def apply(one, params, x, noise=Noise()):
    """The block's result, computed in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(one.apply)({"params": params}, x, noise))


def gelu(x):
    return x * scipy.special.ndtr(x)


def norm(x, p, image):
    """LayerNorm of one image's table (S, C), over all of it."""
    table = x[:, image]
    centred = table - table.sum() / table.size
    variance = (centred**2).sum() / table.size
    return centred / math.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def mix(mlp, u, p):
    """One column or row u, by the equation of the form."""
    w = p["Dense_0"]["kernel"].T
    h = gelu(w @ u)
    if mlp == "sym":
        return w.T @ h
    v = p["Dense_1"]["kernel"].T
    return w.T @ h + v @ h if mlp == "asym" else v @ h


def reference(mlp, p, x, n_iter=1):
    x = x.copy()
    for _ in range(n_iter):
        for image in range(N):
            y = norm(x, p["LayerNorm_0"], image)
            tokens = np.stack([mix(mlp, y[:, i], p["token_mixing"]) for i in range(C)])
            if mlp == "vanilla":
                x[:, image] += tokens.T
                y = norm(x, p["LayerNorm_1"], image)
            chans = np.stack([mix(mlp, y[j], p["channel_mixing"]) for j in range(S)])
            x[:, image] += chans + (tokens.T if mlp != "vanilla" else 0)
    return x


@every_form
def test_a_block_is_its_equations(mlp):
    p, x = weights(mlp), state()
    expected = reference(mlp, p, x, n_iter=2)
    np.testing.assert_allclose(apply(block(mlp, 2), p, x), expected, rtol=0, atol=1e-9)
    coarse, given = jax.tree.map(np.float32, (p, x))
    found = jax.jit(block(mlp, 2, "float32").apply)({"params": coarse}, given, Noise())
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def tied(p):
    """para's or asym's parameters, with another V: a function of W and V."""

    def change(make):
        mlps = {
            layer: {
                "Dense_0": p[layer]["Dense_0"],
                "Dense_1": {
                    "kernel": make(*(p[layer][f"Dense_{i}"]["kernel"] for i in (0, 1)))
                },
            }
            for layer in ("token_mixing", "channel_mixing")
        }
        return {**p, **mlps}

    return change


def test_between_the_forms_lies_a_choice_of_v():
    p, x = weights("para"), state()
    change = tied(p)
    sym = apply(block("sym"), p | without_v(p), x)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)
    # sym is para with V = Wᵀ and asym with V = 0; asym with V − Wᵀ is para.
    close(apply(block("para"), change(lambda w, v: w.T), x), sym)
    close(apply(block("asym"), change(lambda w, v: 0 * v), x), sym)
    para = apply(block("para"), p, x)
    close(apply(block("asym"), change(lambda w, v: v - w.T), x), para)
    assert np.abs(para - sym).max() > 0.1


def without_v(p):
    layers = ("token_mixing", "channel_mixing")
    return {layer: {"Dense_0": p[layer]["Dense_0"]} for layer in layers}


def test_sym_has_half_of_paras_mlp_weights():
    def mlp_weights(mlp):
        shape = jax.ShapeDtypeStruct((S, N, C), jnp.float32)
        init = functools.partial(block(mlp, dtype="float32").init, noise=Noise())
        params = jax.eval_shape(init, jax.random.key(0), shape)["params"]
        mlps = [params["token_mixing"], params["channel_mixing"]]
        return sum(x.size for x in jax.tree.leaves(mlps))

    assert 2 * mlp_weights("sym") == mlp_weights("para") == 2 * (S * DS + C * DC)


# --- The energy -----------------------------------------------------------------------


def flow_down(p, x, steps=400, rate=0.02):
    """Euler steps along the flow v = Tok(g) + Chan(g) − x of sym.

    g is the LayerNorm of x, whose scale γ is one number: then it is the gradient of
    S·C·γ √(Var x + ε) + Σ β ⊙ x, and sym's MLPs are those of the Lagrangian of GELU.

    Returns:
      The energy E of each image before each step; and ∇E + J v, where J = ∂g/∂x is the
      second derivative of a convex function. If it is 0, dE/dt = −vᵀ J v.
    """
    one, scale = block("sym"), p["LayerNorm_0"]["scale"][0, 0]
    w_tokens, w_channels = (
        p[layer]["Dense_0"]["kernel"] for layer in ("token_mixing", "channel_mixing")
    )

    def of_gelu(x):
        gauss = math.sqrt(2 / math.pi) * jnp.exp(-(x**2) / 2)
        erf = jax.scipy.special.erf(x / math.sqrt(2))
        return (x**2 + (x**2 - 1) * erf + x * gauss) / 4

    def of_norm(table):
        bias = (p["LayerNorm_0"]["bias"] * table).sum()
        return S * C * scale * jnp.sqrt(table.var() + 1e-6) + bias

    def energy(table):
        value, g = jax.value_and_grad(of_norm)(table)
        hidden = of_gelu(w_tokens.T @ g).sum() + of_gelu(g @ w_channels).sum()
        return (table * g).sum() - value - hidden

    def of_image(table, flow):
        value, slope = jax.value_and_grad(energy)(table)
        _, turn = jax.jvp(jax.grad(of_norm), (table,), (flow,))
        return value, slope + turn

    def step(x, _):
        flow = one.apply({"params": p}, x, Noise()) - 2 * x
        return x + rate * flow, jax.vmap(of_image, 1)(x, flow)

    with jax.enable_x64(True):
        run = jax.jit(lambda x: jax.lax.scan(step, x, None, steps)[1])
        return jax.tree.map(np.asarray, run(x))


def test_the_energy_of_sym_never_rises_along_its_flow():
    p, x = weights("sym"), 3 * state()
    p["LayerNorm_0"]["scale"] = np.full((S, C), 1.4)
    found, rest = flow_down(p, x)
    assert np.abs(rest).max() < 1e-9
    rises = np.diff(found, axis=0)
    assert rises.max() < 1e-12 * np.abs(found).max()
    assert (found[0] - found[-1]).min() > 1


# --- The model ------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "patch_size": (2, 2),
    "num_blocks": 2,
    "hidden_dim": C,
    "tokens_mlp_dim": DS,
    "channels_mlp_dim": DC,
    "num_classes": 3,
}


def images(n):
    return jnp.float32(np.random.default_rng(3).uniform(-1, 1, (n, 4, 6, 3)))


def small_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), shapes)


def test_every_branch_is_dropped_by_itself_each_time_it_is_computed():
    fields = SMALL | {"num_blocks": 1, "stochastic_depth": 0.5, "n_iter": 2}
    model = ParaMixer(**fields)
    params = small_params(model)
    # Each MLP is a constant to all that it sees, so that the sum tells what was kept.
    norm = params["ParaMixerBlock_0"]["LayerNorm_0"]
    norm["scale"][:], norm["bias"][:] = 0, 1
    train = functools.partial(model.apply, train=True)
    rngs = {"dropout": jax.random.key(5)}
    _, out = jax.jit(train)({"params": params}, images(64), rngs=rngs)
    moved = (out["block_0"] - out["stem"]).reshape(64, -1)
    one, other = (
        np.asarray(mix("para", np.ones(length), params["ParaMixerBlock_0"][layer]))
        for layer, length in (("token_mixing", S), ("channel_mixing", C))
    )
    tokens, channels = np.repeat(one, C), np.tile(other, S)
    # Times 1 / (1 − rate) for each of up to two times.
    counts, *_ = np.linalg.lstsq(np.stack([tokens, channels], 1), moved.T)
    np.testing.assert_allclose(counts, 2 * np.round(counts / 2), atol=1e-4)
    kept = {tuple(pair) for pair in np.round(counts.T / 2).astype(int).tolist()}
    assert kept == {(i, j) for i in range(3) for j in range(3)}


def test_training_penalises_v_of_asym_and_nothing_else():
    model = ParaMixer(**SMALL, mlp="asym", penalty=0.25)
    params = small_params(model)

    @jax.jit
    @jax.value_and_grad
    def penalty(params):
        return model.apply({"params": params}, images(1), train=True)[1]["penalty"]

    value, grads = penalty(params)
    expected = 0.0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        v = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
        penalised = name.endswith("Dense_1/kernel")
        np.testing.assert_allclose(grad, 0.5 * v if penalised else 0 * v, rtol=1e-6)
        expected += 0.25 * (np.float64(v) ** 2).sum() * penalised
    assert value == pytest.approx(expected, rel=1e-6)
    predict = functools.partial(jax.eval_shape, model.apply, {"params": params})
    assert "penalty" not in predict(images(1))[1]
    free = ParaMixer(**SMALL, mlp="asym")
    train = functools.partial(free.apply, train=True)
    assert "penalty" not in jax.eval_shape(train, {"params": params}, images(1))[1]


def test_a_form_without_v_has_no_penalty():
    model = ParaMixer(**SMALL, mlp="sym", penalty=0.1)
    with pytest.raises(ValueError, match='no V to penalise; try mlp="asym"'):
        jax.eval_shape(model.init, jax.random.key(0), images(1))


def test_a_form_that_there_is_not_is_refused():
    model = ParaMixer(**SMALL, mlp="symm")
    with pytest.raises(ValueError, match="mlp 'symm' is unknown; try sym"):
        jax.eval_shape(model.init, jax.random.key(0), images(1))


# --- How it is computed ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["asym", "vanilla"])
def test_no_way_to_compute_it_moves_a_gradient(mlp):
    """With blocks that are applied twice, noise and the penalty."""
    fields = SMALL | {"mlp": mlp, "n_iter": 2, "stochastic_depth": 0.5}
    fields["penalty"] = 0.3 if mlp == "asym" else 0.0
    params = small_params(ParaMixer(**fields))
    rngs, image = {"dropout": jax.random.key(6)}, images(8)

    def gradients(run):
        @jax.jit
        @jax.value_and_grad
        def loss(params):
            model = ParaMixer(**fields, run=run)
            logits, out = model.apply({"params": params}, image, train=True, rngs=rngs)
            return jnp.square(logits).sum() + out.get("penalty", 0.0)

        return loss(params)

    expected = gradients(Run())
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    for run in (Run(scan=True, remat="pre_gelu"), Run(remat="full", mesh=mesh)):
        for a, b in zip(*map(jax.tree.leaves, (gradients(run), expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
