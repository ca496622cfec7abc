"""Rotary position."""

from __future__ import annotations

from ir.builder import Builder, Tensor
from ir.component import Position


class Rope(Position):
    """Rotary position (Su et al. 2021): scores depend on the distance of query and key alone.

    The pair (x_i, x_{i+K/2}) of each query and key at token t turns by the angle t * 10000^(-2i/K). No parameters.
    """

    paper = "Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864"

    def check(self, head_dim: int) -> str | None:
        return f"rope needs an even head size, not {head_dim}" if head_dim % 2 else None

    def rotate(self, b: Builder, x: Tensor, position: Tensor | None = None) -> Tensor:
        return b.rope(x, offset=position)
