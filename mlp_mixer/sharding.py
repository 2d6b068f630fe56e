"""The device mesh, and where arrays live on it.

Three axes: `data` and `fsdp` cut a batch; the devices along `model` share its rows.

A parameter is cut by the letters of its axes in `AXES`: over `model` along hidden units
and the head's classes. So the first product of an MLP is cut by its output and the
second by its input, and one sum over `model` makes the branch whole (Shoeybi et al.
2019, arXiv 1909.08053). From the parameters alone the compiler finds how to cut hidden
layers; tests hold it to that. With "fsdp" the largest axis that is left is cut too,
over `fsdp`, or over `data` where `fsdp` is 1. Moments are cut as their parameters are.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_mixer import known

# The axes that cut a batch.
ROWS = ("data", "fsdp")

# Smaller arrays stay replicated: biases and LayerNorms, where a gather would cost more
# than it saves. Every kernel of Table 1 is larger (token mixing's smallest: 12,544).
FSDP_MIN_ELEMENTS = 4096


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh of `data` x `fsdp` x `model` devices.

    Args:
      data: devices along this axis; -1: as many as the others leave.
      fsdp: devices along the axis that also cuts parameters.
      model: devices that share the rows of a batch.
      devices: the devices to choose from, e.g. those of a machine that is only compiled
        for; by default all devices here.

    Raises:
      ValueError: the devices do not suffice, or would not all be used in a run of
        several processes.
    """
    here = devices is None
    found = list(jax.devices() if devices is None else devices)
    given = f"mesh.data is {data}, mesh.fsdp {fsdp}, mesh.model {model}"
    others = fsdp * model
    if fsdp < 1 or model < 1 or data == 0 or data < -1:
        raise ValueError(
            f"{given}; expected numbers from 1 (data: or -1, for the rest)."
        )
    shape = (len(found) // others if data == -1 else data, fsdp, model)
    count = math.prod(shape)
    if not 0 < count <= len(found) or (data == -1 and count < len(found)):
        raise ValueError(
            f"{given}, but there are {len(found)} devices; "
            + ("fsdp x model must divide them." if data == -1 else "data -1 takes all.")
        )
    if here and count < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"{given}, which takes {count} of {len(found)} devices; with "
            f"{jax.process_count()} processes use all of them (mesh.data=-1)."
        )
    axes = (*ROWS, "model")
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 3, devices=found[:count])


def rows(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """`axis`, by default the leading one, cut into `rows(mesh)` parts."""
    return NamedSharding(mesh, P(*[None] * axis, ROWS))


def constrained(tree: Any, shardings: Any) -> Any:
    """The arrays of a compiled function where `shardings` (one, or a tree) has them."""
    types = jax.tree.leaves(shardings)[0].mesh.axis_types
    explicit = AxisType.Explicit in types  # then a constraint would be an assertion
    move = jax.sharding.reshard if explicit else lax.with_sharding_constraint
    return move(tree, shardings)


def gathered(mesh: Mesh, params: Any, axes: Mapping[str, str]) -> Any:
    """Undoes the cut of "fsdp" inside a compiled function; gradients come back cut.

    Left to itself, the compiler may move activations instead, or keep the gradient of
    every parameter whole on every device.

    Args:
      mesh: mesh of devices.
      params: the parameters, or some of them by their whole paths.
      axes: the model's `AXES`.
    """

    def one(path: Any, leaf: Any) -> Any:
        letters = letters_of(path, leaf, axes)
        whole = NamedSharding(mesh, _spec(mesh, leaf.shape, letters, fsdp=False))
        cut = NamedSharding(mesh, _spec(mesh, leaf.shape, letters, fsdp=True))
        gather = jax.custom_vjp(lambda x: constrained(x, whole))
        gather.defvjp(
            lambda x: (constrained(x, whole), None),
            lambda _, gradient: (constrained(gradient, cut),),
        )
        return gather(leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def letters_of(
    path: Sequence[Any], leaf: Any, axes: Mapping[str, str]
) -> Sequence[str]:
    """The letters of a parameter, or of a moment of one; none where they are not known.

    Args:
      path: its keys, perhaps after those of the state that holds it.
      leaf: the array or its shape.
      axes: the model's `AXES`.
    """
    name = "/".join(str(key.key) for key in path if hasattr(key, "key"))
    for pattern, letters in axes.items():
        numbered = re.escape(pattern).replace(r"\*", r"\d+")
        if re.fullmatch(rf"(.*/)?{numbered}", name):
            found = letters.split()
            return found if len(found) == leaf.ndim else ()
    return ()


def _spec(mesh: Mesh, shape: Sequence[int], letters: Sequence[str], *, fsdp: bool) -> P:
    """How an array is cut over `model`, and with `fsdp` over the batch's devices."""
    spec: list[str | None] = [None] * len(shape)
    if mesh.shape["model"] > 1:
        for axis, letter in enumerate(letters):
            divides = shape[axis] % mesh.shape["model"] == 0
            if divides and (letter.startswith("d") or letter == "k"):
                spec[axis] = "model"
    name = "fsdp" if mesh.shape["fsdp"] > 1 else "data"
    if fsdp and math.prod(shape) >= FSDP_MIN_ELEMENTS:
        for axis in np.argsort(shape)[::-1]:
            if spec[axis] is None and shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
                break
    return P(*spec)


# What is cut beside what `model` cuts.
STRATEGIES = {"replicated": False, "fsdp": True}


def shardings(tree: Any, mesh: Mesh, strategy: str, axes: Mapping[str, str]) -> Any:
    """Returns a NamedSharding for every array (or shape) of `tree`.

    Args:
      tree: parameters, optimiser state or a whole train state.
      mesh: mesh of devices.
      strategy: "replicated", or "fsdp": every array of `FSDP_MIN_ELEMENTS` or more is
        cut along its largest axis that the devices divide, and `model` does not cut.
      axes: the model's `AXES`.
    """
    fsdp = known.pick("sharding", strategy, STRATEGIES)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, _spec(mesh, leaf.shape, letters_of(path, leaf, axes), fsdp=fsdp)
        ),
        tree,
    )


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Passes if a batch can be cut evenly.

    Args:
      mesh: mesh of devices.
      batch_size: images of all processes together.
      accumulate: micro-batches that it is cut into first.

    Raises:
      ValueError: micro-batches and parts do not divide it.
    """
    parts = rows(mesh) * accumulate
    if batch_size % parts:
        micro = f"{accumulate} micro-batches on " if accumulate > 1 else ""
        many = jax.process_count()
        where = f" of {many} processes" if many > 1 else ""
        raise ValueError(
            f"A batch of {batch_size} does not divide among {micro}{rows(mesh)} "
            f"devices{where}; try {max(batch_size // parts, 1) * parts}."
        )


def whole_batch(mesh: Mesh, batch_size: int) -> int:
    """The smallest batch of `batch_size` rows or more that can be cut evenly."""
    return -(-batch_size // rows(mesh)) * rows(mesh)


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that this process's devices hold, in order.

    Processes whose devices share rows, along `model`, get the same ones.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    check_batch(mesh, batch_size, accumulate=1)
    return tuple(
        row for start, stop in _spans(mesh, batch_size) for row in range(start, stop)
    )


def _spans(mesh: Mesh, batch_size: int) -> list[tuple[int, int]]:
    """The parts (start, stop) of a batch on this process's devices."""
    indices: Any = batch(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({index[0].indices(batch_size)[:2] for index in indices.values()})


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Makes one global array per leaf, cut over the devices, from `process_rows`.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    here, parts = len(jax.tree.leaves(tree)[0]), len(_spans(mesh, rows(mesh)))
    size = here * rows(mesh) // parts
    check_batch(mesh, size, accumulate=1)
    first = {start: i for i, (start, _) in enumerate(_spans(mesh, size))}
    each = size // rows(mesh)

    def one(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            i = first[index[0].start or 0]
            return x[i * each : (i + 1) * each]

        shape = (size, *x.shape[1:])
        return jax.make_array_from_callback(shape, batch(mesh), part)

    return jax.tree.map(one, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays of host arrays that every process has whole.

    Args:
      tree: tree of NumPy arrays.
      shardings: as `shardings` gives them, for each.
    """

    def one(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)
