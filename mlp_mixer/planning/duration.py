"""From a step to a run: hours, cost, images, disk."""

import dataclasses
from typing import Any

import numpy as np

from mlp_mixer import recipe
from mlp_mixer.planning.chips import Topology
from mlp_mixer.planning.step import Step

# What a published run needed, divided by what its step is reckoned to need: the least
# and the most of docs/plan.md, and a tenth beyond either, since the points are few.
COMPILER_RATIOS = (0.65, 1.12)
ROOFLINE_RATIOS = (0.78, 1.42)
SHAPES_RATIOS = (1.49, 2.58)
# A guess.
CPU_RATIOS = (1.0, 4.0)
# Shares of an H100's peak that others have published: 39 % (torchtitan, Llama 3 8B) and
# 22.9 % (ViT-5-S).
GPU_SHARES = (0.39, 0.229)

# Images per second of one core, by the side of the image: without and with RandAugment
# (docs/benchmarks/cpu_input.json, JPEGs of 500 x 375).
SIDES = (64, 112, 224, 384, 448)
RATES = {
    False: (1609, 1560, 1465, 1292, 1214),
    True: (1366, 1273, 1087, 752, 622),
}
# The same file: what the pipeline with two worker processes makes of that.
PIPELINE = {False: 1151 / 1481, True: 903 / 1077}
# What DeiT's crop, without and with its RandAugment, leaves of that (docs/data.md).
DEIT = {False: 626 / 1426, True: 435 / 1056}

# Bytes of an encoded image: the official tar's 147.9 GB; 1.31 TB of ImageNet-21k (from
# memory). Of other data sets, ImageNet's.
IMAGE_BYTES = {"imagenet2012": 115_000.0, "imagenet21k": 92_000.0}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a whole run needs; a pair is the least and the most.

    Attributes:
      steps: updates.
      step_seconds: time of an update, evaluations and checkpoints included.
      hours: time of the run.
      origin: where the range comes from.
      chip_hours: hours times chips.
      cost: chip-hours times a price; None without a price.
      images_per_second: what the hosts must make at most.
      cores: cores of all hosts for that.
      hosts: the number of hosts.
      image_bytes: mean bytes of an encoded image.
      image_bytes_from: where that is from.
      read_bytes_per_second: what is read, of all hosts.
      data_bytes: disk for the data set.
      checkpoint_bytes: disk for the checkpoints that are kept.
    """

    steps: int
    step_seconds: tuple[float, float]
    hours: tuple[float, float]
    origin: str
    chip_hours: tuple[float, float]
    cost: tuple[float, float] | None
    images_per_second: float
    cores: float
    hosts: int
    image_bytes: float
    image_bytes_from: str
    read_bytes_per_second: float
    data_bytes: float
    checkpoint_bytes: float


def run(
    config: Any,
    step: Step,
    topology: Topology,
    *,
    price: float | None = None,
    image_bytes: float | None = None,
) -> Run:
    """Returns what a run needs whose step is reckoned.

    Args:
      config: the recipe, complete.
      step: what its step needs.
      topology: the chips.
      price: price of a chip for an hour.
      image_bytes: mean bytes of an encoded image; None: as is known of the data set.
    """
    steps = recipe.total_steps(config)
    low, high, origin = step_range(step, topology, config.run.dtype)
    hours = low * steps / 3600, high * steps / 3600
    chip_hours = hours[0] * topology.chips, hours[1] * topology.chips
    images = config.batch_size / low
    origin_of_bytes = "given"
    if image_bytes is None:
        known = config.dataset.name in IMAGE_BYTES
        name = config.dataset.name if known else "imagenet2012"
        image_bytes = IMAGE_BYTES[name]
        origin_of_bytes = "known" if known else f"assumed, as {name}'s"
    kept = config.checkpoint.keep_latest + (config.checkpoint.keep_best is not None)
    if config.checkpoint.keep_every_steps:
        kept += steps // config.checkpoint.keep_every_steps
    state = (step.parameters + step.moments) * _copies(step)
    return Run(
        steps=steps,
        step_seconds=(low, high),
        hours=hours,
        origin=origin,
        chip_hours=chip_hours,
        cost=None if price is None else (chip_hours[0] * price, chip_hours[1] * price),
        images_per_second=images,
        cores=images / images_per_core(config),
        hosts=topology.hosts,
        image_bytes=image_bytes,
        image_bytes_from=origin_of_bytes,
        read_bytes_per_second=images * image_bytes,
        data_bytes=(config.dataset.num_examples or 0) * image_bytes,
        checkpoint_bytes=kept * state,
    )


def step_range(step: Step, topology: Topology, dtype: str) -> tuple[float, float, str]:
    """Returns the least and the most seconds of a step, and where they come from.

    Args:
      step: what the step needs.
      topology: the chips.
      dtype: dtype of products.
    """
    if topology.chip.platform == "gpu":
        rate, _ = topology.rates(dtype)
        best, worst = (step.needed_flops / rate / share for share in GPU_SHARES)
        low = max(step.seconds, best)
        text = "39 % and 22.9 % of the peak, published of other models on H100"
        return low, max(low, worst), text
    if topology.kind == "cpu":
        low, high = CPU_RATIOS
        text = f"{low:g} to {high:g} x the roofline, which nothing was compared with"
        return step.roofline_seconds * low, step.roofline_seconds * high, text
    if step.compiler_seconds is not None:
        ratios, of = COMPILER_RATIOS, "the compiler's estimate"
    elif step.origin == "compiled" and not step.refused:
        ratios, of = ROOFLINE_RATIOS, "the compiled program's roofline"
    else:
        ratios, of = SHAPES_RATIOS, "the roofline of shapes"
    where = "on a v3" if topology.kind == "v3" else "on a v3, carried over"
    text = f"{ratios[0]:g} to {ratios[1]:g} x {of}, as published runs {where}"
    return step.seconds * ratios[0], step.seconds * ratios[1], text


def images_per_core(config: Any) -> float:
    """Returns the images per second that one core decodes and augments."""
    augments = config.input.randaugment_layers > 0
    side = max(config.model.image_size)
    rate = float(np.interp(side, SIDES, RATES[augments])) * PIPELINE[augments]
    return rate * DEIT[augments] if config.input.crop == "timm" else rate


def _copies(step: Step) -> int:
    """In how many parts the state is cut: a checkpoint has all of them."""
    along = step.mesh["model"]
    if step.sharding != "fsdp":
        return along
    return along * (step.mesh["fsdp"] if step.mesh["fsdp"] > 1 else step.mesh["data"])
