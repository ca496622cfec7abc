"""Average pooling over an image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.ops.convolution import Pool


class Pooling2d(TokenMixer):
    """Average pooling minus identity over an image, PoolFormer's token mixer (Yu et al. 2022).

    y[i, j] = mean of x[u, v] over the window of K x K pixels around (i, j) - x[i, j], x `[B, H, W, D]`; only pixels
    that exist count. No parameters. Linear in the number of tokens.
    """

    paper = "Yu et al. 2022, MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418"
    spatial = True
    causality = "bidirectional"
    cases = (
        Case(grid=(5, 4), d_model=6),
        Case({"window": 5}, grid=(3, 7), d_model=5, batch=1),
        Case({"window": 2}, grid=(4, 3), d_model=3),
    )
    limits = (
        Limit(
            "over one row of pixels it is pooling of a sequence",
            Case({"window": 3}, grid=(1, 9), d_model=6),
            "pooling",
            {"window": 3, "causal": False},
        ),
    )

    window: int = option(3, minimum=2, maximum=63, doc="Height and width of the window, pixels.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        after = self.window // 2
        around = (self.window - 1 - after, after)
        return b.pool(x, Pool("average", (self.window, self.window), (1, 1), (around, around))) - x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        y, after = np.zeros_like(x), self.window // 2
        before = self.window - 1 - after
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                seen = x[:, max(0, i - before) : i + after + 1, max(0, j - before) : j + after + 1]
                y[:, i, j] = seen.mean(axis=(1, 2)) - x[:, i, j]
        return y
