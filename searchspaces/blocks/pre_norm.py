"""Norm before each branch."""

from __future__ import annotations

from ir.builder import Tensor
from ir.op import Array
from searchspaces.parts import Block, LayerParts


class PreNorm(Block):
    """Norm at the start of each residual branch (Xiong et al. 2020).

    y = x + mix(norm_mixer(x)); z = y + channel(norm_channel(y)).
    """

    paper = "Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv 2002.04745"

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        y = x + layer.mix(layer.norm("norm_mixer", x))
        return y if layer.channel is None else y + layer.channel(layer.norm("norm_channel", y))

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        normed = layer.norm("norm_mixer", x)
        y = x + layer.mix(normed)
        if layer.channel is None:
            return y
        normed = layer.norm("norm_channel", y)
        return y + layer.channel(normed)
