"""Records steps.json: what the compiled training step of each kind of recipe does.

    python tests/golden/record_steps.py

Counts, not text: collectives, gathers, transposes, products, large float32 arrays of a
bfloat16 step, and bytes. They are those of one version of jax, whose name stands there.
"""

import collections
import functools
import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from mlp_mixer import experiment, recipe, sharding
from mlp_mixer.data import pipeline

FILE = pathlib.Path(__file__).parent / "steps.json"
# A recipe of each kind, with few blocks: what a block adds, it adds each time.
RECIPES: dict[str, dict[str, Any]] = {
    "configs/mixer_b16.py": {"num_blocks": 2},
    "configs/finetune/cifar10.py": {"num_blocks": 2},
    "configs/digits.py": {"num_blocks": 2},
    "configs/family/digits.py:resmlp": {"num_blocks": 2},
    "configs/family/digits.py:gmlp": {"num_blocks": 2},
    "configs/family/digits.py:smlpnet": {"num_blocks": (1, 1, 1, 1)},
}
# Name → (mesh, strategy, how it is computed).
WAYS: dict[str, Any] = {
    "8 x data, unrolled": ((8, 1, 1), "replicated", {"scan": False}),
    "2 x data, 2 x fsdp, 2 x model, scanned": (
        (2, 2, 2),
        "fsdp",
        {"scan": True, "remat": "pre_gelu"},
    ),
}
BATCH = 16
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


def config_of(name: str, shape: tuple[int, int, int], strategy: str) -> Any:
    """Returns a recipe as it is trained on a mesh, with few blocks."""
    config = recipe.load(name)
    config.model.num_blocks = RECIPES[name]["num_blocks"]
    config.sharding, config.batch_size = strategy, BATCH
    config.mesh.data, config.mesh.fsdp, config.mesh.model = shape
    config.dataset.num_classes = config.dataset.get("num_classes") or 1000
    return config


def lowered(name: str, way: str, dtype: str = "float32") -> Any:
    """Returns the step of a recipe, of shapes alone, lowered for eight devices."""
    shape, strategy, run = WAYS[way]
    config = config_of(name, shape, strategy)
    with config.unlocked():
        config.run.update({**run, "dtype": dtype})
        config.optim.warmup_steps = 0
    mesh = sharding.make_mesh(*shape)
    example = pipeline.example(config.model.image_size)
    built = experiment.build(config, mesh, example, total_steps=10)
    h, w = config.model.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, h, w, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return built.train_step.lower(built.target, batch)  # type: ignore[attr-defined]


def counts(name: str, way: str) -> dict[str, int]:
    """Returns what the optimised step does on one device, by kind."""
    program = lowered(name, way).compile()
    text = program.as_text()
    found = collections.Counter[str]()
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            found[match[2]] += 1
            found[f"{match[2]} bytes"] += sum(
                _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
    for operation in ("gather", "scatter", "transpose", "dot", "convolution"):
        found[operation] = len(re.findall(rf"[\])}}] {operation}\(", text))
    memory = program.memory_analysis()
    found["temporary bytes"] = memory.temp_size_in_bytes
    found["argument bytes"] = memory.argument_size_in_bytes
    found["bytes in place"] = memory.alias_size_in_bytes
    return dict(sorted(found.items()))


def large_floats(name: str, way: str) -> dict[str, int]:
    """Returns {dtype: number} of activations in the step, before the compiler's passes.

    Of a step in bfloat16: float32 is for statistics, losses and parameters. A CPU's
    compiler would turn all to float32.
    """
    text = lowered(name, way, "bfloat16").as_text()
    found = collections.Counter[str]()
    for dims, dtype in re.findall(r"-> tensor<([\dx]+)x(f32|bf16)>", text):
        sizes = [int(n) for n in dims.split("x")]
        if BATCH in sizes and len(sizes) > 2 and math.prod(sizes) // BATCH > 512:
            found[f"{dtype} activations"] += 1
    return dict(sorted(found.items()))


@functools.cache
def recorded() -> dict[str, Any]:
    """Returns what is recorded."""
    return json.loads(FILE.read_text())


def main() -> None:
    """Records all."""
    steps = {
        name: {way: {**counts(name, way), **large_floats(name, way)} for way in WAYS}
        for name in RECIPES
    }
    FILE.write_text(
        json.dumps({"jax": jax.__version__, "steps": steps}, indent=1) + "\n"
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
