"""Inverted bottleneck with a stride between two residual layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Transition, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference

_DIVISOR = 8  # the squeeze is a multiple of this, as published


class SandwichDownsample(Transition):
    """Inverted bottleneck with a stride between two residual layers (Liu et al. 2023, EfficientViT; SHViT too).

    x -> local(x) = ffn(dw(x)), dw(x) = x + bn(depthwise3x3(x)), ffn(x) = x + bn(relu(bn(x W_up)) W_down), width 2 C;
    h = relu(bn(depthwise3x3(relu(bn(x W_in)), stride 2))) of width E = expansion * C; each channel times
    sigmoid(relu(mean(h) W_squeeze) W_excite) (Hu et al. 2018); bn(h W_out) `[B, H / 2, W / 2, D]`; local again.
    """

    paper = (
        "Liu et al. 2023, EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, "
        "arXiv 2305.07027; Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv 1709.01507"
    )
    cases = (
        Case(grid=(4, 6), d_model=4),
        Case({"expansion": 3.0, "stride": 3, "window": 5}, grid=(5, 7), d_model=3, batch=1),
        Case({"squeeze": 0.0}, grid=(3, 3), d_model=4),
    )

    expansion: float = option(4.0, minimum=0.5, maximum=16.0, doc="Width of the bottleneck over that before it.")
    window: int = option(3, minimum=1, maximum=31, doc="Height and width of the windows, pixels.")
    stride: int = option(2, minimum=1, maximum=31, doc="Pixels from one output to the next.")
    squeeze: float = option(
        0.25, minimum=0.0, maximum=1.0, doc="Width of the squeeze over the bottleneck's; 0 for none."
    )

    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        x = self._local(b, x, "before")
        hidden = round(self.expansion * x.shape[-1])
        h = b.relu(_product(b, x, "in", hidden))
        h = convolutions.conv_norm(b, h, "depthwise", hidden, window=self.window, stride=self.stride, groups=hidden)
        y = _product(b, self._excite(b, b.relu(h)), "out", d_model)
        return self._local(b, y, "after")

    def _local(self, b: Builder, x: Tensor, name: str) -> Tensor:
        channels = x.shape[-1]
        x = x + convolutions.conv_norm(b, x, f"{name}_depthwise", channels, window=self.window, groups=channels)
        return x + _product(b, b.relu(_product(b, x, f"{name}_up", 2 * channels)), f"{name}_down", channels)

    def _excite(self, b: Builder, h: Tensor) -> Tensor:
        if not self.squeeze:
            return h
        batch, _, _, hidden = h.shape
        width = max(_DIVISOR, int(self.squeeze * hidden + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
        squeezed = b.relu(b.linear(b.mean(h, 1, 2), "squeeze", (Axis("squeeze", width),), bias=True))
        factors = b.sigmoid(b.linear(squeezed, "excite", (Axis("channels", hidden),), bias=True))
        return h * b.reshape(factors, batch, 1, 1, hidden)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        x = self._local_reference(params, x, "before")
        h = np.maximum(reference.batch_norm(params, "in_norm", x @ params["in"]), 0.0)
        h = reference.convolve(h, params["depthwise"], self.stride, groups=h.shape[-1])
        h = np.maximum(reference.batch_norm(params, "depthwise_norm", h), 0.0)
        if self.squeeze:
            squeezed = np.maximum(h.mean(axis=(1, 2)) @ params["squeeze"] + params["squeeze_bias"], 0.0)
            h = h * reference.sigmoid(squeezed @ params["excite"] + params["excite_bias"])[:, None, None]
        y = reference.batch_norm(params, "out_norm", h @ params["out"])
        return self._local_reference(params, y, "after")

    def _local_reference(self, params: Mapping[str, Array], x: Array, name: str) -> Array:
        seen = reference.convolve(x, params[f"{name}_depthwise"], groups=x.shape[-1])
        x = x + reference.batch_norm(params, f"{name}_depthwise_norm", seen)
        h = np.maximum(reference.batch_norm(params, f"{name}_up_norm", x @ params[f"{name}_up"]), 0.0)
        return x + reference.batch_norm(params, f"{name}_down_norm", h @ params[f"{name}_down"])


def _product(b: Builder, x: Tensor, name: str, outputs: int) -> Tensor:
    """X times a matrix, and its batch norm."""
    return b.batch_norm(b.linear(x, name, (Axis("channels", outputs),)), f"{name}_norm")
