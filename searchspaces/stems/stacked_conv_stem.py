"""Four convolutions and a product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature

_STRIDES: Final = (2, 1, 1, 2)


def _image(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=10)


class StackedConvStem(Stem):
    """Four 3x3 convolutions of strides 2, 1, 1, 2, Next-ViT's stem (Li et al. 2022).

    `image` `[B, S, S, C]` -> `[B, S / 4, S / 4, D]`: each relu(bn(conv(x))), of widths W, W / 2, W, W; then bn(x W).
    """

    paper = (
        "Li et al. 2022, Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic "
        "Industrial Scenarios, arXiv 2207.05501"
    )
    modality = "image"
    cases = (
        EndCase({"width": 6}, signature=_image(9, 2), d_model=5),
        EndCase({"width": 4}, batch=1, d_model=4, signature=_image(6, 1)),
    )

    width: int = option(64, minimum=2, maximum=4096, doc="Width of the convolutions; that of the second is half.")

    def _side(self, signature: Signature) -> int:
        side = signature.image_size
        for stride in _STRIDES:
            side = (side - 1) // stride + 1
        return side

    def num_tokens(self, signature: Signature) -> int:
        return self._side(signature) ** 2

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        widths = (self.width, self.width // 2, self.width, self.width)
        for index, (width, stride) in enumerate(zip(widths, _STRIDES, strict=True)):
            x = b.relu(convolutions.conv_norm(b, x, f"conv{index}", width, window=3, stride=stride))
        return b.batch_norm(b.linear(x, "weight", (Axis("channels", d_model),)), "weight_norm")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        for index, stride in enumerate(_STRIDES):
            x = reference.convolve(x, params[f"conv{index}"], stride)
            x = np.maximum(reference.batch_norm(params, f"conv{index}_norm", x), 0.0)
        return reference.batch_norm(params, "weight_norm", x @ params["weight"])
