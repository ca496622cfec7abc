"""Plain numpy formulas that the components' references share; nothing here knows the graph.

Shape letters: B batch, T tokens, H heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from ir.op import Array


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    """X times its sigmoid."""
    return x / (1.0 + np.exp(-x))


def softplus(x: Array) -> Array:
    """log(1 + e^x)."""
    return np.log1p(np.exp(x))


def gelu(x: Array) -> Array:
    """X times the probability that a standard normal number is below x."""
    return x * np.vectorize(_normal_below, otypes=[np.float64])(x)


def _normal_below(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2.0))


ACTIVATIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "gelu": gelu,
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "relu2": lambda x: np.where(x > 0, x * x, 0.0),
    "silu": silu,
    "tanh": np.tanh,
}


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def layer_norm(x: Array, epsilon: float = 1e-5) -> Array:
    """Zero mean and unit variance over the last axis."""
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)


def rms_norm(x: Array, epsilon: float = 1e-5) -> Array:
    """Unit mean square over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def rotate(x_BTHK: Array, base: float = 10000.0) -> Array:
    """Each pair (x_i, x_{i+K/2}) as a complex number, turned by t * base^(-2i/K) at token t."""
    steps, head_dim = x_BTHK.shape[1], x_BTHK.shape[3]
    half = head_dim // 2
    result = np.empty_like(x_BTHK)
    for t in range(steps):
        for i in range(half):
            turn = np.exp(1j * t * base ** (-2.0 * i / head_dim))
            turned = (x_BTHK[:, t, :, i] + 1j * x_BTHK[:, t, :, i + half]) * turn
            result[:, t, :, i], result[:, t, :, i + half] = turned.real, turned.imag
    return result


def split_heads(x: Array, num_heads: int) -> Array:
    """`[B, T, H * K]` to `[B, T, H, K]`."""
    return np.reshape(x, (*x.shape[:2], num_heads, -1))


def merge_heads(x: Array) -> Array:
    """`[B, T, H, K]` to `[B, T, H * K]`."""
    return np.reshape(x, (*x.shape[:2], -1))


def convolve(
    x: Array, kernel: Array, stride: int = 1, padding: int | None = None, groups: int = 1, dilation: int = 1
) -> Array:
    """Two-dimensional cross-correlation of x `[B, H, W, C]` with a kernel `[K, L, C / groups, O]`, zeros around x.

    The padding is the same on all sides, by default what keeps the size at stride 1.
    """
    height, width, depth, outputs = kernel.shape
    around = (dilation * (height - 1) // 2, dilation * (width - 1) // 2) if padding is None else (padding, padding)
    padded = np.pad(x, ((0, 0), (around[0], around[0]), (around[1], around[1]), (0, 0)))
    rows = (padded.shape[1] - dilation * (height - 1) - 1) // stride + 1
    columns = (padded.shape[2] - dilation * (width - 1) - 1) // stride + 1
    y, fan = np.zeros((x.shape[0], rows, columns, outputs)), outputs // groups
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            seen = padded[:, top : top + dilation * height : dilation, left : left + dilation * width : dilation]
            seen = seen[:, :height, :width]
            for g in range(groups):
                own = seen[..., g * depth : (g + 1) * depth]
                y[:, i, j, g * fan : (g + 1) * fan] = np.einsum(
                    "bklc,klco->bo", own, kernel[..., g * fan : (g + 1) * fan]
                )
    return y


def batch_norm(params: Mapping[str, Array], name: str, x: Array, epsilon: float = 1e-5) -> Array:
    """Batch norm by the running statistics of the parameters that `Builder.batch_norm` makes under a name."""
    centred = (x - params[f"{name}_mean"]) / np.sqrt(params[f"{name}_variance"] + epsilon)
    return centred * params[f"{name}_scale"] + params[f"{name}_bias"]


def fold_batch_norm(params: Mapping[str, Array], name: str, epsilon: float = 1e-5) -> tuple[Array, Array]:
    """Weight and bias of one product that equals the product with weight `name` and the batch norm `name_norm`."""
    factor = params[f"{name}_norm_scale"] / np.sqrt(params[f"{name}_norm_variance"] + epsilon)
    before = params.get(f"{name}_bias", 0.0) - params[f"{name}_norm_mean"]
    return params[name] * factor, before * factor + params[f"{name}_norm_bias"]
