"""Norm after each residual sum."""

from __future__ import annotations

from ir.builder import Tensor
from ir.op import Array
from searchspaces.parts import Block, LayerParts


class PostNorm(Block):
    """Norm after each residual sum, as the transformer was first published (Vaswani et al. 2017).

    y = norm_mixer(x + mix(x)); z = norm_channel(y + channel(y)).
    """

    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762"
    normalises_output = True

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        y = layer.norm("norm_mixer", x + layer.mix(x))
        return y if layer.channel is None else layer.norm("norm_channel", y + layer.channel(y))

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        total = x + layer.mix(x)
        y = layer.norm("norm_mixer", total)
        if layer.channel is None:
            return y
        total = y + layer.channel(y)
        return layer.norm("norm_channel", total)
