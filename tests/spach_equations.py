"""The layers of SPACH in NumPy, image by image, from the paper's equations."""

import math

import numpy as np


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def mlp(x, p):
    h = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def attention(x, p, num_heads):
    """Of one image (s, c), head by head."""
    q, k, v = np.split(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 3, axis=-1)
    heads, d = [], x.shape[-1] // num_heads
    for i in range(num_heads):
        a, b, c = (z[:, i * d : (i + 1) * d] for z in (q, k, v))
        weights = np.exp(a @ b.T / math.sqrt(d))
        heads.append(weights / weights.sum(1, keepdims=True) @ c)
    return np.concatenate(heads, 1) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def depthwise(x, p, grid):
    """Of one image (s, c): each weight of the filter at each place of the map."""
    (h, w), image = grid, x.reshape(*grid, -1)
    y = np.zeros_like(image) + p["bias"]
    for i, j, a, b in np.ndindex(h, w, 3, 3):
        if 0 <= i + a - 1 < h and 0 <= j + b - 1 < w:
            y[i, j] += p["kernel"][a, b, 0] * image[i + a - 1, j + b - 1]
    return y.reshape(x.shape)


def layer(x, p, mixing, grid, num_heads=None, keep=(1.0, 1.0)):
    """The next state of one image (s, c); `keep` are the factors of both branches."""
    u = x + depthwise(x, p["depthwise"], grid)
    if mixing != "conv":
        z = layer_norm(x, p["LayerNorm_0"])
        z = (
            mlp(z.T, p["token_mixing"]).T
            if mixing == "mlp"
            else attention(z, p["attention"], num_heads)
        )
        u = u + keep[0] * p["scale"] * z
    return u + keep[1] * mlp(layer_norm(u, p["LayerNorm_1"]), p["channel_mixing"])
