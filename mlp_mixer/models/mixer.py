"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601, sections 2 and Appendix E).

The parameter tree is the official one, so published files load by identity:
`stem`, `MixerBlock_i/{LayerNorm_0, token_mixing/{Dense_0, Dense_1}, LayerNorm_1,
channel_mixing/{Dense_0, Dense_1}}`, `pre_head_layer_norm`, `head`.
"""

import difflib

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mlp_mixer.models import layers

# What the backward pass may keep of a block besides its input; the rest is computed
# again. With closed-form LayerNorm and GELU, "pre_gelu" costs almost no time.
REMAT_POLICIES = {
    "none": None,
    "pre_gelu": jax.checkpoint_policies.save_only_these_names(layers.PRE_GELU),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MixerBlock(nn.Module):
    """One Mixer layer: token mixing, then channel mixing, both pre-norm residual.

    Attributes: as in `MlpMixer`.
    """

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str = "tanh"
    dropout: float = 0.0
    dtype: layers.Dtype | None = None
    flat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "s n c"],
        keep: Float[Array, "2 n"] | None = None,
        rng: jax.Array | None = None,
    ) -> Float[Array, "s n c"]:
        """Returns the next state.

        Args:
          x: the state.
          keep: factors of the two branches per image (stochastic depth).
          rng: of dropout; None drops nothing.
        """
        rngs = (None, None) if rng is None else jax.random.split(rng)

        def mix(name, mlp_dim, axis, branch, y):
            mlp = layers.MlpBlock(
                mlp_dim,
                axis,
                gelu=self.gelu,
                dropout=self.dropout,
                dtype=self.dtype,
                flat=self.flat,
                name=name,
            )
            y = mlp(y, rngs[branch])
            return y if keep is None else layers.scale_images(y, keep[branch])

        y = layers.LayerNorm(name="LayerNorm_0")(x)
        x = x + mix("token_mixing", self.tokens_mlp_dim, 0, 0, y)
        y = layers.LayerNorm(name="LayerNorm_1")(x)
        return x + mix("channel_mixing", self.channels_mlp_dim, -1, 1, y)


class MlpMixer(nn.Module):
    """MLP-Mixer. The number of tokens comes from the image given to `init`.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: Mixer layers.
      hidden_dim: channels c.
      tokens_mlp_dim: hidden units of token mixing, D_S.
      channels_mlp_dim: hidden units of channel mixing, D_C.
      num_classes: None leaves the head out; features are returned in its place.
      gelu: "tanh" (the published models) or "exact".
      dropout: rate in both MLPs (0 was best everywhere, section 3).
      stochastic_depth: the last block's rate; it rises linearly from 0.
      rescale_stochastic_depth: divide kept branches by 1 − rate (the authors do not).
      head_bias: initial value of the head's bias (pretraining with a sigmoid loss:
        about −ln k; the published listing: 0).
      dtype: of activations and products. Parameters, LayerNorm statistics, pooled
        features and logits are float32 in any case.
      scan: train with one compiled block, scanned over depth. The parameters are
        stacked where they are used, so the tree and checkpoints stay the same.
      remat: what the backward pass keeps: "none" (of rematerialisation: all is kept),
        "pre_gelu" (block inputs and pre-activations) or "full" (block inputs only).
      flat: see `layers.MlpBlock`; for one CPU device only.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int | None = None
    gelu: str = "tanh"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    rescale_stochastic_depth: bool = False
    head_bias: float = 0.0
    dtype: layers.Dtype = jnp.float32
    scan: bool = False
    remat: str = "none"
    flat: bool = False

    @nn.compact
    def __call__(
        self, image: Array, *, train: bool = False
    ) -> tuple[Float[Array, "n k"], dict[str, Float[Array, "..."]]]:
        """Returns (logits, out).

        Args:
          image: (n, h, w, 3), values in [−1, 1]; h, w multiples of the patch's.
          train: use dropout and stochastic depth (random stream "dropout"), `scan`
            and `remat`.

        Returns:
          logits: (n, k) float32, or the pre-logits if `num_classes` is None.
          out: the intermediate outputs `stem`, `block_0`, … (n, s, c) and
            `pre_logits` (n, c).

        Raises:
          ValueError: the image does not fit the patches or the parameters, or an
            attribute has no such value.
        """
        self._check(image)
        x = layers.PatchEmbed(
            self.hidden_dim, self.patch_size, self.dtype, name="stem"
        )(image)
        states = [x]

        keep, rngs = self._noise(image.shape[0]) if train else (None, None)
        if train and self.scan and not self.is_initializing():
            x, blocks = self._scan(x, keep, rngs)
            states += list(blocks)
        else:
            block = MixerBlock
            if train and self.remat != "none":
                block = nn.remat(MixerBlock, policy=REMAT_POLICIES[self.remat])
            for i in range(self.num_blocks):
                x = block(**self._block_fields(), name=f"MixerBlock_{i}")(
                    x,
                    None if keep is None else keep[i],
                    None if rngs is None else rngs[i],
                )
                states.append(x)

        x = layers.LayerNorm(name="pre_head_layer_norm")(x)
        pre_logits = x.mean(0, dtype=jnp.float32)
        names = ["stem", *(f"block_{i}" for i in range(self.num_blocks))]
        out = {k: jnp.swapaxes(v, 0, 1) for k, v in zip(names, states, strict=True)}
        out["pre_logits"] = pre_logits
        if self.num_classes is None:
            return pre_logits, out
        head = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias),
            name="head",
        )
        return head(pre_logits), out

    def _block_fields(self):
        return {
            "tokens_mlp_dim": self.tokens_mlp_dim,
            "channels_mlp_dim": self.channels_mlp_dim,
            "gelu": self.gelu,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "flat": self.flat,
        }

    def _noise(self, n):
        """Every block's branch factors (stochastic depth) and dropout key, or None.

        All at once: one draw compiles and runs faster than one per branch.
        """
        keep = rngs = None
        if self.stochastic_depth:
            # Linear over blocks, s·i/(L−1), the same rate for both branches of a
            # block, masks of their own, surviving branches as they are (big_vision
            # models/mlp_mixer.py).
            rates = jnp.linspace(0.0, self.stochastic_depth, self.num_blocks)
            rates = jnp.broadcast_to(rates[:, None, None], (self.num_blocks, 2, n))
            rng = self.make_rng("dropout")
            keep = jax.random.bernoulli(rng, 1 - rates).astype(jnp.float32)
            if self.rescale_stochastic_depth:
                keep = keep / (1 - rates)
        if self.dropout:
            rngs = jax.random.split(self.make_rng("dropout"), self.num_blocks)
        return keep, rngs

    def _scan(self, x, keep, rngs):
        """The blocks as one scanned body; returns the last state and all of them."""
        block = MixerBlock(**self._block_fields(), parent=None)
        params = self.variables["params"]
        blocks = [self._cast(params[f"MixerBlock_{i}"]) for i in range(self.num_blocks)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

        def body(x, layer):
            params, keep, rng = layer
            x = block.apply({"params": params}, x, keep, rng)
            return x, x

        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return lax.scan(body, x, (stacked, keep, rngs))

    def _cast(self, block):
        """Products' parameters in the compute dtype, so that bfloat16 is stacked."""
        return {
            name: jax.tree.map(lambda w: w.astype(self.dtype), group)
            if name.endswith("mixing")
            else group
            for name, group in block.items()
        }

    def _check(self, image):
        for field, value, known in (
            ("gelu", self.gelu, layers.GELUS),
            ("remat", self.remat, REMAT_POLICIES),
        ):
            if value not in known:
                near = difflib.get_close_matches(str(value), known, len(known), 0)
                raise ValueError(
                    f"{field} {value!r} is unknown; try {', '.join(near)}."
                )
        if image.ndim != 4 or image.shape[-1] != 3:
            raise ValueError(
                f"image has shape {image.shape}; expected (n, h, w, 3). A single image "
                "needs a leading axis, a grey one its channel repeated."
            )
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                f"image has dtype {image.dtype}; expected floats in [-1, 1], "
                "e.g. of steps.value_range."
            )
        h, w = image.shape[1:3]
        check_divisible((h, w), self.patch_size)
        tokens = (h // self.patch_size[0]) * (w // self.patch_size[1])
        if self.has_variable("params", "MixerBlock_0"):
            block = self.variables["params"]["MixerBlock_0"]
            expected = block["token_mixing"]["Dense_0"]["kernel"].shape[0]
            if tokens != expected:
                ph, pw = self.patch_size
                raise ValueError(
                    f"A {h}x{w} image makes {tokens} tokens of {ph}x{pw} pixels, but "
                    f"the parameters are for {expected} tokens: token mixing is tied "
                    "to the resolution. Resize the image to the training resolution."
                )


def check_divisible(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raises ValueError unless patches tile the image; suggests sizes that they do."""
    for size, patch in zip(image_size, patch_size, strict=True):
        if size < 1 or size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            tries = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"image_size {size} is not divisible by patch_size {patch}; "
                f"try {tries}."
            )
