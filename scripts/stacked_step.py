"""The training step with parameters and moments stacked by layer in memory.

The package stacks them where it scans, in every step. This is the other form, to be
measured beside it: the same mathematics from a state whose blocks are one tree with a
leading axis of depth.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlp_mixer import losses, optim, steps
from mlp_mixer.models import layers, mixer, trunk
from mlp_mixer.models.derivatives import LayerNorm
from mlp_mixer.models.model import Noise


def stacked(params: Any) -> dict[str, Any]:
    """Returns the official tree with all blocks as one, stacked: the part "blocks"."""
    names = [name for name in params if name.startswith("MixerBlock_")]
    names.sort(key=lambda name: int(name.rpartition("_")[2]))
    blocks = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(params[n] for n in names)
    )
    return {k: v for k, v in params.items() if k not in names} | {"blocks": blocks}


def logits_of(model: mixer.MlpMixer, params: Any, image: jax.Array) -> jax.Array:
    """Returns the logits of images in [−1, 1], from stacked parameters."""
    mlp = functools.partial(layers.MlpBlock, gelu=model.gelu, run=model.run)
    block = mixer.MixerBlock(
        functools.partial(mlp, model.tokens_mlp_dim, axis=0),
        functools.partial(mlp, model.channels_mlp_dim),
    )

    def body(x: Any, layer: Any) -> tuple[Any, None]:
        return block.apply({"params": layer}, x, Noise()), None

    if policy := trunk.REMAT_POLICIES[model.run.remat]:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.run.dtype) if path[-1].key == "kernel" else leaf

    stem = layers.PatchEmbed(model.hidden_dim, model.patch_size, model.run)
    x: Any = stem.apply({"params": params["stem"]}, image)
    blocks = jax.tree_util.tree_map_with_path(cast, params["blocks"])
    x, _ = lax.scan(body, x, blocks)
    x = LayerNorm().apply({"params": params["pre_head_layer_norm"]}, x)
    head: Any = nn.Dense(params["head"]["bias"].size)
    return head.apply({"params": params["head"]}, x.mean(0, dtype=jnp.float32))


def make_step(model: mixer.MlpMixer, job: Any) -> tuple[Any, Any]:
    """Returns the step, which gives its state away, and the optimiser's `init`."""
    tx, _ = optim.create(**job.optim, total_steps=job.total_steps)
    loss_of = losses.LOSSES[job.loss]

    def objective(params: Any, batch: Any) -> jax.Array:
        logits = logits_of(model, params, steps.value_range(batch["image"]))
        label = losses.targets(batch["label"], params["head"]["bias"].size)
        return loss_of(logits, {}, {**batch, "label": label}).mean()

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = state
        value, grads = jax.value_and_grad(objective)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return jax.jit(step, donate_argnums=0), tx.init


def shapes(target: Any, init: Any) -> Any:
    """Returns the shapes of a stacked state of parameters of the official tree."""
    params = jax.eval_shape(stacked, target)
    return params, jax.eval_shape(init, params)
