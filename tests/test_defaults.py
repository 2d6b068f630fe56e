"""A default stands once: what a recipe says, no function says otherwise.

Found in the sources: every call that gets a field of a recipe, or a whole section.
"""

import ast
import importlib
import inspect
import pathlib
import textwrap

import pytest
from test_fields import flat

from mlp_mixer import evaluators, fields, optim, recipe, sharding

ROOT = pathlib.Path(__file__).parents[1]
# Read by recipe.total_steps, which has no arguments for them.
ALONE = {"epochs", "total_steps"}


def field_of(node):
    """The field that `config.a.b`, `run.config.a` or the like stands for, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    parts.reverse()
    return ".".join(parts[parts.index("config") + 1 :]) if "config" in parts else None


def called(node, namespace):
    """What a call calls, as far as the names of its module say; None if they do not."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in namespace:
        return None
    found = namespace[node.id]
    for part in reversed(parts):
        found = getattr(found, part, None)
    return found


def parameters(function):
    """{name: parameter}, of what `**others` are handed on to as well."""
    found = dict(inspect.signature(function).parameters)
    rest = [p for p in found.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for others in rest:
        del found[others.name]
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if any(
                isinstance(k.value, ast.Name)
                and (k.arg, k.value.id) == (None, others.name)
                for k in call.keywords
            ):
                inner = called(call.func, vars(inspect.getmodule(function)))
                found |= parameters(inner) if inner else {}
    return found


def feeds(source, namespace, base):
    """(function, parameter, field) of what calls get of a recipe.

    Args:
      source: of a module.
      namespace: what its names stand for.
      base: field → default, of `recipe.base()`.
    """
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        f = called(call.func, namespace)
        if not str(getattr(f, "__module__", "")).startswith("mlp_mixer"):
            continue
        given = [(k.arg, field_of(k.value)) for k in call.keywords]
        for i, value in enumerate(call.args):
            if field := field_of(value):
                given.append(([*inspect.signature(f).parameters][i], field))
        for name, field in given:
            if name is not None and field in base:
                yield f, name, field
            elif name is None:  # a whole section
                yield from (
                    (f, key.removeprefix(f"{field}."), key)
                    for key in base
                    if key.startswith(f"{field}.")
                )


def package():
    """(its source, what its names stand for) of every module."""
    for path in sorted((ROOT / "mlp_mixer").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        yield path.read_text(), vars(module)


def second_defaults(fed, base, rows=fields.RECIPE):
    """Lines for people: the parameters that have another default than their field."""
    found = []
    for function, name, field in fed:
        parameter = parameters(function).get(name)
        if parameter is None or parameter.default in (parameter.empty, base[field]):
            continue
        if parameter.default is None and not rows[field].none:
            continue  # it says nothing, then
        said = f"{function.__module__}.{function.__qualname__}"
        found.append(
            f"{said}: {name} is {parameter.default!r}, and config.{field} "
            f"{base[field]!r}"
        )
    return found


BASE = flat(recipe.base().to_dict())


@pytest.fixture(scope="module")
def fed():
    return [feed for module in package() for feed in feeds(module[0], module[1], BASE)]


def test_a_function_has_no_other_default_than_the_recipe(fed):
    assert second_defaults(fed, BASE) == []


def test_every_field_is_fed_to_a_function(fed):
    """Or the law above would say nothing of it."""
    assert BASE.keys() - {field for _, _, field in fed} == ALONE


@pytest.mark.parametrize("kind", evaluators.EVALUATORS)
def test_an_evaluator_has_no_other_default_than_its_section(kind):
    sections = {"accuracy": recipe.evaluation("val"), "fewshot": recipe.fewshot("", "")}
    section = sections[kind]
    evaluator = evaluators.EVALUATORS[kind]
    rows = fields.EVALUATORS[kind]
    fed = [(evaluator, name, name) for name in rows if "." not in name]
    assert second_defaults(fed, flat(section.to_dict()), rows) == []


# --- The law sees what it should ------------------------------------------------------


HOUSE = """
import math
from mlp_mixer import optim, recipe, sharding
def train(run):
    config = run.config
    optim.create(**config.optim, total_steps=recipe.total_steps(config))
    sharding.check_batch(1, config.batch_size, accumulate=run.config.accumulate)
    math.sqrt(config.seed)
"""


def test_calls_that_a_recipe_feeds_are_found():
    namespace: dict = {}
    exec(HOUSE, namespace)
    optimiser = {(optim.create, key, f"optim.{key}") for key in recipe.base().optim}
    assert {*feeds(HOUSE, namespace, BASE)} == {
        *optimiser,
        (sharding.check_batch, "batch_size", "batch_size"),
        (sharding.check_batch, "accumulate", "accumulate"),
    }


def outer(*, crop="inception", flip=False, **others):
    return inner(seed=3, **others)


def inner(shift=0, workers=1, **_):
    return shift, workers


def test_another_default_is_found_also_where_arguments_are_handed_on():
    fed = [(outer, key, f"input.{key}") for key in recipe.base().input]
    assert second_defaults(fed, BASE) == [
        "tests.test_defaults.outer: flip is False, and config.input.flip True",
        "tests.test_defaults.outer: workers is 1, and config.input.workers 0",
    ]
