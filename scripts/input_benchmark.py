"""Speed of training's host path: images a second from one core, beside tf.data.

    python scripts/benchmark.py input
    python scripts/benchmark.py input --images=/data/val/n01440764 --rate=5000
    python scripts/benchmark.py input --workers 1 2 4 8 16 32 --plot=input.png

From JPEG bytes in memory to batches of uint8: Inception crop, bilinear resize, flip,
with and without RandAugment. Ours (direct calls, the training pipeline in threads, in
worker processes) and tf.data take turns, round by round, pinned to as many cores as
they have processes. Without TensorFlow, from the extra `prepare`, the peer is left out.
Then: our functions at other image sizes and with other JPEGs, and the time to start a
training step while threads or worker processes decode.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import arguments
import grain
import numpy as np
import simplejpeg

from mlp_mixer import errors
from mlp_mixer.data import decoding, image_ops, pipeline

STAGES = ("decode", "crop and resize", "flip", "RandAugment")
# The last is big_vision's run of B/16, a whole TPU v3-128.
RATES = (1_000.0, 3_000.0, 10_000.0, 48_400.0)
# Arrays of a state, about those of B/16 with Adam's moments.
STATE = 450
HINT = "no tf.data here: pip install '.[prepare]' brings TensorFlow"


@dataclasses.dataclass
class Memory:
    """JPEGs in memory, repeated up to ImageNet's length.

    Grain's shuffle needs 3 ms per example for a handful, and 20 µs for a million.
    """

    images: list[bytes]
    class_names = None
    multi_label = False

    @property
    def num_classes(self) -> int:
        """One label for all."""
        return 1

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index % len(self.images)],
            "label": self.label(index),
        }

    def label(self, index: int) -> int:
        """The only label."""
        return 0

    def name_of(self, index: int) -> str:
        """The number of the image."""
        return f"image {index}"


def photos(count: int, height: int, width: int, size: int) -> list[bytes]:
    """Makes JPEGs of about `size` bytes with a photo's spectrum, always the same."""
    ky, kx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    falloff = np.maximum(np.hypot(ky, kx), 1 / max(height, width)) ** -1.2
    out = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        noise = np.fft.rfft2(rng.normal(size=(4, height, width))) * falloff
        layers = np.fft.irfft2(noise, (height, width))
        layers -= layers.mean(axis=(1, 2), keepdims=True)
        layers /= layers.std(axis=(1, 2), keepdims=True)
        # One layer of light, three of colour, as a photo's channels are correlated.
        levels = 118 + 55 * (layers[0] + 0.35 * layers[1:])
        image = np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        image = np.ascontiguousarray(image)
        encoded = (
            simplejpeg.encode_jpeg(image, quality, colorsubsampling="420")
            for quality in range(20, 99, 3)
        )
        out.append(min(encoded, key=lambda data: abs(len(data) - size)))
    return out


def files(folder: str, count: int) -> list[bytes]:
    """The first JPEGs below a folder.

    Raises:
      ValueError: there are none.
    """
    paths = (p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file())
    contents = (path.read_bytes() for path in paths)
    jpegs = (data for data in contents if data[:3] == b"\xff\xd8\xff")
    if found := list(itertools.islice(jpegs, count)):
        return found
    raise ValueError(f"--images={folder}: no JPEG is in there.")


# --- What is timed --------------------------------------------------------------------


def fields(size: int, layers: int, magnitude: float, deit: bool) -> dict[str, Any]:
    """The recipe's fields of what is done to an image: the paper's, or DeiT's."""
    whose = {"crop": "inception", "randaugment": "big_vision", "randaugment_std": 0.0}
    if deit:
        whose = {"crop": "timm", "randaugment": "timm", "randaugment_std": 0.5}
    return whose | {
        "image_size": (size, size),
        "min_area": 0.08,
        "interpolation": "bicubic",
        "flip": True,
        "shift": 0,
        "randaugment_layers": layers,
        "randaugment_magnitude": 9 if deit else magnitude,
    }


def direct(
    jpegs: list[bytes],
    size: int,
    layers: int,
    magnitude: float,
    spent: Any = None,
    deit: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the pipeline's images without it; adds to the seconds of each stage."""
    rng = np.random.default_rng(0)
    chosen = fields(size, layers, magnitude, deit)
    changes = pipeline.augmentation(**chosen)
    dct = image_ops.dct_of(chosen["crop"])
    for data in itertools.cycle(jpegs):
        laps = [time.perf_counter()]
        image = decoding.decode(data, dct)
        laps.append(time.perf_counter())
        for change in changes:
            image = change(image, rng)
            laps.append(time.perf_counter())
        if spent is not None:
            for stage, (a, b) in zip(STAGES, itertools.pairwise(laps), strict=True):
                spent[stage].append(b - a)
        yield image


def cpu_seconds() -> float:
    """CPU time of this process and, on Linux, of its worker processes."""
    ticks = 0
    for process in multiprocessing.active_children():
        stat = pathlib.Path(f"/proc/{process.pid}/stat")
        if stat.exists():
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def clock(batches: Iterator[Any], size: int, warm: int, seconds: float) -> dict:
    """CPU and wall seconds per image, after `warm` batches."""
    for _ in range(warm):
        next(batches)
    own, cpu, wall = time.process_time(), cpu_seconds(), time.perf_counter()
    count = 0
    while time.perf_counter() - wall < seconds or not count:
        next(batches)
        count += size
    own, cpu = time.process_time() - own, cpu_seconds() - cpu
    wall = time.perf_counter() - wall
    return {"cpu_s": cpu / count, "own_cpu_s": own / count, "wall_s": wall / count}


@dataclasses.dataclass
class Bench:
    """The variants that are timed, all on the same JPEGs."""

    jpegs: list[bytes]
    args: argparse.Namespace
    shapes: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)

    def variants(self, peer: bool) -> dict[str, tuple[int, Callable[[], Iterator]]]:
        """Name → number of cores, and a function that starts endless batches."""
        out: dict[str, tuple[int, Callable[[], Iterator]]] = {}
        for layers in (0, 2):
            end = " + RandAugment" if layers else ""
            out[f"direct{end}"] = 1, functools.partial(self._direct, layers)
            out[f"threads{end}"] = 1, functools.partial(self._ours, layers, 0)
            for k in self.args.workers:
                name = f"{k} worker{'s' * (k > 1)}{end}"
                out[name] = k, functools.partial(self._ours, layers, k)
            if self.args.deit:
                deit = functools.partial(self._direct, layers, True)
                out[f"direct, DeiT's{end}"] = 1, deit
                deit = functools.partial(self._ours, layers, 0, True)
                out[f"threads, DeiT's{end}"] = 1, deit
            if peer:
                out[f"tf.data{end}"] = 1, functools.partial(self._peer, layers)
        return out

    def _direct(self, layers: int, deit: bool = False) -> Iterator[Any]:
        size, magnitude = self.args.image_size, self.args.magnitude
        images = direct(self.jpegs, size, layers, magnitude, deit=deit)
        while True:
            yield np.stack(list(itertools.islice(images, self.args.batch)))

    def _ours(self, layers: int, workers: int, deit: bool = False) -> Iterator[Any]:
        return pipeline.train_batches(
            Memory(self.jpegs),
            **fields(self.args.image_size, layers, self.args.magnitude, deit),
            batch_size=self.args.batch,
            seed=0,
            repeats=1,
            workers=workers,
            max_broken_images=0,
        )

    def _peer(self, layers: int) -> Iterator[Any]:
        import input_peer  # needs TensorFlow

        return input_peer.batches(
            self.jpegs,
            self.args.image_size,
            self.args.batch,
            layers,
            self.args.magnitude,
        )


def pin(count: int, cores: list[int]) -> None:
    """Restricts this thread, and what it starts, to `count` of the machine's cores."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, cores[-count:])


def measure(bench: Bench, peer: bool) -> dict[str, Any]:
    """The times of all variants, and of the stages of our functions."""
    args = bench.args
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if has_affinity else [0]
    variants = bench.variants(peer)
    report: dict[str, Any] = {
        name: {"cores": min(n, len(cores)), "cpu_s": [], "own_cpu_s": [], "wall_s": []}
        for name, (n, _) in variants.items()
    }
    sizes = [
        {"jpegs": name, "image_size": size, "layers": layers, "cpu_s": []}
        for name, size in [
            *(("", size) for size in args.sizes),
            *((shape, args.image_size) for shape in bench.shapes),
        ]
        for layers in (0, 2)
    ]
    spent: dict[str, list[float]] = collections.defaultdict(list)
    try:
        for i in range(args.rounds):
            print(f"round {i + 1}/{args.rounds} ...", file=sys.stderr, flush=True)
            # Forwards and backwards, so that a drift of the machine favours none.
            for name in list(variants)[:: 1 if i % 2 == 0 else -1]:
                count, start = variants[name]
                pin(count, cores)
                batches = start()
                # The pipeline prepares that many batches in advance.
                times = clock(batches, args.batch, 12, args.seconds)
                if hasattr(batches, "close"):
                    batches.close()
                for key, value in times.items():
                    report[name][key].append(value)
            pin(1, cores)
            stages = direct(bench.jpegs, args.image_size, 2, args.magnitude, spent)
            clock(stages, 1, 0, args.seconds)
            for one in sizes:
                jpegs = bench.shapes.get(one["jpegs"], bench.jpegs)
                images = direct(jpegs, one["image_size"], one["layers"], args.magnitude)
                one["cpu_s"].append(clock(images, 1, 16, args.seconds)["cpu_s"])
    finally:
        pin(len(cores), cores)
    return {"variants": report, "stages": dict(spent), "sizes": sizes}


def measure_dispatch(bench: Bench) -> dict[str, Any]:
    """Seconds to start a step while nobody, threads or processes decode.

    With the JPEGs as they are, and with tiny ones, whose rows are the interpreter's
    work alone: so busy do many cores keep the interpreter of one process.
    """
    import jax

    step = jax.jit(lambda state: [x + 1 for x in state], donate_argnums=0)
    tiny = Bench(photos(16, 16, 16, 700), argparse.Namespace(**vars(bench.args)))
    tiny.args.image_size = 8
    report: dict[str, Any] = {}
    ways = {"nothing": None, "threads": 0} | {
        f"{k} worker{'s' * (k > 1)}": k for k in bench.args.workers
    }
    for i in range(bench.args.rounds):
        for name, workers in list(ways.items())[:: 1 if i % 2 == 0 else -1]:
            for load, of in (("", bench), (", interpreter busy", tiny)):
                batches: Any = None if workers is None else of._ours(2, workers)
                state = [jax.numpy.zeros(8) for _ in range(STATE)]
                for _ in range(12):
                    state = step(state)
                    _ = batches and next(batches)
                times: list[float] = []
                end = time.perf_counter() + bench.args.seconds
                while time.perf_counter() < end or not times:
                    _ = batches and next(batches)
                    start = time.perf_counter()
                    state = step(state)
                    times.append(time.perf_counter() - start)
                    jax.block_until_ready(state)
                if batches:
                    batches.close()
                entry = report.setdefault(f"{name}{load}", {"median_s": []})
                entry["median_s"].append(statistics.median(times))
    return report


def summarise(report: dict[str, Any], rates: list[float]) -> None:
    """Adds medians, rates per core, ratios and the cores that a rate needs."""
    variants = report["variants"]
    for result in variants.values():
        times = result["cpu_s"]
        median = statistics.median(times)
        result |= {"median_s": median, "min_s": min(times), "max_s": max(times)}
        result["spread"] = (max(times) - min(times)) / median
        result["images_per_s_per_core"] = 1 / median
        walls = statistics.median(result["wall_s"])
        result["images_per_s_wall"] = 1 / walls
    ratios = report["ratios"] = {}
    for name, result in variants.items():
        way, plus, augmented = name.partition(" + ")
        theirs = variants.get(f"tf.data{plus}{augmented}")
        if theirs and way != "tf.data":
            ratios[name] = {
                "cpu": theirs["median_s"] / result["median_s"],
                "best": theirs["min_s"] / result["min_s"],
                "wall": statistics.median(theirs["wall_s"])
                / statistics.median(result["wall_s"])
                / result["cores"],
            }
    report["stages"] = {
        stage: {"median_s": statistics.median(times), "mean_s": statistics.mean(times)}
        for stage, times in report["stages"].items()
    }
    for one in report["sizes"]:
        one["images_per_s_per_core"] = 1 / statistics.median(one["cpu_s"])
    report["cores_for_rate"] = {
        f"{rate:g}": {n: rate * r["median_s"] for n, r in variants.items()}
        for rate in rates
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table of text."""
    heads = (
        "images/s/core",
        "ms/image",
        "min",
        "max",
        "spread",
        "wall/s",
        "vs tf.data",
    )
    lines = [
        f"{report['count']} JPEGs, {report['mean_bytes'] / 1e3:.1f} kB and "
        f"{report['mean_pixels'] / 1e3:.0f} kpx on average -> {report['image_size']} px"
        f", batches of {report['batch']}; {report['cpu_model']}",
        "",
        " ".join([" " * 24, *(f"{head:>13}" for head in heads)]),
    ]
    for name, result in report["variants"].items():
        ratio = report["ratios"].get(name)
        cells = [
            f"{result['images_per_s_per_core']:,.0f}",
            *(f"{result[key] * 1e3:.2f}" for key in ("median_s", "min_s", "max_s")),
            f"{result['spread']:.0%}",
            f"{result['images_per_s_wall']:,.0f}",
            f"{ratio['cpu']:.2f}" if ratio else "-",
        ]
        lines.append(" ".join([f"{name:24}", *(f"{cell:>13}" for cell in cells)]))
    lines += [
        "",
        "Where the time of direct calls goes, median and mean ms of wall time:",
    ]
    for stage, times in report["stages"].items():
        lines.append(
            f"  {stage:16} {times['median_s'] * 1e3:6.3f} {times['mean_s'] * 1e3:6.3f}"
        )
    lines += ["", "Host cores that feed an accelerator, with RandAugment (without):"]
    for rate, needed in report["cores_for_rate"].items():
        cells = [
            f"{way} {needed[f'{way} + RandAugment']:.1f} ({needed[way]:.1f})"
            for way in needed
            if "+" not in way
        ]
        lines.append(f"  {float(rate):>8,.0f} images/s: {', '.join(cells)}")
    lines += ["", "Images/s of one core, direct calls, with RandAugment (without):"]
    for plain, augmented in zip(
        report["sizes"][::2], report["sizes"][1::2], strict=True
    ):
        what = plain["jpegs"] or "the JPEGs above"
        lines.append(
            f"  {what:>15} -> {plain['image_size']:3} px:"
            f" {augmented['images_per_s_per_core']:6,.0f}"
            f" ({plain['images_per_s_per_core']:,.0f})"
        )
    if report["dispatch"]:
        lines += ["", f"ms to start a step of {STATE} arrays while decoding:"]
    for name, result in report["dispatch"].items():
        best, median = min(result["median_s"]), statistics.median(result["median_s"])
        lines.append(f"  {name:27} {median * 1e3:6.2f}, best {best * 1e3:6.2f}")
    lines += ["", "Compared by CPU time, with that of worker processes."]
    return "\n".join(lines + report["notes"])


def write_plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws images/s against cores and against the image's side.

    Both by CPU time: of cores that have nothing else to do.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.7), layout="constrained")
    for layers, label, colour in (
        (0, "crop, resize, flip", "#1f5fa8"),
        (2, "with RandAugment", "#c4552d"),
    ):
        found = sorted(
            (result["cores"], result["cores"] * result["images_per_s_per_core"])
            for name, result in report["variants"].items()
            if "worker" in name and name.endswith("RandAugment") == bool(layers)
        )
        left.plot(*zip(*found, strict=True), "o-", color=colour, label=label)
        sizes = [
            (one["image_size"], one["images_per_s_per_core"])
            for one in report["sizes"]
            if not one["jpegs"] and one["layers"] == layers
        ]
        right.plot(*zip(*sorted(sizes), strict=True), "o-", color=colour, label=label)
    left.set(title="Worker processes, by CPU time", xlabel="cores = workers")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(title="One core, direct calls, CPU time", xlabel="side of the image, px")
    for ax in (left, right):
        ax.set(ylabel="images/s", xlim=0, ylim=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e8e8e8")
        ax.legend(frameon=False)
    figure.suptitle(report["cpu_model"], x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="benchmark.py input",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = p.add_argument
    whole, real = arguments.whole, arguments.real
    folder = arguments.path
    flag(
        "--images",
        type=folder,
        metavar="FOLDER",
        help="your own JPEGs; default: made ones",
    )
    flag("--count", type=whole(1), default=16, help="JPEGs at most")
    flag(
        "--shape", type=_shape, default="375x500", help="of made JPEGs, height x width"
    )
    flag("--bytes", type=whole(1), default=50_000, help="of a made JPEG, about")
    side = whole(1, 2**15)
    flag("--image_size", type=side, default=224, help="side in pixels")
    flag("--batch", type=whole(1), default=32, help="images")
    flag("--magnitude", type=real(0, 20), default=15.0, help="of RandAugment(2, ...)")
    workers = whole(1, 1024)
    flag("--workers", type=workers, nargs="*", default=[1, 2], help="processes")
    sizes, shapes = [64, 112, 224, 384, 448], [(187, 250), (750, 1000)]
    flag("--sizes", type=side, nargs="*", default=sizes, help="sides to compare")
    flag("--shapes", type=_shape, nargs="*", default=shapes, help="JPEGs to compare")
    switch = argparse.BooleanOptionalAction
    flag("--deit", action=switch, default=False, help="DeiT's crop and RandAugment too")
    flag("--dispatch", action=switch, default=True, help="time to start a step")
    flag("--rounds", type=whole(1), default=5)
    flag("--seconds", type=real(0), default=1.0, help="at least, per timing")
    rate = real(0.001)
    flag("--rate", type=rate, nargs="*", default=RATES, help="images/s to feed")
    flag("--peer", action=argparse.BooleanOptionalAction, default=True, help="tf.data")
    file = arguments.new_file
    flag("--out", type=file, metavar="FILE.json", help="where all raw figures go")
    flag("--plot", type=file, metavar="FILE.png", help="needs matplotlib and workers")
    return p


def _shape(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, e.g. 375x500")
    height, width = map(arguments.whole(8, 2**15), sides)
    return height, width


def main(argv: list[str], cpu_model: str) -> None:
    """Runs the benchmark; prints the table and writes `--out`."""
    args = parser().parse_args(argv)
    try:
        if args.images:
            jpegs = files(args.images, args.count)
        else:
            height, width = args.shape
            jpegs = photos(args.count, height, width, args.bytes)
    except (ValueError, OSError) as error:
        if (message := errors.message(error, ["input_benchmark"])) is None:
            raise
        parser().error(message)
    found = importlib.util.find_spec("tensorflow") is not None
    sizes = [decoding.decode(data).shape[:2] for data in jpegs]
    report: dict[str, Any] = {
        "command": "python scripts/benchmark.py input " + " ".join(argv),
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (np, grain)},
        "cpu_model": cpu_model,
        "count": len(jpegs),
        "mean_bytes": statistics.mean(map(len, jpegs)),
        "mean_pixels": statistics.mean(h * w for h, w in sizes),
        "image_size": args.image_size,
        "batch": args.batch,
        "magnitude": args.magnitude,
        "notes": [HINT] if args.peer and not found else [],
    }
    shapes = {
        f"{h}x{w}": photos(args.count, h, w, h * w * args.bytes // 187_500)
        for h, w in args.shapes
    }
    bench = Bench(jpegs, args, shapes)
    report |= measure(bench, args.peer and found)
    report["dispatch"] = measure_dispatch(bench) if args.dispatch else {}
    if "tensorflow" in sys.modules:
        report["versions"]["tensorflow"] = sys.modules["tensorflow"].__version__
    summarise(report, args.rate)
    if args.out:
        pathlib.Path(args.out).write_text(
            json.dumps(report, indent=1) + "\n", encoding="utf-8"
        )
    if args.plot:
        write_plot(report, pathlib.Path(args.plot))
    print(table(report))
