"""Convolution with a stride."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Transition, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference

NormKind = Literal["none", "layer_norm", "batch_norm"]


class ConvDownsample(Transition):
    """A convolution with stride, with a norm before or after it: `[B, H, W, C] -> [B, H / S, W / S, D]`.

    ConvNeXt norms before a window of 2, PVT after it, PoolFormer uses a window of 3 and no norm,
    VOLO adds learned positions, SOFT ends with a ReLU. With `class_token`, as before CvT's last stage, the result is a
    sequence `[B, 1 + H' W', D]` that begins with a learned token.
    """

    paper = "Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545; Wang et al. 2021, PVT, arXiv 2102.12122"
    cases = (
        Case(grid=(4, 6), d_model=5),
        Case({"norm": "layer_norm", "norm_first": True}, grid=(5, 7), d_model=4),
        Case({"window": 3, "norm": "batch_norm"}, grid=(5, 4), d_model=4, batch=1),
        Case({"window": 3, "norm": "layer_norm", "stride": 1, "bias": False}, grid=(3, 4), d_model=4),
        Case({"position": True}, grid=(4, 3), d_model=5),
        Case({"window": 3, "norm": "batch_norm", "relu": True}, grid=(4, 5), d_model=4),
        Case({"window": 3, "norm": "layer_norm", "class_token": True}, grid=(5, 4), d_model=4),
    )

    window: int = option(2, minimum=1, maximum=31, doc="Height and width that an output sees, pixels.")
    stride: int = option(2, minimum=1, maximum=31, doc="Pixels from one output to the next.")
    norm: NormKind = option("none", choices=("none", "layer_norm", "batch_norm"), doc="Norm of its input or output.")
    norm_first: bool = option(False, doc="Norm the input instead of the output.")
    bias: bool = option(True, doc="Add a bias to the convolution.")
    relu: bool = option(False, doc="Put a ReLU after the convolution and its norm.")
    position: bool = option(False, doc="Add a learned vector to each output.")
    class_token: bool = option(False, doc="Leave the plane and put a learned token first.")

    @property
    def _padding(self) -> int:
        return 0 if self.window <= self.stride else self.window // 2

    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        x = self._norm(b, x) if self.norm_first else x
        y = convolutions.conv(
            b, x, "kernel", d_model, window=self.window, stride=self.stride, padding=self._padding, bias=self.bias
        )
        y = y if self.norm_first else self._norm(b, y)
        y = b.relu(y) if self.relu else y
        if self.position:
            grid = ((Axis("height", y.shape[1]),), (Axis("width", y.shape[2]),), (Axis("d_model", d_model),))
            y = y + b.parameter("position", grid, "normal(0.02)")
        if not self.class_token:
            return y
        first = b.reshape(b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)"), 1, 1, d_model)
        return b.concat(1, b.broadcast(first, y.shape[0], 1, d_model), b.reshape(y, y.shape[0], -1, d_model))

    def _norm(self, b: Builder, x: Tensor) -> Tensor:
        if self.norm == "batch_norm":
            return b.batch_norm(x, "norm")
        if self.norm == "none":
            return x
        axes = ((Axis("d_model", x.shape[-1]),),)
        scale, bias = b.parameter("norm_scale", axes, "constant(1)"), b.parameter("norm_bias", axes, "constant(0)")
        return b.layer_norm(x, scale, bias)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        x = self._norm_reference(params, x) if self.norm_first else x
        y = reference.convolve(x, params["kernel"], self.stride, self._padding)
        y = y + params["kernel_bias"] if self.bias else y
        y = y if self.norm_first else self._norm_reference(params, y)
        y = (np.maximum(y, 0.0) if self.relu else y) + params.get("position", 0.0)
        if not self.class_token:
            return y
        first = np.broadcast_to(params["class_token"], (y.shape[0], 1, y.shape[-1]))
        return np.concatenate([first, np.reshape(y, (y.shape[0], -1, y.shape[-1]))], axis=1)

    def _norm_reference(self, params: Mapping[str, Array], x: Array) -> Array:
        if self.norm == "batch_norm":
            return reference.batch_norm(params, "norm", x)
        if self.norm == "none":
            return x
        return reference.layer_norm(x) * params["norm_scale"] + params["norm_bias"]
