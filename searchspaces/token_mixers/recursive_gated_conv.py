"""Gated convolution, one gate after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference


def _as_depthwise_conv2d(params: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"kernel": params["depthwise"], "kernel_bias": params["depthwise_bias"]}


class RecursiveGatedConv(TokenMixer):
    """Recursive gated convolution, gnconv, over an image (Rao et al. 2022, HorNet).

    Widths C_k = D / 2^(n-1-k), k = 0 .. n-1: p = x W_p of width C_0, q = scale * depthwise(x W_q), whose channels are
    q_0 .. q_{n-1} of widths C_k; p_1 = p * q_0, p_{k+1} = (p_k W_k) * q_k; y = p_n W_out. Order n = 1 is one gate.
    All products have biases. Linear in the number of tokens.
    """

    paper = (
        "Rao et al. 2022, HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, "
        "arXiv 2207.14284"
    )
    aliases: ClassVar[Aliases] = {"gnconv": {}}
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"order": 3, "kernel_size": 3}, grid=(5, 4), d_model=8),
        Case({"order": 1, "kernel_size": 5, "scale": 1.0}, grid=(3, 5), d_model=5, batch=1),
        Case({"order": 2}, grid=(4, 4), d_model=6),
    )
    limits = (
        Limit(
            "of order 1, of one channel and with its gate at one it is a depthwise convolution",
            Case({"order": 1, "kernel_size": 3, "scale": 1.0}, grid=(5, 4), d_model=1),
            "depthwise_conv2d",
            {"kernel_size": 3},
            values={"p": 0.0, "p_bias": 1.0, "q": 1.0, "q_bias": 0.0, "out": 1.0, "out_bias": 0.0},
            adapt=_as_depthwise_conv2d,
        ),
    )

    order: int = option(3, minimum=1, maximum=16, doc="Gates, one after the other.")
    kernel_size: int = option(7, minimum=1, maximum=63, doc="Height and width of the convolution's window, pixels.")
    scale: float = option(1.0 / 3.0, minimum=0.001, maximum=100.0, doc="Factor of what the convolution gives.")

    def check(self, d_model: int) -> str | None:
        halves = 2 ** (self.order - 1)
        return f"order {self.order} halves d_model {d_model} more often than it can be" if d_model % halves else None

    def _widths(self, d_model: int) -> list[int]:
        return [d_model // 2 ** (self.order - 1 - index) for index in range(self.order)]

    def build(self, b: Builder, x: Tensor) -> Tensor:
        widths = self._widths(x.shape[-1])
        p = b.linear(x, "p", (Axis("gate", widths[0]),), bias=True)
        q = b.linear(x, "q", (Axis("hidden", sum(widths)),), bias=True)
        q = convolutions.depthwise(b, q, "depthwise", self.kernel_size) * self.scale
        for index, factor in enumerate(b.split(q, -1, *widths)):
            if index:
                weight = b.parameter(f"w{index}", ((Axis("gate", widths[index - 1]),), (Axis("gate", widths[index]),)))
                p = b.matmul(p, weight) + b.parameter(
                    f"w{index}_bias", ((Axis("gate", widths[index]),),), "constant(0)"
                )
            p = p * factor
        out = b.parameter("out", ((Axis("gate", x.shape[-1]),), (Axis("d_model", x.shape[-1]),)))
        return b.matmul(p, out) + b.parameter("out_bias", ((Axis("d_model", x.shape[-1]),),), "constant(0)")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q = x @ params["q"] + params["q_bias"]
        scale = float(np.float32(self.scale))  # constants of a graph are of single precision
        q = scale * (reference.convolve(q, params["depthwise"], groups=q.shape[-1]) + params["depthwise_bias"])
        ends = np.cumsum(self._widths(x.shape[-1]))
        p = (x @ params["p"] + params["p_bias"]) * q[..., : ends[0]]
        for k in range(1, self.order):
            p = (p @ params[f"w{k}"] + params[f"w{k}_bias"]) * q[..., ends[k - 1] : ends[k]]
        return p @ params["out"] + params["out_bias"]
