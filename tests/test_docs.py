"""README and docs show nothing that does not work.

A fenced block is `sh` or `python` and runs, or its info string says what it needs:
```sh needs=imagenet. Blocks of Python run here, those of commands in `make test-slow`,
both in a folder with the clone's `configs`, `docs` and `scripts` and a short run of the
digits in `runs/digits`, one page after its own order. What needs something is parsed:
flags and fields exist, recipes load, Python finds its names.
"""

import argparse
import ast
import collections
import dataclasses
import glob
import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import family
import pytest
import suite_report
from absl import flags

from mlp_mixer import models, program, recipe, train

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

NEEDS = {
    "imagenet": "the official tars",
    "data": "files of the reader's own, or a prepared data set",
    "network": "a download",
    "gpu": "one NVIDIA GPU",
    "cluster": "several hosts",
    "install": "changes the environment",
    "minutes": "takes many of them",
}
SHOWN = ("text", "json", "csv")  # neither commands nor code
# Trainings are as short as this, whatever a page's command says: within the warm-up
# of the digits, so that the first steps are the ledger's.
STEPS = 60


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it is, what it needs."""

    page: str
    line: int
    language: str
    needs: tuple[str, ...]
    text: str

    @property
    def runs(self):
        return not self.needs

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page, text):
    """The fenced blocks of a page."""
    found, lines = [], text.splitlines()
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a fence is not closed"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        language, *words = lines[start].strip().removeprefix("```").split() or [""]
        assert all(w.startswith("needs=") for w in words), f"{page}:{start + 1}"
        needs = tuple(n for w in words for n in w.removeprefix("needs=").split(","))
        body = "\n".join(lines[start + 1 : end])
        found.append(Block(page, start + 2, language, needs, body))
    return found


TEXTS = {n: p.read_text(encoding="utf-8") for n, p in zip(NAMES, PAGES, strict=True)}
BLOCKS = [block for name in NAMES for block in blocks_of(name, TEXTS[name])]


def of(language):
    """Page → its blocks in that language."""
    found = collections.defaultdict(list)
    for block in BLOCKS:
        if block.language == language:
            found[block.page].append(block)
    return found


def test_every_block_says_what_it_is_and_what_it_needs():
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        assert block.language in ("sh", "python", *SHOWN), block
        assert set(block.needs) <= NEEDS.keys(), block


# --- Commands -------------------------------------------------------------------------

# Of other projects, with arguments that are not looked at.
OTHERS = (
    *("cd", "export", "find", "git", "pip", ".venv/bin/pip", "wait"),
    *("gcloud", "kubectl", "sbatch", "scancel", "squeue", "tensorboard"),
)
OPERATORS = ("|", "||", "&", "&&", ";")


def commands(text):
    """The words of every command of a block, without where its output goes."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        target = False
        for word in [*lexer, ";"]:
            ends = word in OPERATORS
            if ends and words:
                found.append(words)
                words = []
            if not (ends or target or word in ("<", ">")):
                words.append(word)
            target = word in ("<", ">")
    return found


class _Parsed(Exception):
    """A script has read its options."""


def check_command(words, monkeypatch):
    """Passes if a command would start: its program, flags, recipe and files exist."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    name, *arguments = words
    for word in words:
        top = word.partition("/")[0]
        if top in ("configs", "docs", "scripts", "tests") and ":" not in word:
            assert glob.glob(f"{ROOT}/{word}"), f"there is no {word}"
    if name == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in arguments:
            assert re.search(rf"^{target}:", makefile, re.M), f"make has no {target}"
    elif name == "python" and arguments[0] == "-m":
        if arguments[1] == "mlp_mixer" or arguments[1].startswith("mlp_mixer."):
            check_program(arguments[1], arguments[2:], monkeypatch)
        else:
            assert arguments[1] in ("pytest", "venv"), arguments[1]
    elif name == "python" and arguments[0] == "scripts/convert_checkpoint.py":
        check_program("mlp_mixer.convert", arguments[1:], monkeypatch)
    elif script := [w for w in words if w.startswith("scripts/launch/")]:
        # What is left of its command line goes to the training.
        rest = [w for w in words[words.index(script[0]) :] if w.startswith("--")]
        recipe_of_script = "--config=configs/mixer_b16.py"
        check_program("mlp_mixer.train", [recipe_of_script, *rest], monkeypatch)
    elif name == "python" and arguments[0].endswith(".py"):
        check_script(arguments[0], arguments[1:], monkeypatch)
    else:
        assert name in OTHERS, f"{name} is no known command"


def check_program(module, arguments, monkeypatch):
    """The flags of `python -m MODULE` as it defines them, and its recipe."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    before = set(flags.FLAGS)

    def parse(main, *, distributed=False, **_):
        kept = [w for w in arguments if not w.startswith("--distributed=")]
        assert distributed or kept == arguments, f"{module} is one process"
        monkeypatch.setattr(sys, "argv", [module, *kept])
        program._parse(sys.argv)
        if "config" in flags.FLAGS:
            recipe.check_fields(flags.FLAGS["config"].value)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            patch.setattr(program, "run", parse)
            runpy.run_path(str(path), run_name="__main__")
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def check_script(path, arguments, monkeypatch):
    """The options of a script, and the recipes that it is given."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, *args, **kwargs):
        _, rest = original(self, *args, **kwargs)
        # What is left are fields of the recipes, which are looked at below.
        assert all(word.startswith("--config.") for word in rest), rest
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        with pytest.raises(_Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")
    overrides = [word for word in arguments if word.startswith("--config.")]
    for word in arguments:
        if word.startswith("--config="):
            config = recipe.load(word.removeprefix("--config="))
            recipe.check_fields(program.override(config, overrides))


INLINE = r"`((?:make|python -m|python scripts/)[^`]*)`"


@pytest.mark.parametrize("page", NAMES)
def test_every_command_would_start(page, monkeypatch, capsys):
    texts = {str(block): block.text for block in of("sh")[page]}
    texts |= {f"{page}: {c}": c for c in re.findall(INLINE, prose(TEXTS[page]))}
    for where, text in texts.items():
        assert commands(text), where
        for words in commands(text):
            try:
                check_command(words, monkeypatch)
            except (AssertionError, Exception, SystemExit) as error:
                said = capsys.readouterr().err
                pytest.fail(f"{where}: {shlex.join(words)}: {error!r} {said}")


# --- Python ---------------------------------------------------------------------------


def check_names(source):
    """Passes if what a snippet imports of this project, and takes of it, is there."""
    tree, bound = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                bound[name.asname or name.name] = getattr(module, name.name)
        elif isinstance(node, ast.Import):
            for name in node.names:
                module = importlib.import_module(name.name)
                top = sys.modules[name.name.partition(".")[0]]
                bound[name.asname or top.__name__] = module if name.asname else top
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = bound.get(node.value.id)
            missing = owner is not None and not hasattr(owner, node.attr)
            assert not missing, f"{node.value.id} has no {node.attr}"


@pytest.mark.parametrize("page", of("python"))
def test_every_snippet_finds_its_names(page):
    for block in of("python")[page]:
        check_names(block.text)


def make_clone(folder):
    """What a reader has around: the clone, without its package."""
    for name in ("configs", "docs", "scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run of two steps, for what looks at runs/digits."""
    config = recipe.load("configs/digits.py")
    config.total_steps, config.optim.warmup_steps = 2, 1
    config.log_every_steps = 1
    folder = tmp_path_factory.mktemp("docs")
    train.train(config, folder / "runs/digits", data_dir=data_dir)
    return make_clone(folder)


@pytest.mark.parametrize("page", of("python"))
def test_every_snippet_runs(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    # Of the tests' own making: a reader's ranks promote.
    names = {"__name__": "snippet"}
    for block in of("python")[page]:
        if block.runs:
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(ROOT / page), "exec"), names)


# --- Commands, run --------------------------------------------------------------------

SHORT = f"--config.total_steps={STEPS}"
SHIM = f"""#!/bin/sh
# Shortens what trains.
case "$*" in
  "-m mlp_mixer.train "*|"scripts/sweep.py "*) set -- "$@" {SHORT} ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory, data_dir):
    """shell(text, folder): runs commands as a reader does, with short trainings."""
    bin = tmp_path_factory.mktemp("bin")
    (bin / "python").write_text(SHIM)
    (bin / "python").chmod(0o755)
    variables = {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": data_dir,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }

    def run(text, folder):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=500,
        )

    return run


@pytest.fixture(scope="module")
def digits(shell, tmp_path_factory):
    """The run that the pages begin with, by README's command."""
    folder = make_clone(tmp_path_factory.mktemp("digits"))
    done = shell("python -m mlp_mixer.train --config=configs/digits.py", folder)
    assert done.returncode == 0, done.stdout
    return folder


RUNNING = [page for page, found in of("sh").items() if any(b.runs for b in found)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_every_command_runs(page, digits, shell, tmp_path):
    make_clone(tmp_path)
    shutil.copytree(digits / "runs", tmp_path / "runs")
    for block in of("sh")[page]:
        if block.runs:
            done = shell(block.text, tmp_path)
            assert done.returncode == 0, f"{block}:\n{done.stdout}"


# --- Links, files, tables -------------------------------------------------------------


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found: collections.Counter[str] = collections.Counter()
    slugs = []
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(text), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        slugs.append(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return slugs


def broken_links(page, text):
    """The relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        if not target.resolve().is_relative_to(ROOT) or not target.exists():
            found.append(link)
        elif anchor:
            there = target.read_text(encoding="utf-8") if path else text
            found += [link] * (anchor not in anchors(there))
    return found


@pytest.mark.parametrize("page", NAMES)
def test_every_link_and_anchor_leads_somewhere(page):
    assert broken_links(page, TEXTS[page]) == []


TOP = ("configs/", "docs/", "mlp_mixer/", "scripts/", "tests/")


def missing_files(text):
    """Files of the clone that a page names in its prose, and that are not there."""
    found = []
    for word in re.findall(r"`([^`\s]+)`", prose(text)):
        place = word.partition(":")[0]
        if not place.startswith(TOP) or re.search(r"[=<>]", place):
            continue
        head, *parts = re.split(r"\{(.*?)\}", place)
        paths = [head]
        for choices, rest in zip(parts[::2], parts[1::2], strict=True):
            paths = [p + c + rest for p in paths for c in choices.split(",")]
        found += [path for path in paths if not glob.glob(f"{ROOT}/{path}")]
    return found


@pytest.mark.parametrize("page", NAMES)
def test_every_file_that_a_page_names_is_there(page):
    assert missing_files(TEXTS[page]) == []


@pytest.mark.parametrize("page", NAMES)
def test_every_field_that_a_page_names_is_a_field(page):
    for word in re.findall(r"`(--config\.[a-z][^`\s]*)`", prose(TEXTS[page])):
        recipe.check_fields(
            program.override(recipe.load("configs/mixer_b16.py"), [word])
        )


def test_every_extra_is_in_a_page_and_every_extra_of_a_page_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"].keys()
    named = set(re.findall(r"'\.\[([\w-]+)\]'", "\n".join(TEXTS.values())))
    assert named == {*extras} - {"dev"}  # make brings it


def test_readme_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 140


def test_readme_links_every_model_and_docs_name_every_size():
    section = TEXTS["README.md"].partition("## Models")[2].partition("\n## ")[0]
    for file in models.FAMILIES:
        assert f"]({pathlib.Path(file.__file__).relative_to(ROOT)})" in section
    for name in models.names():
        assert f"| `{name}` |" in TEXTS["docs/family.md"]


@pytest.mark.slow
def test_the_tables_of_the_family_are_those_of_its_files():
    tables = family.tables(family.read_results())
    assert family.rewritten(TEXTS["docs/family.md"], tables) == TEXTS["docs/family.md"]


def test_a_model_that_cannot_be_measured_is_refused_by_name(capsys):
    assert {*family.PEERS} <= {*models.names()}
    for what, word, tries in (
        ("speed", "mixr", "mixer"),
        ("peers", "smlpnet_tt=build/SPACH", "smlpnet_t"),
    ):
        with pytest.raises(SystemExit):
            family.main([what, word])
        said = capsys.readouterr().err
        assert repr(word) in said
        assert tries in said


# --- The checkers see what they should ------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "python -m mlp_mixer.train --config=configs/digits.py --wokdir=runs/x",
        "python -m mlp_mixer.train --config=configs/digit.py",
        "python -m mlp_mixer.train --config=configs/mixer_b16.py:imagenet22k",
        "python -m mlp_mixer.train --config=configs/digits.py --config.optim.rate=1",
        "python -m mlp_mixer.train --config=configs/digits.py --config.mixup=-1",
        "python -m mlp_mixer.predict --weights=runs/digits --format=xml x.png",
        "python -m mlp_mixer.convert a.npz b.npz --distributed=auto",
        "python -m mlp_mixer.trian",
        "scripts/launch/slrum.sh",
        "sbatch --nodes=2 scripts/launch/slurm.sh --config.nothing=1",
        "python scripts/sweep.py --config=configs/digits.py --config.nothing=1",
        "python scripts/sweep.py --config=configs/digits.py --sede=3",
        "python scripts/compare_runs.py runs/digits",
        "python scripts/convert_checkpoint.py runs/digits x.npz --nmaes=timm",
        "python -m mlp_mixer.predict --weights=x docs/digit",
        "make quikstart",
        "frobnicate",
    ],
)
def test_a_command_that_would_not_start_is_found(line, monkeypatch, capsys):
    (words,) = commands(line)
    with pytest.raises((AssertionError, Exception, SystemExit)):
        check_command(words, monkeypatch)


def test_commands_are_told_apart():
    text = "a b   # c\nd 'e f' | g - > h && X=1 i \\\n  j\n\nk\n"
    assert commands(text) == [
        ["a", "b"],
        ["d", "e f"],
        ["g", "-"],
        ["X=1", "i", "j"],
        ["k"],
    ]


@pytest.mark.parametrize(
    "source",
    ["from mlp_mixer import modles", "from mlp_mixer import models\nmodels.x()"],
)
def test_a_snippet_with_a_wrong_name_is_found(source):
    with pytest.raises((AssertionError, ImportError)):
        check_names(source)


def test_wrong_links_and_files_are_found():
    text = "# A `b`\n[x](a.md) [y](#a-b) [z](#c) [w](docs/data.md#speed) `docs/no.md`"
    assert broken_links("README.md", text) == ["a.md", "#c"]
    assert missing_files(text) == ["docs/no.md"]


def test_readmes_figures_of_speed_are_the_recorded_ones():
    file = ROOT / "docs/benchmarks/h200_mixer_b16_batch256_unrolled.json"
    ratios = json.loads(file.read_text(encoding="utf-8"))["ratios"]
    (claim,) = re.findall(r"\*\*Fast\.\*\*.*?docs/", TEXTS["README.md"], re.S)
    for name in ("train_speed", "train_temp_memory"):
        assert f"{ratios[name]:.2f}×" in claim, name


@pytest.mark.parametrize("page", suite_report.PAGES)
def test_the_tables_of_speed_are_those_of_the_recorded_suite(page):
    (file,) = (ROOT / "docs/benchmarks").glob("*_suite.json")
    report = suite_report.load(str(file))
    assert suite_report.rewritten(TEXTS[page], report) == TEXTS[page]
    # The same page, with other figures.
    wrong = re.sub(r"\d\.\d\d × \|", "0.00 × |", TEXTS[page])
    assert suite_report.rewritten(wrong, report) == TEXTS[page] != wrong


def test_the_map_has_every_module_and_no_other():
    named = set(re.findall(r"(\w+)\.py\b", TEXTS["docs/architecture.md"]))
    named |= set(re.findall(r"\b(\w+)/", TEXTS["docs/architecture.md"]))
    package = [p for p in (ROOT / "mlp_mixer").iterdir() if "__" not in p.name]
    modules = {p.stem for p in package if p.suffix == ".py" or p.is_dir()}
    assert modules - {"configs"} <= named
    files = {p.stem for top in TOP for p in (ROOT / top).rglob("*.py")}
    folders = {p.name for top in TOP for p in (ROOT / top).rglob("*") if p.is_dir()}
    assert named <= files | folders | {top.rstrip("/") for top in TOP}


def test_ci_runs_the_jobs_of_its_script_and_no_other():
    script = (ROOT / ".ci/run").read_text()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (jobs,) = re.findall(r"\bset -- (.+)", script)
    (matrix,) = re.findall(r"^ +job: \[(.*)\]", workflow, re.M)
    assert matrix.split(", ") == jobs.split()
    assert re.findall(r"run: (.*)", workflow) == ["bash .ci/run ${{ matrix.job }}"]
