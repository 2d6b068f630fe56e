"""Blocks in a row: unrolled or scanned, rematerialised, with the noise of training."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from mlp_mixer import known, sharding
from mlp_mixer.models.layers import PRE_GELU
from mlp_mixer.models.model import Model, Noise, Run

# What the backward pass computes again of a block: nothing, all but the
# pre-activations, all. With closed-form LayerNorm and GELU, "pre_gelu" costs almost no
# time.
REMAT_POLICIES = {
    "none": None,
    "pre_gelu": jax.checkpoint_policies.save_only_these_names(PRE_GELU),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# The collection of parameters as they are cut over devices. Where a model is given it,
# `blocks` gathers those of one block at a time.
CUT = "cut"


def blocks(
    model: Model,
    block: Callable[..., nn.Module],
    x: Any,
    *,
    name: str,
    count: int,
    train: bool,
    noise: Noise,
    constants: Any = None,
) -> tuple[Any, list[Any]]:
    """Returns the last state, and the state after each block.

    It is called in the compact method of `model`, whose parts `name_0`, `name_1`, …
    the blocks become.

    Args:
      model: the module whose blocks they are.
      block: makes one, of `name` and `parent`; it maps (state, Noise) to the next
        state.
      x: the first state.
      name: the blocks' name, before their number.
      count: number of blocks.
      train: whether this is training.
      noise: noise of all blocks, as `draw` returns it.
      constants: what blocks differ by, NumPy arrays with an entry for each block, which
        it gets as its third argument; None: they do not. Of blocks that are neither
        scanned nor rematerialised it is a plain number.
    """
    run = model.run
    known.require("remat", run.remat, REMAT_POLICIES)
    names = [f"{name}_{i}" for i in range(count)]
    mesh = run.mesh if CUT in model.variables else None
    if (mesh or (train and run.scan)) and not model.is_initializing():
        same = block(parent=None, name=None)
        return _applied(model, same, x, names, train, noise, constants, mesh)
    states = []
    for i, one in enumerate(names):
        call: Any = _call
        if train and run.remat != "none":
            call = nn.remat(_call, policy=REMAT_POLICIES[run.remat])
        x = call(block(name=one), x, _entry(noise, i), _entry(constants, i))
        states.append(x)
    return x, states


def row(
    model: Model,
    block: Callable[..., nn.Module],
    x: Array,
    *,
    name: str,
    train: bool,
    branches: int = 2,
) -> tuple[Any, list[Any]]:
    """Returns `blocks` with noise as most papers draw it: one rate, kept ones rescaled.

    The model's fields `num_blocks`, `stochastic_depth` and, if it has one, `dropout`
    say how many there are and how they are dropped.

    Args:
      model: the module whose blocks they are.
      block: makes one, as in `blocks`.
      x: the first state (s, n, c).
      name: the blocks' name, before their number.
      train: whether this is training.
      branches: number of branches of a block.
    """
    fields: Any = model
    noise = draw(
        model,
        fields.num_blocks,
        x.shape[1],
        train=train,
        rates=(fields.stochastic_depth,) * 2,
        rescale=True,
        dropout=getattr(model, "dropout", 0.0),
        branches=branches,
    )
    count = fields.num_blocks
    return blocks(model, block, x, name=name, count=count, train=train, noise=noise)


def _call(block: nn.Module, x: Any, noise: Noise, constant: Any) -> Any:
    return block(x, noise, *_as_arguments(constant))


def _as_arguments(constant: Any) -> tuple[Any, ...]:
    return () if constant is None else (constant,)


def _applied(
    model: Model,
    block: nn.Module,
    x: Any,
    names: list[str],
    train: bool,
    noise: Noise,
    constants: Any,
    mesh: Mesh | None,
) -> tuple[Any, list[Any]]:
    """The blocks as one function of their variables, which is scanned or repeated.

    Parameters that are cut over a mesh are gathered inside of it, and for the backward
    pass once more.
    """
    run = model.run
    given = {
        kind: [tree[name] for name in names]
        for kind, tree in model.variables.items()
        if names[0] in tree
    }
    cut = given.pop(CUT, None)
    given["params"] = _cast(cut if mesh and cut else given["params"], run)
    changing = [k for k in given if k != "params" and model.is_mutable_collection(k)]

    scan, policy = train and run.scan, REMAT_POLICIES[run.remat]

    def body(x: Any, layer: Any) -> tuple[Any, Any]:
        variables, noise, constant = layer
        if mesh:
            params = variables["params"]
            if train and not scan:
                # Else a GPU's compiler gathers all blocks first, and keeps them.
                x, params = lax.optimization_barrier((x, params))
            # Of any block: the letters are the same.
            named = {names[0]: params}
            whole = sharding.gathered(mesh, named, model.declared_axes())
            variables = {**variables, "params": whole[names[0]]}
        arguments = x, noise, *_as_arguments(constant)
        x, updated = block.apply(variables, *arguments, mutable=changing)
        return x, (x, updated)

    if train and (policy or mesh):
        policy = policy or _all_but_gathered
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    if scan:
        stacked = {
            kind: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
            for kind, trees in given.items()
        }
        x, results = lax.scan(body, x, (stacked, noise, constants))
        found = [_entry(results, i) for i in range(len(names))]
    else:
        found = []
        for i in range(len(names)):
            variables = {kind: trees[i] for kind, trees in given.items()}
            layer = variables, _entry(noise, i), _entry(constants, i)
            x, result = body(x, layer)
            found.append(result)
    for name, (_, updated) in zip(names, found, strict=True):
        for kind, tree in updated.items():
            model.put_variable(kind, name, tree)
    return x, [state for state, _ in found]


def _entry(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps for the backward pass what "none" keeps, without whole parameters."""
    return primitive.name not in _OF_GATHERING


_OF_GATHERING = ("sharding_constraint", "reshard", "optimization_barrier")


def _cast(trees: list[Any], run: Run) -> list[Any]:
    """Kernels in the dtype of products, so that those of bfloat16 are stacked in it."""

    def cast(path: Any, leaf: Any) -> Any:
        return leaf.astype(run.dtype) if path[-1].key == "kernel" else leaf

    return [jax.tree_util.tree_map_with_path(cast, tree) for tree in trees]


def draw(
    model: Model,
    count: int,
    images: Any,
    *,
    train: bool,
    rates: tuple[float, float],
    rescale: bool,
    dropout: float = 0.0,
    branches: int = 2,
) -> Noise:
    """Returns the noise of all blocks for one batch, from the random stream "dropout".

    All at once: one draw compiles and runs faster than one per branch. Every branch of
    every image has a mask of its own.

    Args:
      model: the module whose random stream it is.
      count: number of blocks.
      images: number of images of the batch, which is symbolic in an export.
      train: whether this is training; otherwise there is no noise.
      rates: the probability with which the first and the last block's branches are
        dropped; it is linear in between. Equal: it is constant.
      rescale: whether a branch that is kept is divided by 1 − rate.
      dropout: rate of dropout; 0 draws no keys.
      branches: number of branches of a block.
    """
    keep = rngs = None
    if train and any(rates):
        dropped = jnp.linspace(*rates, count)
        dropped = jnp.broadcast_to(dropped[:, None, None], (count, branches, images))
        kept = jax.random.bernoulli(model.make_rng("dropout"), 1 - dropped)
        keep = kept.astype(jnp.float32)
        if rescale:
            keep = keep / (1 - dropped)
    if train and dropout:
        rngs = jax.random.split(model.make_rng("dropout"), count)
    return Noise(keep, rngs)
