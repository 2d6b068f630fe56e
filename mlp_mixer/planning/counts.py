"""What a function computes and keeps, counted in its jaxpr: from shapes alone.

A loop of fixed length counts as often as it runs; `jax.experimental.roofline`, which
counts the same in what is unrolled, counts its body once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mlp_mixer.models.layers import FILTER

# What a compiler computes where the result is read, without an array of its own.
_FUSED = {
    *("broadcast_in_dim", "reshape", "convert_element_type", "transpose", "squeeze"),
    *("expand_dims", "iota", "copy", "add", "sub", "mul", "div", "neg", "max", "min"),
    *("tanh", "exp", "log", "log1p", "logistic", "rsqrt", "sqrt", "integer_pow", "pow"),
    *("select_n", "gt", "lt", "ge", "le", "eq", "ne", "and", "or", "not", "erf", "abs"),
    *("square", "stop_gradient", "optimization_barrier", "slice", "rev", "sign"),
}


class Turn(NamedTuple):
    """An equation, how often it runs, and the modules that it is of, as "A/b_0/c"."""

    equation: Any
    turns: int
    scope: str


def equations(jaxpr: Any, turns: int = 1, scope: str = "") -> Iterator[Turn]:
    """Yields every equation of a jaxpr, those inside of others too, as they run.

    Args:
      jaxpr: jaxpr of `jax.make_jaxpr`.
      turns: how often the jaxpr itself runs.
      scope: the modules that it is of.
    """
    for equation in _open(jaxpr).eqns:
        own = f"{scope}/{equation.source_info.name_stack}".strip("/")
        yield Turn(equation, turns, own)
        for inner, times in _inside(equation):
            yield from equations(inner, turns * times, own)


def products(jaxpr: Any) -> Iterator[Turn]:
    """Yields every product and convolution of a jaxpr."""
    for turn in equations(jaxpr):
        if turn.equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield turn


def flops(jaxpr: Any, part: str = "") -> int:
    """Returns the operations of products and convolutions, 2 per multiply-add.

    Also of those convolutions that `layers.filter_channels` computes as sums of shifted
    maps. What is computed element by element, as norms are, is not counted.

    Args:
      jaxpr: jaxpr of `jax.make_jaxpr`.
      part: name of a module, such as a block, of which alone they are counted.
    """
    return sum(
        turn.turns * _flops(turn)
        for turn in equations(jaxpr)
        if not part or f"/{part}/" in f"/{turn.scope}/"
    )


def product_bytes(jaxpr: Any) -> int:
    """Returns the bytes that products read and write: the least that a step moves."""
    return sum(
        turns * sum(_bytes(v.aval) for v in (*equation.invars, *equation.outvars))
        for equation, turns, _ in products(jaxpr)
    )


def _flops(turn: Turn) -> int:
    kind, equation = turn.equation.primitive.name, turn.equation
    if kind not in ("dot_general", "conv_general_dilated", "mul"):
        return 0
    result = math.prod(equation.outvars[0].aval.shape)
    if kind == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * result * math.prod(left[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        right = equation.invars[1].aval.shape
        out_axis, *_ = equation.params["dimension_numbers"].rhs_spec
        return 2 * result * math.prod(right) // right[out_axis]
    return 2 * result if FILTER in turn.scope else 0


def peak(jaxpr: Any, bytes_of: Callable[[Any], float]) -> float:
    """Returns the most bytes that live at once, arguments included.

    An estimate: it takes the order of the program, and elementwise work that is read
    once for free. An argument's memory is used again after its last use.

    Args:
      jaxpr: jaxpr of `jax.make_jaxpr`.
      bytes_of: the bytes that an array of this shape and dtype takes.
    """
    opened = _open(jaxpr)
    arguments = [*opened.invars, *opened.constvars]
    return _peak(opened, bytes_of, {v: bytes_of(v.aval) for v in arguments})


def _peak(jaxpr: Any, bytes_of: Callable, live: dict[Any, float]) -> float:
    """The most bytes at once, beginning with what `live` holds."""
    uses: dict[Any, int] = {}
    for equation in jaxpr.eqns:
        for v in _variables(equation.invars):
            uses[v] = uses.get(v, 0) + 1
    results = {*_variables(jaxpr.outvars)}
    now = most = sum(live.values(), 0.0)
    for equation in jaxpr.eqns:
        single = all(uses.get(v) == 1 and v not in results for v in equation.outvars)
        fused = single and equation.primitive.name in _FUSED
        made = {v: 0.0 if fused else bytes_of(v.aval) for v in equation.outvars}
        inside = [_peak(_open(inner), bytes_of, {}) for inner, _ in _inside(equation)]
        # A loop's stacked results are there from the start, beside a turn's own.
        total = sum(made.values(), 0.0)
        loop = equation.primitive.name in ("scan", "while")
        now += total
        most = max(most, now + max([*inside, 0.0]) - (0.0 if loop else total))
        most = max(most, now)
        live.update(made)
        for v in {*_variables(equation.invars)}:
            uses[v] -= equation.invars.count(v)
            if not uses[v] and v not in results:
                now -= live.pop(v, 0.0)
        for v in equation.outvars:
            if not uses.get(v) and v not in results:
                now -= live.pop(v, 0.0)
    return most


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _variables(found: Any) -> list[Any]:
    return [v for v in found if not hasattr(v, "val")]  # the others are literals


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inside(equation: Any) -> Iterator[tuple[Any, int]]:
    """The jaxprs of an equation, and how often each runs."""
    times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    # What a custom derivative replaces is computed once, by its function.
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr", "cond_jaxpr"):
        if name in equation.params:
            yield equation.params[name], times
    for branch in equation.params.get("branches", ()):
        yield branch, 1
