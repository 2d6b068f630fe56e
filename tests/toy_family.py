"""An architecture that no paper has: what a new file declares, and nothing else.

It has statistics, tokens mixed by a square matrix, and an array that timm's names would
keep with more axes.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from mlp_mixer.models import layers
from mlp_mixer.models.model import Model


class ToyBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
        s, _, c = x.shape
        y = nn.BatchNorm(use_running_average=True, name="norm")(x)
        mixed = nn.Dense(s, name="mix")(rearrange(y, "s n c -> n c s"))
        y = rearrange(mixed, "n c s -> s n c")
        scale = self.param("scale", nn.initializers.ones, (c,))
        return x + y * scale.reshape(1, 1, -1)


class ToyNet(Model):
    """Attributes: as the letters of `AXES` say; `power` of the features."""

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    power: str = "one"
    start: float = 0.5

    @nn.compact
    def __call__(self, image: Float[Array, "n h w 3"], *, train: bool = False):
        self.check_image(image)
        x = layers.PatchEmbed(self.hidden_dim, self.patch_size, self.run, name="stem")(
            image
        )
        for i in range(self.num_blocks):
            x = ToyBlock(name=f"ToyBlock_{i}")(x)
        y = rearrange(x, "s n c -> n s c").mean(1, dtype=jnp.float32)
        y = y**2 if self.power == "two" else y
        out = {"pre_logits": y}
        if self.num_classes is None:
            return y, out
        return nn.Dense(self.num_classes, name="head")(y), out


MODEL = ToyNet
SIZES = {
    "toy_s": {"patch_size": (4, 4), "num_blocks": 2, "hidden_dim": 8, "start": 0.1},
    "toy_l": {"patch_size": (4, 4), "num_blocks": 3, "hidden_dim": 16, "start": 0.2},
}
AXES = {
    "stem/kernel": "ph pw rgb c",
    "stem/bias": "c",
    "ToyBlock_*/norm/scale": "c",
    "ToyBlock_*/norm/bias": "c",
    "ToyBlock_*/mix/kernel": "s s",
    "ToyBlock_*/mix/bias": "s",
    "ToyBlock_*/scale": "c",
    "head/kernel": "c k",
    "head/bias": "k",
}
TIMM = (
    ("stem.proj", "stem"),
    ("blocks.{}.norm", "ToyBlock_{}/norm"),
    ("blocks.{}.toy", "ToyBlock_{}/mix"),
    ("blocks.{}.gamma", "ToyBlock_{}/scale", 3),
    ("head", "head"),
)
