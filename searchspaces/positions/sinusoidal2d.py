"""Fixed positions on the plane."""

from __future__ import annotations

from math import isqrt

from ir.builder import Builder, Tensor
from ir.component import Position
from ir.types import Axis


class Sinusoidal2d(Position):
    """Sines and cosines of the column and of the row of each token, added to the embedding (Peebles and Xie 2023, DiT).

    L tokens in row order fill a square of side S = ceil(sqrt(L)): x_t + (p(t mod S), p(floor(t / S))), where p of an
    integer n is a vector of D/2 channels, p_2i = sin(n / 10000^(4i / D)), p_2i+1 = cos of the same. Of an odd D the
    row gets the channel more. Nothing is trained.
    """

    paper = (
        "Peebles, Xie 2023, Scalable Diffusion Models with Transformers, arXiv 2212.09748; "
        "He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377"
    )
    bounded = True

    def embed(self, b: Builder, x: Tensor, max_len: int, position: Tensor | None = None) -> Tensor:
        tokens, d_model = x.shape[1:]
        side = isqrt(max_len - 1) + 1
        columns, rows = d_model // 2, d_model - d_model // 2
        parts = [self._along(b, "rows", side, rows, 1)]
        if columns:
            parts.insert(0, self._along(b, "columns", side, columns, 0))
        table = b.reshape(b.concat(2, *parts), side * side, d_model)
        if position is not None:
            return x + b.reshape(b.take(table, position), 1, 1, d_model)
        return x + (table if tokens == side * side else b.slice(table, 0, 0, tokens))

    def _along(self, b: Builder, name: str, side: int, channels: int, axis: int) -> Tensor:
        """The vectors `[S, S, channels]` of the places along one axis of the plane."""
        table = b.parameter(name, ((Axis("position", side),), (Axis("d_model", channels),)), "sinusoid", trained=False)
        line = [side, 1, channels] if axis else [1, side, channels]
        return b.broadcast(b.reshape(table, *line), side, side, channels)
