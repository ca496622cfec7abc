"""Every token stays."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Reducer
from ir.op import Array


class NoReducer(Reducer):
    """Keep all tokens: y = x. The layer is built without a reducer."""

    @classmethod
    def key(cls) -> str:
        return "none"

    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        return x
