"""No channel mixer."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import ChannelMixer
from ir.op import Array


class NoChannelMixer(ChannelMixer):
    """No channel mixer: a wiring leaves the branch out, with its norm and residual, as in Mamba's layers.

    By itself y = x.
    """

    @classmethod
    def key(cls) -> str:
        return "none"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x
