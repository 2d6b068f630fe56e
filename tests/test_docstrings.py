"""Docstrings say what stands alone, of parameters that are there, in one form."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path
    for top in ("mlp_mixer", "scripts", "configs")
    for path in (ROOT / top).rglob("*.py")
)
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r" {2}(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")
# A description that needs its name, or another one, to be understood.
LEANS = re.compile(r"(of|see|the same|like)\b", re.I)


def entries(docstring, name):
    """(names, description) of a section's entries; a line that is none is an error."""
    found, inside = [], False
    for line in docstring.splitlines():
        if not line.startswith(" ") and line:
            inside = line == f"{name}:"
        elif inside and line.strip() and not line.startswith("   "):
            match = ENTRY.fullmatch(line)
            assert match, f"is not `  name: description`: {line!r}"
            found.append((match[1].split(", "), match[2]))
        elif inside and line.strip():
            assert found, f"is indented by more than 2: {line!r}"
    return found


def faults(source):
    """What is wrong with the docstrings of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if not isinstance(node, kinds) or not (doc := ast.get_docstring(node)):
            continue
        at = f"line {node.lineno}, {node.name}"
        try:
            args, attributes = entries(doc, "Args"), entries(doc, "Attributes")
        except AssertionError as error:
            found.append(f"{at}: {error}")
            continue
        for names, description in args + attributes:
            if LEANS.match(description):
                found.append(f"{at}: {', '.join(names)}: {description}")
        named = {name.lstrip("*") for names, _ in args for name in names}
        found += [f"{at}: has no {name}" for name in sorted(named - parameters(node))]
    return found


def parameters(node):
    """The parameters of a function, or of a class's `__init__` or fields."""
    if isinstance(node, ast.ClassDef):
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        inner = [n for n in inner if n.name == "__init__"]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        names = {n.target.id for n in fields if isinstance(n.target, ast.Name)}
        return names.union(*map(parameters, inner))
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    return {arg.arg for arg in every if arg}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_argument_is_described_by_a_phrase_that_stands_alone(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("  a: number of a.", None),
        ("  a, b: numbers.", None),
        ("  a: of a run.", "a: of a run."),
        ("  b: see a.", "b: see a."),
        ("  c: a number.", "has no c"),
        ("    a: a number.", "more than 2"),
        ("  a number", "is not"),
    ],
)
def test_a_docstring_that_leans_is_found(entry, fault):
    source = f'def f(a, b):\n    """Returns a.\n\n    Args:\n    {entry}\n    """\n'
    found = faults(source)
    assert len(found) == (fault is not None)
    assert not fault or fault in found[0]
