"""No token mixing."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import TokenMixer
from ir.op import Array


class Identity(TokenMixer):
    """No mixing (Yu et al. 2024, IdentityFormer): y = x, so that each token goes its own way.

    No parameters, no state, no cost.
    """

    paper = "Yu et al. 2024, MetaFormer Baselines for Vision, arXiv 2210.13452"
    causality = "causal"
    growth = 0.0

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x
