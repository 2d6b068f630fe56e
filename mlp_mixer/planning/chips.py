"""Chips, with what a data sheet says of each, and the slices that they come in."""

import dataclasses
import math
import re

from mlp_mixer import known

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip; figures are of one chip, decimal, and a data sheet's.

    Attributes:
      platform: "tpu", "gpu" or "cpu", as JAX has it.
      memory: bytes of the chip's memory.
      flops: operations of products per second in bfloat16, 2 per multiply-add.
      float32_flops: operations per second of float32 products at JAX's default
        precision: a TPU rounds them to bfloat16, a GPU to TF32.
      bandwidth: bytes per second from and to that memory.
      links: bytes per second to other chips, both directions together.
      hertz: clock of a TPU, by which the compiler's cycles become seconds.
      devices: devices that JAX sees in one chip.
      host: chips of one host.
      sides: axes of a slice: 2 or 3; 1: a number of chips.
      most: chips of the largest slice.
      source: where the figures are from.
    """

    platform: str
    memory: float
    flops: float
    float32_flops: float
    bandwidth: float
    links: float
    hertz: float
    devices: int
    host: int
    sides: int
    most: int
    source: str


# A TPU's clock is its peak divided by its multipliers and by 2: v3 has 4 x 128 x 128,
# v4 and v5p 8 of them, v5e 4.
_CLOUD = "docs.cloud.google.com/tpu/docs"
CHIPS = {
    "v3": Chip(
        platform="tpu",
        memory=32 * GIB,
        flops=123e12,
        float32_flops=123e12,
        bandwidth=900e9,
        links=328e9,
        hertz=0.94e9,
        devices=2,
        host=4,
        sides=2,
        most=1024,
        source=f"{_CLOUD}/v3; links, 4 of 656 Gbit/s: from memory",
    ),
    "v4": Chip(
        platform="tpu",
        memory=32 * GIB,
        flops=275e12,
        float32_flops=275e12,
        bandwidth=1228e9,
        links=300e9,
        hertz=1.05e9,
        devices=1,
        host=4,
        sides=3,
        most=4096,
        source=f"{_CLOUD}/v4; links, 6 of 50 GB/s: from memory",
    ),
    "v5e": Chip(
        platform="tpu",
        memory=16 * GIB,
        flops=197e12,
        float32_flops=197e12,
        bandwidth=819e9,
        links=400e9,
        hertz=1.5e9,
        devices=1,
        host=4,
        sides=2,
        most=256,
        source=f"{_CLOUD}/v5e",
    ),
    "v5p": Chip(
        platform="tpu",
        memory=95 * GIB,
        flops=459e12,
        float32_flops=459e12,
        bandwidth=2765e9,
        links=1200e9,
        hertz=1.75e9,
        devices=1,
        host=4,
        sides=3,
        most=6144,
        source=f"{_CLOUD}/v5p",
    ),
    "v6e": Chip(
        platform="tpu",
        memory=32 * GIB,
        flops=918e12,
        float32_flops=918e12,
        bandwidth=1638e9,
        links=800e9,
        hertz=1.75e9,
        devices=1,
        host=4,
        sides=2,
        most=256,
        source=f"{_CLOUD}/v6e; clock: v5p's, assumed",
    ),
    "h100": Chip(
        platform="gpu",
        memory=80e9,
        flops=989e12,
        float32_flops=494e12,
        bandwidth=3350e9,
        links=900e9,
        hertz=0.0,
        devices=1,
        host=8,
        sides=1,
        most=8,
        source="NVIDIA's data sheet, H100 SXM",
    ),
    "h200": Chip(
        platform="gpu",
        memory=141e9,
        flops=989e12,
        float32_flops=494e12,
        bandwidth=4800e9,
        links=900e9,
        hertz=0.0,
        devices=1,
        host=8,
        sides=1,
        most=8,
        source="NVIDIA's data sheet, H200 SXM",
    ),
    # A core of this host as a device: 32 multiply-adds a cycle at 2.5 GHz.
    "cpu": Chip(
        platform="cpu",
        memory=4 * GIB,
        flops=0.16e12,
        float32_flops=0.16e12,
        bandwidth=10e9,
        links=10e9,
        hertz=0.0,
        devices=1,
        host=8,
        sides=1,
        most=4096,
        source="a core with AVX-512 and its share of a host, assumed",
    ),
}

# The slices that are offered of chips in two dimensions; those of v5e and v6e end at
# 16x16, those of v3 begin with a host. In three, a slice is 2x2x1, 2x2x2, 2x2x4, 2x4x4,
# or its sides are multiples of 4.
_FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"]
_SMALL = ["2x2x1", "2x2x2", "2x2x4", "2x4x4"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, e.g. v3:16x16.

    Attributes:
      name: what the command line has, e.g. "v3:8x8".
      kind: a key of `CHIPS`.
      grid: the chips along each axis.
    """

    name: str
    kind: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What one of its chips is."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.grid)

    @property
    def devices(self) -> int:
        """The number of devices that JAX sees."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return -(-self.chips // self.chip.host)

    @property
    def memory(self) -> float:
        """Bytes of memory of a device."""
        return self.chip.memory / self.chip.devices

    def rates(self, dtype: str) -> tuple[float, float]:
        """Returns product operations and bytes of memory per second, of a device.

        Args:
          dtype: dtype of the products' operands.
        """
        chip = self.chip
        flops = chip.flops if dtype == "bfloat16" else chip.float32_flops
        return flops / chip.devices, chip.bandwidth / chip.devices


def topologies(text: str) -> list[Topology]:
    """Returns the topologies of "v3:16x16,h200:8".

    Raises:
      ValueError: there is no such chip, or it does not come in such a slice.
    """
    return [_topology(word) for word in text.split(",")]


def _topology(word: str) -> Topology:
    kind, _, shape = word.strip().partition(":")
    chip = known.pick("chip", kind, CHIPS)
    examples = {1: f"{kind}:8", 2: f"{kind}:8x8", 3: f"{kind}:4x4x4"}[chip.sides]
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        raise ValueError(
            f"The topology {word!r} has no grid of chips; expected e.g. {examples}."
        )
    grid = tuple(map(int, shape.split("x")))
    if len(grid) != chip.sides:
        sides = {1: "a number", 2: "two sides", 3: "three sides"}[chip.sides]
        raise ValueError(
            f"The topology {word!r} has {len(grid)} side(s); a slice of {kind} has "
            f"{sides}, e.g. {examples}."
        )
    if offered := _not_offered(kind, chip, grid):
        raise ValueError(f"There is no slice {word!r}; {kind} comes in {offered}.")
    return Topology(f"{kind}:{shape}", kind, grid)


def _not_offered(kind: str, chip: Chip, grid: tuple[int, ...]) -> str:
    """What slices there are, if this is none of them; else ""."""
    shape, count = "x".join(map(str, grid)), math.prod(grid)
    if chip.sides == 1:
        if count <= chip.most:
            return ""
        return f"1 to {chip.most}: a host has {chip.host}, more are not modelled"
    if chip.sides == 2:
        offered = [s for s in _FLAT if math.prod(map(int, s.split("x"))) <= chip.most]
        offered = offered[1:] if kind == "v3" else offered
        return "" if shape in offered else ", ".join(offered)
    whole = all(side % 4 == 0 for side in grid) and list(grid) == sorted(grid)
    if shape in _SMALL or (whole and count <= chip.most):
        return ""
    return (
        f"{', '.join(_SMALL)} and in sides that are multiples of 4, the smallest "
        f"first, e.g. 4x4x8, of at most {chip.most} chips"
    )
