"""Images of one colour a class: what is right on them is known without any training."""

import io
import pathlib

import jax.numpy as jnp
import tensorflow_datasets as tfds
from PIL import Image

from mlp_mixer.data.preparation import writing

# By name, whatever the label.
COLOURS = {"ant": 20, "bee": 90, "cat": 160, "dog": 230}
NAMES = tuple(COLOURS)


def image(name, i=0):
    """A grey image of the class, encoded."""
    out = io.BytesIO()
    grey = COLOURS[name] + i % 5
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(out, "PNG")
    return out.getvalue()


def write_folder(folder, classes, count=4):
    """Writes `folder/<class>/*.png`, the classes as {folder's name: colour's name}."""
    if not isinstance(classes, dict):
        classes = {name: name for name in classes}
    for called, name in classes.items():
        (pathlib.Path(folder) / called).mkdir(parents=True)
        for i in range(count):
            (pathlib.Path(folder) / called / f"{i}.png").write_bytes(image(name, i))
    return f"folder:{folder}"


def write_prepared(data_dir, name, names, count=4, several=False):
    """Writes a prepared data set whose labels have `names` in this order.

    Its images do not depend on that order.
    """

    data_dir = pathlib.Path(data_dir)
    job = writing.Job(name, "1.0.0", data_dir, data_dir, False)
    order = [sorted(names)[i % len(names)] for i in range(count * len(names))]

    def read(start, stop):
        for i in range(start, stop):
            label = [names.index(order[i])] if several else order[i]
            yield {"image": image(order[i], i), "label": label, "file_name": f"{i}.png"}

    label = tfds.features.ClassLabel(names=list(names))
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.Sequence(label) if several else label,
        "file_name": tfds.features.Text(),
    }
    job.partial.mkdir(parents=True)
    writing.write_splits(job, features, {"test": writing.Split(len(order), 9999, read)})
    return name


def predict(greys):
    """A model that knows the grey of each of its classes, by label."""
    known = jnp.asarray(greys, jnp.float32)

    def apply(variables, batch):
        images = batch["image"]
        grey = images.astype(jnp.float32).reshape(len(images), -1).mean(-1)
        logits = -jnp.abs(grey[:, None] - known[None])
        return {"logits": logits, "pre_logits": jnp.stack([grey, grey**2], -1)}

    return apply


def greys(names):
    """Of the classes."""
    return [COLOURS[name] for name in names]
