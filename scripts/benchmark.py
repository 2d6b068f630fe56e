"""Speed, memory and compile time: this package's model beside the literal one.

    python scripts/benchmark.py mixer_b16 --batch=8
    python scripts/benchmark.py mixer_h14 --batch=8 --compile-only
    python scripts/benchmark.py configs/mixer_b16.py:imagenet21k --out=b16.json
    python scripts/benchmark.py input        (the host's side: see input_benchmark.py)
    python scripts/benchmark.py suite --out=FOLDER      (everything: see suite.py)

Forward pass and training step of both, interleaved round by round in one process with
the same flags, optimiser and loss, beside a large matrix product as the ceiling. A
model's name runs with jax, flax, optax, einops and jaxtyping alone; a recipe needs
ml_collections too. CPU: by default one thread, compared by CPU time, which other
programs on the machine disturb least. Elsewhere: wall time.
"""

import argparse
import ast
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

import arguments
import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from measurement import (
    KINDS,
    OPTIM,
    Bench,
    Job,
    clock,
    cpu_model,
    fields_of,
    interleave,
    say,
    start_devices,
    statistics_of,
    training,
)

from mlp_mixer import errors
from mlp_mixer.models.trunk import REMAT_POLICIES


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
    given = {key: getattr(args, key) for key in HOW}
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


def measure(
    bench: Bench, variants: dict[str, dict[str, Any]], rounds: int, seconds: float
) -> dict[str, Any]:
    """Compiles and times; fills `variants` and returns what concerns all of them."""
    state, batch = bench.data()
    product, operations = bench.product()
    timed: dict[str, Any] = {"product": {"operations": operations}} | variants
    clocks: dict[str, Callable[[], dict[str, float]]] = {}
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
            timed_once = functools.partial(clock, run, wait=jax.block_until_ready)
            calls = max(1, round(seconds / timed_once(times=1)["wall_s"]))
            clocks[name] = functools.partial(timed_once, times=calls)
        except jax.errors.JaxRuntimeError as error:  # e.g. out of memory: the rest runs
            result["error"] = str(error).splitlines()[0]
            say(f"{name}: {result['error']}")
    for i, timings in enumerate(interleave(clocks, rounds), 1):
        say(f"round {i}/{rounds} is done")
        for name, timing in timings.items():
            for key, value in timing.items():
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
            result |= statistics_of(times)
            result["images_per_s"] = batch / result["median_s"]
            if rate:
                work = result["flops_per_image"] * result["images_per_s"]
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


# Flags that say how it is computed.
HOW = ("dtype", "scan", "remat", "images_at_once")
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
        f"{model['dtype']}; scan={model['scan']}, remat={model['remat']}, "
        f"images_at_once={model['images_at_once']}",
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
    flag("--scan", action=switch, help="one scanned block; default: on TPUs")
    flag("--remat", choices=REMAT_POLICIES, help="default: none; scanned pre_gelu")
    several = arguments.whole(1)
    flag(
        "--images_at_once", type=several, help="default: all; what a CPU's cache holds"
    )
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
    if argv[:1] == ["suite"]:
        import suite

        return suite.main(argv[1:])
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
        if (message := errors.message(error, ["benchmark", "measurement"])) is None:
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
        | {key: getattr(ours.run, key) for key in HOW[1:]},
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
