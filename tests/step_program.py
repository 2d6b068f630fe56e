"""A training step, compiled for a mesh: what it computes, holds and sends."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimisers
import set_up

from mlp_mixer import sharding, steps
from mlp_mixer.data import pipeline
from mlp_mixer.models import Run
from mlp_mixer.models.mixer import MlpMixer

# Large enough that "fsdp" cuts every kernel but the head's, and that no batch of
# activations or images is as small as a parameter.
FIELDS: dict[str, Any] = {
    "patch_size": (8, 8),
    "num_blocks": 2,
    "hidden_dim": 64,
    "tokens_mlp_dim": 64,
    "channels_mlp_dim": 256,
    "num_classes": 8,
}
SIZE, ROWS = (64, 64), 32
EXAMPLE = pipeline.example(SIZE)
IMAGE = math.prod(SIZE) * 3
LARGEST_PARAMETER = 64 * 256
STEPS = 3
STRATEGIES = ["replicated", "fsdp"]
NOISE: dict[str, Any] = {"mixup": 0.5, "erasing": 0.5, "stochastic_depth": 0.5}
# Most of these tests' time is the compiler's, and half of that this optimisation, of
# machine code alone.
QUICKLY = {"xla_backend_optimization_level": 0}
# Clipping is active: it needs the norm of gradients that may be cut.
ADAM: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5}
# The accumulator of momentum is, after one step, the gradient itself.
GRADIENT: dict[str, Any] = {
    "name": "momentum",
    "learning_rate": 1e-3,
    "clip_norm": None,
}


def optimiser(**fields):
    return optimisers.create(**fields, total_steps=100, warmup_steps=0)[0]


class Program:
    """A compiled step for abstract arguments: to be read, and to be run.

    `devices` are their number, or the shape of a mesh.
    """

    def __init__(
        self,
        devices=1,
        strategy="replicated",
        *,
        optim=ADAM,
        seed=0,
        mixup=0.0,
        erasing=0.0,
        accumulate=1,
        rows=ROWS,
        loss="sigmoid_xent",
        **fields,
    ):
        shape = devices if isinstance(devices, tuple) else (devices,)
        self.mesh = sharding.make_mesh(*shape)
        self.model, self.tx = model_of(self.mesh, **fields), optimiser(**optim)
        self.target = steps.state_shapes(
            self.model, self.tx, self.mesh, EXAMPLE, strategy=strategy
        )
        step: Any = steps.make_train_step(
            self.model,
            self.tx,
            self.mesh,
            self.target,
            loss=loss,
            seed=seed,
            mixup=mixup,
            erasing=erasing,
            accumulate=accumulate,
        )
        batch = {
            "image": jax.ShapeDtypeStruct((rows, *SIZE, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }
        self.step = step.lower(self.target, batch).compile(QUICKLY)

    def state(self, step=0):
        """A state of random parameters and, but for the number, of step 0."""
        params = random_params()
        state = steps.TrainState(jnp.int32(step), params, {}, self.tx.init(params))
        return jax.tree.map(
            lambda x, a: jax.device_put(x, a.sharding), state, self.target
        )

    def batch(self, i=0):
        return sharding.place_rows(batches()[i], self.mesh)

    @functools.cached_property
    def trained(self):
        """The state after some steps, and the metrics of every one; on the host."""
        state, metrics = self.state(), []
        for i in range(STEPS):
            state, scalars = self.step(state, self.batch(i))
            metrics.append(scalars)
        return jax.device_get((state, metrics))


def model_of(
    mesh, *, flat=False, scan=False, remat="none", images_at_once=None, **fields
):
    """`flat` as on one CPU, whatever devices the step is for."""
    mesh = sharding.make_mesh(1) if flat else mesh if mesh.size > 1 else None
    run = Run(scan=scan, remat=remat, images_at_once=images_at_once, mesh=mesh)
    return MlpMixer(**FIELDS | fields, run=run)


compiled = functools.cache(Program)


@functools.cache
def random_params():
    """Without a head of zeros, which would leave nothing to learn below it."""
    return set_up.random_params(MlpMixer(**FIELDS), SIZE, seed=0)


@functools.cache
def batches():
    rng = np.random.default_rng(1)
    return [
        {
            "image": rng.integers(0, 256, (ROWS, *SIZE, 3), np.uint8),
            "label": rng.integers(0, 8, ROWS, np.int32),
        }
        for _ in range(STEPS)
    ]


def named(tree):
    """Name → leaf, without the one bias that reaches no logit: its gradient is zero,
    so what is computed is rounding noise, which Adam scales up to full steps."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    dead = "['token_mixing']['Dense_1']['bias']"
    return {name: leaf for name, leaf in names.items() if not name.endswith(dead)}


def assert_close(tree, expected, rtol, atol=0.0):
    """Every leaf within `rtol` of its own largest entry, or within `atol`."""
    ours, theirs = named(tree), named(expected)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        bound = rtol * abs(theirs[name]).max() + atol
        np.testing.assert_allclose(x, theirs[name], rtol=0, atol=bound, err_msg=name)


def adam(state):
    (moments,) = (s for s in state.opt_state if hasattr(s, "mu"))
    return moments


def assert_same_training(trained, expected):
    """Up to the order of additions."""
    (state, metrics), (expected_state, expected_metrics) = trained, expected
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5)
    assert state.step == expected_state.step == len(metrics)
    assert_close(adam(state).mu, adam(expected_state).mu, 1e-4)
    assert_close(adam(state).nu, adam(expected_state).nu, 1e-4)
    # Parameters move by up to the learning rate of 1e-3 per step.
    assert_close(state.params, expected_state.params, 0.0, 3e-5)


def held(tree, device):
    """Bytes of `tree` on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


COLLECTIVE = re.compile(
    r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast"
    r"|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)


def travels(program):
    """Collective operation → elements of its largest array, of the compiled step."""
    found: dict[str, int] = {}
    for line in program.step.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            for shape in re.findall(r"\w\[([\d,]*)\]", match[1]):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found[match[2]] = max(size, found.get(match[2], 0))
    return found


def flops(program):
    """Of one device. The program is unrolled: a scan's body would count once."""
    assert not program.model.run.scan
    return program.step.cost_analysis()["flops"]


def temporaries(program):
    return program.step.memory_analysis().temp_size_in_bytes
