"""Two-layer perceptron."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, ChannelMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import ACTIVATIONS, Activation


class Mlp(ChannelMixer):
    """Two-layer perceptron, the transformer's feed-forward part (Vaswani et al. 2017).

    y = act(x W_up) W_down with hidden width F = round(expansion * D); 2 D F parameters, 4 D F FLOPs a token. With
    `batch_norm` each matrix is followed by one, as in EfficientViT and SHViT; `final_relu` ends it with a ReLU
    (LMUFormer).
    """

    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762"
    cases = (
        Case(),
        Case({"activation": "relu", "expansion": 2.5, "bias": True}, batch=1, time=3, d_model=5),
        Case({"activation": "relu2"}),
        Case({"activation": "silu"}),
        Case({"activation": "tanh", "expansion": 0.5}),
        Case({"activation": "relu", "batch_norm": True, "init_std": 0.5}, d_model=5),
        Case({"batch_norm": True, "bias": True, "expansion": 1.0}, batch=1, time=3, d_model=5),
        Case({"batch_norm": True, "final_relu": True}),
    )

    expansion: float = option(4.0, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    activation: Activation = option("gelu", choices=tuple(ACTIVATIONS), doc="Function between the two layers.")
    bias: bool = option(False, doc="Add a learned bias after each matrix.")
    batch_norm: bool = option(False, doc="Batch norm after each matrix.")
    final_relu: bool = option(False, doc="ReLU at the end.")
    init_std: float = option(0.0, minimum=0.0, maximum=1.0, doc="Initial deviation of the matrices; 0 for by fan-in.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", max(1, round(self.expansion * d_model.size)))
        init = f"normal({self.init_std:g})" if self.init_std else "fan_in"
        h = b.linear(x, "up", (hidden,), bias=self.bias, init=init)
        h = ACTIVATIONS[self.activation](b, b.batch_norm(h, "up_norm") if self.batch_norm else h)
        y = b.matmul(h, b.parameter("down", ((hidden,), (d_model,)), init))
        y = y + b.parameter("down_bias", ((d_model,),), "constant(0)") if self.bias else y
        y = b.batch_norm(y, "down_norm") if self.batch_norm else y
        return b.relu(y) if self.final_relu else y

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        h = x @ params["up"] + params.get("up_bias", 0.0)
        h = reference.batch_norm(params, "up_norm", h) if self.batch_norm else h
        y = reference.ACTIVATIONS[self.activation](h) @ params["down"] + params.get("down_bias", 0.0)
        y = reference.batch_norm(params, "down_norm", y) if self.batch_norm else y
        return np.maximum(y, 0.0) if self.final_relu else y
