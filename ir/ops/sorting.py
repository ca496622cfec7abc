"""Order along the last axis."""

from __future__ import annotations

import numpy as np

from ir.op import Array, Op, Types, op, require
from ir.types import TensorType


@op
class TopK(Op):
    """The k largest elements along the last axis in falling order, or the k smallest in rising order.

    Of equal elements the one at the lower index comes first. `k` may be the whole axis: that is a stable sort. Results:
    values `[..., k]` and where they were, int32 `[..., k]`. Elements are numbers: where NaN goes is not defined.
    """

    k: int
    largest: bool = True

    def infer(self, x: TensorType) -> Types:
        require(x.is_float and x.rank >= 1, "top_k needs floating-point input with an axis", found=x)
        require(0 < self.k <= x.shape[-1], "k out of range", expected=f"1 to {x.shape[-1]}", found=self.k)
        shape = (*x.shape[:-1], self.k)
        return x.with_shape(shape), TensorType(shape, "int32")

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        order = np.argsort(-x if self.largest else x, axis=-1, kind="stable")[..., : self.k]
        return np.take_along_axis(x, order, axis=-1), order.astype(np.int32)

    def flops(self, operands: Types, results: Types) -> int:
        return operands[0].size * self.k.bit_length()  # comparisons with a heap of k
