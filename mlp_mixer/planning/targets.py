"""Devices to compile for that are not here.

The compilers are in wheels: libtpu for TPUs, JAX's CUDA plugin for NVIDIA's GPUs. JAX
must use no device of this machine before: `prepare` says so.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from mlp_mixer.planning.chips import Topology

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
# What the compiler is told of a card.
GPUS = {
    "h100": _HOPPER.format(
        name="H100 80GB HBM3", bandwidth=3352 * 10**9, cache=52428800, memory=85 * 10**9
    ),
    "h200": _HOPPER.format(
        name="H200", bandwidth=4800 * 10**9, cache=62914560, memory=150 * 10**9
    ),
}


def prepare(topologies: Sequence[Topology], *, compiles: bool = True) -> None:
    """Makes JAX ready to compile for topologies, before it has used a device.

    It starts on the CPU, since an accelerator that is here would hide the compiler, and
    with as many devices as are to be compiled for or stand for others.

    Args:
      topologies: the topologies.
      compiles: whether compilers that are there are used.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    here = [t for t in topologies if not compiles or _is_here(t)]
    if here:
        jax.config.update("jax_num_cpu_devices", max(t.devices for t in here))


def _is_here(topology: Topology) -> bool:
    """Whether devices of this host are compiled for, or stand for the topology's."""
    return topology.kind == "cpu" or bool(missing_wheels(topology.kind))


def missing_wheels(kind: str) -> str:
    """Returns how to install the compiler for a chip; "" if it is there.

    Args:
      kind: a key of `chips.CHIPS`.
    """
    if kind == "cpu":
        return ""
    if kind not in GPUS:
        if importlib.util.find_spec("libtpu"):
            return ""
        return (
            f"The compiler for {kind} is in the wheel libtpu: pip install libtpu (or "
            "this project's extra plan-tpu)."
        )
    if any(_installed(f"jax_plugins.xla_cuda{n}") for n in (13, 12)):
        return ""
    version = importlib.metadata.version("jax")
    return (
        f"The compiler for {kind} is in two wheels of jax's own version: pip install "
        f"--no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} (or this "
        "project's extra plan-gpu)."
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it is not there either
        return False


def compiler(kind: str) -> str:
    """Returns the compiler for a chip and its version, of wheels that are there."""
    name = {"cpu": "jaxlib"}.get(kind, "libtpu")
    if kind in GPUS:
        name = next(
            f"jax-cuda{n}-plugin"
            for n in (13, 12)
            if _installed(f"jax_plugins.xla_cuda{n}")
        )
    return f"{name} {importlib.metadata.version(name)}"


def devices(topology: Topology) -> list[Any]:
    """Returns the devices of a topology, to compile for.

    Raises:
      RuntimeError: the compiler's wheels are missing.
    """
    if message := missing_wheels(topology.kind):
        raise RuntimeError(message)
    import jax
    from jax.experimental import topologies

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.devices]
    if topology.kind in GPUS:
        found = topologies.get_topology_desc(
            topology.kind,
            "cuda",
            topology=f"1x1x{topology.devices}",
            target_config=GPUS[topology.kind],
        )
        return list(found.devices)
    # Else libtpu asks the network what machine this is, and works for one process only.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {}
    if topology.kind == "v4":  # both cores of a chip as one device, as Cloud TPU has it
        options["chip_config_name"] = "megacore"
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    elif topology.kind == "v4":
        options["chips_per_host_bounds"] = (2, 2, 1)
    found = topologies.get_topology_desc(topology.name, "tpu", **options)
    return list(found.devices)
