"""Attention with linear biases."""

from __future__ import annotations

import math

from ir.component import Position


class Alibi(Position):
    """Attention with linear biases (Press, Smith and Lewis 2022): the score falls by slope * |distance|.

    With H heads, a power of two, head h = 1..H has slope 2^(-8 h / H). Otherwise the slopes are those of the power of
    two below H, then every other slope of the next power of two. No parameters.
    """

    paper = "Press, Smith, Lewis 2022, Train Short, Test Long: Attention with Linear Biases, arXiv 2108.12409"

    def slopes(self, num_heads: int) -> tuple[float, ...] | None:
        lower = 2 ** int(math.log2(num_heads))
        between = _geometric(2 * lower)[::2]
        return (*_geometric(lower), *between[: num_heads - lower])


def _geometric(num_heads: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1))
