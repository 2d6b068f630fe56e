"""What a parameter tree says of its model: every size stands in a shape."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlp_mixer import models
from mlp_mixer.fingerprints import Params, leaves

BLOCK = {
    "LayerNorm_0/scale": ("c",),
    "LayerNorm_0/bias": ("c",),
    "token_mixing/Dense_0/kernel": ("s", "ds"),
    "token_mixing/Dense_0/bias": ("ds",),
    "token_mixing/Dense_1/kernel": ("ds", "s"),
    "token_mixing/Dense_1/bias": ("s",),
    "LayerNorm_1/scale": ("c",),
    "LayerNorm_1/bias": ("c",),
    "channel_mixing/Dense_0/kernel": ("c", "dc"),
    "channel_mixing/Dense_0/bias": ("dc",),
    "channel_mixing/Dense_1/kernel": ("dc", "c"),
    "channel_mixing/Dense_1/bias": ("c",),
}
ENDS = {
    "stem/kernel": ("ph", "pw", "rgb", "c"),
    "stem/bias": ("c",),
    "pre_head_layer_norm/scale": ("c",),
    "pre_head_layer_norm/bias": ("c",),
}
HEAD = {"head/kernel": ("c", "k"), "head/bias": ("k",)}

Shape = tuple[int, ...]


def layout(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{name: letters of its axes} of the official tree with as many blocks as `names`.

    Letters: patch height ph and width pw, rgb, tokens s, channels c, hidden units ds
    of token and dc of channel mixing, classes k. With a head if `names` have a part
    of one.
    """
    names = list(names)
    blocks = {
        f"MixerBlock_{i}/{name}": axes
        for i in range(_num_blocks(names))
        for name, axes in BLOCK.items()
    }
    head = HEAD if any(name in HEAD for name in names) else {}
    return ENDS | blocks | head


def _num_blocks(names: Iterable[str]) -> int:
    """The depth that leaves the fewest arrays missing and unexpected, at least 1.

    One array of a block 99 does not make 99 others missing: it is the stray one.
    """
    matches = (re.match("MixerBlock_(0|[1-9][0-9]{0,8})/(.+)", name) for name in names)
    arrays = Counter(int(match[1]) for match in matches if match and match[2] in BLOCK)
    depth, there, least = 1, 0, len(BLOCK) - 2 * arrays[0]
    for number in sorted(arrays):
        there += arrays[number]
        # Missing below this depth and unexpected above it, less what is constant.
        wrong = (number + 1) * len(BLOCK) - 2 * there
        if wrong <= least:
            depth, least = number + 1, wrong
    return depth


def sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """What each letter of `layout` stands for: the size that most arrays give it."""
    votes: dict[str, Counter[int]] = {}
    for name, axes in layout(shapes).items():
        shape = shapes.get(name, ())
        if len(shape) == len(axes):
            for letter, size in zip(axes, shape, strict=True):
                votes.setdefault(letter, Counter())[size] += 1
    found = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    return found | {"rgb": 3}


def problems(
    shapes: Mapping[str, Shape], called: Callable[[str], str] = str
) -> list[str]:
    """What is unexpected, of a shape that contradicts the others, or missing.

    In this order: one stray array stands before all that is missing on its account.

    Args:
      shapes: {name in our tree: shape}.
      called: the name of an array for people, by that in our tree.
    """
    expected, found = layout(shapes), sizes(shapes)
    unexpected = [name for name in shapes if name not in expected]
    lines = [f"unexpected: {called(name)} {shapes[name]}" for name in unexpected]
    for name, axes in expected.items():
        if name not in shapes:
            continue
        fitting = tuple(found.get(letter, "?") for letter in axes)
        said = f"shape: {called(name)} is {shapes[name]}"
        if 0 in shapes[name]:
            lines.append(f"{said}, which is empty")
        elif shapes[name] != fitting:
            sides = ", ".join(f"{a}={n}" for a, n in zip(axes, fitting, strict=True))
            lines.append(f"{said}, the others say ({sides})")
    return lines + [
        f"missing: {called(name)}" for name in expected if name not in shapes
    ]


def geometry(params: Params) -> dict[str, Any]:
    """The fields of `models.mixer.MlpMixer` that follow from the shapes of a tree.

    Raises:
      ValueError: a size stands in none of its arrays.
    """
    shapes = _shapes(params)
    found = sizes(shapes)
    if not {"ph", "pw", "c", "ds", "dc"} <= found.keys():
        raise ValueError(
            "These are not the parameters of an MLP-Mixer; expected a tree with stem, "
            f"MixerBlock_0, …, got {', '.join(params) or 'nothing'}. Try "
            "variables['params'] instead of variables."
        )
    return {
        "patch_size": (found["ph"], found["pw"]),
        "num_blocks": _num_blocks(shapes),
        "hidden_dim": found["c"],
        "tokens_mlp_dim": found["ds"],
        "channels_mlp_dim": found["dc"],
        "num_classes": found.get("k"),
    }


def tokens(params: Params) -> int:
    """How many patches the token mixing is for."""
    return sizes(_shapes(params))["s"]


def square_image(params: Params) -> tuple[int, int] | None:
    """(height, width) in pixels if the tokens can be a square grid, else None."""
    side = math.isqrt(tokens(params))
    if side * side != tokens(params):
        return None
    height, width = geometry(params)["patch_size"]
    return side * height, side * width


def variant(fields: Mapping[str, Any]) -> str | None:
    """The key of Table 1 with these sizes, or None.

    Token mixing may be K² times as wide: grown to another resolution.
    """
    same = ("patch_size", "num_blocks", "hidden_dim", "channels_mlp_dim")
    for name, table in models.mixer.SIZES.items():
        if all(fields[field] == table[field] for field in same):
            factor, rest = divmod(fields["tokens_mlp_dim"], table["tokens_mlp_dim"])
            if not rest and math.isqrt(factor) ** 2 == factor:
                return name
    return None


def _shapes(params: Params) -> dict[str, Shape]:
    return {name: tuple(x.shape) for name, x in leaves(params)}
