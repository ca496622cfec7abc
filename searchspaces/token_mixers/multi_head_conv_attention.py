"""Convolution within heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference


def _as_depthwise_conv2d(params: Mapping[str, Array]) -> Mapping[str, Array]:
    kernel, bias = reference.fold_batch_norm(params, "kernel")
    return {"kernel": kernel, "kernel_bias": bias}


class MultiHeadConvAttention(TokenMixer):
    """Multi-head convolutional attention over an image (Li et al. 2022, Next-ViT).

    y = relu(bn(conv(x))) W_out; the convolution sees K x K pixels and the channels of its own head, of size S, alone.
    K^2 S D + D^2 parameters. Linear in the number of tokens.
    """

    paper = (
        "Li et al. 2022, Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic "
        "Industrial Scenarios, arXiv 2207.05501"
    )
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"head_dim": 3}, grid=(5, 4), d_model=6),
        Case({"head_dim": 5, "kernel_size": 5}, grid=(3, 7), d_model=5, batch=1),
    )
    limits = (
        Limit(
            "one head of one channel that is above zero is a depthwise convolution",
            Case({"head_dim": 1}, grid=(5, 4), d_model=1),
            "depthwise_conv2d",
            {"kernel_size": 3},
            values={"kernel_norm_bias": 60.0, "out": 1.0},
            adapt=_as_depthwise_conv2d,
        ),
    )

    head_dim: int = option(32, minimum=1, maximum=4096, doc="Channels of a head.")
    kernel_size: int = option(3, minimum=1, maximum=63, doc="Height and width of the window, pixels.")

    def check(self, d_model: int) -> str | None:
        return f"head_dim {self.head_dim} does not divide d_model {d_model}" if d_model % self.head_dim else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = x.shape[-1]
        heads = d_model // self.head_dim
        y = convolutions.conv_norm(b, x, "kernel", d_model, window=self.kernel_size, groups=heads)
        return b.linear(b.relu(y), "out", (Axis("channels", d_model),), init="normal(0.02)")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        y = reference.convolve(x, params["kernel"], groups=x.shape[-1] // self.head_dim)
        return np.maximum(reference.batch_norm(params, "kernel_norm", y), 0.0) @ params["out"]
