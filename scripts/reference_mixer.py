"""MLP-Mixer in NumPy and float64, with gradients by hand: the yardstick of gpu_check.

Each function returns its result and `back`, which maps the derivative by the result to
(the derivative by the argument, the derivatives by the parameters). Arrays are (n, s,
c): images, tokens, channels.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Tree = Mapping[str, Any]
Back = Callable[[Array], tuple[Array, dict[str, Any]]]

EPSILON = 1e-6  # of LayerNorm
_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715  # of the tanh form of GELU


def layer_norm(x: Array, params: Tree) -> tuple[Array, Back]:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    normal = centred / deviation

    def back(dy: Array) -> tuple[Array, dict[str, Any]]:
        d = dy * params["scale"]
        along = (d * normal).mean(-1, keepdims=True)
        dx = (d - d.mean(-1, keepdims=True) - normal * along) / deviation
        return dx, {"scale": _rows(dy * normal).sum(0), "bias": _rows(dy).sum(0)}

    return normal * params["scale"] + params["bias"], back


def gelu(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """GELU by tanh; `back` returns the derivative by `x` alone."""
    t = np.tanh(_SLOPE * (x + _CUBE * x**3))
    slope = (1 + t) / 2 + x / 2 * (1 - t**2) * _SLOPE * (1 + 3 * _CUBE * x**2)
    return x * (1 + t) / 2, lambda dy: dy * slope


def exact_gelu(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """GELU by the error function; `back` returns the derivative by `x` alone."""
    share = (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    slope = share + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return x * share, lambda dy: dy * slope


def dense(x: Array, params: Tree) -> tuple[Array, Back]:
    """A linear map along the last axis."""

    def back(dy: Array) -> tuple[Array, dict[str, Any]]:
        kernel = _rows(x).T @ _rows(dy)
        return dy @ params["kernel"].T, {"kernel": kernel, "bias": _rows(dy).sum(0)}

    return x @ params["kernel"] + params["bias"], back


def mlp(x: Array, params: Tree) -> tuple[Array, Back]:
    """Dense, GELU, Dense along the last axis."""
    before, back_first = dense(x, params["Dense_0"])
    hidden, back_gelu = gelu(before)
    y, back_second = dense(hidden, params["Dense_1"])

    def back(dy: Array) -> tuple[Array, dict[str, Any]]:
        d, second = back_second(dy)
        dx, first = back_first(back_gelu(d))
        return dx, {"Dense_0": first, "Dense_1": second}

    return y, back


def block(x: Array, params: Tree) -> tuple[Array, Back]:
    """Token mixing, then channel mixing."""
    normal, back_norm_0 = layer_norm(x, params["LayerNorm_0"])
    mixed, back_tokens = mlp(normal.swapaxes(1, 2), params["token_mixing"])
    x = x + mixed.swapaxes(1, 2)
    normal, back_norm_1 = layer_norm(x, params["LayerNorm_1"])
    mixed, back_channels = mlp(normal, params["channel_mixing"])

    def back(dy: Array) -> tuple[Array, dict[str, Any]]:
        grads: dict[str, Any] = {}
        d, grads["channel_mixing"] = back_channels(dy)
        d, grads["LayerNorm_1"] = back_norm_1(d)
        dy = dy + d
        d, grads["token_mixing"] = back_tokens(dy.swapaxes(1, 2))
        d, grads["LayerNorm_0"] = back_norm_0(d.swapaxes(1, 2))
        return dy + d, grads

    return x + mixed, back


def loss_and_gradients(
    params: Tree, image: Array, label: Array, patch_size: tuple[int, int]
) -> tuple[Array, float, dict[str, Any]]:
    """Returns the logits, the mean softmax cross-entropy and its gradients.

    Args:
      params: the parameters of `models.mixer.MlpMixer`, in float64.
      image: (n, h, w, 3), 0 … 255.
      label: (n,) class numbers.
      patch_size: (height, width) in pixels.
    """
    (n, h, w, _), (ph, pw) = image.shape, patch_size
    patches = (image - 127.5) / 127.5
    patches = patches.reshape(n, h // ph, ph, w // pw, pw, 3).swapaxes(2, 3)
    patches = patches.reshape(n, -1, ph * pw * 3)
    kernel = params["stem"]["kernel"]
    stem = {**params["stem"], "kernel": kernel.reshape(-1, kernel.shape[-1])}
    x, back_stem = dense(patches, stem)
    names = [f"MixerBlock_{i}" for i in range(sum("Block" in name for name in params))]
    backs = []
    for name in names:
        x, back = block(x, params[name])
        backs.append(back)
    x, back_norm = layer_norm(x, params["pre_head_layer_norm"])
    tokens = x.shape[1]
    logits, back_head = dense(x.mean(1), params["head"])

    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares = powers / powers.sum(-1, keepdims=True)
    true = np.eye(logits.shape[-1])[label]
    loss = float(-np.log((shares * true).sum(-1)).mean())

    grads: dict[str, Any] = {}
    d, grads["head"] = back_head((shares - true) / n)
    d = np.repeat(d[:, None] / tokens, tokens, axis=1)
    d, grads["pre_head_layer_norm"] = back_norm(d)
    for name, back in zip(reversed(names), reversed(backs), strict=True):
        d, grads[name] = back(d)
    _, grads["stem"] = back_stem(d)
    grads["stem"]["kernel"] = grads["stem"]["kernel"].reshape(kernel.shape)
    return logits, loss, grads


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
