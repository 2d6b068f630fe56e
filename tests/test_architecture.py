"""Who may import whom, and which module may import which heavy dependency.

Read from the sources without running them, imports inside functions included.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Law 1: a module imports lower layers and, in data/, models/, …, its own package. A
# name stands for a module or for all modules of a package.
LAYERS = (
    # What a leaf may import.
    (
        *("text", "errors", "known", "processes", "goodput"),
        *("supervisor", "joining"),
    ),
    ("sharding",),
    ("console", "files", "models", "shipped"),
    ("fields", "board", "records"),
    (
        "recipe",
        "losses",
        "augment",
        "fingerprints",
        "signals",
        "compilation_cache",
        "metrics",
        "ownership",
        "data.decoding",
        "data.image_ops",
        "data.randaugment",
        "data.timm_randaugment",
        "data.assembly",
        "data.tfrecords",
        "data.folders",
        "data.class_names",
        "planning.hlo",
        "planning.counts",
        "planning.chips",
    ),
    ("orbax_io",),
    (
        "paper",
        "optim",
        "checkpoint",
        "history",
        "data.pipeline",
        "data.prepared",
        "data.sources",
        "data.preparation",
        "visualize",
    ),
    ("workdir", "deit"),
    ("steps", "evaluators"),
    ("pretrained",),
    # What the programs share.
    ("program", "runs", "experiment", "graphs"),
    ("planning",),
    ("train", "evaluate", "predict", "plan", "prepare", "convert", "export"),
    # Studies: many runs of programs.
    ("sweep",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Importing anything below them runs them, so they must not import at all.
PACKAGES = ("", "data")

# Law 2: one door per heavy dependency. Keys are import paths, longest first where one
# contains another; "lazy" means inside a function, since it may not be installed.
PROGRAMS = LAYERS[-2]
DOORS = {
    "grain": ("data",),
    "tensorflow_datasets": ("data",),
    "tensorflow": ("data.preparation",),
    "orbax": ("orbax_io",),
    "ml_collections": (
        "recipe",
        "sweep",
        "paper",
        "deit",
        "workdir",
        "runs",
        "program",
        *PROGRAMS,
    ),
    "absl.flags": ("program", *PROGRAMS),
    "absl.app": ("program", *PROGRAMS),
    "cv2": ("data.image_ops", "data.randaugment"),
    "tensorboardX": ("board",),
    "rich": ("console",),
    "matplotlib": ("visualize",),
    "safetensors": ("pretrained",),
    "torch": ("pretrained",),
    "onnx": ("export",),
    "onnxruntime": ("export",),
    "flatbuffers": ("export",),
    "jax.distributed.initialize": ("program", *PROGRAMS),
}
LAZY = ("tensorflow", "torch", "onnx", "onnxruntime", "flatbuffers")


# --- What a source imports ------------------------------------------------------------


def within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def imported(tree, module, is_package=False):
    """Dotted names that a syntax tree imports, or reaches through what it imports.

    `from a import b` gives "a.b", a module or not; `import jax; jax.distributed.x()`
    gives "jax" and "jax.distributed.x".
    """
    names, alias = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                names.add(item.name)
                bound = item.name if item.asname else item.name.partition(".")[0]
                alias[item.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - up], *filter(None, [base])])
            for item in node.names:
                names.add(base if item.name == "*" else f"{base}.{item.name}")
                alias[item.asname or item.name] = f"{base}.{item.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in alias:
            names.add(".".join([alias[node.id], *reversed(parts)]))
    return names


def at_once(tree):
    """The tree without what waits in functions for being called."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    return Strip().visit(ast.parse(ast.unparse(tree)))


# --- The laws -------------------------------------------------------------------------


def level(name):
    """The layer of a module, by its name below mlp_mixer; None if it has none."""
    found = [key for key in LEVEL if within(name, key)]
    return LEVEL[found[0]] if found else None


def faults(sources):
    """Where a package breaks the laws.

    Args:
      sources: module → source, e.g. "mlp_mixer.data.sources"; a package's is its
        `__init__.py` and its name ends with ".__init__".
    """
    modules = {name.removesuffix(".__init__") for name in sources}
    found = []
    for full, source in sorted(sources.items()):
        module = full.removesuffix(".__init__")
        tree, name = ast.parse(source), module.removeprefix("mlp_mixer").lstrip(".")
        names = imported(tree, module, full != module)
        found += _layer_faults(name, names, modules)
        for path, doors in DOORS.items():
            if not any(within(used, path) for used in names):
                continue
            if not any(within(name, door) for door in doors):
                found.append(f"{name}: {path} is for {', '.join(doors)} only")
            elif path in LAZY:
                early = imported(at_once(tree), module, full != module)
                if any(within(used, path) for used in early):
                    found.append(f"{name}: {path} is imported outside of functions")
    return found


def _layer_faults(name, names, modules):
    own = level(name)
    if own is None and name not in PACKAGES:
        return [f"{name}: has no layer"]
    found = []
    for used in sorted(n for n in names if within(n, "mlp_mixer")):
        # `from module import function`, `module.function`: the longest module of it.
        while used not in modules and "." in used:
            used = used.rpartition(".")[0]
        other = used.removeprefix("mlp_mixer").lstrip(".")
        if other in (*PACKAGES, name):
            continue
        below = level(other)
        package = name.partition(".")[0]
        same = name not in PACKAGES and within(other, package) and other != package
        same = same or other == package != name
        if own is None or below is None:
            found.append(f"{name or 'mlp_mixer'}: may not import {other}")
        elif not (below < own or (same and below <= own)):
            found.append(f"{name}: may not import {other}")
    return list(dict.fromkeys(found))


def recipe_faults(source):
    """What a recipe imports besides these modules and the standard library."""
    builders = [f"mlp_mixer.{name}" for name in ("recipe", "paper", "deit")]
    return sorted(
        name
        for name in imported(ast.parse(source), "")
        if not any(within(name, builder) for builder in builders)
        and name.partition(".")[0] not in sys.stdlib_module_names
    )


def package():
    """Module → source, of all of mlp_mixer."""
    sources = {}
    for path in sorted((ROOT / "mlp_mixer").rglob("*.py")):
        if "configs" in path.relative_to(ROOT).parts:  # A wheel's recipes.
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        sources[name] = path.read_text()
    return sources


def test_the_package_keeps_both_laws():
    sources = package()
    assert {"mlp_mixer.__init__", "mlp_mixer.data.sources"} < sources.keys()
    assert faults(sources) == []


RECIPES = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_imports_nothing_but_recipe_paper_and_deit(path):
    """So it works wherever it lies."""
    assert recipe_faults(path.read_text()) == []


# --- The checker sees what it should --------------------------------------------------

# Modules of a house, to which a test adds one that keeps the laws or breaks them.
HOUSE = {
    f"mlp_mixer.{name}": ""
    for name in (
        *("__init__", "losses", "sharding", "models.__init__", "models.layers"),
        *("optim", "data.__init__", "data.image_ops", "data.sources", "steps"),
        *("evaluators.__init__", "evaluators.accuracy", "runs", "train", "evaluate"),
    )
}


def faults_of(module, source):
    return faults(HOUSE | {f"mlp_mixer.{module}": source})


def lines(text):
    """Cells of a table with a bar between columns."""
    rows = text.strip().splitlines()
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


FORMS = """
import mlp_mixer.steps as s
from mlp_mixer import sharding, steps as s
from mlp_mixer.steps import TrainState
from mlp_mixer.steps import *
from . import steps
from .steps import TrainState
def f(): from mlp_mixer import steps
if TYPE_CHECKING: from mlp_mixer import steps
import mlp_mixer; mlp_mixer.steps.make_predict(1)
import mlp_mixer as m; f = lambda: m.steps.TrainState
"""


@pytest.mark.parametrize("source", [source for (source,) in lines(FORMS)])
def test_every_form_of_import_is_seen(source):
    assert faults_of("optim", source) == ["optim: may not import steps"]
    assert faults_of("train", source) == []


# Sideways, up, up inside a package, what runs with every import, no layer.
WRONG = """
losses              | from mlp_mixer import optim          | may not import optim
evaluate            | from mlp_mixer.train import train    | may not import train
evaluators.accuracy | from mlp_mixer import steps          | may not import steps
evaluators.__init__ | from .. import steps                 | may not import steps
models.layers       | from mlp_mixer import optim          | may not import optim
data.image_ops      | from mlp_mixer.data import sources   | may not import data.sources
data.image_ops      | from .sources import DATASETS        | may not import data.sources
__init__            | from mlp_mixer import models         | may not import models
data.__init__       | from . import sources                | may not import data.sources
utils               | import math                          | has no layer
data.extra          | import math                          | has no layer
recipes             | pass                                 | has no layer
steps               | import grain                         | grain is for
train               | def f(): import tensorflow_datasets  | tensorflow_datasets is for
data.sources        | def f(): import tensorflow as tf     | tensorflow is for
train               | import orbax.checkpoint as ocp       | orbax is for
losses              | from ml_collections import ConfigDict | ml_collections is for
metrics             | from absl import flags               | absl.flags is for
metrics             | import absl; absl.flags.FLAGS        | absl.flags is for
steps               | from absl.flags import FLAGS         | absl.flags is for
train               | import rich.console                  | rich is for
train               | import tensorboardX                  | tensorboardX is for
evaluate            | from matplotlib import pyplot        | matplotlib is for
convert             | import safetensors.numpy             | safetensors is for
convert             | def f(): import torch                | torch is for
pretrained.npz      | import torch                         | torch is imported outside
data.preparation    | if True: import tensorflow           | tensorflow is imported out
convert             | import onnx                          | onnx is for
steps               | import flatbuffers                   | flatbuffers is for
export              | import onnxruntime                   | onnxruntime is imported ou
checkpoint          | import jax; jax.distributed.initialize() | jax.distributed.init
checkpoint          | from jax.distributed import initialize | jax.distributed.initia
checkpoint          | from jax import distributed as d; d.initialize() | jax.distribut
"""


@pytest.mark.parametrize(("module", "source", "fault"), lines(WRONG))
def test_a_wrong_import_is_found(module, source, fault):
    (found,) = faults_of(module, source)
    name = {"__init__": "mlp_mixer"}.get(module, module.removesuffix(".__init__"))
    assert found.startswith(f"{name}: {fault}")


def test_a_module_without_layer_may_not_be_imported():
    sources = HOUSE | {
        "mlp_mixer.utils": "",
        "mlp_mixer.train": "from mlp_mixer.utils import helper",
    }
    assert "train: may not import utils" in faults(sources)


RIGHT = """
models.__init__     | from mlp_mixer.models.layers import gelu
models.layers       | from . import mixer
data.sources        | from mlp_mixer.data import image_ops, pipeline
evaluators.accuracy | from mlp_mixer import losses; from mlp_mixer.data import sources
evaluators.__init__ | from .accuracy import Accuracy
train               | import mlp_mixer; from mlp_mixer import evaluators, steps, runs
steps               | import jax, optax; from mlp_mixer import __version__, losses
data.preparation    | def f(): import tensorflow as tf
data.sources        | import grain; import tensorflow_datasets as tfds
pretrained.torch    | import safetensors
pretrained.torch    | def f(): import torch
export              | def f(): import onnx, onnxruntime, flatbuffers
console             | import rich.console; from absl import logging
checkpoint          | import jax; jax.distributed.is_initialized()
train               | import jax; jax.distributed.initialize()
steps               | import richer, torchvision_like, onnx_like, jax.distributed
"""


@pytest.mark.parametrize(("module", "source"), lines(RIGHT))
def test_a_right_import_is_none(module, source):
    assert faults_of(module, source) == []


RECIPES_OWN = """
import math; from mlp_mixer import recipe, paper | []
from mlp_mixer import deit                       | []
from mlp_mixer.recipe import base                | []
import numpy as np                               | ['numpy']
from mlp_mixer import models                     | ['mlp_mixer.models']
def f(): from ml_collections import ConfigDict   | ['ml_collections.ConfigDict']
from configs import digits                       | ['configs.digits']
"""


@pytest.mark.parametrize(("source", "expected"), lines(RECIPES_OWN))
def test_a_recipes_wrong_import_is_found(source, expected):
    assert str(recipe_faults(source)) == expected


# --- What is loaded -------------------------------------------------------------------


def printed_by(script):
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_training_on_the_device_loads_nothing_heavy():
    """`import mlp_mixer` loads the package alone; models, losses, steps, optimiser and
    sharding add nothing to what JAX, Flax, Optax, einops and jaxtyping load."""
    script = """
import sys

def packages():
    # What a name like "__mp_main__" or "_virtualenv" stands for is nobody's import.
    tops = {name.partition(".")[0] for name in sys.modules}
    return {name for name in tops if not name.startswith("_")}

before = packages()
import mlp_mixer
print(*sorted(packages() - before))
import einops, flax.linen, jax, jaxtyping, numpy, optax
import jax.experimental.multihost_utils
before = packages()
from mlp_mixer import losses, models, optim, sharding, steps
models.create("mixer_s16", num_classes=10)
optim.create(
    name="adam", b1=0.9, b2=0.999, eps=1e-8, momentum=0.9, momentum_dtype="float32",
    weight_decay=0.1, decayed="kernels", clip_norm=1.0, total_steps=10, warmup_steps=1,
    learning_rate=1.0, decay="linear", end_learning_rate=0.0, end_factor=None,
)
print(*sorted(packages() - before - sys.stdlib_module_names))
"""
    assert printed_by(script).splitlines() == ["mlp_mixer", ""]


def test_weights_and_predictions_load_nothing_that_only_some_of_them_need():
    script = """
import sys
import jax, flax.linen
before = {*sys.modules}

def show_packages():
    print(*sorted({name.partition(".")[0] for name in {*sys.modules} - before}))

from mlp_mixer import pretrained
show_packages()
from mlp_mixer import predict
show_packages()
"""
    weights, predictions = ({*line.split()} for line in printed_by(script).splitlines())
    assert "mlp_mixer" in weights
    only_some = {"tensorflow_datasets", "tensorflow", "torch", "onnx", "matplotlib"}
    heavy = {"orbax", "tensorstore", "tensorboardX", "ml_collections", "grain", "cv2"}
    assert not (only_some | heavy) & weights
    assert "grain" in predictions  # and with it Orbax
    assert not only_some & predictions


def test_weights_load_what_they_need_when_they_are_read():
    """`from mlp_mixer import pretrained` loads no heavy dependency but Flax's own."""
    doors = [name for name in DOORS if "." not in name]
    script = f"""
import sys
import flax.linen
before = {{*sys.modules}}
from mlp_mixer import pretrained
print(*sorted(set({doors}) & (sys.modules.keys() - before)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_every_door_stands_for_a_module_that_can_exist():
    """A misspelt door would forbid its own module, and only one day."""
    for doors in DOORS.values():
        for door in doors:
            assert door == "data" or level(door) is not None
