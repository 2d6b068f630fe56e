"""What several tests begin with."""

import math
import pathlib
import socket

import jax
import jax.numpy as jnp
import numpy as np

from mlp_mixer import checkpoint, experiment, goodput, metrics, recipe, sharding
from mlp_mixer.data import pipeline

# JSON that something happened to.
DAMAGED = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "two values": b"{}{}",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "a number beyond any": b'{"a": 1e999}',
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "10 MB of lists": b"[" * 10_000_000,
    "10 MB of objects": b'{"a":' * 2_000_000,
    "deep": b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "zeros": bytes(100),
    "a key twice": b'{"a": 1, "b": {"c": 1, "\\u0063": 2}}',
    "a key that commands a terminal": b'{"\\u001b[31m": 1, "\\u001b[31m": 1}',
    "a key of 100 kB": b'{"%s": 1, "%s": 1}' % (b"a" * 100_000, b"a" * 100_000),
}


def one_line(error, name):
    said = str(error.value)
    return name in said and said.isprintable() and len(said) < 400


def random_params(model, image_size, seed=2, *, writeable=True):
    """Parameters on the host, every one of them random.

    A head of zeros would make any comparison of logits empty, and biases of zeros hide
    a lost one. Drawn by NumPy: to compile JAX's random bits for every shape would take
    most of a test's time.
    """
    image = jnp.zeros((1, *image_size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            x /= math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            x = (path[-1].key == "scale") + 0.1 * x
        x = np.float32(x)
        x.flags.writeable = writeable
        return x

    return jax.tree_util.tree_map_with_path(draw, shapes)


def state_of(config, workdir):
    """The newest checkpoint, on one device, as NumPy arrays."""
    example = pipeline.example(config.model.image_size)
    mesh, total_steps = sharding.make_mesh(1), recipe.total_steps(config)
    target = experiment.build(config, mesh, example, total_steps).target
    with checkpoint.Checkpointer(f"{workdir}/checkpoints", every_steps=1) as reader:
        return jax.tree.map(np.asarray, reader.restore(target))


def assert_equal_runs(config, one, other):
    """Bitwise: parameters, optimiser state, step and every recorded metric."""
    jax.tree.map(
        np.testing.assert_array_equal, state_of(config, one), state_of(config, other)
    )
    assert told(one) == told(other)


def told(workdir):
    """metrics.jsonl without the times, which no two runs share."""
    records = metrics.read(workdir)
    said = [{k: v for k, v in r.items() if not goodput.is_time(k)} for r in records]
    return [record for record in said if record.keys() != {"step"}]


def contents(folder):
    """Every file below the folder, with what is in it."""
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_pair(program, name, arguments, folders=None, seconds=300, devices=1):
    """Runs the processes of one run, usually two.

    Args:
      program: the fixture.
      name: name of the program, e.g. "train".
      arguments: arguments of each process.
      folders: working folder of each.
      seconds: time that each may take.
      devices: number of devices of each.

    Returns:
      Exit codes and outputs.
    """
    port, count = free_port(), len(arguments)
    pair = [
        program(
            name,
            *arguments[i],
            f"--distributed=localhost:{port},{i},{count}",
            cwd=folders[i] if folders else None,
            devices=devices,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=seconds)[0] for process in pair]
    return [process.returncode for process in pair], said


def train_batches(source, **fields):
    """`pipeline.train_batches` with the fields of `recipe.base()` but for these."""
    return pipeline.train_batches(source, **dict(recipe.base().input) | fields)


def share(batch_size, process, count):
    """The rows of a batch that one of `count` processes makes."""
    each = batch_size // count
    return range(process * each, (process + 1) * each)


def eval_batches(source, **fields):
    """`pipeline.eval_batches` with the preprocessing of `recipe.evaluation`."""
    preprocess = recipe.evaluation("").preprocess
    return pipeline.eval_batches(source, **{"preprocess": preprocess} | fields)
