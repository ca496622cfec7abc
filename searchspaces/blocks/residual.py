"""Residual branches without a norm before them."""

from __future__ import annotations

from ir.builder import Tensor
from ir.component import Case, option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import Block, LayerParts, X


class Residual(Block):
    """A residual branch around each mixer, for mixers that end with a norm of their own (He et al. 2016).

    y = x + s_mixer * mix(x); z = y + s_channel * channel(y). With `layer_scale` the factors s `[D]` are learned and
    begin there; at 0 there are none. With `norm_channel` the channel mixer, as in Next-ViT, reads norm_channel(y).
    """

    paper = (
        "He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385; "
        "Li et al. 2022, EfficientFormer, arXiv 2206.01191; Li et al. 2022, Next-ViT, arXiv 2207.05501"
    )

    cases = (Case(), Case({"layer_scale": 0.1, "norm_channel": True}))

    layer_scale: float = option(0.0, minimum=0.0, maximum=1.0, doc="Initial factor of each branch; 0 for none.")
    norm_channel: bool = option(False, doc="Norm before the channel mixer.")

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        y = x + self._scaled("scale_mixer", layer.mix(x), layer)
        if layer.channel is None:
            return y
        normed = layer.norm("norm_channel", y) if self.norm_channel else y
        return y + self._scaled("scale_channel", layer.channel(normed), layer)

    def _scaled(self, name: str, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        return x * self._factor(name, x.shape[-1], layer) if self.layer_scale else x

    def _factor(self, name: str, size: int, layer: LayerParts[X]) -> X:
        return layer.parameter(name, ((Axis("d_model", size),),), f"constant({self.layer_scale:g})")

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        mixed = layer.mix(x)
        if self.layer_scale:
            mixed = mixed * self._factor("scale_mixer", x.shape[-1], layer)
        y = x + mixed
        if layer.channel is None:
            return y
        mixed = layer.channel(layer.norm("norm_channel", y) if self.norm_channel else y)
        if self.layer_scale:
            mixed = mixed * self._factor("scale_channel", x.shape[-1], layer)
        return y + mixed
