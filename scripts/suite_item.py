"""One item of the suite, in a process of its own, so that its failure is its own.

    python scripts/suite_item.py REQUEST.json RESULT.json
    python scripts/suite_item.py --machine RESULT.json

Sides are compiled one after the other, then timed in turn, beside one large product.
The result is written after every step, so that a killed process leaves what it had.
"""

import contextlib
import functools
import gc
import gzip
import json
import os
import pathlib
import platform
import resource
import select
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import bias_row
import flax
import jax
import jax.numpy as jnp
import jaxlib
import measurement
import numpy as np
import optax
from measurement import Bench, Job, clock, say
from suite_plan import Item, Side

from mlp_mixer.models.mixer import SIZES
from mlp_mixer.planning import hlo

HERE = pathlib.Path(__file__).resolve().parent
Clock = Callable[[int], dict[str, float]]  # of so many calls


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file that is whole at every moment."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def machine() -> dict[str, Any]:
    """Returns what is known of this machine and its packages."""
    packages = (jax, jaxlib, flax, optax, np)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": jax.default_backend(),
        "device_kind": device.device_kind,
        "device_bytes": stats.get("bytes_limit"),
        "backend": getattr(device.client, "platform_version", ""),
        "driver": _driver() if jax.default_backend() == "gpu" else None,
        "cpu_model": measurement.cpu_model(),
        "cpu_cores": os.cpu_count(),
        "avx512": _has_avx512(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in packages},
        "flags": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("XLA_", "JAX_", "NPROC"))
        },
    }


def _driver() -> str | None:
    """Driver, power limit and highest clock of NVIDIA's devices, if it can be read."""
    asked = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # a container may be without the program
    return done.stdout.strip()


def _has_avx512() -> bool | None:
    info = pathlib.Path("/proc/cpuinfo")
    return "avx512f" in info.read_text(encoding="utf-8") if info.exists() else None


class PeerError(Exception):
    """A peer is not there, or has failed."""


class TimmProcess:
    """The process of timm_peer.py, or of a script that answers as it does."""

    def __init__(self, python: str, script: str = "timm_peer.py") -> None:
        self.process: Any = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Returns the reply to a request of timm_peer.py.

        Args:
          request: the request.
          seconds: how long the reply may take.

        Raises:
          PeerError: it failed, or did not answer in time.
        """
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError("timm's process has ended") from error
        if not select.select([self.process.stdout], [], [], max(seconds, 0))[0]:
            self.process.kill()
            raise PeerError(f"timm did not answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"timm's process ended with {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply


class Worker:
    """Prepares and times the sides of one item.

    Args:
      request: what suite.py asks for.
      write: takes the result whenever it has grown.
    """

    def __init__(self, request: dict[str, Any], write: Callable[[Any], None]) -> None:
        self.request = request
        item = dict(request["item"])
        sides = tuple(Side(**side) for side in item.pop("sides"))
        self.item = Item(**item, sides=sides)
        self.deadline = time.monotonic() + request["until"] - time.time()
        self.write = write
        self.on_cpu = jax.default_backend() == "cpu"
        self.key = "cpu_s" if self.on_cpu else "wall_s"
        # The size of the highest rate: on a CPU larger products leave the caches.
        self.large = (1024,) * 3 if self.on_cpu else (8192,) * 3
        self.result: dict[str, Any] = {"compared_by": self.key, "sides": {}}
        self.timm: TimmProcess | None = None
        self.state: tuple[Any, Any] = (None, None)

    def run(self) -> None:
        """Measures the item."""
        if not self.item.sides:
            return self.rates()
        clocks: dict[str, Clock] = {"product": self.product()}
        for side in self.item.sides:
            figures = self.result["sides"][side.label] = {"batch": side.batch}
            say(f"  {self.item.name}: {side.label} ...")
            try:
                self.check_time(side, clocks)
                if found := self.prepare(side, figures):
                    figures["first_call"] = found(1)
                    clocks[side.label] = found
            except Exception as error:  # e.g. out of memory: the other sides run
                lines = str(error).splitlines() or [""]
                figures["error"] = f"{type(error).__name__}: {lines[0]}"
                say(f"  {self.item.name}: {side.label}: {figures['error']}")
            gc.collect()
            self.note_memory()
            self.write(self.result)
        if len(clocks) > 1:
            self.time_in_turn(clocks)

    def check_time(self, side: Side, clocks: dict[str, Clock]) -> None:
        """Raises TimeoutError if another side would take the time of the rounds."""
        calls = [
            max(figures["first_call"]["wall_s"], self.request["seconds"])
            for figures in self.result["sides"].values()
            if "first_call" in figures
        ]
        left = self.deadline - time.monotonic()
        if len(clocks) > 1 and left < self.item.rounds * sum(calls):
            raise TimeoutError(f"{max(left, 0):.0f} s are left for the rounds")

    def prepare(self, side: Side, figures: dict[str, Any]) -> Clock | None:
        """Compiles a side into `figures`; returns its clock, if it is to be timed."""
        figures["flops_per_image"] = side.flops
        figures["tokens"] = (side.image_size // side.fields_now["patch_size"][0]) ** 2
        figures["blocks"] = side.fields_now["num_blocks"]
        if side.whose == "timm":
            return self.timm_clock(side, figures)
        bench = self.bench_of(side)
        ours: Any = bench.models["ours"]
        if side.whose == "ours":
            figures["run"] = str(ours.run)
        if side.whose == "onnxruntime":
            return self.onnx_clock(side, bench, figures)
        if side.whose == "stacked":
            import stacked_step

            step, init = stacked_step.make_step(ours, bench.job)
            shapes = stacked_step.shapes(bench.built.target.params, init)
            arguments = (shapes, bench.batch_shapes())
            _, executable, costs = measurement.compile_function(step, arguments, {})
        else:
            row = side.whose == "bias row"
            with bias_row.traced() if row else contextlib.nullcontext():
                whose = "ours" if row else side.whose
                executable, costs = bench.compile(
                    side.kind, whose, options=side.options
                )
        figures |= costs
        kinds = ("temp", "argument", "output")
        used = sum(costs.get(f"{kind}_bytes", 0) for kind in kinds)
        figures["total_bytes"] = used - costs.get("alias_bytes", 0)
        if side.program:
            self.keep_program(side, executable, figures)
        if not side.timed:
            return None
        state, batch = self.state_of(side, bench), bench.random_batch()
        if side.kind == "forward":
            call = functools.partial(executable, state.params, batch["image"])
            figures["logits"] = _summary(np.asarray(call()))
        else:
            if side.whose == "stacked":
                params = stacked_step.stacked(state.params)
                state = (params, init(params))
            call = measurement.training(executable, state, batch)
            figures["loss"] = float(call()["loss"])
        if side.batch == 1:  # latency: the caller waits for every image
            figures["waits_for_each_call"] = True
            return functools.partial(clock, _waiting(call), wait=_nothing)
        return functools.partial(clock, call, wait=jax.block_until_ready)

    def bench_of(self, side: Side) -> Bench:
        """Our model of a side, and the literal one if that is what it is."""
        size = (side.image_size, side.image_size)
        job = Job(
            {"name": side.model, "image_size": size} | side.fields,
            types.SimpleNamespace(num_classes=1000),
            dict(measurement.OPTIM),
            100_000,
            {"dtype": self.request["dtype"]} | side.run,
            accumulate=side.accumulate,
        )
        return Bench(job, side.batch, devices=1, peer=side.whose == "literal")

    def state_of(self, side: Side, bench: Bench) -> Any:
        """The random state of a model, kept until another one is asked for."""
        key = (side.model, repr(side.fields), side.image_size)
        if self.state[0] != key:
            self.state = (None, None)
            self.state = (key, bench.random_state())
        return self.state[1]

    def timm_clock(self, side: Side, figures: dict[str, Any]) -> Clock:
        """Prepares a side of timm's process."""
        if self.timm is None:
            self.timm = TimmProcess(self.request["timm_python"])
        ask = self.timm.ask
        request = {
            "prepare": vars(side) | {"fields": side.fields_now},
            "dtype": self.request["dtype"],
            "threads": self.request["threads"],
        }
        # A part of the time that is left remains for the others' rounds.
        figures |= ask(request, 0.8 * (self.deadline - time.monotonic()))
        return lambda times: ask(
            {"clock": side.label, "times": times}, self.deadline - time.monotonic()
        )

    def onnx_clock(self, side: Side, bench: Bench, figures: dict[str, Any]) -> Clock:
        """Prepares onnxruntime on our own graph."""
        if not self.on_cpu:
            raise PeerError("onnxruntime is compared on CPUs alone")
        try:
            import onnx_peer
        except ImportError as error:
            raise PeerError(
                f"the package's extra `export` is needed: {error}"
            ) from None
        state, batch = self.state_of(side, bench), bench.random_batch()
        threads = self.request["threads"]
        run, figures["versions"] = onnx_peer.runner(
            side.model, state.params, batch["image"], threads
        )
        figures["logits"] = _summary(run())
        return functools.partial(clock, run, wait=_nothing)

    def product(self) -> Clock:
        """The clock of one large product, the measure of all shares."""
        (m, k, n), dtype = self.large, self.request["dtype"]
        self.result["product"] = {"shape": [m, k, n], "operations": 2 * m * k * n}
        call = _multiplied(m, k, n, dtype)
        jax.block_until_ready(call())
        return functools.partial(clock, call, wait=jax.block_until_ready)

    def time_in_turn(self, clocks: dict[str, Clock]) -> None:
        """Times all sides, as many rounds as there is time for."""
        seconds = self.request["seconds"]
        fixed: dict[str, Callable[[], dict[str, float]]] = {}
        for name, timed in list(clocks.items()):
            first = self.result["sides"].get(name, {}).get("first_call") or timed(1)
            least = seconds if name != "product" else seconds / 2
            calls = max(1, min(500, round(least / first["wall_s"])))
            fixed[name] = functools.partial(self.guarded, name, timed, calls)
        begun = time.monotonic()
        turns = measurement.interleave(fixed, self.item.rounds)
        for i, timings in enumerate(turns, 1):
            for name, timing in timings.items():
                figures = self.result["sides"].get(name, self.result["product"])
                for key, value in timing.items():
                    figures.setdefault("rounds", {}).setdefault(key, []).append(value)
            self.summarise()
            self.result["rounds"] = i
            self.note_memory()
            self.write(self.result)
            now = time.monotonic()
            if i < self.item.rounds and now + (now - begun) / i > self.deadline:
                self.result["note"] = f"time for {i} of {self.item.rounds} rounds"
                say(f"  {self.item.name}: {self.result['note']}")
                break

    def guarded(self, name: str, timed: Clock, calls: int) -> dict[str, float]:
        """Times a side; nothing where it fails, or has failed before."""
        figures = self.result["sides"].get(name, {})
        if "error" in figures:
            return {}
        try:
            return timed(calls)
        except (PeerError, jax.errors.JaxRuntimeError) as error:
            figures["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"  {self.item.name}: {name}: {figures['error']}")
            return {}

    def summarise(self) -> None:
        """Adds medians, rates and shares to the raw times."""
        product = self.result["product"]
        product |= measurement.statistics_of(product["rounds"][self.key])
        rate = product["flops_per_s"] = product["operations"] / product["median_s"]
        for figures in self.result["sides"].values():
            if times := figures.get("rounds", {}).get(self.key):
                figures |= measurement.statistics_of(times)
                figures["images_per_s"] = figures["batch"] / figures["median_s"]
                work = figures["flops_per_image"] * figures["images_per_s"]
                figures["share_of_product_rate"] = work / rate

    def note_memory(self) -> None:
        """Notes the process's peak memory, on the host and on the device."""
        scale = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        stats = jax.devices()[0].memory_stats() or {}
        self.result["host_peak_bytes"] = peak
        self.result["device_peak_bytes"] = stats.get("peak_bytes_in_use")

    def keep_program(
        self, side: Side, executable: Any, figures: dict[str, Any]
    ) -> None:
        """Writes the compiled program beside the result, and sums up its kernels."""
        name = f"{self.item.name} {side.label}".replace(" ", "_")
        path = pathlib.Path(self.request["programs"]) / f"{name}.hlo.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = executable.as_text()
        path.write_bytes(gzip.compress(text.encode()))
        figures["program"] = path.name
        try:
            found = hlo.kernels(text)
        except Exception as error:  # the program is kept, and the side is timed
            figures["program_error"] = f"{type(error).__name__}: {error}"
            say(f"  {self.item.name}: {side.label}: {figures['program_error']}")
            return
        figures["kernels"] = kernel_sums(found)
        figures["written_elsewhere_bytes"] = {  # stem and head are counted with them
            where: hlo.elsewhere_written(found, where) / side.batch / figures["blocks"]
            for where in hlo.PASSES
        }

    def rates(self) -> None:
        """Measures products, the large one and those of our shapes, and a copy."""
        dtype, images = self.request["dtype"], 8 if self.on_cpu else 256
        shapes = {"large": self.large}
        models = ("mixer_b16", "mixer_s16", "mixer_l16", "mixer_h14", "mixer_b32")
        for name in models[:2] if self.on_cpu else models:
            size = SIZES[name]
            s = (224 // size["patch_size"][0]) ** 2
            c, ds, dc = (
                size[x] for x in ("hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
            )
            shapes[f"{name} token mixing, first"] = (ds, s, images * c)
            shapes[f"{name} token mixing, second"] = (s, ds, images * c)
            # As many as fast kernels may want as the length of a sum.
            for more in (200, 208, 256) if s == 196 and not self.on_cpu else ():
                shapes[f"{name} token mixing, first, {more} tokens"] = (
                    ds,
                    more,
                    images * c,
                )
            shapes[f"{name} channel mixing, first"] = (s * images, c, dc)
            shapes[f"{name} channel mixing, second"] = (s * images, dc, c)
        self.result["images"] = images
        self.result["rates"] = found = {}
        for name, (m, k, columns) in shapes.items():
            if time.monotonic() > self.deadline:
                break
            timed = self.repeated(_multiplied(m, k, columns, dtype))
            work = 2 * m * k * columns
            found[name] = {"shape": [m, k, columns], "flops_per_s": work / timed}
            self.write(self.result)
        count = 2**26 if self.on_cpu else 2**30
        x = jnp.zeros(count, dtype)
        add = jax.jit(lambda x: x + 1).lower(x).compile()
        moved = 2 * x.nbytes
        self.result["copy_bytes_per_s"] = moved / self.repeated(lambda: add(x))
        self.note_memory()
        self.write(self.result)

    def repeated(self, run: Callable[[], Any]) -> float:
        """Returns the median seconds of a call, of three timings."""
        timed = functools.partial(clock, run, wait=jax.block_until_ready)
        timed(times=1)
        calls = max(1, min(500, round(0.1 / timed(times=1)["wall_s"])))
        times = [timed(times=calls)[self.key] for _ in range(3)]
        return measurement.statistics_of(times)["median_s"]


def kernel_sums(found: list[Any]) -> dict[str, dict[str, int]]:
    """Returns how many kernels of a kind there are, and what they read and write.

    Args:
      found: kernels of `hlo.kernels`; library products are told apart by
        their epilogue.
    """
    sums: dict[str, dict[str, int]] = {}
    for kernel in found:
        library = kernel.kind == hlo.LIBRARY
        name = f"{kernel.kind}, {kernel.work}" if library else kernel.kind
        one = sums.setdefault(name, {"count": 0, "read_bytes": 0, "written_bytes": 0})
        one["count"] += kernel.turns
        one["read_bytes"] += kernel.turns * kernel.read
        one["written_bytes"] += kernel.turns * kernel.written
    return sums


def _multiplied(m: int, k: int, n: int, dtype: str) -> Callable[[], Any]:
    """A call that multiplies (m, k) by (k, n), both as good as random."""
    # Drawn by a sine of the index: large random arrays take longer than their product.
    a, b = (
        jnp.sin(1.7 * jnp.arange(rows * columns, dtype="float32"))
        .reshape(rows, columns)
        .astype(dtype)
        for rows, columns in ((m, k), (k, n))
    )
    return functools.partial(jax.jit(jnp.matmul).lower(a, b).compile(), a, b)


def _waiting(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(call())


def _nothing(out: Any) -> None:
    """The call itself has waited."""


def _summary(logits: np.ndarray) -> dict[str, Any]:
    """Numbers by which two models can be told apart."""
    return {
        "first": [float(x) for x in logits[0, :4]],
        "largest": float(np.abs(logits).max()),
    }


def main(argv: list[str]) -> None:
    """Measures what the request says."""
    asked, answer = argv
    path = pathlib.Path(answer)
    if asked == "--machine":
        return write_json(path, machine())
    request = json.loads(pathlib.Path(asked).read_text(encoding="utf-8"))
    measurement.start_devices(request["threads"] or None, 1)
    jax.block_until_ready(jnp.ones(8) + 1)  # the compiler's own start
    worker = Worker(request, functools.partial(write_json, path))
    try:
        worker.run()
    finally:
        if worker.timm:
            worker.timm.process.kill()
    worker.result["done"] = True
    worker.write(worker.result)


if __name__ == "__main__":
    main(sys.argv[1:])
