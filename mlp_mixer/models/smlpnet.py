"""sMLPNet (Tang et al. 2021, arXiv 2109.05422): a pyramid with BatchNorm.

The state X is a map of h by w positions with c channels. A block mixes 3x3 positions
in each channel, then whole rows and whole columns, then the channels:

    V = act(DW(act(X)))                           act(X) = gelu(BatchNorm(X))
    U = X + [V, mix_w(V), mix_h(V)] Wf            Wf (3c, c), DW a 3x3 convolution of
    Y = U + W2 gelu(W1 LayerNorm(U) + b1) + b2    each channel, W1 (c, αc), W2 (αc, c)

mix_w(V)[y, :, j] = A V[y, :, j] + a is one map (w, w) for all rows and channels, mix_h
one (h, h) for all columns and channels. Four stages see the image at 1/4, 1/8, 1/16 and
1/32 with c, 2c, 4c and 8c channels: a linear map of 4x4 pixels begins the first, one of
2x2 positions each of the others. After the last: BatchNorm, the mean over positions, a
linear head. DW, Wf and the maps that begin stages have no bias.

Initial values, epsilons and the momentum of BatchNorm are torch's defaults, as in the
authors' code (microsoft/SPACH, models/smlp.py).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mlp_mixer.models import layers, pyramid
from mlp_mixer.models.derivatives import GELUS, TORCH_KERNEL, Dense, LayerNorm
from mlp_mixer.models.model import IMAGENET, Model, Noise, Outputs, Run, sizes

gelu = GELUS["exact"]


class SmlpBlock(nn.Module):
    """One block of any stage.

    Attributes:
      mlp_ratio: number of hidden units of the MLP per channel, α.
      train: whether this is training, for BatchNorm.
      run: how it is computed.
    """

    mlp_ratio: int
    train: bool
    run: Run

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], noise: Noise = Noise()
    ) -> Float[Array, "n h w c"]:
        """Returns the next state; `noise` is that of both branches."""
        first, second = noise.branches(2)
        x = x + layers.scale_images(self._mix_positions(x), first.keep, axis=0)
        return x + layers.scale_images(self._mix_channels(x), second.keep, axis=0)

    def _mix_positions(self, x: Array) -> Array:
        c, norm = x.shape[-1], functools.partial(pyramid.BatchNorm, self.train)
        y = gelu(norm(name="BatchNorm_0")(x))
        # XLA's own convolution, where `layers.Depthwise` would be faster: recorded runs
        # have its bits.
        y = nn.Conv(
            c,
            (3, 3),
            feature_group_count=c,
            conv_general_dilated=layers.depthwise(self.run),
            use_bias=False,
            dtype=self.run.dtype,
            kernel_init=TORCH_KERNEL,
            name="depthwise",
        )(y)
        y = gelu(norm(name="BatchNorm_1")(y))
        y = jnp.concatenate([y, self._mix(y, 2, "mix_w"), self._mix(y, 1, "mix_h")], -1)
        return nn.Dense(
            c,
            use_bias=False,
            dtype=self.run.dtype,
            kernel_init=TORCH_KERNEL,
            name="fuse",
        )(y)

    def _mix(self, x: Array, axis: int, name: str) -> Array:
        """A linear map along one axis."""
        size = x.shape[axis]
        linear = Dense(size, axis=0, run=self.run, torch_init=True, name=name)
        return jnp.moveaxis(linear(jnp.moveaxis(x, axis, 0)), 0, axis)

    def _mix_channels(self, x: Array) -> Array:
        c = x.shape[-1]
        d = self.mlp_ratio * c
        y = LayerNorm(epsilon=1e-5, name="LayerNorm_0")(x)
        y = Dense(d, run=self.run, torch_init=True, name="Dense_0")(y)
        y = gelu(checkpoint_name(y, layers.PRE_GELU))
        return Dense(c, run=self.run, torch_init=True, name="Dense_1")(y)


class SmlpNet(Model):
    """sMLPNet; tied to the resolution of the image given to `init`.

    Attributes:
      patch_size: (height, width) in pixels of a position of the first stage.
      hidden_dim: number of channels of the first stage; each stage has twice as many.
      num_blocks: number of blocks of each stage.
      mlp_ratio: number of hidden units of an MLP per channel, α.
      stochastic_depth: the last block's rate; it rises linearly from 0 over all
        stages. A branch that is kept is divided by 1 − rate.
      mean, std: what levels from 0 to 1 are normalised by, in each channel: no stem
        without a bias makes weights for other images weights for these.
    """

    patch_size: tuple[int, int]
    hidden_dim: int
    num_blocks: tuple[int, int, int, int]
    mlp_ratio: int
    stochastic_depth: float = 0.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless the last stage's positions tile the image."""
        pyramid.check_stages(self, image_size)

    def check_image(self, image: Array) -> None:
        """Raises ValueError unless `image` fits the model and its parameters."""
        super().check_image(image)
        sides = zip(("h0", "w0"), image.shape[1:3], self.patch_size, strict=True)
        for letter, pixels, patch in sides:
            expected = self.size_of(letter)
            if expected is not None and pixels != expected * patch:
                raise ValueError(
                    f"A side of the image is {pixels} pixels, but the parameters are "
                    f"for {expected * patch}: rows and columns are mixed by matrices "
                    "of their length. Resize the image to the training resolution."
                )

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Outputs:
        """Returns (logits, out).

        Args:
          image: (n, h, w, 3), values in [−1, 1]; h, w multiples of eight patches'.
          train: whether BatchNorm takes and records the batch's statistics (collection
            "batch_stats") and stochastic depth is on (random stream "dropout").

        Returns:
          logits: (n, k) float32, or the pre-logits if `num_classes` is None.
          out: `stem`, `block_0`, … of all stages, `stage_1`, … with which stages end,
            all (n, h, w, c), and `pre_logits` (n, c).

        Raises:
          ValueError: the image does not fit the strides or the parameters.
        """
        self.check_image(image)
        block = functools.partial(
            SmlpBlock, mlp_ratio=self.mlp_ratio, train=train, run=self.run
        )

        def begin(i: int) -> nn.Module:
            size, name = ((2, 2), f"down{i}") if i else (self.patch_size, "stem")
            return pyramid.Convolution(
                self.hidden_dim * 2**i,
                size,
                stride=size,
                run=self.run,
                use_bias=False,
                torch_init=True,
                name=name,
            )

        x, out = pyramid.stages(
            self,
            layers.normalised(image, self.mean, self.std),
            begin,
            lambda i: [pyramid.Row(block, self.num_blocks[i])],
            noise=pyramid.linear_noise(self, image, train),
            train=train,
        )
        return pyramid.pooled(
            pyramid.BatchNorm(train, name="norm")(x),
            out,
            self.num_classes,
            torch_init=True,
        )


MODEL = SmlpNet
# The paper's variants, T* the one with α = 2: patch, C, blocks, α, rate.
_ROWS = {
    "smlpnet_t": ((4, 4), 80, (2, 8, 14, 2), 3, 0.0),
    "smlpnet_s": ((4, 4), 96, (2, 10, 24, 2), 3, 0.2),
    "smlpnet_b": ((4, 4), 112, (2, 10, 24, 2), 3, 0.3),
    "smlpnet_t_star": ((4, 4), 80, (2, 8, 14, 2), 2, 0.0),
}
SIZES = {name: sizes(SmlpNet, row) for name, row in _ROWS.items()}
TOP_1 = {
    "smlpnet_t": 81.9,
    "smlpnet_s": 83.1,
    "smlpnet_b": 83.4,
    "smlpnet_t_star": 81.3,
}
CHECKED = "counts; logits and statistics of the authors' code"
_BLOCK = {
    "BatchNorm_0/scale": "c",
    "BatchNorm_0/bias": "c",
    "depthwise/kernel": "3 3 1 c",
    "BatchNorm_1/scale": "c",
    "BatchNorm_1/bias": "c",
    "mix_w/kernel": "w w",
    "mix_w/bias": "w",
    "mix_h/kernel": "h h",
    "mix_h/bias": "h",
    "fuse/kernel": "3c c",
    "LayerNorm_0/scale": "c",
    "LayerNorm_0/bias": "c",
    "Dense_0/kernel": "c dc",
    "Dense_0/bias": "dc",
    "Dense_1/kernel": "dc c",
    "Dense_1/bias": "c",
}


AXES = {
    "stem/kernel": "ph pw rgb c0",
    **pyramid.stage_axes(0, _BLOCK),
    "down1/kernel": "2 2 c0 c1",
    **pyramid.stage_axes(1, _BLOCK),
    "down2/kernel": "2 2 c1 c2",
    **pyramid.stage_axes(2, _BLOCK),
    "down3/kernel": "2 2 c2 c3",
    **pyramid.stage_axes(3, _BLOCK),
    "norm/scale": "c3",
    "norm/bias": "c3",
    "head/kernel": "c3 k",
    "head/bias": "k",
}
# What the authors call what. They number blocks through all stages, and their proj_h
# mixes along the width.
_NAMES = {
    "token_mix.{}.0.conv_merge.BN": "BatchNorm_0",
    "token_mix.{}.0.conv_merge.Conv": "depthwise",
    "token_mix.{}.1.BN": "BatchNorm_1",
    "token_mix.{}.1.proj_h": "mix_w",
    "token_mix.{}.1.proh_w": "mix_h",
    "token_mix.{}.1.fuse": "fuse",
    "channel_mix.{}.1": "LayerNorm_0",
    "channel_mix.{}.2.net.0": "Dense_0",
    "channel_mix.{}.2.net.3": "Dense_1",
}
_POINTWISE = ("mix_w", "mix_h", "fuse")  # their convolutions of 1x1
AUTHORS = (
    ("to_patch_embedding.0.0", "stem"),
    *((f"to_patch_embedding.{i}.0", f"down{i}") for i in range(1, 4)),
    *(
        (theirs, f"stage{i}_block_{{}}/{ours}", *how)
        for i in range(4)
        for theirs, ours in _NAMES.items()
        for how in [("o i 1 1 -> i o",) if ours in _POINTWISE else ()]
    ),
    ("batch_norm", "norm"),
    ("mlp_head.0", "head"),
)
NORMALISATION = IMAGENET
