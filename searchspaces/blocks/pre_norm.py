"""Norm before each branch."""

from __future__ import annotations

from ir.builder import Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import Block, LayerParts, X


class PreNorm(Block):
    """Norm at the start of each residual branch (Xiong et al. 2020).

    y = reduce(x + s_mixer * mix(norm_mixer(x))); z = y + s_channel * channel(norm_channel(y)). With `layer_scale` the
    factors s `[D]` are learned and begin there (Touvron et al. 2021, LayerScale); at 0 there are none.
    """

    paper = (
        "Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv 2002.04745; "
        "Touvron et al. 2021, Going deeper with Image Transformers, arXiv 2103.17239, section 2 (LayerScale)"
    )
    reduces = True

    layer_scale: float = option(0.0, minimum=0.0, maximum=1.0, doc="Initial factor of each branch; 0 for none.")

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        y = x + self._scaled("scale_mixer", layer.mix(layer.norm("norm_mixer", x)), layer)
        y = layer.reduce(y)
        if layer.channel is None:
            return y
        return y + self._scaled("scale_channel", layer.channel(layer.norm("norm_channel", y)), layer)

    def _scaled(self, name: str, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        return x * self._factor(name, x.shape[-1], layer) if self.layer_scale else x

    def _factor(self, name: str, size: int, layer: LayerParts[X]) -> X:
        return layer.parameter(name, ((Axis("d_model", size),),), f"constant({self.layer_scale:g})")

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        normed = layer.norm("norm_mixer", x)
        mixed = layer.mix(normed)
        if self.layer_scale:
            mixed = mixed * self._factor("scale_mixer", x.shape[-1], layer)
        y = layer.reduce(x + mixed)
        if layer.channel is None:
            return y
        normed = layer.norm("norm_channel", y)
        mixed = layer.channel(normed)
        if self.layer_scale:
            mixed = mixed * self._factor("scale_channel", x.shape[-1], layer)
        return y + mixed
