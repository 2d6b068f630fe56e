"""Records a small run half-way, its weights, and what it becomes, with an old commit.

Every import of mlp_mixer is that commit's; see README.md.
"""

import os
import pathlib
import runpy
import shutil
import signal
import sys
import tarfile

import mlp_mixer
from mlp_mixer import convert, metrics, train

STOP, END = 10, 20
FILES = ("run", "weights.safetensors", "weights.npz", "end.npz", "end.jsonl")


def recipe(root: pathlib.Path, **model):
    """The digits' recipe in `root`, shrunk, as a user of any version may state it."""
    config = runpy.run_path(str(root / "configs/digits.py"))["get_config"]()
    config.total_steps = END
    config.batch_size = 20
    config.log_every_steps = 1
    config.model.patch_size = (4, 4)
    config.model.num_blocks = 2
    config.model.hidden_dim = 8
    config.model.tokens_mlp_dim = 4
    config.model.channels_mlp_dim = 16
    # What they drop is a function of seed and step, in every version.
    config.model.dropout = 0.1
    config.model.stochastic_depth = 0.2
    for field, value in model.items():
        section = config.run if field in config.get("run", ()) else config.model
        section[field] = value
    config.optim.warmup_steps = 5
    config.evals.test.every_steps = STOP
    config.checkpoint.every_steps = STOP
    return config


def record(folder: pathlib.Path, **model) -> None:
    config = recipe(pathlib.Path(mlp_mixer.__file__).parent.parent, **model)
    run, end = folder / "run", folder / "end"
    evaluation = metrics.Writer.evaluation

    def stopping(self, *arguments):
        evaluation(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    metrics.Writer.evaluation = stopping  # type: ignore[method-assign]
    train.train(config, run)
    metrics.Writer.evaluation = evaluation  # type: ignore[method-assign]
    shutil.rmtree(run / "tensorboard")
    for name in ("weights.safetensors", "weights.npz"):
        convert.convert(run, folder / name)

    shutil.copytree(run, end)
    train.train(config, end)
    convert.convert(end, folder / "end.npz")
    shutil.copy(end / "metrics.jsonl", folder / "end.jsonl")
    with tarfile.open(f"{folder}.tar.xz", "w:xz") as archive:
        for name in FILES:
            archive.add(folder / name, name)


if __name__ == "__main__":
    words = {"scan": True, "remat": "pre_gelu", "gelu": "exact"}
    record(
        pathlib.Path(sys.argv[1]).resolve(),
        **{word: words[word] for word in sys.argv[2:]},
    )
