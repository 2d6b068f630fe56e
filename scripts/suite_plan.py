"""What the suite measures, in order of value: the list to edit.

An `Item` is what is timed together in one process, interleaved round by round. A `Side`
is one thing that is timed: a model, whose, which pass, at which batch, compiled how.
"""

import dataclasses
from typing import Any

import measurement

from mlp_mixer import models
from mlp_mixer.models.mixer import SIZES

# Modes of timm that take long to compile.
SLOW_MODES = ("compiled", "max-autotune")


@dataclasses.dataclass(frozen=True)
class Side:
    """One thing that is timed, or only compiled.

    Attributes:
      label: its name within the item; the first side is what others are compared with.
      whose: "ours", "literal", "stacked" (ours, with the state stacked in memory),
        "bias row" (ours, see bias_row.py), "timm" or "onnxruntime".
      kind: "train" (a whole step) or "forward".
      model: a key of `SIZES`.
      batch: number of images of one call.
      image_size: side of the images in pixels.
      fields: other values of the model's fields, e.g. num_blocks.
      run: fields of `models.Run` that are not left to choice.
      accumulate: number of micro-batches of a training step.
      options: the compiler's options; timm's: {"mode": …}, see timm_peer.py.
      timed: whether it runs; otherwise it is only compiled.
      program: whether the compiled program is kept as a file.
    """

    label: str
    whose: str = "ours"
    kind: str = "train"
    model: str = "mixer_b16"
    batch: int = 8
    image_size: int = 224
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    timed: bool = True
    program: bool = False

    @property
    def fields_now(self) -> dict[str, Any]:
        """All fields of its model."""
        return SIZES[self.model] | self.fields

    @property
    def flops(self) -> int:
        """Floating-point operations per image, of products alone."""
        model = models.create(self.model, num_classes=1000, **self.fields)
        size = (self.image_size, self.image_size)
        return measurement.flops(model, size)[self.kind]


@dataclasses.dataclass(frozen=True)
class Item:
    """Sides that one process times together.

    Attributes:
      name: what it is called, also as a file.
      sides: what is timed; none: the rates of products and copies.
      rounds: number of timings of each side.
      curve: what its sides are a curve of: "batch", "tokens" or "depth".
    """

    name: str
    sides: tuple[Side, ...] = ()
    rounds: int = 5
    curve: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What of a machine decides how long an item takes.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      rate: operations per second of large products.
      train_s, forward_s: seconds to compile a pass of 12 blocks.
      torch_s: seconds until a compiled step of timm runs.
      start_s: seconds to start a process.
      seconds: the least that one timing lasts.
    """

    platform: str
    rate: float
    train_s: float
    forward_s: float
    torch_s: float
    start_s: float
    seconds: float


MACHINES = {
    "cpu": Machine("cpu", 70e9, 9, 5, 60, 4, 0.5),
    "gpu": Machine("gpu", 600e12, 13, 4, 30, 10, 0.4),
    "tpu": Machine("tpu", 100e12, 20, 8, 30, 15, 0.4),
}


def beside(
    kind: str,
    model: str,
    batch: int,
    *peers: str,
    also: str = "",
    rounds: int = 5,
    **more: Any,
) -> Item:
    """Returns an item of our model beside its peers.

    Args:
      kind, model, batch: fields of all sides.
      *peers: what they are compared with: "literal", "timm MODE", "onnxruntime".
      also: end of its name, where an item of this pass, model and batch is there.
      rounds: number of timings of each side.
      **more: other fields of our side.
    """
    sides = [Side("ours", kind=kind, model=model, batch=batch, **more)]
    for peer in peers:
        whose, _, mode = peer.partition(" ")
        options = {"mode": mode} if mode else {}
        sides.append(Side(peer, whose, kind, model, batch, options=options))
    return Item(f"{kind} {model} batch {batch}{also}", tuple(sides), rounds)


def variants(
    name: str, base: Side, others: dict[str, dict[str, Any]], **of: Any
) -> Item:
    """Returns an item of one side and of others that differ from it in some fields."""
    made = (dataclasses.replace(base, label=k, **v) for k, v in others.items())
    return Item(name, (base, *made), **of)


def images_at_once(count: int, **run: Any) -> dict[str, Any]:
    """Returns what a side is given to compute so many images at a time."""
    return {"run": {"images_at_once": count, **run}}


ALL = 2**20  # images: more than any batch
FORMS = {
    f"{shape}, keeps {what}": images_at_once(ALL, scan=scan, remat=remat)
    for shape, scan in (("unrolled", False), ("scanned", True))
    for what, remat in (
        ("everything", "none"),
        ("pre-GELU", "pre_gelu"),
        ("nothing", "full"),
    )
}
UNROLLED, SCANNED = (
    FORMS["unrolled, keeps everything"],
    FORMS["scanned, keeps pre-GELU"],
)
# Then every product is cuBLASLt's, with biases and GELUs as its epilogues: see
# docs/benchmarks/compiled_programs.md.
WITHOUT_TRITON = {"options": {"xla_gpu_enable_triton_gemm": False}, "program": True}
LEVELS = {
    f"level {level}": {"options": {"jax_optimization_level": level}}
    for level in ("O0", "O1", "O2", "O3")
}


def both(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the same options for our model and for the literal one."""
    found: dict[str, dict[str, Any]] = {"literal": {"whose": "literal"}}
    for label, given in options.items():
        found[label] = {"options": given}
        found[f"literal, {label}"] = {"options": given, "whose": "literal"}
    return found


def curve(
    name: str, of: str, kind: str, values: dict[str, dict[str, Any]], **more: Any
) -> Item:
    """Returns an item whose sides are points of a curve."""
    sides = (Side(k, kind=kind, **{**more, **v}) for k, v in values.items())
    return Item(name, tuple(sides), rounds=3, curve=of)


def cpu_items() -> list[Item]:
    """The items of one CPU thread in float32."""
    eager, onnx = "timm eager", "onnxruntime"
    b16, s16, s32 = "mixer_b16", "mixer_s16", "mixer_s32"
    step = Side("ours", batch=8)
    return [
        Item("rates"),
        beside("train", b16, 8, "literal", eager),
        beside("train", s16, 32, "literal", eager),
        beside("forward", b16, 8, "literal", eager, onnx),
        beside("forward", b16, 1, "literal", eager, onnx),
        beside("train", s32, 4, "literal", eager),
        variants(
            "memory of mixer_b16 batch 32",
            Side("ours", batch=32, timed=False),
            {
                "literal": {"whose": "literal"},
                "all images at once": images_at_once(32),
                "scanned, keeps pre-GELU": images_at_once(32, scan=True),
                "scanned, keeps nothing": images_at_once(32, scan=True, remat="full"),
            },
        ),
        beside("forward", b16, 32, "literal", eager, onnx, rounds=3),
        beside("forward", s16, 8, "literal", eager, onnx),
        beside("forward", s16, 1, "literal", eager, onnx),
        beside("forward", s16, 32, "literal", eager, onnx),
        variants("forms of mixer_b16 batch 8", step, FORMS, rounds=3),
        variants(
            "images at once of mixer_b16 batch 32",
            Side("ours", kind="forward", batch=32),
            {f"{n} at once": images_at_once(n) for n in (1, 2, 4, 8, 16, 32)},
            rounds=3,
        ),
        variants(
            "images at once of the mixer_s16 training step batch 32",
            Side("ours", model=s16, batch=32),
            {f"{n} at once": images_at_once(n) for n in (4, 8, 16, 32)},
            rounds=3,
        ),
        state_in_memory(s32, 4),
        state_in_memory(b16, 8),
        compile_times(),
        beside("forward", "mixer_s32", 8, "literal", eager, onnx),
        beside("forward", "mixer_b32", 8, "literal", eager, onnx),
        beside("forward", "mixer_l16", 1, "literal", eager, onnx),
        beside("forward", "mixer_h14", 1, "literal", eager),
        beside("train", "mixer_b32", 8, "literal", eager),
        *curves(batches=(1, 2, 4, 8, 16, 32), batch=1),
        variants(
            "compiler's options of mixer_b16 batch 8",
            Side("ours", kind="forward", batch=8),
            both(
                {
                    "512-bit vectors": {"xla_cpu_prefer_vector_width": 512},
                    "fast-math": {"xla_cpu_enable_fast_math": True},
                    "fast min/max": {"xla_cpu_enable_fast_min_max": True},
                }
            ),
            rounds=3,
        ),
        variants(
            "compiler's options of the mixer_b16 step batch 8",
            step,
            both(
                {
                    "512-bit vectors": {"xla_cpu_prefer_vector_width": 512},
                    "fast-math": {"xla_cpu_enable_fast_math": True},
                }
            ),
            rounds=3,
        ),
        beside("train", s16, 32, "timm compiled", also=", timm compiled", rounds=3),
        beside("train", "mixer_l16", 2, "literal", eager, rounds=3),
    ]


def accelerator_items() -> list[Item]:
    """The items of one GPU or TPU in bfloat16."""
    b16, s16 = "mixer_b16", "mixer_s16"
    timm = ("timm eager", "timm channels-last", "timm compiled")
    step = Side("ours", batch=256)
    forward = Side("ours", kind="forward", batch=256)
    return [
        Item("rates"),
        beside("train", b16, 256, "literal", *timm, program=True),
        beside("forward", b16, 256, "literal", *timm, program=True),
        beside("train", s16, 1024, "literal", "timm compiled", program=True),
        beside("forward", s16, 1024, "literal", "timm compiled"),
        beside("train", "mixer_l16", 128, "literal"),
        beside("train", "mixer_h14", 64, "literal"),
        variants(
            "products of mixer_b16 batch 256",
            step,
            {
                "without cuBLASLt": {"options": {"xla_gpu_enable_cublaslt": False}},
                "without Triton": WITHOUT_TRITON,
                "bias as a row": {"whose": "bias row", "program": True},
                "bias as a row, without Triton": {"whose": "bias row"} | WITHOUT_TRITON,
                "no autotuning": {"options": {"xla_gpu_autotune_level": 0}},
            },
            rounds=4,
        ),
        variants(
            "products of the mixer_b16 inference batch 256",
            forward,
            {
                "without cuBLASLt": {"options": {"xla_gpu_enable_cublaslt": False}},
                "without Triton": WITHOUT_TRITON,
                "bias as a row, without Triton": {"whose": "bias row"} | WITHOUT_TRITON,
            },
            rounds=4,
        ),
        variants(
            "launches of mixer_b16 batch 256",
            step,
            {
                "no command buffers": {
                    "options": {"xla_gpu_enable_command_buffer": ""}
                },
                "small command buffers": {
                    "options": {"xla_gpu_graph_min_graph_size": 1}
                },
                "latency hiding": {
                    "options": {"xla_gpu_enable_latency_hiding_scheduler": True}
                },
            },
            rounds=4,
        ),
        variants("levels of mixer_b16 batch 256", step, LEVELS, rounds=4),
        variants("forms of mixer_b16 batch 256", step, FORMS, rounds=4),
        state_in_memory(b16, 256),
        *(
            variants(
                f"batches of the mixer_b16 step from {few}",
                Side(f"ours, {few}", batch=few),
                {
                    f"literal, {few}": {"whose": "literal"},
                    f"ours, {many}": {"batch": many},
                    f"literal, {many}": {"whose": "literal", "batch": many},
                },
                rounds=3,
                curve="batch",
            )
            for few, many in ((64, 512), (1024, 2048))
        ),
        variants(
            "images at once of mixer_b16 batch 256",
            forward,
            {f"{n} at once": images_at_once(n) for n in (16, 32, 64, 128)},
            rounds=4,
        ),
        beside("forward", b16, 1, "literal", *timm),
        beside("forward", "mixer_l16", 128, "literal", "timm compiled"),
        beside("forward", "mixer_h14", 64, "literal", "timm compiled"),
        beside("train", "mixer_l16", 128, "timm compiled", also=", timm compiled"),
        beside("train", "mixer_h14", 64, "timm compiled", also=", timm compiled"),
        *(
            beside(kind, model, batch, "literal", "timm compiled")
            for model, batch in (
                ("mixer_s32", 2048),
                ("mixer_b32", 1024),
                ("mixer_l32", 512),
            )
            for kind in ("train", "forward")
        ),
        *curves(batches=(1, 8, 32, 128, 512, 2048), batch=256),
        state_in_memory("mixer_s32", 64),
        variants(
            "levels of the mixer_b16 inference batch 256", forward, LEVELS, rounds=4
        ),
        beside("train", b16, 256, "timm max-autotune", also=", timm max-autotune"),
        compile_times(),
    ]


def state_in_memory(model: str, batch: int) -> Item:
    """The item of parameters stacked at use, stacked in memory, and not stacked."""
    return variants(
        f"state of {model} batch {batch}",
        Side("stacked at use", model=model, batch=batch, **SCANNED),
        {
            "stacked in memory": {"whose": "stacked"},
            "unrolled": UNROLLED,
            "literal": {"whose": "literal"},
        },
        rounds=3,
    )


def compile_times() -> Item:
    """The item that compiles training steps, and runs nothing."""
    how: dict[str, dict[str, Any]] = {
        "scanned": SCANNED,
        "stacked in memory": {"whose": "stacked"} | SCANNED,
        "unrolled": UNROLLED,
        "literal": {"whose": "literal"},
    }
    sides = [
        Side(f"{model} {label}", model=model, batch=8, timed=False, **given)
        for model in ("mixer_b16", "mixer_h14")
        for label, given in how.items()
    ]
    return Item("compile times", tuple(sides))


def curves(batches: tuple[int, ...], batch: int) -> list[Item]:
    """The items of cost against batch, tokens and depth, of B/16."""
    sizes, depths = (64, 112, 160, 224, 320, 448), (1, 3, 6, 12, 24)
    return [
        curve(
            "curve of batches, forward",
            "batch",
            "forward",
            {f"{n} images": {"batch": n} for n in batches},
        ),
        curve(
            "curve of tokens, forward",
            "tokens",
            "forward",
            {f"{(n // 16) ** 2} tokens": {"image_size": n} for n in sizes},
            batch=batch,
        ),
        curve(
            "curve of depth, forward",
            "depth",
            "forward",
            {f"{n} blocks": {"fields": {"num_blocks": n}} for n in depths},
            batch=batch,
        ),
        curve(
            "curve of batches, train",
            "batch",
            "train",
            {f"{n} images": {"batch": n} for n in batches[:4]},
        ),
        curve(
            "curve of tokens, train",
            "tokens",
            "train",
            {f"{(n // 16) ** 2} tokens": {"image_size": n} for n in sizes[:5]},
            batch=batch,
        ),
        curve(
            "curve of depth, train",
            "depth",
            "train",
            {f"{n} blocks": {"fields": {"num_blocks": n}} for n in depths},
            batch=batch,
        ),
    ]


def items_for(platform: str) -> list[Item]:
    """Returns the items of "cpu", "gpu" or "tpu", the most valuable first."""
    return cpu_items() if platform == "cpu" else accelerator_items()


def expected_seconds(item: Item, machine: Machine) -> float:
    """Returns about how long an item takes, at 55 % of the rate of large products."""
    total = machine.start_s + (0 if item.sides else 10)
    for side in item.sides:
        depth = side.fields_now["num_blocks"] / 12
        if side.whose == "timm":
            compiling = machine.torch_s if side.options.get("mode") in SLOW_MODES else 2
        else:
            scanned = side.run.get("scan", machine.platform == "tpu")
            scanned = scanned and side.whose != "literal" and side.kind == "train"
            compiling = machine.train_s if side.kind == "train" else machine.forward_s
            compiling *= 0.5 if scanned else depth
        total += compiling
        if side.timed:
            call = side.flops * side.batch / machine.rate / 0.55
            total += 2 * call + item.rounds * max(call, machine.seconds)
    return total
