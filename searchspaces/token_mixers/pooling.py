"""Average pooling."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, context_option, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import TensorType


class Pooling(TokenMixer):
    """Average pooling minus identity (Yu et al. 2022, PoolFormer): the simplest mixer of near tokens.

    y_t = mean of x_s over the window - x_t; the window is centred on t, or ends at t if causal, and counts only tokens
    that exist. No parameters. Linear in T. State: the last window - 1 tokens.
    """

    paper = "Yu et al. 2022, MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418"
    cases = (
        Case({"causal": True}),
        Case({"causal": False}),
        Case({"window": 4, "causal": True}, batch=1, time=9, d_model=5),
        Case({"window": 4, "causal": False}, time=3, d_model=1),
    )

    window: int = option(3, minimum=2, maximum=65536, doc="Tokens averaged.")
    causal: bool = context_option(True, doc="Average earlier tokens only.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        after = 0 if self.causal else self.window // 2
        return b.pool(x, Pool("average", (self.window,), (1,), ((self.window - 1 - after, after),))) - x

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"recent": TensorType((batch, self.window - 1, d_model))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        recent = b.concat(1, state["recent"], x)
        count = b.minimum(b.cast(position, "float32") + 1.0, float(self.window))
        y = b.sum(recent, 1, keepdims=True) / count - x
        return y, {"recent": b.slice(recent, 1, 1, self.window)}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        y, after = np.zeros_like(x), 0 if self.causal else self.window // 2
        for t in range(x.shape[1]):
            first, last = max(0, t + after - self.window + 1), min(x.shape[1] - 1, t + after)
            y[:, t] = x[:, first : last + 1].mean(axis=1) - x[:, t]
        return y
