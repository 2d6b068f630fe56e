"""The kernels of a compiled program, and what they read, write and compute.

Bytes are those of arrays in the device's memory; caches and a TPU's on-chip memory do
not count. A loop's kernels count as often as the loop turns.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

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
    "channel": re.compile(r"\bchannel_id=(\d+)"),
    "turns": re.compile(r'"known_trip_count":\{"n":"(\d+)"\}'),
    "cycles": re.compile(r'"estimated_cycles":"(\d+)"'),
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
      cycles: the compiler's estimate of a turn, on a TPU; else 0.
      carried: bytes of a collective's results, wherever they lie.
      channel: the number of a collective; a TPU that computes meanwhile writes the same
        one several times. "" if it has none.
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
    cycles: int = 0
    carried: int = 0
    channel: str = ""


def kernels(text: str, *, open_loops: int | None = None) -> list[Kernel]:
    """Returns the kernels of an optimised program, in the order in which they run.

    Args:
      text: what `as_text()` of an executable returns.
      open_loops: turns of a loop that runs until its data say so, e.g. one that draws
        from a distribution; None: such a loop is an error.

    Raises:
      ValueError: the text is no optimised program, or it has an open loop.
    """
    computations, entry = read_program(text)
    return list(_kernels(computations, entry, 1, open_loops))


def _kernels(
    computations: dict[str, Computation], name: str, turns: int, open_loops: int | None
) -> Iterator[Kernel]:
    computation = computations[name]
    for one in computation.values():
        if one.opcode == "while":
            repeated = turns * _turns(computations, one, open_loops)
            yield from _kernels(
                computations, one.attribute("body"), repeated, open_loops
            )
        elif one.opcode in ("call", "async-start"):
            called = one.attribute("to_apply") or one.attribute("calls")
            yield from _kernels(computations, called, turns, open_loops)
        elif one.opcode == "conditional":
            for branch in re.findall(r"%([\w.-]+)", one.rest):
                if branch in computations:
                    yield from _kernels(computations, branch, turns, open_loops)
        elif not (
            one.opcode in _FREE
            or one.opcode.endswith(("-done", "-update"))
            or one.attribute("target") in _FREE_CALLS
        ):
            yield _kernel(computations, computation, one, turns)


def _turns(
    computations: dict[str, Computation], loop: Instruction, open_loops: int | None
) -> int:
    """How often a loop runs: the compiler's word, or what its counter stops at."""
    if known := loop.attribute("turns"):
        return int(known)
    condition = computations[loop.attribute("condition")]
    root = next(one for one in condition.values() if one.is_root)
    ends = [condition[name] for name in root.operands]
    ends = [one for one in ends if one.opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.rest or len(ends) != 1:
        if open_loops is not None:
            return open_loops
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
        kind = GENERATED  # perhaps with a collective that goes on meanwhile
    elif travels := opcodes & {*_COLLECTIVES, *(f"{c}-start" for c in _COLLECTIVES)}:
        kind, work = "collective", min(travels).removesuffix("-start")
        if work == "all-reduce" and "dynamic-slice" in opcodes:
            work = "reduce-scatter"  # a TPU's, as a fusion
    elif one.opcode == "custom-call":
        kind, work = "call", target
    elif opcodes <= _MOVED_BY:
        kind = "copy"
    path = one.attribute("op_name")
    where = "forward" if path else "other"
    if "transpose(jvp(" in path:
        where = "backward"
    elif path.startswith("jit(train_step)") and "jvp(" not in path:
        where = "update"
    read, written = _traffic(computations, computation, one)
    carried, channel = 0, ""
    if kind == "collective":
        done = [i for i in computation.values() if i.opcode.endswith("-done")]
        ends = [i.shape for i in done if one.name in i.operands]
        first = next(
            i for i in inner if i.opcode.removesuffix("-start") in _COLLECTIVES
        )
        channel = first.attribute("channel")
        begun = len(inner) > 1 and one.shape.startswith("(")  # and goes on elsewhere
        carried = _length(ends[0] if ends else first.shape if begun else one.shape)
    return Kernel(
        *(one.name, kind, where, _part(path), work, read, written, flops, turns),
        cycles=int(one.attribute("cycles") or 0),
        carried=carried,
        channel=channel,
    )


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
    parameters = _parameters(body)
    read = 0
    for position, name in enumerate(one.operands):
        if name in one.operands[:position] or name not in computation:
            continue
        whole = sum(_sizes(computation[name].shape))
        if position in parameters:
            name = parameters[position]
            whole = min(whole, _part_read(computations, body, name, whole))
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


def _part_read(
    computations: dict[str, Computation], body: Computation, parameter: str, whole: int
) -> int:
    """What a fusion reads of a parameter: slices of it, or all."""
    read = 0
    for user in body.values():
        if parameter not in user.operands:
            continue
        position = user.operands.index(parameter)
        if user.opcode == "bitcast":
            read += _part_read(computations, body, user.name, whole)
        elif user.opcode == "fusion":
            inner = computations[user.attribute("calls")]
            name = _parameters(inner)[position]
            read += _part_read(computations, inner, name, whole)
        elif user.opcode in _PART_READ and not position:
            read += _length(user.shape)
        elif user.opcode != "dynamic-update-slice" or position:
            return whole  # of an array that is updated in place, nothing is read
    return read


def _parameters(body: Computation) -> dict[int, str]:
    """The names of a computation's parameters by position."""
    return {
        int(re.match(r"\d+", i.rest)[0]): i.name  # type: ignore[index]
        for i in body.values()
        if i.opcode == "parameter"
    }


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


def collectives(found: list[Kernel]) -> dict[str, tuple[int, float]]:
    """Returns kind → how often it runs, and the bytes of its results.

    Args:
      found: kernels of `kernels`.
    """
    sums: dict[str, tuple[int, float]] = {}
    seen = set[str]()
    for k in found:
        if k.kind == "collective" and (not k.channel or k.channel not in seen):
            seen.add(k.channel)
            count, carried = sums.get(k.work, (0, 0.0))
            sums[k.work] = count + k.turns, carried + k.turns * k.carried
    return sums
