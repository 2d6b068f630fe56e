"""sMLPNet is its equations, in NumPy and float64; its statistics are torch's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimisers
import pytest

from mlp_mixer import sharding, steps
from mlp_mixer.models import Run, pyramid
from mlp_mixer.models.model import Noise
from mlp_mixer.models.smlpnet import SmlpBlock, SmlpNet

SMALL: dict[str, Any] = {
    "patch_size": (2, 2),
    "hidden_dim": 6,
    "num_blocks": (1, 1, 2, 1),
    "mlp_ratio": 3,
    "num_classes": 5,
}
SIZE = (32, 48)  # 16x24, 8x12, 4x6 and 2x3 positions
EXAMPLE = {"image": jax.ShapeDtypeStruct((1, *SIZE, 3), np.uint8)}
RNGS = {"dropout": jax.random.key(7)}


def images(n=4, size=SIZE):
    return jnp.float32(np.random.default_rng(1).uniform(-1, 1, (n, *size, 3)))


def random_variables(model, size=SIZE, seed=2):
    """All random, and each kernel large enough that a lost one is seen."""
    image = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        elif kind == "var":
            value = rng.uniform(1e-3, 1, leaf.shape)  # epsilon shows
        else:
            value = (kind == "scale") + 0.2 * rng.normal(size=leaf.shape)
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def forward(model, variables, image, train=False):
    """((logits, out), statistics), compiled."""

    @jax.jit
    def apply(variables, image):
        rngs = RNGS if train else None
        stats = ["batch_stats"] if train else []
        return model.apply(variables, image, train=train, rngs=rngs, mutable=stats)

    return apply(variables, image)


# --- The equations, position by position --------------------------------------------


class Numpy:
    """sMLPNet in float64, from the paper's equations and torch's documentation."""

    def __init__(self, variables, num_blocks, train=False, keep=None):
        to64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
        self.params = jax.tree.map(to64, variables["params"])
        self.stats = jax.tree.map(to64, variables["batch_stats"])
        self.num_blocks, self.train, self.keep = num_blocks, train, keep

    def __call__(self, image):
        """Returns (logits, states); `stats` are then those after this batch."""
        x, states = np.asarray(image, np.float64), dict[str, Any]()
        block = 0
        for stage, depth in enumerate(self.num_blocks):
            name = f"down{stage}" if stage else "stem"
            x = self.patches(x, self.params[name]["kernel"])
            states |= {} if stage else {"stem": x}
            for i in range(depth):
                p = self.params[f"stage{stage}_block_{i}"]
                stats = self.stats[f"stage{stage}_block_{i}"]
                first, second = (
                    np.ones((2, len(x))) if self.keep is None else self.keep[block]
                )
                x = x + first[:, None, None, None] * self.positions(x, p, stats)
                x = x + second[:, None, None, None] * self.channels(x, p)
                states[f"block_{block}"] = x
                block += 1
            states[f"stage_{stage + 1}"] = x
        x = self.batch_norm(x, self.params["norm"], self.stats["norm"])
        x = states["pre_logits"] = x.mean((1, 2))
        head = self.params["head"]
        return x @ head["kernel"] + head["bias"], states

    def patches(self, x, kernel):
        ph, pw = kernel.shape[:2]
        n, h, w, _ = x.shape
        y = np.zeros((n, h // ph, w // pw, kernel.shape[-1]))
        for i in range(h // ph):
            for j in range(w // pw):
                patch = x[:, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
                y[:, i, j] = np.einsum("nyxc,yxcd->nd", patch, kernel)
        return y

    def positions(self, x, p, stats):
        y = self.gelu(self.batch_norm(x, p["BatchNorm_0"], stats["BatchNorm_0"]))
        y = self.depthwise(y, p["depthwise"]["kernel"])
        y = self.gelu(self.batch_norm(y, p["BatchNorm_1"], stats["BatchNorm_1"]))
        rows, columns = np.zeros_like(y), np.zeros_like(y)
        for i in range(y.shape[1]):
            a, b = p["mix_w"]["kernel"], p["mix_w"]["bias"]
            rows[:, i] = np.einsum("nwc,wv->nvc", y[:, i], a) + b[:, None]
        for j in range(y.shape[2]):
            a, b = p["mix_h"]["kernel"], p["mix_h"]["bias"]
            columns[:, :, j] = np.einsum("nhc,hg->ngc", y[:, :, j], a) + b[:, None]
        wy, wr, wc = np.split(p["fuse"]["kernel"], 3)
        return y @ wy + rows @ wr + columns @ wc

    def channels(self, x, p):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        y = (x - mean) / np.sqrt(variance + 1e-5)
        y = y * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
        y = self.gelu(y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return y @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    def depthwise(self, x, kernel):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = x.shape[1:3]
        return sum(
            padded[:, i : i + h, j : j + w] * kernel[i, j, 0]
            for i in range(3)
            for j in range(3)
        )

    def batch_norm(self, x, p, stats):
        mean, variance = stats["mean"], stats["var"]
        if self.train:
            values = x.reshape(-1, x.shape[-1])
            mean, variance = values.mean(0), values.var(0)
            stats["mean"] = 0.9 * stats["mean"] + 0.1 * mean
            stats["var"] = 0.9 * stats["var"] + 0.1 * values.var(0, ddof=1)
        return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]

    @staticmethod
    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def assert_close(actual, expected, relative=1e-5):
    """Relative to the largest entry of each array."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())

    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("train", [False, True])
def test_the_forward_is_the_papers(train):
    model, image = SmlpNet(**SMALL), images()
    variables = random_variables(model)
    (logits, out), stats = forward(model, variables, image, train)
    reference = Numpy(variables, SMALL["num_blocks"], train)
    expected, states = reference(image)
    assert_close(logits, expected)
    assert_close(dict(out), states)
    assert_close(stats, {"batch_stats": reference.stats} if train else {})


def test_stochastic_depth_is_linear_over_all_stages_and_rescaled():
    model, image = SmlpNet(**SMALL, stochastic_depth=0.6), images(64, (16, 16))
    variables = random_variables(model, (16, 16))
    draw: Any = pyramid.linear_noise
    noise: Any = model.apply(variables, image, True, method=draw, rngs=RNGS)
    keeps = np.concatenate([of_stage.keep for of_stage in noise])
    rates = np.linspace(0, 0.6, 5)
    for keep, rate in zip(keeps, rates, strict=True):
        values = [1] if rate == 0 else [0, 1 / (1 - rate)]
        np.testing.assert_allclose(np.unique(keep), values, rtol=1e-6)
    # The masks of each block's branches are those of its place in the whole network.
    reference = Numpy(variables, SMALL["num_blocks"], True, keeps)
    expected, _ = reference(image)
    (logits, _), _ = forward(model, variables, image, train=True)
    assert_close(logits, expected, 2e-5)


def test_a_block_whose_branches_are_dropped_is_the_identity():
    block, x = SmlpBlock(3, True, Run()), images(2, (4, 6))
    variables = block.init(jax.random.key(0), x)
    dropped = Noise(keep=jnp.zeros((2, 2)))
    y, _ = block.apply(variables, x, dropped, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, x)


def test_a_transposed_image_sees_rows_as_columns():
    model, image = SmlpNet(**SMALL), images()
    variables = random_variables(model)

    def transposed(path, leaf):
        name = path[-2].key
        if name == "fuse":
            y, rows, columns = np.split(leaf, 3)
            return np.concatenate([y, columns, rows])
        return leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf

    turned = jax.tree_util.tree_map_with_path(transposed, variables)
    for name, block in turned["params"].items():
        if "_block_" in name:
            block["mix_w"], block["mix_h"] = block["mix_h"], block["mix_w"]
    expected = forward(model, variables, image)[0][0]
    actual = forward(model, turned, image.swapaxes(1, 2))[0][0]
    assert_close(actual, expected)


# --- What it is made of ---------------------------------------------------------------


def test_initial_values_are_uniform_up_to_torchs_bounds():
    block, x = SmlpBlock(3, True, Run()), jnp.zeros((2, 16, 24, 32))
    params = jax.jit(block.init)(jax.random.key(0), x)["params"]
    fans = {"depthwise": 9, "mix_w": 24, "mix_h": 16, "fuse": 96, "Dense_0": 32}
    for name, fan_in in (fans | {"Dense_1": 96}).items():
        for leaf in params[name].values():
            assert 0.8 < np.abs(leaf).max() * fan_in**0.5 <= 1


def test_images_of_another_resolution_are_refused():
    model = SmlpNet(**SMALL)
    variables = random_variables(model)
    with pytest.raises(ValueError, match="is 48 pixels, but the parameters are for 32"):
        model.apply(variables, images(1, (48, 32)))


# --- How it is computed ---------------------------------------------------------------


def test_bfloat16_keeps_statistics_and_logits_in_float32():
    image = images()
    exact = SmlpNet(**SMALL)
    variables = random_variables(exact)
    (expected, _), stats = forward(exact, variables, image, train=True)
    model = SmlpNet(**SMALL, run=Run(dtype="bfloat16", scan=True))
    (logits, out), coarse = forward(model, variables, image, train=True)
    assert out["block_4"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves([coarse, logits])} == {jnp.float32.dtype}
    assert_close(logits, expected, 0.1)
    assert_close(coarse, stats, 0.1)


# --- Training -------------------------------------------------------------------------


class Training:
    """A few compiled steps on so many devices."""

    def __init__(
        self, devices=1, strategy="replicated", *, accumulate=1, scan=False, **fields
    ):
        self.mesh = sharding.make_mesh(devices)
        run = Run(scan=scan, mesh=self.mesh)
        self.model = SmlpNet(**SMALL | fields, run=run)
        tx, _ = optimisers.create(
            name="momentum", learning_rate=0.02, total_steps=100, warmup_steps=0
        )
        target = steps.state_shapes(
            self.model, tx, self.mesh, EXAMPLE, strategy=strategy
        )
        variables = random_variables(self.model)
        self.state = steps.init_state(
            self.model,
            tx,
            target,
            EXAMPLE,
            seed=0,
            params=variables.pop("params"),
            stats=variables,
        )
        self.step = steps.make_train_step(
            self.model,
            tx,
            self.mesh,
            target,
            loss="softmax_xent",
            seed=0,
            mixup=0.0,
            accumulate=accumulate,
        )

    def train(self, batch):
        batch = sharding.place_rows(batch, self.mesh)
        self.state, metrics = self.step(self.state, batch)
        return metrics

    def variables(self):
        return jax.tree.map(np.asarray, self.state.variables)


def batches(count=3, rows=16):
    rng = np.random.default_rng(5)
    return [
        {
            "image": rng.integers(0, 256, (rows, *SIZE, 3), np.uint8),
            "label": rng.integers(0, 5, rows, np.int32),
        }
        for _ in range(count)
    ]


def test_statistics_after_three_steps_are_numpys():
    training = Training()
    stats = training.variables()["batch_stats"]
    for batch in batches():
        params = training.variables()["params"]
        training.train(batch)
        reference = Numpy(
            {"params": params, "batch_stats": stats}, SMALL["num_blocks"], train=True
        )
        reference(batch["image"] / 127.5 - 1)
        stats = reference.stats
    assert_close(training.variables()["batch_stats"], stats, 2e-5)


@pytest.mark.slow
def test_predictions_use_the_running_statistics():
    training = Training()
    for batch in batches(2):
        training.train(batch)
    variables, image = training.variables(), batches(1)[0]["image"]
    predict = steps.make_predict(training.model, training.mesh)
    batch = sharding.place_rows({"image": image}, training.mesh)
    logits = predict(training.state.variables, batch)["logits"]
    expected, _ = Numpy(variables, SMALL["num_blocks"])(image / 127.5 - 1)
    assert_close(logits, expected)
    alone = sharding.place_rows({"image": image[:1]}, training.mesh)
    assert_close(predict(training.state.variables, alone)["logits"], expected[:1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", "fsdp"])
def test_eight_devices_train_as_one_with_the_global_batchs_statistics(strategy):
    one = Training(stochastic_depth=0.3)
    eight = Training(8, strategy, stochastic_depth=0.3, scan=True)
    for batch in batches():
        ours, theirs = one.train(batch), eight.train(batch)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    assert_close(eight.variables(), one.variables(), 1e-3)


@pytest.mark.slow
def test_micro_batches_each_move_the_statistics():
    training = Training(accumulate=2)
    before = training.variables()
    (batch,) = batches(1)
    training.train(batch)
    reference = Numpy(before, SMALL["num_blocks"], train=True)
    for first in (0, 1):
        reference(batch["image"][first::2] / 127.5 - 1)
    assert_close(training.variables()["batch_stats"], reference.stats, 2e-5)
