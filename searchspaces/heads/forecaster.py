"""Forecast of a series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.errors import InputError
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_SIGNATURE = Signature(modality="series", output="forecast", seq_len=7, variates=3, horizon=5)


class Forecaster(Head):
    """All future values by one matrix from all tokens or the last one (Nie et al. 2023), or each variate by its own.

    `[B, T, D]` -> `forecast` `[B, horizon, variates]`: flatten(x) W + bias, or x_T W + bias;
    (T D + 1) * horizon * variates parameters for all tokens, (D + 1) * horizon * variates for the last. With `each`
    token c is variate c, whose future is x_c W + bias (Liu et al. 2024, iTransformer): (D + 1) * horizon parameters;
    with `direct` it is x_c itself, as wide as the horizon.
    """

    paper = (
        "Nie et al. 2023, A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, arXiv 2211.14730; "
        "Liu et al. 2024, iTransformer: Inverted Transformers Are Effective for Time Series Forecasting, "
        "arXiv 2310.06625"
    )
    output = "forecast"
    cases = (
        EndCase(signature=_SIGNATURE),
        EndCase({"source": "last"}, batch=1, d_model=5, signature=_SIGNATURE),
        EndCase({"source": "each"}, time=3, d_model=6, signature=_SIGNATURE),
        EndCase({"source": "direct"}, time=3, d_model=5, signature=_SIGNATURE),
    )

    source: Literal["all", "last", "each", "direct"] = option(
        "all", choices=("all", "last", "each", "direct"), doc="Tokens that the forecast reads, or is."
    )

    def num_tokens(self, signature: Signature) -> int | None:
        return signature.variates if self.source in ("each", "direct") else None

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        if self.source in ("each", "direct"):
            return self._of_each(b, x, signature)
        batch, tokens, d_model = x.shape
        if self.source == "last":
            x, tokens = b.slice(x, 1, tokens - 1, tokens), 1
        outputs = (Axis("horizon", signature.horizon), Axis("variates", signature.variates))
        weight = b.parameter("weight", ((Axis("tokens", tokens), Axis("d_model", d_model)), outputs))
        y = b.matmul(b.reshape(x, batch, tokens * d_model), weight) + b.parameter("bias", (outputs,), "constant(0)")
        return b.reshape(y, batch, signature.horizon, signature.variates)

    def _of_each(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        """The forecast of tokens that are variates."""
        if x.shape[1] != signature.variates:
            expected = f"{signature.variates} tokens, one a variate: a stem such as series_variates"
            raise InputError("tokens are not variates", where="head", expected=expected, found=f"{x.shape[1]} tokens")
        if self.source == "each":
            horizon = Axis("horizon", signature.horizon)
            weight = b.parameter("weight", ((Axis("d_model", x.shape[2]),), (horizon,)))
            x = b.matmul(x, weight) + b.parameter("bias", ((horizon,),), "constant(0)")
        elif x.shape[2] != signature.horizon:
            expected = f"d_model {signature.horizon}, the horizon"
            raise InputError("tokens are no forecasts", where="head", expected=expected, found=f"d_model {x.shape[2]}")
        return b.transpose(x, 0, 2, 1)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        if self.source == "direct":
            return np.stack([x[:, c] for c in range(signature.variates)], axis=-1)
        if self.source == "each":
            return np.einsum("bcd,dh->bhc", x, params["weight"]) + params["bias"][:, None]
        read = x[:, -1:] if self.source == "last" else x
        weight = np.reshape(params["weight"], (*read.shape[1:], signature.horizon, signature.variates))
        bias = np.reshape(params["bias"], (signature.horizon, signature.variates))
        return np.einsum("btd,tdhv->bhv", read, weight) + bias
