"""Learned absolute position."""

from __future__ import annotations

from ir.builder import Builder, Tensor
from ir.component import Position
from ir.types import Axis


class Learned(Position):
    """A learned vector for each position, added to the embedding (Gehring et al. 2017).

    x_t + table[t]; L * D parameters for sequences of up to L tokens.
    """

    paper = "Gehring et al. 2017, Convolutional Sequence to Sequence Learning, arXiv 1705.03122"
    bounded = True

    def embed(self, b: Builder, x: Tensor, max_len: int, position: Tensor | None = None) -> Tensor:
        tokens, d_model = x.shape[1:]
        table = b.parameter("table", ((Axis("position", max_len),), (Axis("d_model", d_model),)), "normal(0.02)")
        if position is not None:
            return x + b.reshape(b.take(table, position), 1, 1, d_model)
        return x + (table if tokens == max_len else b.slice(table, 0, 0, tokens))
