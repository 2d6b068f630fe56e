"""What is known of every architecture: measured here, and written into docs/family.md.

    python scripts/family.py digits [WORD ...]   (train each model on the digits)
    python scripts/family.py speed [WORD ...]    (time each model beside a Mixer)
    python scripts/family.py peers SIZE[=FOLDER] ... --python=PYTHON
                                                 (time sizes beside their authors' code)
    python scripts/family.py tables              (put all that is known into the page)

Words are those of configs/family/digits.py; without any, all that are not measured yet.
Sizes are those of authors_peer.py, with the folder of a clone of the authors' code, or
with none for timm; the interpreter has PyTorch and timm.
Results are kept in docs/benchmarks/family.json, one at a time, so a command that was
ended is repeated for what is missing.
"""

import argparse
import collections
import datetime
import functools
import json
import operator
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import measurement
import numpy as np
from authors_peer import PEERS
from suite_item import TimmProcess

from mlp_mixer import experiment, known, metrics, models, recipe, sharding, steps
from mlp_mixer.data import pipeline
from mlp_mixer.planning import counts
from mlp_mixer.pretrained import tree

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "family.json"
PAGE = ROOT / "docs" / "family.md"
RECIPE = "configs/family/digits.py"
MIXER = "mixer"  # the recipe's model without a word


def words() -> list[str]:
    """Returns the models of the digits' recipe, and the Mixer."""
    return [MIXER, *recipe.run_file(str(ROOT / RECIPE))["MODELS"]]


def recipe_of(word: str) -> str:
    """Returns what stands behind --config= for a model."""
    return RECIPE + (f":{word}" if word != MIXER else "")


# --- What is measured -----------------------------------------------------------------


def digits(word: str) -> dict[str, Any]:
    """Trains a model on the digits by the common command.

    Returns:
      Top-1 accuracy of the last step, and the CPU time of the process, in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [
                *(sys.executable, "-m", "mlp_mixer.train"),
                *(f"--config={recipe_of(word)}", f"--workdir={folder}"),
            ],
            cwd=ROOT,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        top1 = [r["test/top1"] for r in metrics.read(folder) if "test/top1" in r][-1]
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return {"top1": top1, "cpu_s": round(seconds, 1)}


BLOCKS, MOST_BLOCKS, ROUNDS = 4, 16, 5


def speed(word: str) -> dict[str, Any]:
    """Times a model's forward pass and training step beside a Mixer's, in turn.

    Both have few blocks, what a block costs being the question, and a similar number of
    operations; the Mixer's widths follow from the model's as in Table 1, or from as
    many times as many channels as keep it shallow.

    Returns:
      Of both passes: CPU seconds of a batch, operations of its products, and what an
      operation takes as a multiple of what it takes in the Mixer.
    """
    name = recipe.load(recipe_of(word)).model.name
    size = models.fields(name)
    staged, (side, _) = isinstance(size["num_blocks"], tuple), size["patch_size"]
    pixels = 224 if staged or side >= 8 else 32
    batch, patch = (8, 16) if pixels == 224 else (32, side)
    fields = {"num_blocks": (1,) * len(size["num_blocks"]) if staged else BLOCKS}
    ours = _Timed(word, {"name": name, **fields}, pixels, batch)
    c, blocks = size["hidden_dim"], MOST_BLOCKS + 1
    if isinstance(c, tuple):  # at 1/16, as the Mixer
        c = c[min(2, len(c) - 1)]
    elif staged:
        c *= 4
    while blocks > MOST_BLOCKS:  # else it is wider
        mixer = {"name": "mixer_s16", "patch_size": (patch, patch), "hidden_dim": c}
        mixer |= {"tokens_mlp_dim": c // 2, "channels_mlp_dim": 4 * c}
        one, two = (
            _Timed(MIXER, mixer | {"num_blocks": n}, pixels, batch).flops["forward"]
            for n in (1, 2)
        )
        blocks = max(1, round((ours.flops["forward"] - one) / (two - one)) + 1)
        c *= 2
    beside = _Timed(MIXER, mixer | {"num_blocks": blocks}, pixels, batch)
    found: dict[str, Any] = {"pixels": pixels, "batch": batch, "mixer_blocks": blocks}
    for kind in measurement.KINDS:
        times = _in_turn({"ours": ours.clock(kind), "mixer": beside.clock(kind)})
        operations = {"ours": ours.flops[kind], "mixer": beside.flops[kind]}
        per_operation = {name: times[name] / operations[name] for name in times}
        found[kind] = {
            "cpu_s": times,
            "flops": operations,
            "beside_mixer": per_operation["ours"] / per_operation["mixer"],
        }
    return found


def _in_turn(clocks: dict[str, Callable[[], dict[str, float]]]) -> dict[str, float]:
    """CPU seconds of each clock, the median of some rounds."""
    rounds = list(measurement.interleave(clocks, ROUNDS))
    return {
        name: statistics.median(r[name]["cpu_s"] for r in rounds) for name in clocks
    }


PEER_PIXELS, PEER_BATCH, PEER_SECONDS = 224, 4, 900


def beside_peer(size: str, code: str, python: str) -> dict[str, Any]:
    """Times a size beside the same model of its authors, or of timm, in turn.

    Each on one core, in float32, without stochastic depth; training is a whole step
    with AdamW.

    Args:
      size: a key of `authors_peer.PEERS`.
      code: folder of a clone of the authors' repository; "": timm.
      python: interpreter that has PyTorch and timm.

    Returns:
      Of both passes: CPU seconds of a batch, and ours as a multiple of theirs.
    """
    model = {"name": size, "stochastic_depth": 0.0}
    ours = _Timed(MIXER, model, PEER_PIXELS, PEER_BATCH)
    theirs = TimmProcess(python, "authors_peer.py")
    found: dict[str, Any] = {"pixels": PEER_PIXELS, "batch": PEER_BATCH}
    found["peer"] = PEERS[size].repository or "timm"
    for kind in measurement.KINDS:
        side = {"label": kind, "kind": kind, "size": size, "code": code}
        side |= {"image_size": PEER_PIXELS, "batch": PEER_BATCH, "options": {}}
        asked = {"prepare": side, "dtype": "float32", "threads": 1}
        found["versions"] = theirs.ask(asked, PEER_SECONDS)["versions"]

        def clock(kind: str = kind) -> dict[str, float]:
            return theirs.ask({"clock": kind, "times": 1}, PEER_SECONDS)

        times = _in_turn({"ours": ours.clock(kind), "theirs": clock})
        found[kind] = {"cpu_s": times, "beside": times["ours"] / times["theirs"]}
    return found


class _Timed:
    """A model with its training step, which is that of a recipe for the digits."""

    def __init__(
        self, word: str, model: dict[str, Any], pixels: int, batch: int
    ) -> None:
        config = recipe.load(recipe_of(word))
        config.model = {"image_size": (pixels, pixels), **model}
        config.dataset.num_classes, config.mixup = 1000, 0.0
        config.batch_size = batch
        self.mesh = sharding.make_mesh(1)
        self.example = pipeline.example((pixels, pixels))
        self.built = experiment.build(config, self.mesh, self.example, 1000)
        self.batch = _random_batch(self.mesh, batch, pixels)
        forward = jax.make_jaxpr(self.built.predict)(
            self.built.target.variables, self.batch
        )
        train = jax.make_jaxpr(self.built.train_step)(self.built.target, self.batch)
        self.flops = {"forward": counts.flops(forward), "train": counts.flops(train)}

    def clock(self, kind: str) -> Callable[[], dict[str, float]]:
        """Returns what measures one call of a pass, compiled and warm."""
        state = steps.init_state(
            self.built.model, self.built.tx, self.built.target, self.example, seed=0
        )
        if kind == "train":
            run = measurement.training(self.built.train_step, state, self.batch)
        else:

            def run() -> Any:
                return self.built.predict(state.variables, self.batch)

        jax.block_until_ready(run())
        return lambda: measurement.clock(run, 1, jax.block_until_ready)


def _random_batch(mesh: Any, batch: int, pixels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch, pixels, pixels, 3), np.uint8)
    label = rng.integers(0, 1000, batch, np.int32)
    return sharding.place_rows({"image": image, "label": label}, mesh)


# --- The page -------------------------------------------------------------------------


def paper_of(file: ModuleType) -> tuple[str, str]:
    """Returns name and arXiv number of what the first line of a file's docstring says.

    Raises:
      ValueError: the line does not begin with NAME (AUTHORS, arXiv NUMBER.
    """
    found = re.match(r"(.+?) \(.*?arXiv\s+([0-9]+\.[0-9]+)", file.__doc__ or "", re.S)
    if found is None:
        raise ValueError(
            f"{file.__name__} begins with {(file.__doc__ or '')[:80]!r}; expected "
            "NAME (AUTHORS YEAR, arXiv NUMBER, …"
        )
    return found[1], found[2]


def one_block_each(size: str) -> models.Model:
    """Returns a model of a size with one block in each row, as the paper counts it."""
    few = jax.tree.map(lambda n: min(n, 1), models.fields(size)["num_blocks"])
    return models.create(size, num_classes=models.counted(size)[1], num_blocks=few)


@functools.cache
def shapes_of_one_block_each(size: str) -> Any:
    """Returns the shapes of the variables of `one_block_each`."""
    side, _ = models.counted(size)
    return tree.variables(one_block_each(size), (side, side))


class Cost(NamedTuple):
    """What a size has and does, for one image.

    Attributes:
      parameters: number of parameters.
      macs: multiply-adds of products and convolutions.
      norms: operations of norms as fvcore counts them, 5 for each value that a norm
        normalises, 2 where BatchNorm does it with its running statistics. fvcore, with
        which most papers count, adds them to the multiply-adds.
    """

    parameters: int
    macs: int
    norms: int


@functools.cache
def cost(size: str) -> Cost:
    """Returns what a size costs, with the paper's images and classes.

    Counted from shapes, with one block in each row: all blocks of a row are alike.
    """
    side, _ = models.counted(size)
    model, given = one_block_each(size), shapes_of_one_block_each(size)
    image = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    norms, part = collections.Counter[str](), ""

    def count_norms(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal part
        # A module without a path, as I-MLP's prior, is of the part that was last.
        part = next(iter(context.module.path), part)
        kind = type(context.module).__name__
        if context.method_name == "__call__" and kind.endswith("Norm"):
            norms[part] += (2 if kind == "BatchNorm" else 5) * args[0].size
        return call(*args, **kwargs)

    with nn.intercept_methods(count_norms):
        jaxpr = jax.make_jaxpr(model.apply)(given, image)
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(part))
        for name, part in given["params"].items()
    }
    found = Cost(sum(sizes.values()), counts.flops(jaxpr) // 2, norms.total())
    depth = [n for n in np.atleast_1d(models.fields(size)["num_blocks"]) if n]
    for block, n in zip(_blocks(model, jaxpr), depth, strict=True):
        of_block = sizes[block], counts.flops(jaxpr, block) // 2, norms[block]
        more = (int(n - 1) * each for each in of_block)
        found = Cost(*map(operator.add, found, more))
    return found


def _blocks(model: models.Model, jaxpr: Any) -> list[str]:
    """The first block of each row, in the order in which they are computed."""
    first = {
        path.partition("/")[0].replace("*", "0")
        for path in model.declared_axes()
        if "*" in path
    }
    parts = (part for x in counts.equations(jaxpr) for part in x.scope.split("/"))
    return [*dict.fromkeys(part for part in parts if part in first)]


def papers(results: dict[str, Any]) -> str:
    """Returns the table of architectures."""
    rows = []
    for name, file in models.families().items():
        title, number = paper_of(file)
        millions = [cost(size).parameters / 1e6 for size in file.SIZES]
        scores = [file.TOP_1[size] for size in file.SIZES if size in file.TOP_1]
        trained = {
            word: results["digits"][word]
            for word in words()
            if word.partition("-")[0] == name and word in results.get("digits", {})
        }
        rows.append(
            [
                f"[{title}](https://arxiv.org/abs/{number})",
                f"[{name}.py](../mlp_mixer/models/{name}.py)",
                f"{len(file.SIZES)}",
                _range(millions, ".1f"),
                _range(scores, ".1f") or "–",
                file.CHECKED,
                " / ".join(f"{100 * x['top1']:.2f}" for x in trained.values()) or "–",
                " / ".join(f"{x['cpu_s']:.0f}" for x in trained.values()) or "–",
            ]
        )
    columns = ["paper", "file", "sizes", "million parameters", "published top-1, %"]
    columns += ["checked against", "digits, %", "CPU seconds"]
    return _markdown(columns, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _range(values: Sequence[float], form: str) -> str:
    ends = (min(values), max(values)) if values else ()
    return " to ".join(dict.fromkeys(format(x, form) for x in ends))


def all_sizes() -> str:
    """Returns the table of the sizes of all architectures."""
    rows = []
    for file in models.FAMILIES:
        for size in file.SIZES:
            side, classes = models.counted(size)
            found, top1 = cost(size), file.TOP_1.get(size)
            rows.append(
                [
                    f"`{size}`",
                    f"{found.parameters:,}",
                    f"{found.macs / 1e9:.3f}",
                    f"{(found.macs + found.norms) / 1e9:.3f}",
                    f"{side}, {classes:,}",
                    "–" if top1 is None else f"{top1:.1f}",
                ]
            )
    columns = ["size", "parameters", "GMACs", "and norms", "at pixels, classes"]
    return _markdown([*columns, "published top-1, %"], rows)


def speeds(results: dict[str, Any]) -> str:
    """Returns the table of times beside a Mixer."""
    rows = []
    for word, found in results.get("speed", {}).items():
        cells = []
        for kind in measurement.KINDS:
            one = found[kind]
            flops = one["flops"]["ours"] / found["batch"] / 1e9
            cells += [f"{flops:.3g}", f"{one['cpu_s']['ours']:.3g}"]
            cells += [f"{one['beside_mixer']:.2f} ×"]
        rows.append([word, f"{found['batch']} of {found['pixels']} px", *cells])
    columns = ["model", "batch"]
    for kind in ("forward", "training"):
        columns += [f"{kind}, GFLOP an image", "s", "per FLOP, beside Mixer"]
    return _markdown(columns, rows)


def peers(results: dict[str, Any]) -> str:
    """Returns the table of times beside the authors' code."""
    rows = []
    for size, found in results.get("peers", {}).items():
        cells = []
        for kind in measurement.KINDS:
            seconds = found[kind]["cpu_s"]
            cells += [f"{seconds[who]:.3g}" for who in ("ours", "theirs")]
            cells += [f"{found[kind]['beside']:.2f} ×"]
        versions = found["versions"]
        theirs = f"{found['peer']}, torch {versions['torch'].partition('+')[0]}"
        rows.append([f"`{size}`", theirs, *cells])
    columns = ["size", "theirs"]
    for kind in ("forward", "training"):
        columns += [f"{kind}: ours, s", "theirs, s", "ours / theirs"]
    return _markdown(columns, rows)


_MARKS = r"(<!-- family: {} -->\n).*?(<!-- end of family -->)"


def rewritten(page: str, tables: dict[str, str]) -> str:
    """Returns a page with the tables between their marks."""
    for name, table in tables.items():
        parts = re.split(_MARKS.format(name), page, flags=re.S)
        count = len(parts) // 3
        if count != 1:
            raise ValueError(
                f"The page has {count} places for the table {name}; expected one, "
                f"<!-- family: {name} --> … <!-- end of family -->."
            )
        before, begin, end, after = parts
        page = f"{before}{begin}{table}{end}{after}"
    return page


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Returns the page's tables by name."""
    return {
        "papers": papers(results),
        "sizes": all_sizes(),
        "speed": speeds(results),
        "peers": peers(results),
    }


# --- The command line -----------------------------------------------------------------


def read_results() -> dict[str, Any]:
    """Returns what was measured: {"digits": {word: …}, "speed": …, "peers": …}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def kept(
    kind: str, measures: Mapping[str, Callable[[], dict[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures models one after the other; yields each result once it is kept.

    Args:
      kind: "digits", "speed" or "peers".
      measures: word or size → what measures it.
    """
    for name, measure in measures.items():
        print(f"{kind} of {name}", file=sys.stderr, flush=True)
        found = measure()
        found["date"] = datetime.date.today().isoformat()
        results = read_results()
        results.setdefault(kind, {})[name] = found
        order = [x for x in (*words(), *models.names()) if x in results[kind]]
        results[kind] = {x: results[kind][x] for x in order}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        yield name, found


def _measures(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What the command line asks for.

    Raises:
      ValueError: it names a model that there is not.
    """
    chosen, known_names = args.words, [*PEERS] if args.what == "peers" else words()
    for word in chosen:
        if word.partition("=")[0] not in known_names:
            tries = known.nearest(word, known_names)
            raise ValueError(f"there is no model {word!r} to measure; try {tries}")
    if args.what == "peers":
        folders = {size: code for size, _, code in (x.partition("=") for x in chosen)}
        return {
            size: functools.partial(beside_peer, size, code, args.python)
            for size, code in folders.items()
        }
    done = read_results().get(args.what, {})
    measure = {"digits": digits, "speed": speed}[args.what]
    missing = [word for word in known_names if word not in done]
    return {word: functools.partial(measure, word) for word in chosen or missing}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["digits", "speed", "peers", "tables"])
    parser.add_argument("words", nargs="*", metavar="WORD or SIZE=FOLDER")
    parser.add_argument(
        "--python", default=sys.executable, help="has PyTorch and timm; for peers"
    )
    args = parser.parse_args(argv)
    if args.what == "tables":
        page = rewritten(PAGE.read_text(), tables(read_results()))
        PAGE.write_text(page)
        return
    try:
        measures = _measures(args)
    except ValueError as error:
        parser.error(str(error))
    measurement.start_devices(1, 1)
    for name, found in kept(args.what, measures):
        print(name, json.dumps(found))


if __name__ == "__main__":
    main()
