"""The device mesh, and where arrays live on it.

One axis, `data`: every device has a slice of the batch. Parameters and moments are
either on every device ("replicated") or cut over the same axis ("fsdp").
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_mixer import known

# Smaller arrays stay replicated: biases and LayerNorms, where a gather would cost more
# than it saves. Every kernel of Table 1 is larger (token mixing's smallest: 12,544).
FSDP_MIN_ELEMENTS = 4096


def make_mesh(data: int = -1) -> Mesh:
    """Returns a mesh of `data` devices, by default all of them.

    Raises:
      ValueError: fewer devices than asked for, or not all in a run of several
        processes.
    """
    count = jax.device_count() if data == -1 else data
    if not 0 < count <= jax.device_count():
        raise ValueError(
            f"mesh.data is {data}, but there are {jax.device_count()} devices; "
            "-1 takes all of them."
        )
    if count < jax.device_count() and jax.process_count() > 1:
        raise ValueError(
            f"mesh.data is {data} of {jax.device_count()} devices; with "
            f"{jax.process_count()} processes use all of them (-1)."
        )
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over the devices."""
    return NamedSharding(mesh, P("data"))


def _fsdp(mesh: Mesh, leaf: Any) -> NamedSharding:
    spec: list[str | None] = [None] * leaf.ndim
    if leaf.size >= FSDP_MIN_ELEMENTS:
        for axis in np.argsort(leaf.shape)[::-1]:
            if leaf.shape[axis] % mesh.size == 0:
                spec[axis] = "data"
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
      mesh: of `make_mesh`.
      strategy: "replicated", or "fsdp": every array of `FSDP_MIN_ELEMENTS` or more is
        cut along its largest axis that the devices divide.
    """
    cut = known.pick("sharding", strategy, STRATEGIES)
    return jax.tree.map(lambda leaf: cut(mesh, leaf), tree)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Passes if a batch can be cut evenly.

    Args:
      mesh: of `make_mesh`.
      batch_size: images of all processes together.
      accumulate: micro-batches that it is cut into first.

    Raises:
      ValueError: micro-batches and devices do not divide it.
    """
    parts = mesh.size * accumulate
    if batch_size % parts:
        micro = f"{accumulate} micro-batches on " if accumulate > 1 else ""
        many = jax.process_count()
        where = f" of {many} processes" if many > 1 else ""
        raise ValueError(
            f"A batch of {batch_size} does not divide among {micro}{mesh.size} "
            f"devices{where}; try {max(batch_size // parts, 1) * parts}."
        )


def put(tree: Any, mesh: Mesh) -> Any:
    """Makes one global array per leaf from this process's rows, cut over the devices.

    Raises:
      ValueError: the devices do not divide the batch.
    """
    check_batch(mesh, len(jax.tree.leaves(tree)[0]) * jax.process_count())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(batch(mesh), x), tree
    )


def place(tree: Any, shardings: Any) -> Any:
    """Makes global arrays of host arrays that every process has whole.

    Args:
      tree: of NumPy arrays.
      shardings: as `shardings` gives them, for each.
    """

    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)
