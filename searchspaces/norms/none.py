"""No norm."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Norm
from ir.op import Array


class NoNorm(Norm):
    """No normalisation: y = x."""

    @classmethod
    def key(cls) -> str:
        return "none"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x
