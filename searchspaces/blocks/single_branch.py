"""One residual branch."""

from __future__ import annotations

from ir.builder import Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import Block, LayerParts, X


class SingleBranch(Block):
    """Both mixers in one residual branch, a norm between them (Liu et al. 2022, ConvNeXt).

    y = x + s * channel(norm(mix(x))), with learned factors s `[D]` that begin at `layer_scale`; at 0 there are none.
    """

    paper = "Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, figure 4"

    layer_scale: float = option(0.0, minimum=0.0, maximum=1.0, doc="Initial factor of the branch; 0 for none.")

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        y = layer.norm("norm", layer.mix(x))
        y = y if layer.channel is None else layer.channel(y)
        return x + (y * self._factor(x.shape[-1], layer) if self.layer_scale else y)

    def _factor(self, size: int, layer: LayerParts[X]) -> X:
        return layer.parameter("scale", ((Axis("d_model", size),),), f"constant({self.layer_scale:g})")

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        mixed = layer.mix(x)
        y = layer.norm("norm", mixed)
        y = y if layer.channel is None else layer.channel(y)
        return x + (y * self._factor(x.shape[-1], layer) if self.layer_scale else y)
