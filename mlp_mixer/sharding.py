"""The device mesh, and where arrays live on it.

Three axes: `data` and `fsdp` cut a batch, `model` does not. With "fsdp", parameters and
moments are cut over the axis `fsdp`, or over `data` where `fsdp` is 1; with
"replicated" every device has all of them.
"""

import math
from collections.abc import Sequence
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
    given = f"mesh.data is {data}, mesh.fsdp {fsdp}" + f", model {model}" * (model != 1)
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


def gathered(mesh: Mesh, params: Any) -> Any:
    """Undoes the cut of "fsdp" inside a compiled function; gradients come back cut.

    Left to itself, the compiler may move activations instead, or keep the gradient of
    every parameter whole on every device.
    """

    def one(leaf: Any) -> Any:
        cut = _fsdp(mesh, leaf)
        spec = P(*(axis if axis == "model" else None for axis in cut.spec))
        whole = NamedSharding(mesh, spec)
        gather = jax.custom_vjp(lambda x: constrained(x, whole))
        gather.defvjp(
            lambda x: (constrained(x, whole), None),
            lambda _, gradient: (constrained(gradient, cut),),
        )
        return gather(leaf)

    return jax.tree.map(one, params)


def _fsdp(mesh: Mesh, leaf: Any) -> NamedSharding:
    spec: list[str | None] = [None] * leaf.ndim
    name = "fsdp" if mesh.shape["fsdp"] > 1 else "data"
    if leaf.size >= FSDP_MIN_ELEMENTS:
        for axis in np.argsort(leaf.shape)[::-1]:
            if leaf.shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
                break
    return NamedSharding(mesh, P(*spec))


STRATEGIES = {
    "replicated": lambda mesh, leaf: replicated(mesh),
    "fsdp": _fsdp,
}


def shardings(tree: Any, mesh: Mesh, strategy: str) -> Any:
    """Returns a NamedSharding for every array (or shape) of `tree`.

    Args:
      tree: parameters, optimiser state or a whole train state.
      mesh: mesh of devices.
      strategy: "replicated", or "fsdp": every array of `FSDP_MIN_ELEMENTS` or more is
        cut along its largest axis that the devices divide.
    """
    cut = known.pick("sharding", strategy, STRATEGIES)
    return jax.tree.map(lambda leaf: cut(mesh, leaf), tree)


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


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Makes one global array per leaf from this process's rows, cut over the devices.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    count = len(jax.tree.leaves(tree)[0]) * jax.process_count()
    check_batch(mesh, count, accumulate=1)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(batch(mesh), x), tree
    )


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays of host arrays that every process has whole.

    Args:
      tree: tree of NumPy arrays.
      shardings: as `shardings` gives them, for each.
    """

    def one(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)
