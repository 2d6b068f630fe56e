"""What every architecture is: fields (what), a `Run` (how) and a table of axes.

A file of this package is one paper. It declares

* `MODEL`: a `Model`, called as `model.apply(variables, image, train=…)`, that returns
  (logits, out). `out["pre_logits"]` (n, c) are the features, also the first result
  where `num_classes` is None; what else is in `out` is the paper's own. A pyramid,
  whose `num_blocks` is a tuple, has `stage_1` … `stage_4` (n, h, w, c) there.
* `SIZES`: name → fields, laid out like the paper's table.
* `AXES`: path of a parameter (`*` for the number of a block) → letters of its axes:
  `s` tokens, `c` channels, `d…` hidden units, `k` classes, `ph pw rgb` a patch. A model
  whose parameters depend on one of its fields calls that field `FORM`, and has a table
  for each of its values: {value: {path: letters}}. Of several fields `FORM` is a tuple,
  and so is what has a table.
* `TOP_1`: name → top-1 accuracy on ImageNet, in percent, where the paper prints one.
* `CHECKED`: what the file was checked against, in a few words.
* `CANNOT_RESIZE`, where parameters have an axis of tokens and yet no other grid of
  patches can be given to them: why.
* `TIMM`, where timm has the model, and `AUTHORS`, where its authors have released it:
  the names of its arrays there, ours (see `pretrained.foreign`). `NORMALISATION`: the
  mean and the standard deviation of levels that images are normalised by in such files,
  if those are not 0.5.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

# Mean and standard deviation of ImageNet's levels: red, green, blue.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Bytes of the state (s, n, c) up to which one CPU is fastest: with hidden layers four
# times as wide, a block's arrays stay in a cache of 32 MiB.
CACHED_STATE = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model is computed here. It may differ between two starts of one run.

    Attributes:
      dtype: dtype of activations and products. Parameters, statistics of norms, pooled
        features and logits are float32 in any case.
      scan: whether training compiles one block and scans it over depth. The parameters
        are stacked where they are used, so tree and checkpoints stay the same.
      remat: what the backward pass computes again of a block, a key of
        `trunk.REMAT_POLICIES`.
      images_at_once: number of images of a batch that each device computes at a time,
        one part of the batch after the other; None: all.
      mesh: the devices; None if they are not known.
    """

    dtype: Any = "float32"
    scan: bool = False
    remat: str = "none"
    images_at_once: int | None = None
    mesh: Mesh | None = None

    @classmethod
    def choose(
        cls,
        model: "Model",
        image_size: tuple[int, int],
        mesh: Mesh,
        *,
        dtype: Any = "float32",
        scan: bool | None = None,
        remat: str | None = None,
        images_at_once: int | None = None,
    ) -> "Run":
        """Returns the fastest way to compute a model, but for what is given.

        Measured (docs/benchmarks): unrolled blocks that keep everything are fastest on
        CPUs and GPUs. Elsewhere one block is scanned, which keeps less and compiles in
        a time that hardly grows with depth. One CPU takes as many images at a time as
        its cache holds.

        Args:
          model: the model; its own `run` is not read.
          image_size: (height, width) in pixels.
          mesh: the devices.
          dtype: dtype of activations and products.
          scan, remat, images_at_once: what is given; None: what is fastest.
        """
        if scan is None:
            scan = cls.scans(mesh.devices.flat[0].platform)
        if remat is None:
            remat = "pre_gelu" if scan else "none"
        run = cls(dtype, scan, remat, images_at_once, mesh)
        channels: Any = getattr(model, "hidden_dim", None)
        if images_at_once is None and channels and run.flat and model.in_parts:
            if isinstance(channels, tuple):  # the first stage's state is the largest
                channels = channels[0]
            (h, w), (ph, pw) = image_size, model.patch_size
            state = (h // ph) * (w // pw) * channels * jnp.dtype(dtype).itemsize
            limit = max(1, CACHED_STATE // state)
            run = dataclasses.replace(run, images_at_once=limit)
        return run

    @staticmethod
    def scans(platform: str) -> bool:
        """Whether training on a platform is fastest with one scanned block."""
        return platform not in ("cpu", "gpu")

    def parts(self, images: int) -> int:
        """Returns in how many equal parts a device computes so many images.

        Each part has at most `images_at_once`. If no part of at least half as many
        divides the images, there is one part: small ones take longer than all at once.
        """
        limit = self.images_at_once
        if limit is None or images <= limit:
            return 1
        size = max(size for size in range(1, limit + 1) if images % size == 0)
        return images // size if 2 * size >= limit else 1

    def __str__(self) -> str:
        """How it is computed, in words for the log."""
        blocks = "one scanned block" if self.scan else "unrolled blocks"
        kept = {
            "none": "keeping everything",
            "pre_gelu": "keeping pre-activations",
            "full": "keeping each block's input",
        }[self.remat]
        images = self.images_at_once
        at_once = f", at most {images} images at once" if images else ""
        return f"{jnp.dtype(self.dtype).name}, {blocks} {kept}{at_once}"

    @property
    def flat(self) -> bool:
        """Whether products are of true matrices, with the other axes merged.

        It is faster on one CPU device. On several, merging a cut batch axis would make
        every device gather the batch and do everybody's work.
        """
        mesh = self.mesh
        return (
            mesh is not None
            and mesh.size == 1
            and mesh.devices.flat[0].platform == "cpu"
        )


class Noise(NamedTuple):
    """What training draws for one branch: of a block, or of all blocks, stacked.

    Attributes:
      keep: the factor of each image's branch (stochastic depth); None keeps all.
      rng: the key of dropout; None drops nothing.
    """

    keep: Float[Array, "*blocks n"] | None = None
    rng: jax.Array | None = None

    def branches(self, count: int) -> list["Noise"]:
        """Returns the noise of each of a block's branches."""
        keep = [None] * count if self.keep is None else self.keep
        rng = [None] * count if self.rng is None else jax.random.split(self.rng, count)
        return [Noise(*pair) for pair in zip(keep, rng, strict=True)]


# What `Model.__call__` returns.
Outputs = tuple[Float[Array, "n k"], dict[str, Float[Array, "..."]]]


class Model(nn.Module, kw_only=True):
    """Base of all architectures.

    Attributes:
      patch_size: (height, width) in pixels of what becomes one token at the stem.
      num_classes: None leaves the head out; features are returned in its place.
      run: how it is computed.
      in_parts: whether one CPU is fastest with a few images at a time. A convolution is
        not: in a loop its gradient takes six times as long (CycleMLP-B1, 224 px).
    """

    in_parts: ClassVar[bool] = True

    patch_size: tuple[int, int]
    num_classes: int | None = None
    run: Run = Run()

    @classmethod
    def declared(cls) -> dict[str, dataclasses.Field]:
        """Returns the fields that say what the model computes, by name.

        Its classes are not among them: they follow from the data.
        """
        others = ("parent", "name", "num_classes", "run")
        return {f.name: f for f in dataclasses.fields(cls) if f.name not in others}

    @property
    def draws_noise(self) -> bool:
        """Whether training draws dropout or stochastic depth."""
        return any(getattr(self, rate, 0) for rate in ("dropout", "stochastic_depth"))

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError unless images of (height, width) pixels fit the model."""
        check_divisible(image_size, self.patch_size)

    @classmethod
    def declared_axes(cls) -> dict[str, str]:
        """Returns `all_axes` of the model's file; none of a file that has no table."""
        return {} if (file := cls._file()) is None else all_axes(file)

    def axes_of_form(self) -> Mapping[str, str]:
        """Returns the table of `AXES` for the model's form: in order, and no others."""
        if (file := self._file()) is None:
            return {}
        fields = {name: getattr(self, name) for name in self.declared()}
        return axes_by_form(file)[form_of(file, fields)]

    @classmethod
    def _file(cls) -> ModuleType | None:
        """The file of the architecture, if it has a table of axes."""
        files = (sys.modules[base.__module__] for base in cls.__mro__)
        return next((file for file in files if hasattr(file, "AXES")), None)

    def check_image(self, image: Array) -> None:
        """Raises ValueError unless `image` fits the model and its parameters.

        Args:
          image: (n, h, w, 3), values in [−1, 1]. Its tokens are compared with the
            letter `s` of `AXES`.
        """
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
        self.check_size((h, w))
        expected = self.size_of("s")
        if expected is None:
            return
        ph, pw = self.patch_size
        tokens = (h // ph) * (w // pw)
        if tokens != expected:
            raise ValueError(
                f"A {h}x{w} image makes {tokens} tokens of {ph}x{pw} pixels, but "
                f"the parameters are for {expected} tokens: token mixing is tied "
                "to the resolution. Resize the image to the training resolution, or "
                "the weights (docs/resolution.md)."
            )

    def size_of(self, letter: str) -> int | None:
        """Returns the length of an axis in the parameters; None if none has it."""
        for path, letters in self.declared_axes().items():
            if letter in letters.split():
                leaf: Any = self.variables.get("params", {})
                for key in path.replace("*", "0").split("/"):
                    leaf = leaf.get(key, {})
                if len(leaf):  # else of another form, or of another depth
                    return leaf.shape[letters.split().index(letter)]
        return None


def sizes(model: type[Model], row: Sequence[Any]) -> dict[str, Any]:
    """Returns {field: value} of a table's row, for the first fields of a model."""
    return dict(zip(list(model.declared())[: len(row)], row, strict=True))


def check_divisible(
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    what: str = "patch_size",
) -> None:
    """Raises ValueError unless patches tile the image; suggests sizes that they do.

    Args:
      image_size: (height, width) in pixels.
      patch_size: (height, width) in pixels of what has to tile the image.
      what: its name, for the message.
    """
    for size, patch in zip(image_size, patch_size, strict=True):
        if size < 1 or size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            tries = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"image_size {size} is not divisible by {what} {patch}; try {tries}."
            )


def axes_by_form(file: ModuleType) -> Mapping[Any, Mapping[str, str]]:
    """Returns {form: {path: letters}} of an architecture's file.

    A form is the value of the field `FORM`, or the values of the fields. An
    architecture whose parameters are always the same has one form, None.
    """
    return file.AXES if hasattr(file, "FORM") else {None: file.AXES}


def form_of(file: ModuleType, fields: Mapping[str, Any]) -> Any:
    """Returns the form of a model of an architecture, by the model's fields."""
    names = getattr(file, "FORM", None)
    if isinstance(names, tuple):
        return tuple(fields.get(name) for name in names)
    return fields.get(names) if names else None


def fields_of_form(file: ModuleType, form: Any) -> dict[str, Any]:
    """Returns {field: value} of what makes a form of an architecture."""
    names = getattr(file, "FORM", ())
    if isinstance(names, tuple):
        return dict(zip(names, form or (), strict=True))
    return {names: form}


def all_axes(file: ModuleType) -> dict[str, str]:
    """Returns {path: letters} of the parameters of all forms of an architecture."""
    return {k: v for table in axes_by_form(file).values() for k, v in table.items()}


def axes(layers: dict[str, str]) -> dict[str, str]:
    """Returns the entries of `AXES` for layers by path, with the letters of a kernel.

    A bias has the last letter. A layer of one letter is a norm: a scale and a bias.
    """
    found: dict[str, str] = {}
    for path, letters in layers.items():
        array = "kernel" if " " in letters else "scale"
        found |= {f"{path}/{array}": letters, f"{path}/bias": letters.split()[-1]}
    return found
