"""Laws of the learning-rate schedule and of the optimiser."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimisers
import pytest

from mlp_mixer import models, optim, recipe
from mlp_mixer.models.model import axes_by_form

TOTAL, WARMUP, PEAK = 1000, 100, 3e-3
# A schedule that is the peak from the first step on.
CONSTANT: dict[str, Any] = {
    "total_steps": TOTAL,
    "learning_rate": PEAK,
    "warmup_steps": 0,
    "end_learning_rate": None,
    "end_factor": 1.0,
}


def schedule_of(total, **fields):
    _, schedule = optimisers.create(total_steps=total, learning_rate=PEAK, **fields)
    return schedule


def formula(t, decay, end, peak=PEAK, warmup=WARMUP, total=TOTAL):
    """The published one, in float64."""
    p = min(max((t - warmup) / (total - warmup), 0.0), 1.0)
    left = 1 - p if decay == "linear" else (1 + np.cos(np.pi * p)) / 2
    return (end + (peak - end) * left) * min(1.0, t / warmup)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("ends", "end"),
    [
        ({}, 1e-5),
        ({"end_learning_rate": None, "end_factor": 1e-5}, 1e-5 * PEAK),
        ({"end_learning_rate": 0.0}, 0.0),
    ],
    ids=["absolute", "relative", "to zero"],
)
def test_the_schedule_is_the_published_formula(decay, ends, end):
    fields = {"warmup_steps": WARMUP, "decay": decay} | ends
    schedule = schedule_of(TOTAL, **fields)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(WARMUP), PEAK, rtol=1e-6)
    np.testing.assert_allclose(schedule(TOTAL), end, rtol=1e-5, atol=1e-12)
    for t in (1, 50, 99, 101, 300, 550, 999, TOTAL, TOTAL + 1, 2 * TOTAL):
        expected = formula(t, decay, end)
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-5, atol=1e-9)
    # As the optimiser calls it: an integer array, compiled.
    inside = jax.jit(schedule)(jnp.asarray(300, jnp.int32))
    np.testing.assert_allclose(inside, formula(300, decay, end), rtol=1e-5)


@pytest.mark.parametrize("total", [500, 10_000, 777])
def test_the_staircase_is_hyperrules(total):
    """A tenth at 30, 60 and 90 % of the run, whatever the warm-up takes of it."""
    fields = {"warmup_steps": WARMUP, "decay": "staircase", "end_learning_rate": 0.0}
    schedule = schedule_of(total, **fields)
    np.testing.assert_allclose(schedule(WARMUP // 2), PEAK / 2, rtol=1e-6)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(WARMUP, total + 1)))
    steps = np.flatnonzero(np.diff(rates)) + WARMUP + 1
    assert steps.tolist() == [int(np.ceil(total * at)) for at in (0.3, 0.6, 0.9)]
    for step, rate in zip(steps, (PEAK / 10, PEAK / 100, PEAK / 1000), strict=True):
        np.testing.assert_allclose(schedule(int(step)), rate, rtol=1e-5)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_warm_up_may_begin_elsewhere(decay):
    """Linear from there to the peak; after it, nothing is other than it was."""
    schedule = schedule_of(
        TOTAL, warmup_steps=WARMUP, warmup_learning_rate=1e-6, decay=decay
    )
    for t in (0, 1, 37, WARMUP):
        expected = 1e-6 + (PEAK - 1e-6) * t / WARMUP
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-5)
    for t in (WARMUP + 1, 555, TOTAL):
        np.testing.assert_allclose(schedule(t), formula(t, decay, 1e-5), rtol=1e-5)


@pytest.mark.parametrize("decay", ["linear", "cosine", "staircase"])
def test_a_cool_down_follows_the_whole_schedule(decay):
    fields = {"warmup_steps": WARMUP, "decay": decay, "end_learning_rate": 1e-5}
    longer = schedule_of(TOTAL + 200, cooldown_steps=200, **fields)
    steps = jnp.arange(TOTAL + 200)
    found, expected = (
        jax.vmap(s)(steps) for s in (longer, schedule_of(TOTAL, **fields))
    )
    np.testing.assert_array_equal(found, expected)
    if decay != "staircase":
        np.testing.assert_allclose(found[TOTAL:], 1e-5, rtol=1e-5)


@pytest.mark.parametrize("cooldown", [TOTAL - WARMUP, TOTAL, -1])
def test_a_cool_down_longer_than_what_the_warm_up_leaves_is_explained(cooldown):
    message = (
        rf"cooldown_steps is {cooldown}; expected 0 or more, and fewer than the 900"
    )
    with pytest.raises(ValueError, match=message):
        schedule_of(TOTAL, warmup_steps=WARMUP, cooldown_steps=cooldown)


def test_without_warm_up_the_first_update_has_the_peak():
    schedule = schedule_of(TOTAL, warmup_steps=0)
    np.testing.assert_allclose(schedule(0), PEAK, rtol=1e-6)


def test_the_default_recipe_has_the_papers_schedule():
    """10,000 steps of warm-up, then linearly to 1e-5; 300 epochs of ImageNet."""
    total = 92_897
    _, schedule = optim.create(**recipe.base().optim, total_steps=total)
    for t in (0, 1, 5000, 10_000, 50_000, 92_896, total):
        expected = formula(t, "linear", 1e-5, 1e-3, 10_000, total)
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "ends",
    [
        {"end_learning_rate": 1e-5, "end_factor": 1e-5},
        {"end_learning_rate": None, "end_factor": None},
    ],
    ids=["both", "neither"],
)
def test_exactly_one_end_must_be_given(ends):
    with pytest.raises(ValueError, match="set exactly one of them"):
        schedule_of(TOTAL, warmup_steps=WARMUP, **ends)


@pytest.mark.parametrize("warmup", [TOTAL, TOTAL + 1, -1])
def test_a_warm_up_longer_than_the_run_is_explained(warmup):
    message = rf"warmup_steps {warmup} is not below total_steps 1000.*e\.g\. 100"
    with pytest.raises(ValueError, match=message):
        schedule_of(TOTAL, warmup_steps=warmup)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adma"}, "optimiser 'adma' is unknown; try adam, "),
        ({"decayed": "kernel"}, "decayed 'kernel' is unknown; try kernels, "),
        ({"decay": "cosin"}, "decay 'cosin' is unknown; try cosine, linear"),
    ],
)
def test_an_unknown_word_lists_the_known(fields, message):
    with pytest.raises(ValueError, match=message):
        optimisers.create(**CONSTANT | fields)


# --- The chain ------------------------------------------------------------------------


def parameters():
    """Names of a Mixer's tree; nothing is zero, so that every decay would show."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "stem": {"kernel": normal(2, 2, 3, 4), "bias": normal(4)},
        "MixerBlock_0": {
            "LayerNorm_0": {"scale": normal(4), "bias": normal(4)},
            "token_mixing": {"Dense_0": {"kernel": normal(5, 6), "bias": normal(6)}},
        },
        "head": {"kernel": normal(4, 3), "bias": normal(3)},
    }


def is_kernel(path):
    return jax.tree_util.keystr(path).endswith("['kernel']")


def gradients(params, steps):
    """Some above and some below the clipping norm of 1."""
    rng = np.random.default_rng(1)
    scales = [1.0, 0.01, 0.3, 0.001]
    return [
        jax.tree.map(
            lambda x, s=scales[t % 4]: jnp.asarray(s * rng.normal(size=x.shape), "f4"),
            params,
        )
        for t in range(steps)
    ]


def run(tx, params, grads):
    """The parameters after every update."""
    opt_state, out = tx.init(params), []
    for grad in grads:
        updates, opt_state = jax.jit(tx.update)(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out, opt_state


def moved(params, before):
    """Name → change, for all that changed."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(before),
        strict=True,
    )
    return {
        jax.tree_util.keystr(path): np.asarray(x - y)
        for (path, x), y in pairs
        if (x != y).any()
    }


@pytest.mark.parametrize("decayed", ["kernels", "all"])
def test_adam_is_big_visions_chain(decayed):
    """clip → Adam's direction × lr → + wd·param, wd = 0.1·lr → × relative schedule →
    × −1: weight decay 0.1 of the paper is 1e-4 there, at learning rate 0.001."""
    lr, wd, total, warmup, steps = 1e-3, 0.1 * 1e-3, 40, 5, 30
    tx, _ = optimisers.create(
        total_steps=total,
        learning_rate=lr,
        warmup_steps=warmup,
        end_learning_rate=None,
        end_factor=1e-5,
        weight_decay=0.1,
        decayed=decayed,
    )
    params = parameters()
    grads = gradients(params, steps)
    ours, _ = run(tx, params, grads)

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    start = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    now = list(start)
    first = [np.zeros_like(x) for x in now]
    second = [np.zeros_like(x) for x in now]
    for t in range(steps):
        grad = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads[t])]
        norm = np.sqrt(sum((g * g).sum() for g in grad))
        relative = formula(t, "linear", 1e-5, 1.0, warmup, total)
        for i, path in enumerate(paths):
            g = grad[i] / max(norm, 1.0)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            mean, square = (
                first[i] / (1 - 0.9 ** (t + 1)),
                second[i] / (1 - 0.999 ** (t + 1)),
            )
            update = lr * mean / (np.sqrt(square) + 1e-8)
            if decayed == "all" or is_kernel(path):
                update = update + wd * now[i]
            now[i] = now[i] - relative * update
        for x, y in zip(jax.tree.leaves(ours[t]), now, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    # What was compared is not the start.
    assert all(abs(x - y).max() > 1e-3 for x, y in zip(now, start, strict=True))


def test_adam_is_clipping_and_adamw_with_a_mask_of_kernels():
    fields: dict[str, Any] = {
        "total_steps": 40,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
    }
    tx, schedule = optimisers.create(**fields, weight_decay=0.1)

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)

    adamw = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.1, mask=mask),
    )
    params = parameters()
    grads = gradients(params, 10)
    (*_, ours), _ = run(tx, params, grads)
    (*_, theirs), _ = run(adamw, params, grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


def test_lamb_moves_a_decayed_array_by_its_own_norm():
    """‖step‖ = learning rate · ‖array‖, along Adam's direction and its decay; what has
    no decay moves as Adam's."""
    fields = CONSTANT | {"weight_decay": 0.1, "decayed": "matrices", "clip_norm": None}
    params = parameters()
    grads = gradients(params, 1)
    moves = {}
    for name in ("adam", "lamb"):
        tx, _ = optimisers.create(**fields, name=name)
        (after,), _ = run(tx, params, grads)
        moves[name] = moved(after, params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        adam, lamb = moves["adam"][name], moves["lamb"][name]
        if x.ndim > 1:
            adam = adam * PEAK * np.linalg.norm(x) / np.linalg.norm(adam)
        np.testing.assert_allclose(lamb, adam, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "momentum"])
@pytest.mark.parametrize("decayed", ["kernels", "matrices", "all"])
def test_decay_moves_kernels_only_unless_told_otherwise(name, decayed):
    """With zero gradients nothing but decay is left: −lr · wd · param."""
    tx, _ = optimisers.create(**CONSTANT, name=name, weight_decay=0.1, decayed=decayed)
    params = parameters()
    params["norm"] = {name: jnp.ones((5, 4)) for name in ("scale", "bias")}
    zero = jax.tree.map(jnp.zeros_like, params)
    (after,), _ = run(tx, params, [zero])
    changes = moved(after, params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        change = changes.pop(jax.tree_util.keystr(path), np.zeros(x.shape))
        decays = is_kernel(path) or decayed == "all"
        # A norm over tokens and channels; its bias is one as any other.
        decays |= decayed == "matrices" and path[-1].key == "scale" and x.ndim == 2
        factor = PEAK * 0.1 if decays else 0.0
        np.testing.assert_allclose(change, -factor * x, rtol=1e-3, atol=3e-7)
    assert not changes


def test_without_decay_zero_gradients_move_nothing():
    tx, _ = optimisers.create(**CONSTANT)
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    (*_, after), _ = run(tx, params, [zero, zero])
    assert moved(after, params) == {}


def test_momentum_is_not_nesterovs():
    """u₁ = g₁, u₂ = 0.9·u₁ + g₂; Nesterov's would begin with 1.9·g₁."""
    tx, _ = optimisers.create(**CONSTANT, name="momentum", clip_norm=None)
    params = {"kernel": jnp.zeros((2, 3))}
    g1, g2 = jnp.full((2, 3), 2.0), jnp.arange(6.0).reshape(2, 3)
    (one, two), _ = run(tx, params, [{"kernel": g1}, {"kernel": g2}])
    np.testing.assert_allclose(one["kernel"], -PEAK * g1, rtol=1e-6)
    expected = -PEAK * (1.9 * np.asarray(g1) + np.asarray(g2))
    np.testing.assert_allclose(two["kernel"], expected, rtol=1e-5)


def test_the_accumulator_of_momentum_keeps_its_dtype():
    tx, _ = optimisers.create(**CONSTANT, name="momentum", momentum_dtype="bfloat16")
    params = parameters()
    (*_, after), opt_state = run(tx, params, gradients(params, 3))
    (trace,) = (s.trace for s in opt_state if isinstance(s, optax.TraceState))
    assert {x.dtype for x in jax.tree.leaves(trace)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("clip_norm", "length", "expected"),
    [(1.0, 50.0, 1.0), (1.0, 0.5, 0.5), (2.0, 50.0, 2.0), (None, 50.0, 50.0)],
)
def test_gradients_are_clipped_by_their_global_norm(clip_norm, length, expected):
    tx, _ = optimisers.create(**CONSTANT, name="momentum", clip_norm=clip_norm)
    params = parameters()
    (grad,) = gradients(params, 1)
    scale = length / optax.tree.norm(grad)
    grad = jax.tree.map(lambda g: g * scale, grad)
    updates, _ = tx.update(grad, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), PEAK * expected, rtol=1e-5)
    # Only the length changes, not the direction.
    direction = jax.tree.map(lambda g: -PEAK * expected / length * g, grad)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, direction
    )


# --- Rates of parameters --------------------------------------------------------------

AXES = {
    "stem/kernel": "ph pw rgb c",
    "stem/bias": "c",
    "MixerBlock_*/LayerNorm_0/scale": "c",
    "MixerBlock_*/LayerNorm_0/bias": "c",
    "MixerBlock_*/token_mixing/Dense_0/kernel": "s ds",
    "MixerBlock_*/token_mixing/Dense_0/bias": "ds",
    "head/kernel": "c k",
    "head/bias": "k",
}


def test_each_parameter_has_the_rate_of_its_layer_and_of_its_patterns():
    """Its decay follows: the whole update is what it was, times a factor."""
    fields: dict[str, Any] = CONSTANT | {"weight_decay": 0.1, "decayed": "all"}
    rates = ("head/*=10", "*/bias=0.5", "stem/kernel=0")
    tx, _ = optimisers.create(**fields, layer_decay=0.7, rates=rates, axes=AXES)
    plain, _ = optimisers.create(**fields)
    params = parameters()
    grads = gradients(params, 3)
    (*_, before), _ = run(plain, params, grads[:1])
    (*_, after), _ = run(tx, params, grads[:1])
    layers = {"stem": 0.7**2, "MixerBlock_0": 0.7, "head": 10.0}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        factor = layers[path[0].key] * (0.5 if name.endswith("bias") else 1.0)
        factor *= name != "stem/kernel"
        now, then = (tree[path[0].key] for tree in (after, before))
        for key in path[1:]:
            now, then = now[key.key], then[key.key]
        np.testing.assert_allclose(now - x, factor * (then - x), rtol=2e-4, atol=2e-6)


def test_a_pattern_that_fits_no_parameter_is_explained():
    tx, _ = optimisers.create(**CONSTANT, rates=("haed/*=10",))
    with pytest.raises(ValueError, match=r"'haed/\*', which no .* try head/"):
        jax.eval_shape(tx.init, parameters())


FORMS = {
    f"{name} {form}": axes
    for name, file in models.families().items()
    for form, axes in axes_by_form(file).items()
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_counted_from_the_stem_to_the_head(form):
    """As BEiT does: 0, then the blocks, then the head with the norm before it."""
    axes = FORMS[form]
    paths = [path.replace("*", str(i)) for path in axes for i in (0, 10, 9, 3)]
    layers = optim.layers_of(paths, axes)
    blocks = {
        path for path in paths if re.search(r"_\d+/", path.partition("/")[0] + "/")
    }
    numbers = [layers[path] for path in paths if path in blocks]
    depth = max(numbers)
    assert sorted({*numbers}) == list(range(1, depth + 1))
    assert depth % 4 == 0
    for path, layer in layers.items():
        if path.startswith("stem"):
            assert layer == 0
        elif path.startswith("head"):
            assert layer == depth + 1
        else:
            assert 0 < layer <= depth + 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [("spach_ms_s_attn", ["attn"]), ("spach_ms_hybrid_s", ["conv", "attn"])],
)
def test_a_model_says_the_rows_of_its_own_form_in_their_order(size, expected):
    rows = [path.partition("_*")[0] for path in models.create(size).axes_of_form()]
    found = [row for row in dict.fromkeys(rows) if row.startswith("stage1")]
    assert found == [f"stage1_{row}" for row in expected]


def test_the_stages_of_a_pyramid_are_counted_one_after_the_other():
    """A convolution between two stages is of the block that it feeds."""
    axes = models.family("smlpnet_t").AXES
    paths = ["stem/kernel", "down1/kernel", "norm/scale", "head/bias"]
    paths += [f"stage{i}_block_{j}/fuse/kernel" for i in (1, 0) for j in (0, 1, 10, 2)]
    layers = optim.layers_of(paths, axes)
    expected = {"stem/kernel": 0, "down1/kernel": 5, "norm/scale": 9, "head/bias": 9}
    for i in (0, 1):
        for k, j in enumerate((0, 1, 2, 10)):
            expected[f"stage{i}_block_{j}/fuse/kernel"] = 1 + 4 * i + k
    assert layers == expected
    with pytest.raises(ValueError, match="the layer of neck/bias, which the model's"):
        optim.layers_of(["neck/bias"], axes)


# --- The average of the parameters ----------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.99996])
def test_the_average_is_its_closed_form(decay):
    """Σ (1 − dₜ)·parametersₜ₊₁·∏ dₛ, s > t, and what the product of all leaves of the
    first ones; dₜ = min(decay, (1 + t)/(10 + t))."""
    steps = 12
    params, (plain, _) = parameters(), optimisers.create(**CONSTANT)
    tx, _ = optimisers.create(**CONSTANT, ema=decay)
    grads = gradients(params, steps)
    expected, _ = run(plain, params, grads)
    found, opt_state = run(tx, params, grads)
    # It changes nothing of training.
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    d = np.minimum(decay, (1 + np.arange(steps)) / (10 + np.arange(steps)))
    weights = [d.prod(), *((1 - d[t]) * d[t + 1 :].prod() for t in range(steps))]
    assert sum(weights) == pytest.approx(1)
    average = jax.tree.map(
        lambda *xs: sum(
            w * np.asarray(x, np.float64) for w, x in zip(weights, xs, strict=True)
        ),
        *(params, *found),
    )
    state = optim.average_of(opt_state)
    assert state is not None
    assert state.step == steps
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        *(state.params, average),
    )


def test_statistics_are_averaged_as_parameters_are():
    """The first ones are put into the state; whole numbers are not averaged."""
    tx, _ = optimisers.create(**CONSTANT, ema=0.9)
    params = {"kernel": jnp.ones((2, 2))}
    stats = {"batch_stats": {"mean": jnp.zeros(3), "count": jnp.int32(0)}}
    opt_state = optim.with_stats(tx.init(params), stats)
    now = {"batch_stats": {"mean": jnp.ones(3), "count": jnp.int32(7)}}
    for _ in range(2):
        zero = jax.tree.map(jnp.zeros_like, params)
        _, opt_state = tx.update(zero, opt_state, params, stats=now)
    average = optim.average_of(opt_state)
    assert average is not None
    expected = 1 - 1 / 10 * 2 / 11
    np.testing.assert_allclose(
        average.stats["batch_stats"]["mean"], expected, rtol=1e-6
    )
    assert average.stats["batch_stats"]["count"] == 7


def test_without_an_average_there_is_none():
    tx, _ = optimisers.create(**CONSTANT)
    assert optim.average_of(tx.init(parameters())) is None
