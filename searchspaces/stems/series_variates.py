"""Variates of a series as tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature


def _window(seq_len: int, variates: int) -> Signature:
    return Signature(modality="series", output="forecast", seq_len=seq_len, variates=variates, horizon=3)


class SeriesVariates(Stem):
    """Each variate of a series as one token (Liu et al. 2024, iTransformer).

    `series` `[B, L, C]` -> `[B, C, D]`: x_c W + b over the L times of variate c. With `trend_width` K the trend, the
    mean of the K values around each time with the ends repeated, and the rest have matrices and biases of their own,
    which are summed (Zeng et al. 2023, DLinear). (L + 1) D parameters, twice that with a trend; none depends on C.
    """

    paper = (
        "Liu et al. 2024, iTransformer: Inverted Transformers Are Effective for Time Series Forecasting, "
        "arXiv 2310.06625; Zeng et al. 2023, Are Transformers Effective for Time Series Forecasting?, arXiv 2205.13504"
    )
    modality = "series"
    cases = (
        EndCase(signature=_window(11, 3)),
        EndCase({"trend_width": 5}, signature=_window(7, 2)),
        EndCase({"trend_width": 25}, batch=1, d_model=5, signature=_window(12, 1)),
    )

    trend_width: int = option(0, minimum=0, maximum=4095, doc="Times that the trend is averaged over, odd; 0 for none.")

    def check(self, signature: Signature) -> str | None:
        if self.trend_width and self.trend_width % 2 == 0:
            return f"trend_width {self.trend_width} is not odd"
        return super().check(signature)

    def num_tokens(self, signature: Signature) -> int:
        return signature.variates

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        series = b.transpose(x, 0, 2, 1)
        if not self.trend_width:
            return b.linear(series, "weight", (Axis("d_model", d_model),), bias=True)
        trend = b.transpose(self._trend(b, x), 0, 2, 1)
        y = b.linear(series - trend, "rest", (Axis("d_model", d_model),), bias=True)
        return y + b.linear(trend, "trend", (Axis("d_model", d_model),), bias=True)

    def _trend(self, b: Builder, x: Tensor) -> Tensor:
        """Means `[B, L, C]` of the values around each time."""
        batch, length, variates = x.shape
        side = self.trend_width // 2
        times = np.minimum(np.maximum(np.arange(-side, length + side), 0), length - 1)
        rows = np.arange(batch)[:, None] * length + times
        padded = b.take(b.reshape(x, batch * length, variates), b.constant(rows))
        return b.pool(padded, Pool("average", (self.trend_width,), (1,), ((0, 0),)))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        if not self.trend_width:
            return np.einsum("blc,ld->bcd", x, params["weight"]) + params["weight_bias"]
        side, length = self.trend_width // 2, x.shape[1]
        trend = np.zeros_like(x)
        for t in range(length):
            for near in range(t - side, t + side + 1):
                trend[:, t] += x[:, min(max(near, 0), length - 1)] / self.trend_width
        y = np.einsum("blc,ld->bcd", x - trend, params["rest"]) + params["rest_bias"]
        return y + np.einsum("blc,ld->bcd", trend, params["trend"]) + params["trend_bias"]
