"""Attention over an image with learned biases by distance."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import offsets, reference


class OffsetAttention(TokenMixer):
    """Attention over an image whose scores get a learned bias for each distance (Graham et al. 2021, LeViT).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K) + table_h[|rows|, |columns| apart]) v_s in each of H heads, queries and
    keys of size K, values of size V = value_ratio * K; y = concat_h(o) W_out. EfficientFormer's attention.
    D H (2 K + 2 V) parameters, biases and H a pixel. T^2 in tokens.
    """

    paper = (
        "Graham et al. 2021, LeViT: a Vision Transformer in ConvNet's Clothing, arXiv 2104.01136; "
        "Li et al. 2022, EfficientFormer: Vision Transformers at MobileNet Speed, arXiv 2206.01191"
    )
    spatial = True
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"num_heads": 2, "head_dim": 3, "value_ratio": 2.0}, grid=(3, 4), d_model=5),
        Case({"num_heads": 3, "head_dim": 4}, grid=(5, 2), d_model=6, batch=1),
    )
    limits = (
        Limit(
            "without biases of distance it is softmax attention",
            Case({"num_heads": 3, "head_dim": 4, "value_ratio": 1.0}, grid=(3, 4)),
            "softmax_attention",
            {"num_heads": 3, "head_dim": 4, "bias": True, "causal": False},
            values={"offsets": 0.0},
        ),
    )

    num_heads: int = option(8, minimum=1, maximum=1024, doc="Heads.")
    head_dim: int = option(32, minimum=1, maximum=1024, doc="Size of queries and keys in a head.")
    value_ratio: float = option(4.0, minimum=0.1, maximum=64.0, doc="Size of values over that of keys.")

    def _value_dim(self) -> int:
        return max(1, int(self.value_ratio * self.head_dim))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        tokens = b.reshape(x, batch, height * width, d_model)
        heads, values = Axis("heads", self.num_heads), Axis("value_dim", self._value_dim())
        q, k, v = (
            b.split_heads(b.linear(tokens, name, (heads, size), bias=True), self.num_heads)
            for name, size in (
                ("q", Axis("head_dim", self.head_dim)),
                ("k", Axis("head_dim", self.head_dim)),
                ("v", values),
            )
        )
        o = b.attention(q, k, v, bias=offsets.offset_bias(b, "offsets", self.num_heads, height, width))
        y = b.matmul(b.merge_heads(o), b.parameter("out", ((heads, values), (Axis("d_model", d_model),))))
        y = y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")
        return b.reshape(y, *x.shape)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        tokens = np.reshape(x, (batch, -1, d_model))
        q, k, v = (
            reference.split_heads(tokens @ params[name] + params[f"{name}_bias"], self.num_heads) for name in "qkv"
        )
        o = np.zeros_like(v)
        for t in range(height * width):
            for h in range(self.num_heads):
                scores = np.einsum("bk,bsk->bs", q[:, t, h], k[:, :, h]) / self.head_dim**0.5
                query = divmod(t, width)
                scores += offsets.offset_bias_reference(params["offsets"], h, query, width, height * width)
                o[:, t, h] = np.einsum("bs,bsv->bv", reference.softmax(scores), v[:, :, h])
        return np.reshape(reference.merge_heads(o) @ params["out"] + params["out_bias"], x.shape)
