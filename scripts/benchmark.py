"""Speed, memory and compile time: this package's model beside the literal one.

    python scripts/benchmark.py mixer_b16 --batch=8
    python scripts/benchmark.py mixer_h14 --batch=8 --compile-only
    python scripts/benchmark.py configs/mixer_b16.py:imagenet21k --out=b16.json
    python scripts/benchmark.py input        (the host's side: see input_benchmark.py)

Forward pass and training step of both, interleaved round by round in one process with
the same flags, optimiser and loss, beside a large matrix product as the ceiling. A
model's name runs with jax, flax, optax, einops and jaxtyping alone; a recipe needs
ml_collections too. CPU: by default one thread, compared by CPU time, which other
programs on the machine disturb least. Elsewhere: wall time.
"""

import argparse
import ast
import dataclasses
import functools
import gc
import json
import os
import pathlib
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

import arguments
import flax
import jax
import jax.extend
import jax.numpy as jnp
import jaxlib
import literal_mixer
import numpy as np
import optax

from mlp_mixer import errors, experiment, models, sharding, steps
from mlp_mixer.models.mixer import MlpMixer
from mlp_mixer.models.trunk import REMAT_POLICIES

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
    seed: int = 0
    accumulate: int = 1
    sharding: str = "replicated"


def job_of(args: argparse.Namespace) -> Job:
    """The job that the command line describes, a model's name or a recipe."""
    if ".py" in args.what:
        from mlp_mixer import recipe  # needs ml_collections

        config = recipe.load(args.what)
        recipe.check_fields(config)
        model, update, run = (dict(config[k]) for k in ("model", "optim", "run"))
        # A recipe may leave the classes to its data, which nobody opens here.
        data = types.SimpleNamespace(num_classes=config.dataset.num_classes or 1000)
        total_steps = recipe.total_steps(config)
        job = Job(model, data, update, total_steps, run, config.loss, config.mixup)
    else:
        model = {"name": args.what, "image_size": (224, 224)}
        data = types.SimpleNamespace(num_classes=1000)
        job = Job(model, data, dict(OPTIM), 100_000, {})
    given = {key: getattr(args, key) for key in ("dtype", "scan", "remat")}
    job.run |= {key: value for key, value in given.items() if value is not None}
    if args.image_size:
        job.model["image_size"] = (args.image_size, args.image_size)
    for word in args.override:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--override={word}: expected KEY=VALUE.")
        try:
            job.model[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            job.model[key] = value
    classes = job.model.pop("num_classes", job.dataset.num_classes)
    job.dataset.num_classes = classes
    return job


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

    def _jitted(self, kind: str, model: Any) -> tuple[Any, tuple]:
        cut = sharding.batch(self.mesh)
        image = jax.ShapeDtypeStruct((self.batch, *self.size, 3), "uint8", sharding=cut)
        if kind == "forward":

            def forward(params, image):
                image = steps.value_range(image)
                return model.apply({"params": params}, image)[0]

            return jax.jit(forward, out_shardings=cut), (
                self.built.target.params,
                image,
            )
        label = jax.ShapeDtypeStruct((self.batch,), "int32", sharding=cut)
        built = self._build(model)
        return built.train_step, (built.target, {"image": image, "label": label})

    def compile(self, kind: str, name: str) -> tuple[Any, dict[str, Any]]:
        """Returns the executable, and what it cost and needs."""
        # Functions are traced once per identity: an earlier trace must not be free.
        jax.clear_caches()
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        jitted, arguments = self._jitted(kind, self.models[name])
        lowered = jitted.lower(*arguments)
        executable = lowered.compile()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        result: dict[str, Any] = {"compile_cpu_s": [cpu], "compile_wall_s": [wall]}
        if memory := executable.memory_analysis():
            for field in ("temp", "argument", "output", "alias"):
                result[f"{field}_bytes"] = getattr(memory, f"{field}_size_in_bytes")
        run = getattr(self.models[name], "run", models.Run())
        looped = kind == "train" and run.scan
        # XLA counts the body of a loop once, whatever its number of turns.
        cost = None if looped else lowered.cost_analysis()
        result["xla_flops_per_image"] = cost and cost["flops"] / self.batch
        return executable, result

    def data(self) -> tuple[steps.TrainState, Any]:
        """A state whose head is random, and a batch of noise.

        A head of zeros would make all logits equal and all gradients below it zero.
        """
        model = self.models["ours"]
        tx, target = self.built.tx, self.built.target
        state = steps.init_state(model, tx, target, self.example, seed=0)
        rng = np.random.default_rng(0)
        kernel = state.params["head"]["kernel"]
        random = rng.normal(0, kernel.shape[0] ** -0.5, kernel.shape)
        state.params["head"]["kernel"] = jax.device_put(
            random.astype(kernel.dtype), kernel.sharding
        )
        image = rng.integers(0, 256, (self.batch, *self.size, 3), np.uint8)
        label = rng.integers(0, model.num_classes, self.batch, np.int32)
        return state, sharding.place_rows({"image": image, "label": label}, self.mesh)

    def product(self) -> tuple[Callable[[], Any], int]:
        """A large square product in the compute dtype, and its operations."""
        # Sizes at which the rate no longer grows.
        n = 2048 if jax.default_backend() == "cpu" else 8192
        a, b = jax.random.normal(jax.random.key(0), (2, n, n)).astype(
            self.models["ours"].run.dtype
        )
        multiply = jax.jit(jnp.matmul).lower(a, b).compile()
        return lambda: multiply(a, b), 2 * n**3


def clock(run: Callable[[], Any], times: int) -> dict[str, float]:
    """Seconds per call, until the device is done."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        out = run()
    jax.block_until_ready(out)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu / times, "wall_s": wall / times}


def training(executable: Any, state: Any, batch: Any) -> Callable[[], Any]:
    """A run that takes the next step of a state of its own."""
    state = jax.tree.map(jnp.copy, state)  # each step destroys its input

    def run():
        nonlocal state
        state, scalars = executable(state, batch)
        return scalars

    return run


def measure(
    bench: Bench, variants: dict[str, dict[str, Any]], rounds: int, seconds: float
) -> dict[str, Any]:
    """Compiles and times; fills `variants` and returns what concerns all of them."""
    state, batch = bench.data()
    product, operations = bench.product()
    timed: dict[str, Any] = {"product": {"operations": operations}} | variants
    runs: dict[str, Callable[[], Any]] = {}
    calls: dict[str, int] = {}  # per timing, so that each lasts `seconds`
    logits: dict[str, Any] = {}
    for name, result in timed.items():
        kind, _, whose = name.partition(" ")
        say(f"compiling {name} ...")
        try:
            if kind == "product":
                run = product
            else:
                executable, costs = bench.compile(kind, whose)
                result |= costs
                if kind == "train":
                    run = training(executable, state, batch)
                else:
                    run = functools.partial(executable, state.params, batch["image"])
                    logits[whose] = np.asarray(run())
            jax.block_until_ready(run())
            calls[name] = max(1, round(seconds / clock(run, 1)["wall_s"]))
            runs[name] = run
        except jax.errors.JaxRuntimeError as error:  # e.g. out of memory: the rest runs
            result["error"] = str(error).splitlines()[0]
            say(f"{name}: {result['error']}")
    for i in range(rounds):
        say(f"round {i + 1}/{rounds} ...")
        # There and back, so that a drift of the machine favours nobody.
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            for key, value in clock(runs[name], calls[name]).items():
                timed[name].setdefault(key, []).append(value)
    out: dict[str, Any] = {"product": timed["product"]}
    stats = jax.devices()[0].memory_stats() or {}
    out["device_peak_bytes"] = stats.get("peak_bytes_in_use")  # of the whole run
    if len(logits) == 2:
        difference = np.abs(logits["ours"] - logits["literal"]).max()
        out["logits_difference"] = float(difference)
        out["logits_largest"] = float(np.abs(logits["literal"]).max())
    return out


def summarise(report: dict[str, Any]) -> None:
    """Adds medians, rates, shares and ratios to the raw times of `report`."""
    key, batch, variants = (report[k] for k in ("compared_by", "batch", "variants"))
    # CPU time adds up over devices as the work does; wall time passes once for all.
    devices = report["devices"] if key == "wall_s" else 1
    rate = None
    if times := report.get("product", {}).get(key):
        rate = report["product"]["operations"] / statistics.median(times)
        report["product"]["flops_per_s"] = rate
    for result in variants.values():
        if times := result.get(key):
            median = statistics.median(times)
            result |= {"median_s": median, "min_s": min(times), "max_s": max(times)}
            result["spread"] = (max(times) - min(times)) / median
            result["images_per_s"] = batch / median
            if rate:
                work = result["flops_per_image"] * batch / median
                result["share_of_product_rate"] = work / rate / devices
        for field in ("compile_cpu_s", "compile_wall_s"):
            if field in result:
                result[f"median_{field}"] = statistics.median(result[field])
    ratios = report["ratios"] = {}
    for kind in KINDS:
        ours, literal = (variants.get(f"{kind} {x}", {}) for x in ("ours", "literal"))
        for name, field, turned in (
            ("speed", "median_s", True),
            ("speed_of_best", "min_s", True),  # load only ever adds to a time
            ("temp_memory", "temp_bytes", False),
            ("compile_cpu", "median_compile_cpu_s", False),
        ):
            a, b = ours.get(field), literal.get(field)
            if a and b:
                ratios[f"{kind}_{name}"] = b / a if turned else a / b


# Heading, key of a variant, unit, format.
COLUMNS = (
    ("images/s", "images_per_s", 1, ".2f"),
    ("ms/call", "median_s", 1e-3, ".1f"),
    ("min", "min_s", 1e-3, ".1f"),
    ("max", "max_s", 1e-3, ".1f"),
    ("spread", "spread", 1, ".1%"),
    ("of rate", "share_of_product_rate", 1, ".1%"),
    ("GFLOP/img", "flops_per_image", 1e9, ".2f"),
    ("temp MiB", "temp_bytes", 2**20, ".1f"),
    ("args MiB", "argument_bytes", 2**20, ".1f"),
    ("compile: CPU s", "median_compile_cpu_s", 1, ".1f"),
    ("wall s", "median_compile_wall_s", 1, ".1f"),
)


def table(report: dict[str, Any]) -> str:
    """The report to read: one line per variant, then the ratios."""
    model = report["model"]
    lines = [
        f"{report['what']}: batch {report['batch']}, {model['image_size']}, "
        f"{model['dtype']}; training: scan={model['scan']}, remat={model['remat']}",
        f"{report['devices']} x {report['device_kind']}; jax "
        f"{report['versions']['jax']}, flax {report['versions']['flax']}; "
        f"{report['cpu_model']}, {report['cpu_threads'] or 'all'} CPU thread(s)",
        "",
        " ".join([" " * 15, *(f"{c[0]:>9}" for c in COLUMNS)]),
    ]
    for name, result in report["variants"].items():
        cells = [
            (format(result[key] / unit, form) if key in result else "-").rjust(
                max(9, len(heading))
            )
            for heading, key, unit, form in COLUMNS
        ]
        lines.append(" ".join([f"{name:15}", *cells, result.get("error", "")]))
    lines.append("")
    if rate := report.get("product", {}).get("flops_per_s"):
        kind = "CPU" if report["compared_by"] == "cpu_s" else "wall"
        lines.append(f"times: {kind} time; matrix product: {rate / 1e9:,.1f} GFLOP/s")
    if "logits_difference" in report:
        difference, largest = report["logits_difference"], report["logits_largest"]
        lines.append(
            f"logits: differ by {difference:.1e}, the largest is {largest:.1f}"
        )
    for name, ratio in report["ratios"].items():
        what = "times the literal's" if "speed" in name else "of the literal's"
        lines.append(f"{name:20}{ratio:6.2f} {what}")
    return "\n".join(lines + report["notes"])


def cpu_model() -> str:
    """The processor's own name for itself."""
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, switch = p.add_argument, argparse.BooleanOptionalAction
    flag("what", help="a model, e.g. mixer_b16, or a recipe, configs/x.py[:words]")
    flag(
        "--batch",
        type=arguments.whole(1),
        help="images; default: 8 on CPU, 256 elsewhere",
    )
    flag("--rounds", type=arguments.whole(1), help="default: 5; with --compile-only 1")
    seconds = arguments.real(0)
    flag("--seconds", type=seconds, default=1.0, help="at least, per timing")
    flag("--dtype", choices=("float32", "bfloat16"), help="of products")
    flag("--image_size", type=arguments.whole(1, 2**15), help="side in pixels")
    flag("--scan", action=switch, help="one scanned block; default: not on GPUs")
    flag("--remat", choices=REMAT_POLICIES, help="default: pre_gelu; on GPU none")
    flag("--override", action="append", default=[], metavar="KEY=VALUE", help="a field")
    flag("--peer", action=switch, default=True, help="the literal model too")
    flag("--only", choices=KINDS, help="half of it")
    flag("--compile-only", action="store_true", help="compile, but run nothing")
    flag("--devices", type=arguments.whole(1), default=1, help="on the mesh")
    threads = arguments.whole(0, 2**16)
    flag("--threads", type=threads, help="of the CPU backend; default: 1; 0: all cores")
    file = arguments.new_file
    flag("--out", type=file, metavar="FILE.json", help="where all raw figures go")
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark; prints the table and writes `--out`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["input"]:
        import input_benchmark  # needs the whole package, not five of its parts

        return input_benchmark.main(argv[1:], cpu_model())
    args = parser().parse_args(argv)
    try:
        job = job_of(args)
        threads = start_devices(args.threads, args.devices)
        on_cpu = jax.default_backend() == "cpu"
        batch = args.batch or (8 if on_cpu else 256)
        bench = Bench(job, batch, args.devices, args.peer)
    except ImportError as error:
        parser().error(str(error))
    except Exception as error:
        if (message := errors.message(error, ["benchmark"])) is None:
            raise
        parser().error(message)
    ours: Any = bench.models["ours"]
    report: dict[str, Any] = {
        "what": args.what,
        "command": "python scripts/benchmark.py " + " ".join(argv),
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (jax, jaxlib, flax, optax, np)},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "cpu_model": cpu_model(),
        "devices": bench.mesh.size,
        "cpu_threads": threads,
        "flags": {k: os.environ.get(k) for k in ("XLA_FLAGS", "NPROC")},
        "batch": batch,
        "model": fields_of(ours, type(ours))
        | {"image_size": bench.size, "dtype": jnp.dtype(ours.run.dtype).name}
        | {"scan": ours.run.scan, "remat": ours.run.remat},
        "optim": {"total_steps": job.total_steps} | job.optim,
        "loss": job.loss,
        "mixup": job.mixup,
        "compared_by": "cpu_s" if on_cpu else "wall_s",
        "notes": [
            f"note: the literal model has no {field}; here it is {value}"
            for field, value in fields_of(ours, type(ours)).items()
            if args.peer and field in ("gelu", "dropout", "stochastic_depth")
            if value not in ("tanh", 0)
        ],
        "variants": {
            f"{kind} {name}": {"flops_per_image": bench.flops[kind]}
            for kind in ([args.only] if args.only else KINDS)
            for name in bench.models
        },
    }
    jax.block_until_ready(jnp.ones(8) + 1)  # the compiler's own start is nobody's cost
    rounds = args.rounds or (1 if args.compile_only else 5)
    if not args.compile_only:
        report |= measure(bench, report["variants"], rounds, args.seconds)
    else:
        for i in range(rounds):
            for name, result in report["variants"].items():
                say(f"compiling {name}, round {i + 1}/{rounds} ...")
                _, costs = bench.compile(*name.split())
                for key in ("compile_cpu_s", "compile_wall_s"):
                    costs[key] = result.get(key, []) + costs[key]
                result |= costs
    summarise(report)
    if args.out:
        pathlib.Path(args.out).write_text(
            json.dumps(report, indent=1) + "\n", encoding="utf-8"
        )
    print(table(report))


if __name__ == "__main__":
    main()
