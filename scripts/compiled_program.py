"""The kernels of a compiled program, and what they read and write.

    python scripts/compiled_program.py mixer_b16 --chip=h200 --batch=256 --blocks=2
    python scripts/compiled_program.py mixer_b16 --chip=v5e --batch=128
    python scripts/compiled_program.py mixer_b16 --chip=h200 --products=library
    python scripts/compiled_program.py FOLDER/programs/NAME.hlo.gz   (kept by the suite)

Compiles for a chip that need not be here. NVIDIA: without the card nothing is timed,
so every product is a generated kernel with the compiler's default tiles, or, with
`--products=library`, a call of cuBLASLt; on the card the compiler chooses one by one.

A model of `--blocks` blocks and one of twice as many are compiled: the difference is
what a block costs, whether blocks are unrolled or scanned. Bytes are those of arrays in
the device's memory; caches and a TPU's on-chip memory do not count.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import types
from typing import Any

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

import arguments

from mlp_mixer.planning import chips, hlo, targets

# --- Compiling for a chip that is not here --------------------------------------------

# bfloat16. Hopper: what such cards reach; v5e: the data sheet.
CHIPS = {
    "h100": hlo.Rates(790e12, 3.0e12),
    "h200": hlo.Rates(790e12, 4.3e12),
    "v5e": hlo.Rates(197e12, 0.82e12),
}
# Products as calls of cuBLASLt, with what it can do after them.
_LIBRARY_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def device_of(chip: str) -> list[Any]:
    """Returns one device to compile for.

    Raises:
      RuntimeError: the compiler's wheels are missing.
    """
    # Four, since libtpu has no topology of one chip of any kind.
    name = {"v5e": "v5e:2x2"}.get(chip, f"{chip}:1")
    return targets.devices(*chips.topologies(name))[:1]


def compile_step(args: argparse.Namespace, blocks: int) -> Any:
    """Returns the executable of a training step, or of inference.

    Args:
      args: the parsed command line.
      blocks: number of blocks.
    """
    import bias_row
    import jax
    import measurement

    from mlp_mixer import experiment, sharding, steps

    given = {key: getattr(args, key) for key in ("dtype", "scan", "remat")}
    size = (args.image_size, args.image_size)
    job = measurement.Job(
        {"name": args.what, "image_size": size, "num_blocks": blocks},
        types.SimpleNamespace(num_classes=1000),
        dict(measurement.OPTIM),
        100_000,
        {key: value for key, value in given.items() if value is not None},
    )
    mesh = sharding.make_mesh(devices=device_of(args.chip))
    model: Any = experiment.create_model(job, mesh, 1000)
    example = {"image": jax.ShapeDtypeStruct((1, *size, 3), "uint8")}
    if args.literal:
        model = measurement.literal_of(model)
    built = experiment.build(job, mesh, example, job.total_steps, model=model)
    train_step: Any = built.train_step
    cut = sharding.batch(mesh)
    image = jax.ShapeDtypeStruct((args.batch, *size, 3), "uint8", sharding=cut)
    label = jax.ShapeDtypeStruct((args.batch,), "int32", sharding=cut)

    def forward(params: Any, image: Any) -> Any:
        return model.apply({"params": params}, steps.value_range(image))[0]

    with bias_row.traced() if args.bias_row else contextlib.nullcontext():
        if args.forward:
            lowered = jax.jit(forward).lower(built.target.params, image)
        else:
            batch = {"image": image, "label": label}
            lowered = train_step.lower(built.target, batch)
    options: dict[str, Any] = {}
    if args.products == "library":
        options |= _LIBRARY_OPTIONS
    options |= dict(args.option)
    return lowered.compile(compiler_options=options or None)


def compiler_option(text: str) -> tuple[str, bool | int | str]:
    """Returns a compiler's option, NAME=VALUE, as a pair of name and value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.isdecimal() else value


# --- The command ----------------------------------------------------------------------


def table(found: list[hlo.Kernel], rates: hlo.Rates, least: float = 1e6) -> str:
    """Returns the kernels to read, alike ones of one part together.

    Args:
      found: kernels of `kernels`.
      rates: what the chip is assumed to reach.
      least: bytes that a kernel must read and write to be listed.
    """
    groups: dict[tuple, list[hlo.Kernel]] = collections.defaultdict(list)
    for k in found:
        if (k.read + k.written) * k.turns >= least:
            part = re.sub(r"_\d+(?=/|$)", "_*", k.part, count=1)
            groups[k.where, k.kind, part, k.work, k.read, k.written].append(k)
    lines = [f"{'':4} {'read MB':>8} {'written':>8} {'GFLOP':>7} {'bound us':>8}"]
    for (where, kind, part, work, read, written), same in groups.items():
        turns = sum(k.turns for k in same)
        bound = sum(rates.seconds(k) for k in same) / turns
        lines.append(
            f"{turns:3}x {read / 1e6:8.1f} {written / 1e6:8.1f} "
            f"{same[0].flops / 1e9:7.1f} {bound * 1e6:8.1f}  "
            f"{where} {kind}: {part} [{work}]"
        )
    return "\n".join(lines)


def per_block(
    few: list[hlo.Kernel], many: list[hlo.Kernel], blocks: int, images: int
) -> dict[str, float]:
    """Returns what kernels other than products write, bytes per image and block.

    Args:
      few: kernels of a program with `blocks` blocks.
      many: kernels of one with twice as many.
      blocks: number of blocks of the former.
      images: images of the batch.
    """
    result = {}
    for where in hlo.PASSES:
        more = hlo.elsewhere_written(many, where) - hlo.elsewhere_written(few, where)
        result[where] = more / blocks / images
    return result | {"all": sum(result.values())}


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    flag("what", help="a model, e.g. mixer_b16, or the file of a kept program")
    flag("--chip", choices=CHIPS, default="h200", help="what is compiled for")
    flag("--batch", type=arguments.whole(1), default=256, help="images")
    flag("--blocks", type=arguments.whole(1), default=2, help="blocks of the smaller")
    flag("--image_size", type=arguments.whole(1, 2**15), default=224, help="in pixels")
    flag("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    flag("--scan", action=argparse.BooleanOptionalAction, help="one scanned block")
    flag("--remat", help="none, pre_gelu or full")
    flag("--forward", action="store_true", help="inference, not a training step")
    flag("--literal", action="store_true", help="the literal model in place of ours")
    flag("--bias_row", action="store_true", help="token mixing as in bias_row.py")
    flag("--products", choices=("generated", "library"), default="generated")
    flag(
        "--option",
        action="append",
        default=[],
        type=compiler_option,
        metavar="NAME=VALUE",
        help="of the compiler, e.g. xla_gpu_enable_cublaslt=false",
    )
    flag("--hlo", type=arguments.new_file, help="where the program's text goes")
    flag("--out", type=arguments.new_file, help="where the kernels go, as JSON")
    return p


def read_text(path: str) -> str:
    """Returns the text of a program that was kept, e.g. by the suite (.hlo.gz)."""
    data = pathlib.Path(path).read_bytes()
    return (gzip.decompress(data) if path.endswith(".gz") else data).decode()


def compile_both(args: argparse.Namespace) -> tuple[list[str], str]:
    """Returns the texts of both programs, and a line on the memory of the smaller."""
    executables = [compile_step(args, n) for n in (args.blocks, 2 * args.blocks)]
    memory = executables[0].memory_analysis().temp_size_in_bytes
    line = (
        f"{args.what}, {args.blocks} blocks, batch {args.batch}, {args.chip}, jax "
        f"{importlib.metadata.version('jax')}: temporary memory "
        f"{memory / 2**20:,.0f} MiB"
    )
    return [e.as_text() for e in executables], line


def main(argv: list[str] | None = None) -> None:
    """Compiles, or reads a kept program; prints the table, writes `--out`, `--hlo`."""
    args = parser().parse_args(argv)
    rates, blocks, images = CHIPS[args.chip], args.blocks, args.batch
    report: dict[str, Any] = {}
    if os.path.exists(args.what):
        texts, line = [read_text(args.what)], args.what
    else:
        if message := targets.missing_wheels(args.chip):
            parser().error(message)
        # Before JAX starts: else a device that is here would hide the compiler.
        os.environ["JAX_PLATFORMS"] = "cpu"
        texts, line = compile_both(args)
    found = [hlo.kernels(text) for text in texts]
    report["kernels"] = [dataclasses.asdict(k) for k in found[0]]
    report["totals"] = sums = hlo.totals(found[0], rates)
    bounds = [sum(map(rates.seconds, each)) for each in found]
    line += f"; bound {bounds[0] * 1e3:.2f} ms"
    print(table(found[0], rates))
    print(f"\n{'':28} {'kernels':>7} {'read MB':>8} {'written':>8} {'bound us':>9}")
    for name, e in sorted(sums.items()):
        print(
            f"{name:28} {e['kernels']:7.0f} {e['read'] / 1e6:8.0f} "
            f"{e['written'] / 1e6:8.0f} {e['seconds'] * 1e6:9.0f}"
        )
    print("\n" + line)
    if len(found) == 2:
        written = per_block(found[0], found[1], blocks, images)
        report["written_per_image_and_block"] = written
        report["bound_per_block"] = (bounds[1] - bounds[0]) / blocks
        print(
            f"a block: bound {report['bound_per_block'] * 1e3:.3f} ms; written by "
            "kernels other than products, KB per image: "
            + ", ".join(f"{k} {v / 1e3:,.0f}" for k, v in written.items())
        )
    if args.hlo:
        pathlib.Path(args.hlo).write_text(texts[0], encoding="utf-8")
    if args.out:
        words = sys.argv[1:] if argv is None else argv
        report["command"] = " ".join(["python scripts/compiled_program.py", *words])
        report["jax"] = importlib.metadata.version("jax")
        out = json.dumps(report, indent=1) + "\n"
        pathlib.Path(args.out).write_text(out, encoding="utf-8")


if __name__ == "__main__":
    main()
