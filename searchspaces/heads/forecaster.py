"""Forecast of a series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_SIGNATURE = Signature(modality="series", output="forecast", seq_len=7, variates=3, horizon=5)


class Forecaster(Head):
    """All future values by one matrix from all tokens or from the last one (Nie et al. 2023).

    `[B, T, D]` -> `forecast` `[B, horizon, variates]`: flatten(x) W + bias, or x_T W + bias;
    (T D + 1) * horizon * variates parameters for all tokens, (D + 1) * horizon * variates for the last.
    """

    paper = (
        "Nie et al. 2023, A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, arXiv 2211.14730"
    )
    output = "forecast"
    cases = (EndCase(signature=_SIGNATURE), EndCase({"source": "last"}, batch=1, d_model=5, signature=_SIGNATURE))

    source: Literal["all", "last"] = option("all", choices=("all", "last"), doc="Tokens that the forecast reads.")

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        batch, tokens, d_model = x.shape
        if self.source == "last":
            x, tokens = b.slice(x, 1, tokens - 1, tokens), 1
        outputs = (Axis("horizon", signature.horizon), Axis("variates", signature.variates))
        weight = b.parameter("weight", ((Axis("tokens", tokens), Axis("d_model", d_model)), outputs))
        y = b.matmul(b.reshape(x, batch, tokens * d_model), weight) + b.parameter("bias", (outputs,), "constant(0)")
        return b.reshape(y, batch, signature.horizon, signature.variates)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        read = x[:, -1:] if self.source == "last" else x
        weight = np.reshape(params["weight"], (*read.shape[1:], signature.horizon, signature.variates))
        bias = np.reshape(params["bias"], (signature.horizon, signature.variates))
        return np.einsum("btd,tdhv->bhv", read, weight) + bias
