"""Attention whose queries, keys and values see near tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference


def _as_softmax_attention(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Parameters with convolutions of one token and their batch norms folded into the products after them."""
    folded = dict(params)
    for name in ("q", "k", "v"):
        kernel, shift = reference.fold_batch_norm(params, f"{name}_conv")
        folded[name] = kernel[0, 0, 0][:, None] * params[name]
        folded[f"{name}_bias"] = params[f"{name}_bias"] + shift @ params[name]
    return folded


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image that holds so many tokens: a square's, or a power of two and what it takes."""
    rows = math.isqrt(tokens)
    rows = rows if rows * rows == tokens else 2 ** (rows.bit_length() - 1)
    return rows, -(-tokens // rows)


class ConvProjectedAttention(TokenMixer):
    """Attention with convolutional projections (Wu et al. 2021, CvT).

    Tokens `[B, T, D]` in row order of a square image; with z(x) = bn(depthwise(x)) over K x K tokens, q = z_q(x) W_q,
    and keys and values of every S-th row and column, k = z_k(x) W_k, v = z_v(x) W_v;
    o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s in each head, y = concat_h(o) W_out, all products with biases. With
    `class_token` the first of several is no part of the image and goes to the products as it is. Zeros fill
    up the last row of an image that is no square.
    4 D^2 + 3 K^2 D parameters beside norms. T^2 / S^2 in tokens.
    """

    paper = "Wu et al. 2021, CvT: Introducing Convolutions to Vision Transformers, arXiv 2103.15808"
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"num_heads": 2}, time=9, d_model=6),
        Case({"num_heads": 3, "class_token": True}, time=10, d_model=6),
        Case({"num_heads": 1, "class_token": True}, time=7, d_model=5, batch=1),
        Case({"num_heads": 1, "kernel_size": 5, "stride": 1}, time=11, d_model=4),
    )
    limits = (
        Limit(
            "with convolutions of one token and one head it is softmax attention",
            Case({"num_heads": 1, "kernel_size": 1, "stride": 1}, time=9, d_model=6),
            "softmax_attention",
            {"num_heads": 1, "bias": True, "causal": False},
            adapt=_as_softmax_attention,
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    kernel_size: int = option(3, minimum=1, maximum=31, doc="Height and width of the windows, tokens; odd.")
    stride: int = option(2, minimum=1, maximum=31, doc="Rows and columns from one key to the next.")
    class_token: bool = option(False, doc="The first of several tokens is no part of the image.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None if self.kernel_size % 2 else f"kernel_size {self.kernel_size} is even"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = x.shape[-1]
        apart = self.class_token and x.shape[1] > 1
        first = b.slice(x, 1, 0, 1) if apart else None
        image = b.slice(x, 1, 1, x.shape[1]) if apart else x
        tokens, grid = image.shape[1], _grid(image.shape[1])
        filled = b.pad(image, 1, 0, math.prod(grid) - tokens) if math.prod(grid) > tokens else image
        image = b.reshape(filled, x.shape[0], *grid, d_model)
        heads = Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads)
        projected: list[Tensor] = []
        for name, stride in (("q", 1), ("k", self.stride), ("v", self.stride)):
            z = convolutions.conv_norm(
                b, image, f"{name}_conv", d_model, window=self.kernel_size, stride=stride, groups=d_model
            )
            z = b.reshape(z, x.shape[0], -1, d_model)
            z = b.slice(z, 1, 0, tokens) if name == "q" and z.shape[1] > tokens else z
            z = b.concat(1, first, z) if first is not None else z
            projected.append(b.split_heads(b.linear(z, name, heads, bias=True), self.num_heads))
        q, k, v = projected
        o = b.merge_heads(b.attention(q, k, v, scale=d_model**-0.5))
        y = b.matmul(o, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, _, d_model = x.shape
        apart = self.class_token and x.shape[1] > 1
        first, tokens = (x[:, :1], x[:, 1:]) if apart else (x[:, :0], x)
        grid = _grid(tokens.shape[1])
        filled = np.pad(tokens, ((0, 0), (0, math.prod(grid) - tokens.shape[1]), (0, 0)))
        image = np.reshape(filled, (batch, *grid, d_model))
        projected: list[Array] = []
        for name, stride in (("q", 1), ("k", self.stride), ("v", self.stride)):
            z = reference.convolve(image, params[f"{name}_conv"], stride, groups=d_model)
            z = np.reshape(reference.batch_norm(params, f"{name}_conv_norm", z), (batch, -1, d_model))
            z = np.concatenate([first, z[:, : tokens.shape[1]] if name == "q" else z], axis=1)
            projected.append(reference.split_heads(z @ params[name] + params[f"{name}_bias"], self.num_heads))
        q, k, v = projected
        o = np.zeros_like(q)
        for t in range(x.shape[1]):
            for h in range(self.num_heads):
                weights = reference.softmax(np.einsum("bk,bsk->bs", q[:, t, h], k[:, :, h]) / d_model**0.5)
                o[:, t, h] = np.einsum("bs,bsk->bk", weights, v[:, :, h])
        return reference.merge_heads(o) @ params["out"] + params["out_bias"]
