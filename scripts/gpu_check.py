"""Checks the laws of model, step, sharding and checkpoint on the accelerator here.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --only=float64,bitwise --out=checks.json

Every law is a line: what agrees with what, the largest error, its bound, the seconds.
It continues after a failure and ends with 1 if there was any. Models are small ones of
every architecture, in float32 at the highest precision of products where nothing else
is said. Needs jax, flax, optax, einops and jaxtyping alone, and a few minutes; with
several devices it checks that they compute what one does, with Orbax also checkpoints.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))
# The processes that check resuming need memory beside this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import arguments
import flax
import jax
import jaxlib
import numpy as np
import optax
import reference_mixer
from flax.traverse_util import flatten_dict

from mlp_mixer import experiment, models, sharding, steps
from mlp_mixer.models import derivatives
from mlp_mixer.models.trunk import REMAT_POLICIES

# On a GPU, the same bits need kernels that add in the same order.
DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
CLASSES, ROWS = 10, 16
# Of 49 tokens, as 224 pixels in patches of 32: no multiple of anything.
_SIZES = {"patch_size": (8, 8), "num_blocks": 3, "hidden_dim": 128}
_SIZES |= {"channels_mlp_dim": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixer": _SIZES | {"tokens_mlp_dim": 64, "image_size": (56, 56)},
    "resmlp": _SIZES | {"image_size": (56, 56)},
    "gmlp": _SIZES | {"image_size": (56, 56)},
    "smlpnet": {
        "patch_size": (4, 4),
        "num_blocks": (1, 1, 1, 2),
        "hidden_dim": 16,
        "mlp_ratio": 2,
        "image_size": (64, 64),
    },
}
# One update after which the optimiser's accumulator is the gradient.
GRADIENT = {
    "name": "momentum",
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "momentum": 0.9,
    "momentum_dtype": "float32",
    "weight_decay": 0.0,
    "decayed": "kernels",
    "clip_norm": None,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
    "decay": "linear",
    "end_learning_rate": 0.0,
    "end_factor": None,
}
PRETRAINING = GRADIENT | {"name": "adam", "weight_decay": 0.1, "clip_norm": 1.0}
AT_ONCE = {"images_at_once": ROWS // 4}
NOISE: dict[str, Any] = {"dropout": 0.1, "stochastic_depth": 0.2}

Arrays = dict[str, np.ndarray]


class Result(NamedTuple):
    """How far one thing is from another, and may be; no bound: it was not checked."""

    what: str
    error: float = 0.0
    bound: float | None = None


Law = Callable[[], Iterator[Result]]


# --- What is compared -----------------------------------------------------------------


class Setup:
    """A small model, its random state and a batch, on some devices."""

    def __init__(
        self,
        family: str,
        *,
        run: Mapping[str, Any] | None = None,
        devices: Sequence[Any] | None = None,
        strategy: str = "replicated",
        accumulate: int = 1,
        mixup: float = 0.0,
        optim: Mapping[str, Any] = GRADIENT,
        **fields: Any,
    ) -> None:
        self.mesh = sharding.make_mesh(devices=devices or jax.devices()[:1])
        self.fields = FAMILIES[family] | fields
        self.model = models.create(
            family,
            num_classes=CLASSES,
            run=models.Run(mesh=self.mesh, **(run or {})),
            **self.fields,
        )
        config = types.SimpleNamespace(
            dataset=types.SimpleNamespace(num_classes=CLASSES),
            optim=optim,
            loss="softmax_xent",
            seed=0,
            mixup=mixup,
            cutmix=0.0,
            erasing=0.0,
            label_smoothing=0.0,
            accumulate=accumulate,
            sharding=strategy,
        )
        size = self.fields["image_size"]
        example = {"image": jax.ShapeDtypeStruct((1, *size, 3), "uint8")}
        self.built = experiment.build(
            config, self.mesh, example, total_steps=100, model=self.model
        )

    def state(self) -> steps.TrainState:
        """A state in which every parameter is random, so that nothing hides."""
        rng = np.random.default_rng(2)

        def draw(path: Any, leaf: Any) -> np.ndarray:
            spread = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
            noise = spread * rng.normal(size=leaf.shape)
            name = path[-1].key
            value = np.exp(noise) if name == "var" else noise
            return (value + (name in ("scale", "alpha"))).astype(np.float32)

        target = self.built.target
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), target)
        drawn = {
            name: jax.tree_util.tree_map_with_path(draw, getattr(target, name))
            for name in ("params", "stats")
        }
        return self.placed(state._replace(**drawn))

    def placed(self, state: Any) -> Any:
        """A state of the host on the devices."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.built.target)
        return sharding.place(state, places)

    def host_batch(self, step: int = 0) -> Arrays:
        """The batch of a step."""
        rng = np.random.default_rng(step)
        shape = (ROWS, *self.fields["image_size"], 3)
        image = rng.integers(0, 256, shape, np.uint8)
        return {"image": image, "label": rng.integers(0, CLASSES, ROWS, np.int32)}

    def batch(self, step: int = 0) -> dict[str, Any]:
        """The batch of a step, on the devices."""
        return sharding.place_rows(self.host_batch(step), self.mesh)

    def step(self) -> Arrays:
        """What one training step gives: loss, statistics and gradients."""
        state, metrics = self.built.train_step(self.state(), self.batch())
        (grads,) = (s.trace for s in state.opt_state if hasattr(s, "trace"))
        return {
            "loss": np.asarray(metrics["loss"]),
            **flat(state.stats, "statistics of "),
            **flat(grads, "gradient of "),
        }

    def logits(self) -> np.ndarray:
        """What `predict` gives."""
        out = self.built.predict(self.state().variables, self.batch())
        return np.asarray(out["logits"])


@functools.cache
def plain_step(family: str) -> Arrays:
    """`Setup.step` on one device, unrolled, with the whole batch at once."""
    return Setup(family).step()


def flat(tree: Any, prefix: str = "") -> Arrays:
    """Returns {prefix + "a/b": array} of nested dicts."""
    pairs = flatten_dict(dict(tree), sep="/").items()
    return {f"{prefix}{name}": np.asarray(leaf) for name, leaf in pairs}


def by_largest(found: Any, expected: Any) -> float:
    """The largest difference, as a part of the largest value that is expected."""
    found, expected = np.float64(found), np.float64(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def worst(what: str, found: Arrays, expected: Arrays, bound: float) -> Result:
    """The array that differs most: the norm of the difference, as a part of its norm.

    Or as a part of a hundredth of the largest norm, if that is more: some gradients are
    zero, e.g. those of token mixing's last biases, which LayerNorm removes.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"{what}: {sorted(found.keys() ^ expected.keys())} differ.")
    norms = {name: float(np.linalg.norm(array)) for name, array in expected.items()}
    least = max(norms.values()) / 100
    errors = {
        name: float(np.linalg.norm(np.float64(found[name]) - array))
        / max(norms[name], least)
        for name, array in expected.items()
    }
    name = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return Result(f"{what}; worst: {name}", errors[name], bound)


# --- Laws -----------------------------------------------------------------------------


def closed_forms() -> Iterator[Result]:
    """LayerNorm and GELU, and their derivatives, against float64."""
    rng = np.random.default_rng(0)
    x, dy = 3 * rng.normal(size=(2, 6, 49, 128))
    params = {"scale": rng.normal(size=128), "bias": rng.normal(size=128)}
    narrow: Any = functools.partial(jax.tree.map, np.float32)

    def with_derivatives(function: Any, *given: Any) -> Any:
        def both(dy: Any, *given: Any) -> Any:
            y, back = jax.vjp(function, *given)
            return y, back(dy)

        return jax.jit(both)(narrow(dy), *narrow(given))

    y, back = reference_mixer.layer_norm(x, params)
    dx, grads = back(dy)
    found, (found_dx, found_scale, found_bias) = with_derivatives(
        derivatives.layer_norm, x, params["scale"], params["bias"]
    )
    expected = {"value": y, "dx": dx} | grads
    got = {"value": found, "dx": found_dx, "scale": found_scale, "bias": found_bias}
    yield worst("LayerNorm = float64", got, expected, 1e-5)
    for name, function in (
        ("tanh", reference_mixer.gelu),
        ("exact", reference_mixer.exact_gelu),
    ):
        y, slope = function(x)
        found, (found_dx,) = with_derivatives(derivatives.GELUS[name], x)
        got, expected = {"value": found, "dx": found_dx}, {"value": y, "dx": slope(dy)}
        yield worst(f"{name} GELU = float64", got, expected, 1e-5)


@functools.cache
def _float64() -> tuple[np.ndarray, Arrays]:
    """Logits, and loss and gradients, of the Mixer by NumPy."""
    setup = Setup("mixer")
    params = jax.tree.map(np.float64, jax.device_get(setup.state().params))
    batch = setup.host_batch()
    logits, loss, grads = reference_mixer.loss_and_gradients(
        params, batch["image"], batch["label"], setup.fields["patch_size"]
    )
    return logits, {"loss": np.asarray(loss), **flat(grads, "gradient of ")}


def float64() -> Iterator[Result]:
    """The Mixer in float32 against float64."""
    setup, (logits, step) = Setup("mixer"), _float64()
    error = by_largest(setup.logits(), logits)
    yield Result("mixer float32: logits = float64", error, 1e-5)
    yield worst("mixer float32: step = float64", plain_step("mixer"), step, 1e-5)


def bfloat16() -> Iterator[Result]:
    """The Mixer in bfloat16, which has 8 bits, against float64."""
    logits, step = _float64()
    with jax.default_matmul_precision("default"):
        setup = Setup("mixer", run={"dtype": "bfloat16"})
        error = by_largest(setup.logits(), logits)
        yield Result("mixer bfloat16: logits = float64", error, 1e-2)
        yield worst("mixer bfloat16: step = float64", setup.step(), step, 3e-2)


def families() -> Iterator[Result]:
    """Every architecture here against the same on this machine's CPU."""
    try:
        cpu = [
            device for device in jax.devices("cpu")[:1] if device != jax.devices()[0]
        ]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        cpu = []
    if not cpu:
        yield Result("all architectures = on the CPU: there is no CPU besides")
        return
    for name in FAMILIES:
        there = Setup(name, devices=cpu).step()
        yield worst(f"{name}: step = on the CPU", plain_step(name), there, 2e-5)


def formulations() -> Iterator[Result]:
    """Scanned and unrolled, with every rematerialisation, of every architecture."""
    for name in FAMILIES:
        forms = [(scan, remat) for scan in (False, True) for remat in REMAT_POLICIES]
        if name != "mixer":  # they share all that differs
            forms = [(False, "none"), (True, "full")]
        for scan, remat in forms[1:]:
            found = Setup(name, run={"scan": scan, "remat": remat}).step()
            form = f"{'scanned' if scan else 'unrolled'}, remat={remat}"
            what = f"{name}: {form} = unrolled"
            yield worst(what, found, plain_step(name), 2e-5)


def accumulate() -> Iterator[Result]:
    """Micro-batches against the whole batch, where no statistics are of the batch."""
    for name in ("mixer", "resmlp", "gmlp"):
        parts = Setup(name, accumulate=4).step()
        yield worst(f"{name}: accumulate=4 = 1", parts, plain_step(name), 2e-5)
    parts = Setup("mixer", run=AT_ONCE).step()
    what = "mixer: a quarter of the images at once = all"
    yield worst(what, parts, plain_step("mixer"), 2e-5)


def _device_count() -> int:
    """The most devices here that divide a batch."""
    return next(n for n in range(jax.device_count(), 0, -1) if ROWS % n == 0)


def devices() -> Iterator[Result]:
    """All devices against one, with whole and with cut parameters."""
    count = _device_count()
    if count == 1:
        yield Result("all devices = one: there is one alone")
        return
    for name in FAMILIES:
        for strategy in sharding.STRATEGIES:
            found = Setup(name, devices=jax.devices()[:count], strategy=strategy).step()
            what = f"{name}: {count} devices, {strategy} = one device"
            yield worst(what, found, plain_step(name), 2e-5)


def predict() -> Iterator[Result]:
    """Prediction against the forward pass outside of training."""
    for name in FAMILIES:
        setup = Setup(name)
        model, variables = setup.model, setup.state().variables
        forward = jax.jit(lambda v, x, m=model: m.apply(v, steps.value_range(x))[0])
        logits = forward(variables, setup.batch()["image"])
        error = by_largest(setup.logits(), logits)
        yield Result(f"{name}: predict = forward pass", error, 1e-6)
    parts, whole = Setup("mixer", run=AT_ONCE).logits(), Setup("mixer").logits()
    what = "mixer: a quarter of the images at once = all"
    yield Result(what, by_largest(parts, whole), 1e-5)


def checkpoints() -> Iterator[Result]:
    """A state that is saved and read back, on all devices."""
    try:
        from mlp_mixer import checkpoint
    except ModuleNotFoundError as error:
        yield Result(f"a checkpoint = what was saved: {error.name} is not installed")
        return
    count = _device_count()
    setup = Setup(
        "mixer", devices=jax.devices()[:count], strategy="fsdp", optim=PRETRAINING
    )
    state, _ = setup.built.train_step(setup.state(), setup.batch())
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpointer(folder, every_steps=1) as saver:
            saver.save(1, state, force=True)
            saver.wait()
        with checkpoint.Checkpointer(folder, every_steps=1) as reader:
            found = reader.restore(setup.built.target)
    same = digest(found) == digest(state)
    yield Result("a checkpoint = what was saved, bit for bit", float(not same), 0.0)


# --- The same bits, in processes of their own -----------------------------------------

LAST, KILLED = 6, 3


def digest(state: Any) -> str:
    """The SHA-256 of all arrays of a state."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def train(part: str, file: pathlib.Path) -> None:
    """Trains in this process, and prints what came out as JSON.

    Args:
      part: "whole" trains to the end, "begin" writes its state to `file` on the way and
        is killed, "resume" goes on from there.
      file: an npz file of the state's leaves.
    """
    setup = Setup("mixer", mixup=0.5, optim=PRETRAINING, **NOISE)
    state, first = setup.state(), 0
    results = {"platform": jax.default_backend()}
    if part == "whole":
        once, again = (
            setup.built.train_step(setup.state(), setup.batch())[0] for _ in range(2)
        )
        results["once"], results["again"] = digest(once), digest(again)
    if part == "resume":
        with np.load(file) as arrays:
            leaves = [arrays[f"arr_{i}"] for i in range(len(arrays))]
        state, first = jax.tree.unflatten(jax.tree.structure(state), leaves), KILLED
        state = setup.placed(state)
    for step in range(first, LAST):
        if part == "begin" and step == KILLED:
            np.savez(file, *jax.tree.leaves(jax.device_get(state)))
            print(json.dumps(results), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        state, _ = setup.built.train_step(state, setup.batch(step))
    results["end"] = digest(state)
    print(json.dumps(results), flush=True)


def bitwise() -> Iterator[Result]:
    """A step twice, and a run that is killed and resumed, bit for bit."""
    flags = os.environ.get("XLA_FLAGS", "")
    note = "" if DETERMINISTIC in flags else f", with XLA_FLAGS={DETERMINISTIC}"
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "XLA_FLAGS": f"{flags} {DETERMINISTIC}".strip(),
            # With what the compiler has measured: it may choose otherwise another time.
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
        }

        def run(part: str) -> dict[str, str]:
            command = [sys.executable, __file__, "--train", part, f"{folder}/state.npz"]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300
            )
            if done.returncode != (-signal.SIGKILL if part == "begin" else 0):
                raise RuntimeError(f"training failed: {done.stderr.strip()[-2000:]}")
            return json.loads(done.stdout)

        whole = run("whole")
        if whole["platform"] != "gpu":
            note = ""
        differs = float(whole["once"] != whole["again"])
        yield Result(f"a step = the same step again, bit for bit{note}", differs, 0.0)
        run("begin")
        differs = float(whole["end"] != run("resume")["end"])
        what = f"killed and resumed = never killed, bit for bit{note}"
        yield Result(what, differs, 0.0)


# Those in processes of their own first: some accelerators serve one process at a time.
LAWS: dict[str, Law] = {
    "bitwise": bitwise,
    "closed_forms": closed_forms,
    "float64": float64,
    "bfloat16": bfloat16,
    "predict": predict,
    "families": families,
    "formulations": formulations,
    "accumulate": accumulate,
    "devices": devices,
    "checkpoints": checkpoints,
}


# --- The command line -----------------------------------------------------------------


def check(laws: Mapping[str, Law]) -> list[dict[str, Any]]:
    """Checks laws, prints a line for each comparison and returns the same as records.

    A record's `status` is "ok", "FAILED" or "skipped".
    """
    records: list[dict[str, Any]] = []
    for name, law in laws.items():
        results, more = law(), True
        while more:
            began, status = time.perf_counter(), "ok"
            try:
                with jax.default_matmul_precision("highest"):
                    result = next(results)
            except StopIteration:
                break
            except Exception as error:  # the other laws are checked all the same
                traceback.print_exc()
                result, status, more = Result(f"{error!r:.300}"), "FAILED", False
            seconds = time.perf_counter() - began
            if result.bound is None:
                status = status if status == "FAILED" else "skipped"
                figures = ""
            else:
                # An error that is no number fails.
                status = "ok" if result.error <= result.bound else "FAILED"
                figures = f"  error {result.error:.2g}, bound {result.bound:.2g}"
            print(
                f"{status:8}{name}: {result.what}{figures}  ({seconds:.1f} s)",
                flush=True,
            )
            records.append(
                {"law": name, "status": status, "seconds": round(seconds, 2)}
                | result._asdict()
            )
    return records


def about() -> dict[str, Any]:
    """The machine and the versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "flags": os.environ.get("XLA_FLAGS"),
        "backend": device.client.platform_version,
    }


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(LAWS)
    parser.add_argument("--only", help=f"some laws, with commas: {names}")
    parser.add_argument("--out", type=arguments.new_file, help="a JSON file of it all")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.train:
        train(args.train[0], pathlib.Path(args.train[1]))
        return 0
    chosen = args.only.split(",") if args.only else list(LAWS)
    if unknown := [name for name in chosen if name not in LAWS]:
        parser.error(f"{', '.join(unknown)} is no law; there are {names}")
    began = time.perf_counter()
    records = check({name: law for name, law in LAWS.items() if name in chosen})
    content = about() | {"seconds": round(time.perf_counter() - began, 1)}
    failed = sum(record["status"] == "FAILED" for record in records)
    skipped = sum(record["status"] == "skipped" for record in records)
    print(
        f"{len(records) - failed - skipped} hold, {failed} failed, {skipped} skipped, "
        f"in {content['seconds']:.0f} s on {content['devices']} {content['device']}, "
        f"jax {content['jax']}"
    )
    if args.out:
        text = json.dumps(content | {"laws": records}, indent=1)
        pathlib.Path(args.out).write_text(text + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
