"""What a training step needs of a device: compiled for it, or reckoned from shapes."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from mlp_mixer import experiment, models, recipe, sharding
from mlp_mixer.models.model import all_axes
from mlp_mixer.planning import counts, hlo, targets
from mlp_mixer.planning.chips import Topology

# The share of a chip's memory that a program may have; the runtime has the rest. JAX
# takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
USABLE = {"tpu": 0.97, "gpu": 0.75, "cpu": 1.0}
# The images of a step that is counted: no axis of a model has a multiple of them.
_IMAGES = 127


@dataclasses.dataclass(frozen=True)
class Step:
    """What one training step needs; bytes, operations and seconds are of one device.

    Attributes:
      origin: "compiled", or "shapes" where it is reckoned.
      run: how the model is computed, in words.
      mesh: devices along each axis.
      sharding: the recipe's word.
      accumulate: micro-batches.
      parameters: bytes of parameters.
      moments: bytes of the optimiser's state and of statistics.
      batch: bytes of images and labels.
      temporaries: bytes of activations, gradients and what else a step makes.
      peak: bytes of all of them at once.
      usable: bytes that a program may have.
      flops: operations of products, those that are computed again included.
      needed_flops: operations without those.
      moved: bytes from and to memory; from shapes, those of products and of the update.
      collectives: kind → (how often, bytes of results).
      roofline_seconds: the shortest time at the data sheet's rates.
      link_seconds: the shortest time of the collectives.
      compiler_seconds: the compiler's estimate, by its cycles; on TPUs.
      optimal_seconds: the compiler's bound, where it gives one, on a v3; it counts the
        body of a scan once.
      compiled_flops: operations of products in the compiled program.
      compile_seconds: time that compiling took.
      compiler: name and version of the compiler.
      refused: whether the compiler says that the program does not fit.
    """

    origin: str
    run: str
    mesh: dict[str, int]
    sharding: str
    accumulate: int
    parameters: float
    moments: float
    batch: float
    temporaries: float
    peak: float
    usable: float
    flops: float
    needed_flops: float
    moved: float
    collectives: dict[str, tuple[int, float]]
    roofline_seconds: float
    link_seconds: float
    compiler_seconds: float | None = None
    optimal_seconds: float | None = None
    compiled_flops: float | None = None
    compile_seconds: float | None = None
    compiler: str = ""
    refused: bool = False

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return not self.refused and self.peak <= self.usable

    @property
    def seconds(self) -> float:
        """What a duration follows from: the compiler's estimate, or the roofline."""
        return max(self.compiler_seconds or self.roofline_seconds, self.link_seconds)


class Part(NamedTuple):
    """What a device has of a parameter.

    Attributes:
      path: path of the parameter.
      shape: lengths of its axes.
      letters: their letters in the model's `AXES`.
      cut: what cuts each of them, "-" for nothing; or "whole".
      bytes: bytes on one device.
    """

    path: str
    shape: str
    letters: str
    cut: str
    bytes: float


class Planner:
    """Reckons and compiles the steps of a recipe on a topology.

    Args:
      config: the recipe, complete.
      topology: the chips.
      devices: the topology's devices, or as many of this host that stand for them.
    """

    def __init__(self, config: Any, topology: Topology, devices: list[Any]):
        self.config, self.topology, self.devices = config, topology, devices
        platform = topology.chip.platform
        with config.unlocked(), config.ignore_type():
            if config.run.scan is None:
                config.run.scan = models.Run.scans(platform)
            if config.run.remat is None:
                config.run.remat = "pre_gelu" if config.run.scan else "none"
        self._made: dict[str, Any] = {}  # what every mesh shares

    def changed(self, **changes: Any) -> "Planner":
        """Returns a planner of the recipe with other values of fields.

        Args:
          **changes: values by field; of `mesh` and `run`, some of the section's fields.
        """
        config = self.config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            for field, value in changes.items():
                if isinstance(value, Mapping):
                    config[field].update(value)
                else:
                    config[field] = value
        planner = Planner(config, self.topology, self.devices)
        planner._made = self._made
        return planner

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The recipe's mesh of the topology's devices.

        Raises:
          ValueError: the recipe's mesh or batch does not fit them.
        """
        mesh = sharding.make_mesh(**self.config.mesh, devices=self.devices)
        sharding.check_batch(mesh, self.config.batch_size, self.config.accumulate)
        return mesh

    def build(self) -> experiment.Experiment:
        """Returns the recipe on the mesh, with the shardings of its state."""
        total = recipe.total_steps(self.config)
        return experiment.build(self.config, self.mesh, _batch(self.config, 1), total)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What depends on the model alone and how it is computed, made only once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _state(self) -> Any:
        """The state's shapes with their shardings: those of `build`, made only once."""
        shapes = self._once("shapes", lambda: self.build().target)
        axes = all_axes(models.family(self.config.model.name))
        strategy = self.config.sharding
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            shapes,
            sharding.shardings(shapes, self.mesh, strategy, axes),
        )

    def shardings(self) -> list[Part]:
        """Returns how each parameter is cut."""
        state, parts = self._state(), []
        axes = all_axes(models.family(self.config.model.name))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            cut = [str(axis or "-") for axis in leaf.sharding.spec]
            parts.append(
                Part(
                    path="/".join(str(key.key) for key in path),
                    shape=" x ".join(map(str, leaf.shape)),
                    letters=" ".join(sharding.letters_of(path, leaf, axes)),
                    cut=", ".join(cut) if {*cut} - {"-"} else "whole",
                    bytes=_held(leaf),
                )
            )
        return parts

    def reckoned(self) -> Step:
        """Returns what a step needs, by the shapes of its program."""
        config, mesh, chip = self.config, self.mesh, self.topology.chip
        state = self._state()
        counted = self._once(f"counts {config.run}", lambda: _counted(config))
        run = self._once(f"words {config.run}", lambda: _words(config, mesh))
        images = config.batch_size / sharding.rows(mesh) / config.accumulate
        if config.run.images_at_once:
            images = min(images, config.run.images_at_once)
        batch = sum(
            math.prod(x.shape) * x.dtype.itemsize / sharding.rows(mesh)
            for x in _batch(config, config.batch_size).values()
        )
        parameters = sum(map(_held, jax.tree.leaves(state.params)))
        held = sum(map(_held, jax.tree.leaves(state)))
        peak = self._peak(counted.jaxpr, state, images)
        share = config.batch_size / _IMAGES / mesh.size
        # An update reads gradients, and reads and writes parameters and both moments.
        moved = counted.moved * share + parameters + 2 * held
        flop_rate, byte_rate = self.topology.rates(config.run.dtype)
        collectives = self._collectives(state, images)
        return Step(
            origin="shapes",
            run=run,
            mesh={str(axis): size for axis, size in mesh.shape.items()},
            sharding=config.sharding,
            accumulate=config.accumulate,
            parameters=parameters,
            moments=held - parameters,
            batch=batch,
            temporaries=max(peak - held, 0.0),
            peak=peak + batch,
            usable=self.topology.memory * USABLE[chip.platform],
            flops=counted.flops * share,
            needed_flops=counted.needed_flops * share,
            moved=moved,
            collectives=collectives,
            roofline_seconds=max(counted.flops * share / flop_rate, moved / byte_rate),
            link_seconds=_link_seconds(collectives, self.topology),
        )

    def _peak(self, jaxpr: Any, state: Any, images: float) -> float:
        """The most bytes at once, where a device computes so many images at a time."""
        along, parts = self.mesh.shape["model"], self._parts()
        hidden = _hidden_lengths(self.config, state.params)

        def bytes_of(aval: Any) -> float:
            size = float(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8))
            if any(n and n % _IMAGES == 0 for n in aval.shape):
                size *= images / _IMAGES
            elif math.prod(aval.shape) >= sharding.FSDP_MIN_ELEMENTS:
                size /= parts
            return size / (along if hidden & {*aval.shape} else 1)

        peak = counts.peak(jaxpr, bytes_of)
        if parts > 1:  # the weights of one block, and of the next
            blocks = self.config.model.get("num_blocks", 1)  # of each stage, if several
            count = sum(blocks) if isinstance(blocks, tuple) else blocks
            peak += 2 * self._gradients(state) / count
        return peak

    def _parts(self) -> int:
        """In how many parts "fsdp" cuts parameters."""
        if self.config.sharding != "fsdp":
            return 1
        shape = self.mesh.shape
        return shape["fsdp"] if shape["fsdp"] > 1 else shape["data"]

    def _gradients(self, state: Any) -> float:
        """The bytes of all gradients that a device of the axis model has."""
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
        return whole / self.mesh.shape["model"]

    def _collectives(self, state: Any, images: float) -> dict[str, tuple[int, float]]:
        """What travels: gradients; of fsdp, weights for both ways; of the axis model,
        the sum of an MLP for both ways."""
        micro, whole = self.config.accumulate, self._gradients(state)
        found = {"all-reduce": (0, 0.0)}
        if self._parts() > 1:
            found["all-gather"] = (2 * micro, 2 * micro * whole)
            found["reduce-scatter"] = (micro, micro * whole / self._parts())
        elif sharding.rows(self.mesh) > 1:
            found["all-reduce"] = (micro, micro * whole)
        if self.mesh.shape["model"] > 1:
            model = self.config.model
            mlps = sum(
                len(shape) == 2 and letters[0].startswith("d")
                for letters, shape in _lettered(self.config, state.params)
                if letters
            )
            (h, w), (ph, pw) = model.image_size, model.patch_size
            size = 2 if self.config.run.dtype == "bfloat16" else 4
            # Of the first stage, whose maps are the largest, if there are several.
            channels = int(np.ravel(model.get("hidden_dim", 0))[0])
            one = images * (h // ph) * (w // pw) * channels * size
            count, carried = found["all-reduce"]
            times = 2 * mlps
            if self.config.run.remat != "none":  # once more, but for a block's last
                times += mlps - int(np.sum(model.get("num_blocks", mlps)))
            times *= micro
            found["all-reduce"] = (count + times, carried + times * one)
        return {kind: sums for kind, sums in found.items() if sums[0]}

    def compiled(self) -> Step:
        """Returns what a step needs, of the program that is compiled for the topology.

        Raises:
          jax.errors.JaxRuntimeError: the compiler refuses the program for another
            reason than memory.
        """
        reckoned, built, config = self.reckoned(), self.build(), self.config
        cut = sharding.batch(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut)
            for name, x in _batch(config, config.batch_size).items()
        }
        train_step: Any = built.train_step
        lowered = train_step.lower(built.target, batch)
        begun = time.monotonic()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message:
                raise
            held = reckoned.parameters + reckoned.moments + reckoned.batch
            made = refused_bytes(message, held) or reckoned.temporaries
            measured: dict[str, Any] = {
                "temporaries": made,
                "peak": held + made,
                "refused": True,
            }
        else:
            measured = self._read(executable)
        return dataclasses.replace(
            reckoned,
            origin="compiled",
            compiler=targets.compiler(self.topology.kind),
            compile_seconds=time.monotonic() - begun,
            **measured,
        )

    def _read(self, executable: Any) -> dict[str, Any]:
        """What a compiled step says of itself."""
        memory = executable.memory_analysis()
        # What draws from a distribution ends by chance, mostly after one turn.
        found = hlo.kernels(executable.as_text(), open_loops=1)
        rates = hlo.Rates(*self.topology.rates(self.config.run.dtype))
        hertz = self.topology.chip.hertz
        cycles = sum(k.cycles * k.turns for k in found)
        made = memory.temp_size_in_bytes + memory.output_size_in_bytes
        made -= memory.alias_size_in_bytes
        collectives = hlo.collectives(found)
        read: dict[str, Any] = {
            "temporaries": float(made),
            "peak": float(memory.argument_size_in_bytes + made),
            "moved": float(sum((k.read + k.written) * k.turns for k in found)),
            "collectives": collectives,
            "roofline_seconds": sum(rates.seconds(k) for k in found),
            "link_seconds": _link_seconds(collectives, self.topology),
            "compiled_flops": float(sum(k.flops * k.turns for k in found)),
        }
        if cycles and hertz:
            read["compiler_seconds"] = cycles / hertz
        if self.topology.kind == "v3":  # elsewhere libtpu fills it with any number
            read["optimal_seconds"] = executable.cost_analysis()["optimal_seconds"]
        return read


# --- Shapes ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The step of one device that computes `_IMAGES` images, counted."""

    jaxpr: Any
    flops: int
    needed_flops: int
    moved: int


def _counted(config: Any) -> _Counted:
    jaxpr = _jaxpr(config, config.run.remat)
    kept = jaxpr if config.run.remat == "none" else _jaxpr(config, "none")
    return _Counted(
        *(jaxpr, counts.flops(jaxpr), counts.flops(kept), counts.product_bytes(jaxpr))
    )


def _jaxpr(config: Any, remat: str) -> Any:
    """The jaxpr of a step of `_IMAGES` images on one device."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.run.update(remat=remat, images_at_once=_IMAGES)
        config.update(accumulate=1, sharding="replicated")
    mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    total = recipe.total_steps(config)
    built = experiment.build(config, mesh, _batch(config, 1), total)
    return jax.make_jaxpr(built.train_step)(built.target, _batch(config, _IMAGES))


def _words(config: Any, mesh: jax.sharding.Mesh) -> str:
    """How the model is computed, for people."""
    return str(experiment.create_model(config, mesh).run)


def _batch(config: Any, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, as `pipeline.train_batches` makes it."""
    shape = (images, *config.model.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, "uint8"),
        "label": jax.ShapeDtypeStruct((images,), "int32"),
    }


def _held(leaf: Any) -> float:
    """The bytes that one device holds of an array."""
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def _lettered(config: Any, params: Any) -> list[tuple[Sequence[str], Sequence[int]]]:
    """The letters and the lengths of every parameter's axes."""
    axes = all_axes(models.family(config.model.name))
    return [
        (sharding.letters_of(path, leaf, axes), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def _hidden_lengths(config: Any, params: Any) -> Set[int]:
    """The lengths that only hidden units and classes have: what the axis model cuts."""
    lengths: dict[bool, set[int]] = {True: set(), False: set()}
    for letters, shape in _lettered(config, params):
        for letter, length in zip(letters, shape, strict=False):
            lengths[letter.startswith("d") or letter == "k"].add(length)
    return lengths[True] - lengths[False]


def _link_seconds(sums: Mapping[str, tuple[int, float]], topology: Topology) -> float:
    """The shortest time of collectives: what a ring sends, one way at a time."""
    rate = topology.chip.links / topology.chip.devices / 2
    sent = {"all-reduce": 2.0, "reduce-scatter": topology.devices - 1.0}
    return sum(size * sent.get(kind, 1.0) for kind, (_, size) in sums.items()) / rate


def refused_bytes(message: str, held: float) -> float | None:
    """Returns the temporaries of a program that a compiler refuses; None if unsaid.

    Args:
      message: the compiler's message.
      held: bytes of the program's arguments.
    """
    for pattern, arguments in (
        (r"HLO temporaries \(([\d.]+)([KMGT])\)", 0.0),
        (r"Used ([\d.]+)([KMGT]) of", held),
    ):
        if found := re.search(pattern, message):
            size = float(found[1]) * 2.0 ** (10 * (1 + "KMGT".index(found[2])))
            return max(size - arguments, 0.0)
    return None
