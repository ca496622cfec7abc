"""Fixed positions."""

from __future__ import annotations

from ir.builder import Builder, Tensor
from ir.component import Position
from ir.types import Axis


class Sinusoidal(Position):
    """A fixed vector of sines and cosines for each position, added to the embedding (Vaswani et al. 2017).

    x_t + table[t], table[t, 2i] = sin(t / 10000^(2i / D)), table[t, 2i + 1] = cos of the same; nothing is trained. The
    table has as many rows as the task has tokens.
    """

    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, section 3.5"
    bounded = True

    def embed(self, b: Builder, x: Tensor, max_len: int, position: Tensor | None = None) -> Tensor:
        tokens, d_model = x.shape[1:]
        axes = ((Axis("position", max_len),), (Axis("d_model", d_model),))
        table = b.parameter("table", axes, "sinusoid", trained=False)
        if position is not None:
            return x + b.reshape(b.take(table, position), 1, 1, d_model)
        return x + (table if tokens == max_len else b.slice(table, 0, 0, tokens))
