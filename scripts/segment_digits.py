"""A linear head on a pyramid's dense features: which pixel is of which digit.

    python scripts/segment_digits.py runs/convmlp --picture=segmented.png

The pyramid, of configs/family/digits.py, is trained on single digits of 32x32 pixels,
and stays as it is. Here it sees canvases of 128x128 with five of them. The maps of its
stages are resized to the finest, of stride 4, and concatenated; a linear map of each
position gives the logits of 11 classes, the background and the digits; they are resized
to the pixels. The head is fitted on digits of the training split and scored on others.
"""

import argparse
from typing import Any

import arguments
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from mlp_mixer import models, pretrained, steps
from mlp_mixer.data import decoding, image_ops, sources

CANVAS, DIGIT, DIGITS = 128, 32, 5  # pixels of a side, and digits of a canvas
CLASSES = 11  # background, 0 … 9
INK = 64  # the level from which a pixel is of a digit
FITTED, SCORED, SHOWN = 256, 128, 6  # canvases
BATCH, STEPS = 8, 800

Images = UInt8[np.ndarray, "n h w 3"]
Labels = Int[np.ndarray, "n h w"]


def canvases(split: str, count: int, seed: int) -> tuple[Images, Labels]:
    """Returns canvases of digits of a split, and the class of each pixel."""
    source, rng = sources.open_source("digits", split), np.random.default_rng(seed)
    images = np.zeros((count, CANVAS, CANVAS, 3), np.uint8)
    labels = np.zeros((count, CANVAS, CANVAS), np.int32)
    for image, label in zip(images, labels, strict=True):
        placed = 0
        while placed < DIGITS:
            y, x = rng.integers(CANVAS - DIGIT + 1, size=2)
            at = slice(y, y + DIGIT), slice(x, x + DIGIT)
            if image[at].any():
                continue
            example = source[int(rng.integers(len(source)))]
            digit = decoding.decode(example["image"])
            image[at] = image_ops.resize(digit, (DIGIT, DIGIT))
            label[at] = np.where(image[at][..., 0] >= INK, 1 + example["label"], 0)
            placed += 1
    return images, labels


def dense_features(
    model: models.Model, variables: Any, images: Images
) -> Float[np.ndarray, "n y x c"]:
    """Returns all stages at the stride of the first, one beside the other."""

    @jax.jit
    def concatenated(batch: Array) -> Array:
        stages = models.features(model, variables, steps.value_range(batch))
        n, y, x, _ = stages["stage_1"].shape
        resized = [
            jax.image.resize(stage, (n, y, x, stage.shape[-1]), "bilinear")
            for stage in stages.values()
        ]
        return jnp.concatenate(resized, axis=-1)

    batches = np.split(images, range(BATCH, len(images), BATCH))
    return np.concatenate([concatenated(batch) for batch in batches])


def logits(head: Any, x: Float[Array, "n y x c"]) -> Float[Array, "n h w k"]:
    """Returns the logits of each pixel: linear at each position, then resized."""
    y = jnp.einsum("nyxc,ck->nyxk", x, head["kernel"])
    y = y + head["bias"].reshape(1, 1, 1, -1)
    return jax.image.resize(y, (len(x), CANVAS, CANVAS, CLASSES), "bilinear")


def fit(features: Float[np.ndarray, "n y x c"], labels: Labels) -> Any:
    """Returns a head whose cross-entropy over pixels is small."""
    tx = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))

    @jax.jit
    def step(head: Any, state: Any, x: Array, label: Array) -> tuple[Any, Any]:
        def loss(head: Any) -> Array:
            truth = jax.nn.one_hot(label, CLASSES)
            return optax.softmax_cross_entropy(logits(head, x), truth).mean()

        updates, state = tx.update(jax.grad(loss)(head), state)
        return optax.apply_updates(head, updates), state

    c, rng = features.shape[-1], np.random.default_rng(0)
    head: Any = {"kernel": jnp.zeros((c, CLASSES)), "bias": jnp.zeros(CLASSES)}
    state = tx.init(head)
    for _ in range(STEPS):
        at = rng.choice(len(features), BATCH, replace=False)
        head, state = step(head, state, features[at], labels[at])
    return head


def scores(predicted: Labels, labels: Labels) -> str:
    """Returns the share of pixels that are right, and the mean IoU of the classes."""
    pairs = np.bincount((CLASSES * labels + predicted).ravel(), minlength=CLASSES**2)
    table = pairs.reshape(CLASSES, CLASSES)
    both = np.diag(table)
    iou = both / (table.sum(0) + table.sum(1) - both)
    return f"{100 * both.sum() / table.sum():5.1f} % {100 * iou.mean():9.1f} %"


def draw(images: Images, labels: Labels, predicted: Labels, path: str) -> None:
    """Writes a picture: canvases, and their pixels' true and predicted classes."""
    of_class = matplotlib.colors.ListedColormap(
        ["black", *matplotlib.color_sequences["tab10"]]
    )
    figure = matplotlib.figure.Figure(figsize=(1.5 * len(images), 4.7))
    axes = figure.subplots(3, len(images))
    for i, (row, name) in enumerate(
        ((images, "image"), (labels, "truth"), (predicted, "predicted"))
    ):
        for axis, picture in zip(axes[i], row, strict=True):
            axis.imshow(picture, cmap=of_class, vmin=0, vmax=CLASSES - 1)
            axis.set(xticks=[], yticks=[])
        axes[i, 0].set_ylabel(name)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Fits and scores a head, and draws what it predicts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", help="of a pyramid that takes images of any size")
    parser.add_argument("--picture", type=arguments.new_file, help="a PNG file")
    options = parser.parse_args()
    weights = pretrained.read(options.weights)
    model = pretrained.create_model(weights)
    images, labels = canvases("train", FITTED, seed=0)
    head = fit(dense_features(model, weights.variables, images), labels)
    images, labels = canvases("test", SCORED, seed=1)
    features = dense_features(model, weights.variables, images)
    predicted = np.asarray(jax.jit(logits)(head, features).argmax(-1), np.int32)
    print(f"{weights}, trained at {weights.image_size} px, here at {(CANVAS,) * 2}")
    print("                       pixels   mean IoU")
    print(f"all background      {scores(np.zeros_like(labels), labels)}")
    print(f"linear on 4 stages  {scores(predicted, labels)}")
    if options.picture:
        some = slice(SHOWN)
        draw(images[some], labels[some], predicted[some], options.picture)


if __name__ == "__main__":
    main()
