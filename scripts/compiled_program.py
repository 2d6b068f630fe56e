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
import math
import os
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

# Also in a bare clone, where the package is not installed; and always this clone's.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

import arguments

# --- The text of a program ------------------------------------------------------------

_BITS = re.compile(r"^[a-z]+?(\d+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ATTRIBUTE = {
    "calls": re.compile(r"\bcalls=%?([\w.-]+)"),
    "to_apply": re.compile(r"\bto_apply=%?([\w.-]+)"),
    "condition": re.compile(r"\bcondition=%?([\w.-]+)"),
    "body": re.compile(r"\bbody=%?([\w.-]+)"),
    "op_name": re.compile(r'\bop_name="([^"]*)"'),
    "target": re.compile(r'\bcustom_call_target="([^"]*)"'),
    "epilogue": re.compile(r'"epilogue":"(\w+)"'),
    "beta": re.compile(r'"beta":([\d.]+)'),
    "turns": re.compile(r'"known_trip_count":\{"n":"(\d+)"\}'),
    "contracted": re.compile(r"\blhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)"),
}


@dataclasses.dataclass
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool

    def attribute(self, key: str) -> str:
        """Returns the attribute, a key of `_ATTRIBUTE`; "" if there is none."""
        found = _ATTRIBUTE[key].search(self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def read_program(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of an optimised program by name, and the entry's name.

    Args:
      text: what `as_text()` of an executable returns.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        heading = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if heading:
            current = computations[heading[2]] = {}
            entry = heading[2] if heading[1] else entry
        elif line.startswith("  ") and (one := _instruction(line)):
            current[one.name] = one
    if not entry:
        raise ValueError(
            "The text has no ENTRY computation; expected the optimised program of an "
            "executable, jitted.lower(...).compile().as_text()."
        )
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"  (ROOT )?%?([\w.-]+) = (.*)", line)
    if not found:
        return None
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    operands = [] if opcode in _NO_OPERANDS else re.findall(r"%([\w.-]+)", inside)
    return Instruction(
        found[2], shape, opcode, operands, inside + rest[end:], bool(found[1])
    )


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"A bracket is never closed: {text[:80]!r}")


def _sizes(shape: str) -> list[int]:
    """The bytes of each array of a shape; 0 for those outside the device's memory."""
    sizes = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _BITS.match(dtype)
        width = int(bits[1]) if bits else 8 * (dtype == "pred")  # a token has none
        elsewhere = re.search(r"S\([1-9]\d*\)", layout)
        sizes.append(0 if elsewhere else -(-width * _elements(dims) // 8))
    return sizes


def _elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


# --- Kernels --------------------------------------------------------------------------

_NO_OPERANDS = ("parameter", "constant", "iota")
# What runs nothing: names for memory that is there already.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "domain", "add-dependency"),
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_MOVES = {
    *("copy", "copy-start", "transpose", "pad", "slice", "concatenate", "reverse"),
    *("dynamic-slice", "dynamic-update-slice", "slice-start", "gather", "scatter"),
}
_MOVED_BY = _MOVES | _FREE | {"convert", "reshape", "broadcast", "fusion", "iota"}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_PRODUCTS = ("dot", "convolution")
_PART_READ = ("slice", "dynamic-slice", "gather", "slice-start")

LIBRARY, GENERATED = "library product", "product fusion"
PRODUCTS = (LIBRARY, GENERATED)
PASSES = ("forward", "backward", "update", "other")
KINDS = (*PRODUCTS, "fusion", "copy", "collective", "call")


@dataclasses.dataclass
class Kernel:
    """What runs as one, or is called as one.

    Attributes:
      name: its name in the program.
      kind: one of `KINDS`; a "copy" only moves or casts.
      where: one of `PASSES`; "other" is what the program has no name for.
      part: the part of the model, e.g. MixerBlock_0/token_mixing/Dense_0.
      work: the epilogue of a library product; the opcodes of others.
      read, written: bytes in the device's memory, per turn.
      flops: operations of its products, per turn; 2 per multiply-add.
      turns: how often it runs, as a part of a loop.
    """

    name: str
    kind: str
    where: str
    part: str
    work: str
    read: int
    written: int
    flops: int
    turns: int = 1


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of an optimised program, in the order in which they run.

    Args:
      text: what `as_text()` of an executable returns.
    """
    computations, entry = read_program(text)
    return list(_kernels(computations, entry, 1))


def _kernels(
    computations: dict[str, Computation], name: str, turns: int
) -> Iterator[Kernel]:
    computation = computations[name]
    for one in computation.values():
        if one.opcode == "while":
            repeated = turns * _turns(computations, one)
            yield from _kernels(computations, one.attribute("body"), repeated)
        elif one.opcode in ("call", "async-start"):
            called = one.attribute("to_apply") or one.attribute("calls")
            yield from _kernels(computations, called, turns)
        elif one.opcode == "conditional":
            for branch in re.findall(r"%([\w.-]+)", one.rest):
                if branch in computations:
                    yield from _kernels(computations, branch, turns)
        elif not (
            one.opcode in _FREE
            or one.opcode.endswith(("-done", "-update"))
            or one.attribute("target") in _FREE_CALLS
        ):
            yield _kernel(computations, computation, one, turns)


def _turns(computations: dict[str, Computation], loop: Instruction) -> int:
    """How often a loop runs: the compiler's word, or what its counter stops at."""
    if known := loop.attribute("turns"):
        return int(known)
    condition = computations[loop.attribute("condition")]
    root = next(one for one in condition.values() if one.is_root)
    ends = [condition[name] for name in root.operands]
    ends = [one for one in ends if one.opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.rest or len(ends) != 1:
        raise ValueError(
            f"{loop.name}: the program does not say how often this loop runs; "
            "expected a scan, whose length is fixed."
        )
    return int(re.match(r"\d+", ends[0].rest)[0])  # type: ignore[index]


def _kernel(
    computations: dict[str, Computation],
    computation: Computation,
    one: Instruction,
    turns: int,
) -> Kernel:
    inner = list(_inside(computations, one))
    opcodes = {i.opcode for i in inner} - _FREE
    target = one.attribute("target")
    kind, work = "fusion", " ".join(sorted(opcodes - {"convert", "broadcast"}))
    flops = sum(_flops(i, _scope(computations, computation, i)) for i in inner)
    if target.startswith(("__cublas", "__cudnn")):
        kind, work = LIBRARY, f"{target} {one.attribute('epilogue')}".strip()
        work += " + C" * (float(one.attribute("beta") or 0) != 0)
        flops = _flops(one, computation)
    elif opcodes & set(_PRODUCTS):
        kind = GENERATED
    elif one.opcode == "custom-call":
        kind, work = "call", target
    elif one.opcode.removesuffix("-start") in _COLLECTIVES:
        kind = "collective"
    elif opcodes <= _MOVED_BY:
        kind = "copy"
    path = one.attribute("op_name")
    where = "forward" if path else "other"
    if "transpose(jvp(" in path:
        where = "backward"
    elif path.startswith("jit(train_step)") and "jvp(" not in path:
        where = "update"
    read, written = _traffic(computations, computation, one)
    return Kernel(one.name, kind, where, _part(path), work, read, written, flops, turns)


def _inside(
    computations: dict[str, Computation], one: Instruction
) -> Iterator[Instruction]:
    """The instructions of a fusion, those of fusions inside of it included."""
    if one.opcode != "fusion":
        yield one
        return
    for part in computations[one.attribute("calls")].values():
        yield from _inside(computations, part)


def _scope(
    computations: dict[str, Computation], here: Computation, one: Instruction
) -> Computation:
    """The computation in which the operands of a product are found."""
    if one.opcode not in _PRODUCTS or here.get(one.name) is one:
        return here
    return next(c for c in computations.values() if c.get(one.name) is one)


def _flops(one: Instruction, scope: Computation) -> int:
    if one.opcode not in _PRODUCTS and not one.attribute("contracted"):
        return 0
    shapes = [_ARRAY.findall(scope[name].shape)[0][1] for name in one.operands[:2]]
    result = _elements(_ARRAY.findall(one.shape)[0][1])
    if one.opcode == "convolution":  # a TPU's product; (mk · kn / mn)^½ = k
        left, right = map(_elements, shapes)
        return 2 * result * round(math.sqrt(left * right / result))
    lengths = [int(d) for d in shapes[0].split(",")]
    axes = re.findall(r"\d+", one.attribute("contracted"))
    return 2 * result * math.prod(lengths[int(axis)] for axis in axes)


def _traffic(
    computations: dict[str, Computation], computation: Computation, one: Instruction
) -> tuple[int, int]:
    """The bytes that an instruction reads and writes."""
    written = _sizes(one.shape)
    if one.opcode.removesuffix("-start") in ("copy", "slice", "dynamic-slice"):
        # copy-start makes (result, source, …), slice-start (source, result, …).
        position = int(one.opcode == "slice-start")
        source = computation[one.operands[0]].shape
        length, whole = (
            _elements(_ARRAY.findall(shape)[i][1])
            for shape, i in ((one.shape, position), (source, 0))
        )
        return sum(_sizes(source)) * length // whole, written[position]
    body: Computation = {}
    if one.opcode == "fusion":
        body = computations[one.attribute("calls")]
    parameters = {
        int(re.match(r"\d+", i.rest)[0]): i.name  # type: ignore[index]
        for i in body.values()
        if i.opcode == "parameter"
    }
    read = 0
    for position, name in enumerate(one.operands):
        if name in one.operands[:position] or name not in computation:
            continue
        whole = sum(_sizes(computation[name].shape))
        if position in parameters:
            whole = min(whole, _part_read(body, parameters[position], whole))
        elif one.opcode == "dynamic-update-slice" and not position:
            whole = 0  # it is updated in place
        read += whole
    if one.attribute("target").startswith("__cublas") and len(written) > 1:
        written.pop()  # the library's workspace
    if body or one.opcode == "dynamic-update-slice":
        root, inside = one, computation
        if body:
            root, inside = next(i for i in body.values() if i.is_root), body
        results = [root]
        if root.opcode == "tuple":
            results = [inside[name] for name in root.operands]
        written = list(map(min, written, (_made(inside, r) for r in results)))
    return read, sum(written)


def _part_read(body: Computation, parameter: str, whole: int) -> int:
    """What a fusion reads of a parameter: slices of it, or all."""
    read = 0
    for user in body.values():
        if parameter not in user.operands:
            continue
        if user.opcode == "bitcast":
            read += _part_read(body, user.name, whole)
        elif user.opcode in _PART_READ and user.operands[0] == parameter:
            read += _length(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
            return whole  # of an array that is updated in place, nothing is read
    return read


def _made(body: Computation, result: Instruction) -> int:
    """The bytes of an array that are new: all, or a slice that is set in it."""
    while result.opcode == "bitcast" and result.operands[0] in body:
        result = body[result.operands[0]]
    if result.opcode == "dynamic-update-slice" and result.operands[1] in body:
        result = body[result.operands[1]]
    return _length(result.shape)


def _length(shape: str) -> int:
    """The bytes of a shape, wherever they lie."""
    return sum(_sizes(re.sub(r"S\(\d+\)", "", shape)))


def _part(path: str) -> str:
    """The modules on an instruction's path, without functions and transformations."""
    found = re.search(r"jvp\(\w*\)+/(.*)", path.partition(";")[0])
    inside = (
        found[1]
        if found
        else re.sub(r"^(jit\(\w+\)/)?((Literal|Mlp)Mixer/)?", "", path)
    )
    names = [n for n in inside.split("/") if not re.search(r"[(,>]", n)]
    names = [
        n for n in names if n not in ("while", "body", "closed_call", "checkpoint")
    ]
    return "/".join(names[:-1] or names)


# --- Sums -----------------------------------------------------------------------------


def elsewhere_written(found: list[Kernel], where: str) -> int:
    """Returns the bytes that kernels other than products write.

    Args:
      found: kernels of `kernels`.
      where: the pass, one of `PASSES`.
    """
    return sum(
        k.written * k.turns
        for k in found
        if k.kind not in PRODUCTS and k.where == where
    )


@dataclasses.dataclass
class Rates:
    """What a chip is assumed to reach."""

    flops: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """Returns the shortest time of all turns: products, or memory."""
        moved = (kernel.read + kernel.written) / self.bandwidth
        return kernel.turns * max(kernel.flops / self.flops, moved)


def totals(found: list[Kernel], rates: Rates) -> dict[str, dict[str, float]]:
    """Returns number, bytes, operations and shortest time by kind and pass."""
    sums: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: dict.fromkeys(("kernels", "read", "written", "flops", "seconds"), 0.0)
    )
    for k in found:
        entry = sums[f"{k.where} {k.kind}"]
        entry["kernels"] += k.turns
        for field in ("read", "written", "flops"):
            entry[field] += k.turns * getattr(k, field)
        entry["seconds"] += rates.seconds(k)
    return dict(sums)


# --- Compiling for a chip that is not here --------------------------------------------

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}
  clock_rate_ghz: 1.98  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
# bfloat16. Hopper: what such cards reach; v5e: the data sheet.
CHIPS = {
    "h100": Rates(790e12, 3.0e12),
    "h200": Rates(790e12, 4.3e12),
    "v5e": Rates(197e12, 0.82e12),
}
_TARGETS = {
    "h100": _HOPPER.format(
        name="H100 80GB HBM3", bandwidth=3352 * 10**9, cache=52428800, memory=85 * 10**9
    ),
    "h200": _HOPPER.format(
        name="H200", bandwidth=4800 * 10**9, cache=62914560, memory=150 * 10**9
    ),
}
# Products as calls of cuBLASLt, with what it can do after them.
_LIBRARY_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def missing_wheels(chip: str) -> str:
    """Returns how to install the compiler for `chip`; "" if it is there."""
    if chip == "v5e":
        if importlib.util.find_spec("libtpu"):
            return ""
        return "The compiler for v5e is in the wheel libtpu: pip install libtpu"
    if any(_installed(f"jax_plugins.xla_cuda{n}") for n in (13, 12)):
        return ""
    version = importlib.metadata.version("jax")
    return (
        f"The compiler for {chip} is in two wheels of jax's own version: pip install "
        f"--no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it is not there either
        return False


def devices_of(chip: str) -> list[Any]:
    """Returns one device to compile for.

    Raises:
      RuntimeError: the compiler's wheels are missing.
    """
    if message := missing_wheels(chip):
        raise RuntimeError(message)
    from jax.experimental import topologies

    if chip == "v5e":
        # Else libtpu asks the network what machine this is.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    else:
        topology = topologies.get_topology_desc(
            chip, "cuda", topology="1x1x1", target_config=_TARGETS[chip]
        )
    return list(topology.devices)[:1]


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
    mesh = sharding.make_mesh(devices=devices_of(args.chip))
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


def table(found: list[Kernel], rates: Rates, least: float = 1e6) -> str:
    """Returns the kernels to read, alike ones of one part together.

    Args:
      found: kernels of `kernels`.
      rates: what the chip is assumed to reach.
      least: bytes that a kernel must read and write to be listed.
    """
    groups: dict[tuple, list[Kernel]] = collections.defaultdict(list)
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
    few: list[Kernel], many: list[Kernel], blocks: int, images: int
) -> dict[str, float]:
    """Returns what kernels other than products write, bytes per image and block.

    Args:
      few: kernels of a program with `blocks` blocks.
      many: kernels of one with twice as many.
      blocks: number of blocks of the former.
      images: images of the batch.
    """
    result = {}
    for where in PASSES:
        more = elsewhere_written(many, where) - elsewhere_written(few, where)
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
        if message := missing_wheels(args.chip):
            parser().error(message)
        # Before JAX starts: else a device that is here would hide the compiler.
        os.environ["JAX_PLATFORMS"] = "cpu"
        texts, line = compile_both(args)
    found = [kernels(text) for text in texts]
    report["kernels"] = [dataclasses.asdict(k) for k in found[0]]
    report["totals"] = sums = totals(found[0], rates)
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
