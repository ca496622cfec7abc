"""Both mixers side by side."""

from __future__ import annotations

from ir.builder import Tensor
from ir.op import Array
from searchspaces.parts import Block, LayerParts


class Parallel(Block):
    """Both mixers read one norm and add to the residual stream at once (Wang and Komatsuzaki 2021, GPT-J).

    y = x + mix(norm_mixer(x)) + channel(norm_mixer(x)).
    """

    paper = "Wang, Komatsuzaki 2021, GPT-J-6B; Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 2"

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        normed = layer.norm("norm_mixer", x)
        y = x + layer.mix(normed)
        return y if layer.channel is None else y + layer.channel(normed)

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        normed = layer.norm("norm_mixer", x)
        branches = [layer.mix] if layer.channel is None else [layer.mix, layer.channel]
        return x + sum(branch(normed) for branch in branches)
