"""Learned biases of attention scores by how far apart two pixels lie.

Shape letters: H heads, T tokens of an image in row order.
"""

from __future__ import annotations

import numpy as np

from ir.builder import Builder, Tensor
from ir.op import Array
from ir.types import Axis


def offset_bias(b: Builder, name: str, heads: int, height: int, width: int) -> Tensor:
    """Bias `[1, H, T, T]` out of a new table `name` `[height * width, H]`: a row for each |rows|, |columns| apart.

    Graham et al. 2021, LeViT, arXiv 2104.01136, section 4.2.
    """
    table = b.parameter(name, ((Axis("offsets", height * width),), (Axis("heads", heads),)), "constant(0)")
    rows, columns = np.divmod(np.arange(height * width), width)
    apart = np.abs(rows[:, None] - rows) * width + np.abs(columns[:, None] - columns)
    bias = b.take(table, b.constant(apart.astype(np.int32)))
    return b.reshape(b.transpose(bias, 2, 0, 1), 1, heads, height * width, height * width)


def offset_bias_reference(table: Array, head: int, query: tuple[int, int], width: int, tokens: int) -> Array:
    """Biases `[T]` of one head between the pixel `query` and all others."""
    bias = np.zeros(tokens)
    for token in range(tokens):
        row, column = divmod(token, width)
        bias[token] = table[abs(query[0] - row) * width + abs(query[1] - column), head]
    return bias
