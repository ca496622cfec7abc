"""Tokens by what the class token attends."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Reducer, option
from ir.op import Array


class Evit(Reducer):
    """Keep the tokens that the class token attends most, and fuse the others into one (Liang et al. 2022, EViT).

    The first token is the class token; the weights a_i that it gives the N others, averaged over heads, rank them.
    y = (x_0, the ceil(keep * N) tokens of largest a_i, sum of a_i x_i over the others). Nothing changes at keep 1.
    No parameters.
    """

    paper = "Liang et al. 2022, Not All Patches are What You Need (EViT), arXiv 2202.07800"
    needs_attention = True
    cases = (
        Case({"keep": 0.5}),
        Case({"keep": 0.7}, batch=1, time=11, d_model=5),
        Case({"keep": 0.4, "fuse": False}, time=9),
        Case({"keep": 1.0}, time=5),
    )

    keep: float = option(0.7, minimum=0.01, maximum=1.0, doc="Share of the tokens that stay as they are.")
    fuse: bool = option(True, doc="Add one token for the others.")

    def _kept(self, tokens: int) -> int:
        return math.ceil(self.keep * (tokens - 1))

    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        batch, tokens, d_model = x.shape
        kept = self._kept(tokens)
        if kept == tokens - 1:
            return x
        first, others = b.split(x, 1, 1, tokens - 1)
        scores = b.slice(b.slice(b.mean(weights, 1), 1, 0, 1), 2, 1, tokens)
        values, places = b.top_k(b.reshape(scores, batch, tokens - 1), kept)
        chosen = b.gather(others, b.reshape(places, batch, kept, 1), 1)
        if not self.fuse:
            return b.concat(1, first, chosen)
        fused = b.matmul(scores, others) - b.matmul(b.reshape(values, batch, 1, kept), chosen)
        return b.concat(1, first, chosen, b.reshape(fused, batch, 1, d_model))

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        assert weights is not None
        kept = self._kept(x.shape[1])
        if kept == x.shape[1] - 1:
            return x
        rows: list[Array] = []
        for tokens, attention in zip(x, weights, strict=True):
            scores = attention[:, 0, 1:].mean(axis=0)
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            row = [tokens[0], *(tokens[1 + i] for i in order[:kept])]
            if self.fuse:
                row.append(np.sum([scores[i] * tokens[1 + i] for i in order[kept:]], axis=0))
            rows.append(np.stack(row))
        return np.stack(rows)
