"""What the benchmark and the suite measure: models and peers, compiled and timed.

Needs jax, flax, optax, einops and jaxtyping alone.
"""

import dataclasses
import gc
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.extend
import jax.numpy as jnp
import literal_mixer
import numpy as np

from mlp_mixer import experiment, sharding, steps
from mlp_mixer.models.mixer import MlpMixer

# What is measured without a recipe: an update as in pretraining.
OPTIM = {
    "warmup_steps": 10_000,
    "learning_rate": 1e-3,
    "decay": "linear",
    "end_learning_rate": 1e-5,
    "end_factor": None,
    "name": "adam",
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "momentum": 0.9,
    "momentum_dtype": "float32",
    "weight_decay": 0.1,
    "decayed": "kernels",
    "clip_norm": 1.0,
}
KINDS = ("forward", "train")


@dataclasses.dataclass
class Job:
    """What is measured: of a recipe what `experiment.build` reads."""

    model: dict[str, Any]
    dataset: types.SimpleNamespace  # with num_classes
    optim: dict[str, Any]
    total_steps: int
    run: dict[str, Any]
    loss: str = "sigmoid_xent"
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    accumulate: int = 1
    sharding: str = "replicated"


def fields_of(model: Any, of: type) -> dict[str, Any]:
    """The values that `model` has for the fields of a module class."""
    names = [f.name for f in dataclasses.fields(of)]
    others = ("parent", "name", "run", "dtype")
    return {name: getattr(model, name) for name in names if name not in others}


def literal_of(model: MlpMixer) -> literal_mixer.LiteralMixer:
    """The literal model of the same sizes, hence of the same parameter tree."""
    literal = literal_mixer.LiteralMixer
    fields = fields_of(model, literal) | {"dtype": model.run.dtype}
    return literal(**fields)


def flops(model: Any, image_size: tuple[int, int]) -> dict[str, int]:
    """Floating-point operations per image: 2 per multiply-add, products only.

    Training is three times the forward pass, less the stem's input gradient; what
    rematerialisation computes again is not work done.
    """
    (height, width), (ph, pw) = image_size, model.patch_size
    s, c = (height // ph) * (width // pw), model.hidden_dim
    stem = s * ph * pw * 3 * c
    block = 2 * s * model.tokens_mlp_dim * c + 2 * s * c * model.channels_mlp_dim
    forward = stem + model.num_blocks * block + c * (model.num_classes or 0)
    return {"forward": 2 * forward, "train": 2 * (3 * forward - stem)}


def start_devices(threads: int | None, count: int) -> int | None:
    """Prepares the backend; returns its CPU threads (None: all, or not a CPU)."""
    jax.config.update("jax_enable_compilation_cache", False)
    if jax.default_backend() != "cpu":
        return None
    # The CPU client sizes its pool by NPROC (or by the affinity mask) when it is made;
    # --xla_cpu_multi_thread_eigen=false no longer has an effect.
    threads = 1 if threads is None else threads
    jax.extend.backend.clear_backends()
    if threads:
        os.environ["NPROC"] = str(threads)
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)
    return threads or None


def say(message: str) -> None:
    """A line of progress, apart from the results."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """Both models on one mesh: compiles, runs and times them."""

    def __init__(self, job: Job, batch: int, devices: int, peer: bool) -> None:
        self.mesh = sharding.make_mesh(devices)
        classes = job.dataset.num_classes
        ours: Any = experiment.create_model(job, self.mesh, classes)
        if not isinstance(ours, MlpMixer):
            raise ValueError(
                f"{job.model['name']} is no MLP-Mixer, of which the operations are "
                "counted and the literal model is the peer; try mixer_b16."
            )
        self.models = {"ours": ours} | ({"literal": literal_of(ours)} if peer else {})
        self.job, self.batch = job, batch
        self.size = tuple(job.model["image_size"])
        self.example = {"image": jax.ShapeDtypeStruct((1, *self.size, 3), "uint8")}
        self.flops = flops(ours, self.size)
        self.built = self._build(ours)

    def _build(self, model: Any) -> experiment.Experiment:
        job = self.job
        return experiment.build(
            job, self.mesh, self.example, job.total_steps, model=model
        )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch."""
        cut, n = sharding.batch(self.mesh), self.batch
        image = jax.ShapeDtypeStruct((n, *self.size, 3), "uint8", sharding=cut)
        label = jax.ShapeDtypeStruct((n,), "int32", sharding=cut)
        return {"image": image, "label": label}

    def _jitted(self, kind: str, model: Any) -> tuple[Any, tuple]:
        built, batch = self._build(model), self.batch_shapes()
        if kind == "train":
            return built.train_step, (built.target, batch)

        def forward(params, image):
            return built.predict({"params": params}, {"image": image})["logits"]

        jitted = jax.jit(forward, out_shardings=sharding.batch(self.mesh))
        return jitted, (built.target.params, batch["image"])

    def compile(
        self,
        kind: str,
        name: str,
        *,
        options: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the executable, and what it cost and needs.

        Args:
          kind: a pass, of `KINDS`.
          name: a key of `models`.
          options: compiler's options, of `compiled`.
        """
        jitted, arguments = self._jitted(kind, self.models[name])
        lowered, executable, result = compile_function(jitted, arguments, options)
        run = self.models[name].run
        parts = run.parts(self.batch // sharding.rows(self.mesh))
        looped = parts > 1 or (kind == "train" and run.scan)
        # XLA counts the body of a loop once, whatever its number of turns.
        cost = None if looped else lowered.cost_analysis()
        result["xla_flops_per_image"] = cost and cost["flops"] / self.batch
        return executable, result

    def data(self) -> tuple[steps.TrainState, Any]:
        """A state and a batch of `random_state` and `random_batch`."""
        return self.random_state(), self.random_batch()

    def random_state(self) -> steps.TrainState:
        """A state of random kernels.

        The head's is random too: zeros would make all logits equal and all gradients
        below it zero. Drawn here, as to compile `init` takes longer.
        """
        rng = np.random.default_rng(0)

        def leaf(path: Any, shape: Any) -> jax.Array:
            name = path[-1].key if hasattr(path[-1], "key") else ""
            value = np.zeros(shape.shape, shape.dtype)  # biases, moments, counts
            if name == "scale":
                value += 1
            elif name == "kernel":
                value = rng.standard_normal(shape.shape, np.float32)
                value *= np.float32(np.prod(shape.shape[:-1]) ** -0.5)
            return jax.device_put(value, shape.sharding)

        target = self.built.target
        zeros = jax.tree.map(lambda x: leaf([None], x), target._replace(params={}))
        params = jax.tree_util.tree_map_with_path(leaf, target.params)
        return zeros._replace(params=params)

    def random_batch(self) -> dict[str, jax.Array]:
        """A batch of noise, on the devices."""
        rng, classes = np.random.default_rng(1), self.models["ours"].num_classes
        image = rng.integers(0, 256, (self.batch, *self.size, 3), np.uint8)
        label = rng.integers(0, classes, self.batch, np.int32)
        return sharding.place_rows({"image": image, "label": label}, self.mesh)

    def product(self) -> tuple[Callable[[], Any], int]:
        """A large square product in the compute dtype, and its operations."""
        # Sizes at which the rate no longer grows.
        n = 2048 if jax.default_backend() == "cpu" else 8192
        a, b = jax.random.normal(jax.random.key(0), (2, n, n)).astype(
            self.models["ours"].run.dtype
        )
        multiply = jax.jit(jnp.matmul).lower(a, b).compile()
        return lambda: multiply(a, b), 2 * n**3


def compiled(lowered: Any, options: Mapping[str, Any]) -> Any:
    """Returns the executable of a lowered function.

    Args:
      lowered: the function.
      options: compiler's options: XLA's by name, and `jax_optimization_level`.
    """
    name = "jax_optimization_level"
    before = getattr(jax.config, name)
    xla = {k: v for k, v in options.items() if k != name}
    jax.config.update(name, options.get(name, before))
    try:
        return lowered.compile(compiler_options=xla or None)
    finally:
        jax.config.update(name, before)


def compile_function(
    jitted: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a jitted function lowered, its executable, and what that cost and needs.

    Args:
      jitted: the function.
      arguments: its arguments, or their shapes.
      options: compiler's options, of `compiled`.
    """
    # Functions are traced once per identity: an earlier trace must not be free.
    jax.clear_caches()
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    lowered = jitted.lower(*arguments)
    executable = compiled(lowered, options)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    result: dict[str, Any] = {"compile_cpu_s": [cpu], "compile_wall_s": [wall]}
    if memory := executable.memory_analysis():
        for field in ("temp", "argument", "output", "alias"):
            result[f"{field}_bytes"] = getattr(memory, f"{field}_size_in_bytes")
    return lowered, executable, result


def clock(
    run: Callable[[], Any], times: int, wait: Callable[[Any], Any]
) -> dict[str, float]:
    """Returns CPU seconds, wall seconds and page faults per call.

    Args:
      run: the call.
      times: number of calls.
      wait: given the last call's result, returns when the device is done.
    """
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        out = run()
    wait(out)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    used = {"cpu_s": cpu, "wall_s": wall, "page_faults": faults}
    return {name: value / times for name, value in used.items()}


def interleave(
    clocks: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> Iterator[dict[str, dict[str, float]]]:
    """Yields what each clock measured, round by round.

    There and back, so that a drift of the machine favours nobody.
    """
    for i in range(rounds):
        names = list(clocks)[:: 1 if i % 2 == 0 else -1]
        yield {name: clocks[name]() for name in names}


def statistics_of(times: list[float]) -> dict[str, float]:
    """Returns median, minimum, maximum and spread, (max − min) / median."""
    median, low, high = statistics.median(times), min(times), max(times)
    return {"median_s": median, "min_s": low, "max_s": high} | {
        "spread": (high - low) / median
    }


def training(executable: Any, state: Any, batch: Any) -> Callable[[], Any]:
    """A run that takes the next step of a state of its own."""
    state = jax.tree.map(jnp.copy, state)  # each step destroys its input

    def run():
        nonlocal state
        state, scalars = executable(state, batch)
        return scalars

    return run


def cpu_model() -> str:
    """The processor's own name for itself."""
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
