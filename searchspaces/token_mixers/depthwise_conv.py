"""Depthwise convolution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, context_option, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference
from searchspaces.convolutions import taps
from searchspaces.parts import ACTIVATIONS, Activation


class DepthwiseConv(TokenMixer):
    """Inverted separable convolution, ConvFormer's token mixer (Yu et al. 2024, after Sandler et al. 2018).

    u = act(x W_in) of width E = expansion * D; c_t[e] = sum_w kernel[w, e] u_{t + w - before}[e] + bias[e] over
    `kernel_size` tokens around t, or up to t if causal; y = c W_out. The default activation is the squared ReLU, which
    ConvFormer scales and shifts. With `pointwise` off, y is the convolution of x alone. Linear in T. State: the last
    kernel_size - 1 inputs of the convolution.
    """

    paper = (
        "Yu et al. 2024, MetaFormer Baselines for Vision, arXiv 2210.13452; "
        "Sandler et al. 2018, MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381"
    )
    cases = (
        Case({"causal": True, "kernel_size": 4}),
        Case({"causal": False, "kernel_size": 5}),
        Case({"causal": True, "pointwise": False, "kernel_size": 3}, batch=1, time=9, d_model=5),
        Case({"causal": False, "pointwise": False, "kernel_size": 4}, time=3, d_model=5),
        Case({"causal": True, "expansion": 1.5, "activation": "silu"}, time=5, d_model=6),
    )

    kernel_size: int = option(7, minimum=2, maximum=65536, doc="Tokens that the convolution sees.")
    pointwise: bool = option(True, doc="Mix channels by a matrix before and after the convolution.")
    expansion: float = option(2.0, minimum=0.1, maximum=16.0, doc="Width between the matrices over model width.")
    activation: Activation = option("relu2", choices=tuple(ACTIVATIONS), doc="Function after the first matrix.")
    causal: bool = context_option(True, doc="See earlier tokens only.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        after = 0 if self.causal else self.kernel_size // 2
        c = self._convolve(b, self._input(b, x), self.kernel_size - 1 - after, after)
        return self._output(b, c, x.shape[-1])

    def _width(self, d_model: int) -> int:
        return max(1, round(self.expansion * d_model)) if self.pointwise else d_model

    def _input(self, b: Builder, x: Tensor) -> Tensor:
        if not self.pointwise:
            return x
        return ACTIVATIONS[self.activation](b, b.linear(x, "in", (Axis("hidden", self._width(x.shape[-1])),)))

    def _convolve(self, b: Builder, u: Tensor, before: int, after: int) -> Tensor:
        """Convolution of u `[B, T, E]` with so many zeros around it."""
        channels = Axis("hidden" if self.pointwise else "d_model", u.shape[-1])
        axes = ((taps(self.kernel_size, causal=self.causal),), (Axis("group", 1),), (channels,))
        y = b.conv(u, b.parameter("kernel", axes), padding=((before, after),), groups=channels.size)
        return y + b.parameter("bias", ((channels,),), "constant(0)")

    def _output(self, b: Builder, c: Tensor, d_model: int) -> Tensor:
        if not self.pointwise:
            return c
        return b.matmul(c, b.parameter("out", ((Axis("hidden", c.shape[-1]),), (Axis("d_model", d_model),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"recent": TensorType((batch, self.kernel_size - 1, self._width(d_model)))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        recent = b.concat(1, state["recent"], self._input(b, x))
        y = self._output(b, self._convolve(b, recent, 0, 0), x.shape[-1])
        return y, {"recent": b.slice(recent, 1, x.shape[1], recent.shape[1])}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        u = reference.ACTIVATIONS[self.activation](x @ params["in"]) if self.pointwise else x
        before = self.kernel_size - 1 if self.causal else (self.kernel_size - 1) // 2
        c = np.zeros_like(u) + params["bias"]
        for t in range(u.shape[1]):
            for w in range(self.kernel_size):
                if 0 <= t + w - before < u.shape[1]:
                    c[:, t] += params["kernel"][w, 0] * u[:, t + w - before]
        return c @ params["out"] if self.pointwise else c
