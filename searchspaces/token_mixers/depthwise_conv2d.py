"""Depthwise convolution over an image."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Case, TokenMixer, option
from ir.op import Array
from searchspaces import convolutions, reference


class DepthwiseConv2d(TokenMixer):
    """Each channel under its own window of K x K pixels (Liu et al. 2022, ConvNeXt).

    c[i, j, e] = sum_{u, v} kernel[u, v, e] x[i + u - K/2, j + v - K/2, e] + bias[e], zeros around the image. With
    `batch_norm` the bias gives way to a batch norm, as in EfficientViT and SHViT. Linear in the number of tokens.
    """

    paper = "Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545"
    spatial = True
    causality = "bidirectional"
    cases = (
        Case(grid=(5, 4), d_model=6),
        Case({"kernel_size": 7}, grid=(3, 9), d_model=5, batch=1),
        Case({"kernel_size": 3, "batch_norm": True}, grid=(4, 4), d_model=6),
    )

    kernel_size: int = option(3, minimum=1, maximum=63, doc="Height and width of the window, pixels.")
    batch_norm: bool = option(False, doc="Batch norm instead of a bias.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        y = convolutions.depthwise(b, x, "kernel", self.kernel_size, bias=not self.batch_norm)
        return b.batch_norm(y, "norm") if self.batch_norm else y

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        y = reference.convolve(x, params["kernel"], groups=x.shape[-1]) + params.get("kernel_bias", 0.0)
        return reference.batch_norm(params, "norm", y) if self.batch_norm else y
