"""What a parameter tree says of its model: every size stands in a shape."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mlp_mixer import models
from mlp_mixer.fingerprints import leaves

Params = dict[str, Any]

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
    head = HEAD if any(name.startswith("head/") for name in names) else {}
    return ENDS | blocks | head


def _num_blocks(names: Iterable[str]) -> int:
    """How many blocks are there, whatever their numbers say."""
    matches = (re.match(r"MixerBlock_(\d+)/(.*)", name) for name in names)
    parts = Counter(match[1] for match in matches if match and match[2] in BLOCK)
    # More than half of a block: what is less is a stray array, not a block.
    return max(sum(2 * count > len(BLOCK) for count in parts.values()), 1)


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


def problems(shapes: Mapping[str, Shape]) -> list[str]:
    """What is missing, unexpected or of a shape that contradicts the others."""
    expected, found = layout(shapes), sizes(shapes)
    lines = [f"missing: {name}" for name in expected if name not in shapes]
    lines += [
        f"unexpected: {name} {shapes[name]}" for name in shapes if name not in expected
    ]
    for name, axes in expected.items():
        if name not in shapes:
            continue
        fitting = tuple(found.get(letter, 0) for letter in axes)
        if not all(shapes[name]):
            lines.append(f"shape: {name} is {shapes[name]}, which is empty")
        elif shapes[name] != fitting:
            said = ", ".join(f"{a}={n}" for a, n in zip(axes, fitting, strict=True))
            lines.append(f"shape: {name} is {shapes[name]}, the others say ({said})")
    return lines


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
    for name, (_, table) in models.MODELS.items():
        if all(fields[field] == table[field] for field in same):
            factor, rest = divmod(fields["tokens_mlp_dim"], table["tokens_mlp_dim"])
            if not rest and math.isqrt(factor) ** 2 == factor:
                return name
    return None


def _shapes(params: Params) -> dict[str, Shape]:
    return {name: tuple(x.shape) for name, x in leaves(params)}
