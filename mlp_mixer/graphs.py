"""ONNX graphs of the models that have one: the nodes, by the parameters' own names.

The state is (n, s, c) throughout: no activation is transposed after the stem but where
a model's own mathematics asks for it. A linear map across tokens multiplies its
transposed kernel from the left; runtimes transpose the kernels once, when they load.

`GRAPHS` has a function for each architecture. It is given a `Graph`, which has the
layers that models share, and makes the model's nodes from the image to "pre_logits" and
"logits". This module needs no onnx package.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlp_mixer import models
from mlp_mixer.models import moves

GELUS = {"tanh": "tanh", "exact": "none"}  # ours: what ONNX calls them


class Graph:
    """Makes the nodes of one model; `nodes` collects them, `constants` its arrays.

    A method of a layer takes the name of its input and its path in the parameters, and
    returns the name of its output.

    Attributes:
      fields: what the model computes.
      grid: (rows, columns) of patches.
      num_classes: number of classes; None without a head.
      constants: arrays besides the parameters, by name.
      outputs: the length of each output's vector, by name.
    """

    def __init__(
        self,
        node: Callable[..., str],
        fields: Mapping[str, Any],
        image_size: tuple[int, int],
        num_classes: int | None,
    ) -> None:
        """Begins a graph without nodes.

        Args:
          node: makes a node, of its output's name (or the names of several), its
            operator, the names of its inputs and its attributes; returns that name.
          fields: what the model computes.
          image_size: (height, width) in pixels.
          num_classes: number of classes; None without a head.
        """
        self.node, self.fields, self.num_classes = node, fields, num_classes
        (h, w), (ph, pw) = image_size, fields["patch_size"]
        self.grid = h // ph, w // pw
        self.constants = {"tokens/axis": np.array([1])}
        self.outputs: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.grid[0] * self.grid[1]

    def constant(self, name: str, value: Any) -> str:
        """Adds an array, once; returns its name."""
        self.constants.setdefault(name, np.asarray(value))
        return name

    def stem(self) -> str:
        """The tokens of the image."""
        (h, w), (ph, pw) = self.grid, self.fields["patch_size"]
        rows = self.constant("patches/shape", [0, h, ph, w, pw * 3])
        patches = self.constant("tokens/shape", [0, h * w, ph * pw * 3])
        matrix = self.constant("stem/shape", [-1, self.fields["hidden_dim"]])
        x = self.node("patches/rows", "Reshape", "image", rows)
        x = self.node("patches/grid", "Transpose", x, perm=[0, 1, 3, 2, 4])
        x = self.node("patches/output", "Reshape", x, patches)
        self.node("stem/matrix", "Reshape", "stem/kernel", matrix)
        return self.over_channels(x, "stem", "matrix")

    def over_channels(self, x: str, at: str, kernel: str = "kernel") -> str:
        """A linear map of each token."""
        y = self.node(f"{at}/product", "MatMul", x, f"{at}/{kernel}")
        return self.node(f"{at}/output", "Add", y, f"{at}/bias")

    def over_tokens(self, x: str, at: str) -> str:
        """A linear map across tokens, the same in each channel."""
        kernel, bias = f"{at}/kernel_transposed", f"{at}/bias_column"
        self.node(kernel, "Transpose", f"{at}/kernel", perm=[1, 0])
        self.node(bias, "Unsqueeze", f"{at}/bias", "tokens/axis")
        y = self.node(f"{at}/product", "MatMul", kernel, x)
        return self.node(f"{at}/output", "Add", y, bias)

    def layer_norm(self, x: str, at: str, epsilon: float = 1e-6) -> str:
        """LayerNorm over channels."""
        inputs = (x, f"{at}/scale", f"{at}/bias")
        return self.node(f"{at}/output", "LayerNormalization", *inputs, epsilon=epsilon)

    def affine(self, x: str, at: str) -> str:
        """ResMLP's Aff: a scale and a shift for each channel."""
        y = self.node(f"{at}/scaled", "Mul", x, f"{at}/alpha")
        return self.node(f"{at}/output", "Add", y, f"{at}/beta")

    def gelu(self, x: str, at: str) -> str:
        """GELU, in the model's form."""
        return self.node(
            f"{at}/gelu", "Gelu", x, approximate=GELUS[self.fields["gelu"]]
        )

    def mlp(self, x: str, at: str, dense: Callable[[str, str], str]) -> str:
        """A `layers.MlpBlock`; `dense` is `over_channels` or `over_tokens`."""
        x = self.gelu(dense(x, f"{at}/Dense_0"), at)
        return dense(x, f"{at}/Dense_1")

    def add(self, to: str, x: str, y: str) -> str:
        """The sum of two outputs, called `to`."""
        return self.node(to, "Add", x, y)

    def readout(self, x: str) -> None:
        """The mean over tokens and the head: the graph's outputs."""
        x = self.node("pre_logits", "ReduceMean", x, "tokens/axis", keepdims=0)
        if self.num_classes is not None:
            self.node("logits", "Gemm", x, "head/kernel", "head/bias")
            self.outputs["logits"] = self.num_classes
        self.outputs["pre_logits"] = self.fields["hidden_dim"]


# --- Blocks, given the map across tokens ----------------------------------------------

Mixing = Callable[[str, str], str]  # (input, path) -> output


def _mixer_blocks(graph: Graph, token_mixing: Mixing) -> None:
    x = graph.stem()
    for i in range(graph.fields["num_blocks"]):
        block = f"MixerBlock_{i}"
        y = graph.layer_norm(x, f"{block}/LayerNorm_0")
        y = token_mixing(y, f"{block}/token_mixing")
        x = graph.add(f"{block}/tokens_mixed", x, y)
        y = graph.layer_norm(x, f"{block}/LayerNorm_1")
        y = graph.mlp(y, f"{block}/channel_mixing", graph.over_channels)
        x = graph.add(f"{block}/output", x, y)
    graph.readout(graph.layer_norm(x, "pre_head_layer_norm"))


def _resmlp_blocks(graph: Graph, token_mixing: Mixing) -> None:
    x = graph.stem()
    for i in range(graph.fields["num_blocks"]):
        block = f"ResMlpBlock_{i}"
        y = graph.affine(x, f"{block}/Affine_0")
        y = token_mixing(y, f"{block}/token_mixing")
        y = graph.node(f"{block}/tokens_scaled", "Mul", y, f"{block}/scale_0")
        x = graph.add(f"{block}/tokens_mixed", x, y)
        y = graph.affine(x, f"{block}/Affine_1")
        y = graph.mlp(y, f"{block}/channel_mixing", graph.over_channels)
        y = graph.node(f"{block}/channels_scaled", "Mul", y, f"{block}/scale_1")
        x = graph.add(f"{block}/output", x, y)
    graph.readout(graph.affine(x, "pre_head_affine"))


# --- The models -----------------------------------------------------------------------


def _mixer(graph: Graph) -> None:
    _mixer_blocks(graph, lambda x, at: graph.mlp(x, at, graph.over_tokens))


def _resmlp(graph: Graph) -> None:
    _resmlp_blocks(graph, graph.over_tokens)


def _gmlp(graph: Graph) -> None:
    x = graph.stem()
    for i in range(graph.fields["num_blocks"]):
        block = f"GMlpBlock_{i}"
        y = graph.layer_norm(x, f"{block}/LayerNorm_0")
        y = graph.gelu(graph.over_channels(y, f"{block}/Dense_0"), block)
        half = graph.fields["channels_mlp_dim"] // 2
        sizes = graph.constant("gating/halves", [half, half])
        z1, z2 = f"{block}/gating/first", f"{block}/gating/second"
        graph.node((z1, z2), "Split", y, sizes, axis=2)
        z2 = graph.layer_norm(z2, f"{block}/gating/LayerNorm_0", epsilon=1e-5)
        z2 = graph.over_tokens(z2, f"{block}/gating/Dense_0")
        y = graph.node(f"{block}/gating/output", "Mul", z1, z2)
        y = graph.over_channels(y, f"{block}/Dense_1")
        x = graph.add(f"{block}/output", x, y)
    graph.readout(graph.layer_norm(x, "pre_head_layer_norm"))


def _s2mlp(graph: Graph) -> None:
    norms = {"layer": graph.layer_norm, "affine": graph.affine}
    norm = norms[graph.fields["norm"]]
    x = norm(graph.stem(), "stem_norm")
    for i in range(graph.fields["num_blocks"]):
        block = f"S2MlpBlock_{i}"
        at = f"{block}/token_mixing"
        y = graph.gelu(graph.over_channels(x, f"{at}/Dense_0"), at)
        y = graph.over_channels(_shift4(graph, y, at), f"{at}/Dense_1")
        y = norm(y, f"{block}/token_norm")
        x = graph.add(f"{block}/tokens_mixed", x, y)
        y = graph.mlp(x, f"{block}/channel_mixing", graph.over_channels)
        y = norm(y, f"{block}/channel_norm")
        x = graph.add(f"{block}/output", x, y)
    graph.readout(x)


def _shift4(graph: Graph, x: str, at: str) -> str:
    """`moves.shift4`: each quarter of the channels gathers the tokens beside it."""
    # What the shift makes of the tokens' numbers says which token each quarter sees.
    numbers = jnp.arange(graph.tokens, dtype=jnp.float32).reshape(*graph.grid, 1)
    seen = np.asarray(moves.shift4(jnp.repeat(numbers, 4, axis=-1)), np.int64)
    c = graph.fields["hidden_dim"]
    ends = [c * i // 4 for i in range(5)]
    sizes = graph.constant("shift/quarters", np.diff(ends))
    quarters = [f"{at}/quarter_{i}" for i in range(4)]
    graph.node(quarters, "Split", x, sizes, axis=2)
    moved = [
        graph.node(
            f"{quarter}/moved",
            "Gather",
            quarter,
            graph.constant(f"shift/tokens_{i}", seen[..., i].ravel()),
            axis=1,
        )
        for i, quarter in enumerate(quarters)
    ]
    return graph.node(f"{at}/shifted", "Concat", *moved, axis=2)


def _ccs(graph: Graph) -> None:
    blocks = {"mixer": _mixer_blocks, "resmlp": _resmlp_blocks}
    blocks[graph.fields["base"]](graph, lambda x, at: _circulant(graph, x, at))


def _circulant(graph: Graph, x: str, at: str) -> str:
    """`moves.circulant`, as a product with the matrix of each group of channels."""
    s, c, groups = graph.tokens, graph.fields["hidden_dim"], graph.fields["groups"]
    i, k = np.indices((s, s))
    order = graph.constant("circulant/order", (k - i) % s)
    grouped = graph.constant("circulant/grouped", [0, s, c // groups, groups])
    merged = graph.constant("circulant/merged", [0, s, c])
    matrices = graph.node(f"{at}/matrices", "Gather", f"{at}/kernel", order, axis=1)
    x = graph.node(f"{at}/grouped", "Reshape", x, grouped)
    x = graph.node(f"{at}/groups_first", "Transpose", x, perm=[0, 3, 1, 2])
    x = graph.node(f"{at}/product", "MatMul", matrices, x)
    x = graph.node(f"{at}/groups_last", "Transpose", x, perm=[0, 2, 3, 1])
    return graph.node(f"{at}/output", "Reshape", x, merged)


GRAPHS: dict[ModuleType, Callable[[Graph], None]] = {
    models.mixer: _mixer,
    models.resmlp: _resmlp,
    models.gmlp: _gmlp,
    models.s2mlp: _s2mlp,
    models.ccs: _ccs,
}
