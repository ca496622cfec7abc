"""Norm before each branch."""

from __future__ import annotations

import numpy as np

from ir.builder import Tensor
from ir.component import Case, context_option, option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import Block, LayerParts, X


class PreNorm(Block):
    """Norm at the start of each residual branch (Xiong et al. 2020).

    y = reduce(x + s_mixer * mix(norm_mixer(x))); z = y + s_channel * channel(norm_channel(y)). With `layer_scale` the
    factors s `[D]` are learned and begin there (Touvron et al. 2021, LayerScale); at 0 there are none. `reduce_last`
    reduces z instead, after both branches. `norm_by_depth`
    divides the norms of layer l, counted from 1, by sqrt(l), so that the stream grows less with depth (Sun et al. 2025,
    LayerNorm scaling). `norm_after` norms what the token mixer gives, as sigmoid attention over many tokens needs
    (Ramapuram et al. 2024, hybrid norm); `norm_last` norms what the layer gives (Tang et al. 2024, PredFormer).
    """

    paper = (
        "Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv 2002.04745; "
        "Touvron et al. 2021, Going deeper with Image Transformers, arXiv 2103.17239, section 2 (LayerScale); "
        "Ramapuram et al. 2024, Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv 2409.04431; "
        "Tang et al. 2024, Video Prediction Transformers without Recurrence or Convolution, arXiv 2410.04733; "
        "Sun et al. 2025, The Curse of Depth in Large Language Models, arXiv 2502.05795"
    )
    reduces = True
    cases = (
        Case(),
        Case({"layer_scale": 0.1}),
        Case({"reduce_last": True}),
        Case({"norm_by_depth": True, "layer": 4}),
        Case({"norm_after": True, "layer_scale": 0.1}),
        Case({"norm_last": True, "reduce_last": True}),
    )

    layer_scale: float = option(0.0, minimum=0.0, maximum=1.0, doc="Initial factor of each branch; 0 for none.")
    reduce_last: bool = option(False, doc="Reduce tokens after both branches instead of between them.")
    norm_by_depth: bool = option(False, doc="Divide the norms of layer l by sqrt(l).")
    norm_after: bool = option(False, doc="Norm what the token mixer gives.")
    norm_last: bool = option(False, doc="Norm what the layer gives.")
    layer: int = context_option(1, doc="Number of the layer, from 1.")

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        mixed = layer.mix(self._normed("norm_mixer", x, layer))
        mixed = layer.norm("norm_mixed", mixed) if self.norm_after else mixed
        y = x + self._scaled("scale_mixer", mixed, layer)
        y = y if self.reduce_last else layer.reduce(y)
        if layer.channel is not None:
            y = y + self._scaled("scale_channel", layer.channel(self._normed("norm_channel", y, layer)), layer)
        y = layer.reduce(y) if self.reduce_last else y
        return layer.norm("norm_last", y) if self.norm_last else y

    def _normed(self, name: str, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        normed = layer.norm(name, x)
        return normed * self.layer**-0.5 if self.norm_by_depth else normed

    def _scaled(self, name: str, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        return x * self._factor(name, x.shape[-1], layer) if self.layer_scale else x

    def _factor(self, name: str, size: int, layer: LayerParts[X]) -> X:
        return layer.parameter(name, ((Axis("d_model", size),),), f"constant({self.layer_scale:g})")

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        divisor = np.sqrt(self.layer) if self.norm_by_depth else 1.0
        normed = layer.norm("norm_mixer", x) / divisor
        mixed = layer.mix(normed)
        if self.norm_after:
            mixed = layer.norm("norm_mixed", mixed)
        if self.layer_scale:
            mixed = mixed * self._factor("scale_mixer", x.shape[-1], layer)
        y = x + mixed if self.reduce_last else layer.reduce(x + mixed)
        if layer.channel is not None:
            mixed = layer.channel(layer.norm("norm_channel", y) / divisor)
            if self.layer_scale:
                mixed = mixed * self._factor("scale_channel", x.shape[-1], layer)
            y = y + mixed
        if self.reduce_last:
            y = layer.reduce(y)
        return layer.norm("norm_last", y) if self.norm_last else y
