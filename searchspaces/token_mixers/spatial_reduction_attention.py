"""Attention to a smaller image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference


class SpatialReductionAttention(TokenMixer):
    """Attention whose keys and values come from patches of R x R tokens (Wang et al. 2021, PVT).

    z = layer_norm(conv(x)) with a window and a stride of R; o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over the
    tokens s of z, queries from x; y = concat_h(o) W_out. At R = 1 there is no z and it is plain attention. Zeros fill
    up sizes that R does not divide. (4 + R^2) D^2 parameters; T^2 / R^2 in tokens.
    """

    paper = "Wang et al. 2021, Pyramid Vision Transformer, arXiv 2102.12122, section 3.3"
    spatial = True
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"num_heads": 3, "reduction": 2}, grid=(4, 6)),
        Case({"num_heads": 2, "reduction": 3, "bias": False}, grid=(5, 7), d_model=6, batch=1),
        Case({"num_heads": 1, "reduction": 1}, grid=(3, 4), d_model=5),
    )
    limits = (
        Limit(
            "without reduction it is multi-head attention",
            Case({"num_heads": 3, "reduction": 1}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
        ),
    )

    num_heads: int = option(1, minimum=1, maximum=1024, doc="Heads.")
    reduction: int = option(2, minimum=1, maximum=64, doc="Height and width of the patch behind a key, tokens.")
    bias: bool = option(True, doc="Add learned biases to queries, keys, values and output.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        tokens = b.reshape(x, batch, height * width, d_model)
        q = b.split_heads(b.linear(tokens, "q", heads, bias=self.bias), self.num_heads)
        patches = self._reduced(b, x) if self.reduction > 1 else tokens
        k, v = (b.split_heads(b.linear(patches, name, heads, bias=self.bias), self.num_heads) for name in "kv")
        y = b.matmul(b.merge_heads(b.attention(q, k, v)), b.parameter("out", (heads, (Axis("d_model", d_model),))))
        y = y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)") if self.bias else y
        return b.reshape(y, batch, height, width, d_model)

    def _reduced(self, b: Builder, x: Tensor) -> Tensor:
        """Normed patches `[B, S, D]`."""
        ratio, d_model = self.reduction, x.shape[-1]
        x = convolutions.fill(b, x, ratio)
        z = convolutions.conv(b, x, "reduce", d_model, window=ratio, stride=ratio, padding=0, bias=True)
        axes = ((Axis("d_model", d_model),),)
        scale, bias = b.parameter("norm_scale", axes, "constant(1)"), b.parameter("norm_bias", axes, "constant(0)")
        return b.layer_norm(b.reshape(z, z.shape[0], z.shape[1] * z.shape[2], d_model), scale, bias)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        z, ratio = x, self.reduction
        if ratio > 1:
            z = np.pad(x, ((0, 0), (0, -x.shape[1] % ratio), (0, -x.shape[2] % ratio), (0, 0)))
            z = reference.convolve(z, params["reduce"], ratio, 0) + params["reduce_bias"]
            z = reference.layer_norm(z) * params["norm_scale"] + params["norm_bias"]
        sources = {"q": x, "k": z, "v": z}
        q, k, v = (
            reference.split_heads(
                np.reshape(source, (len(x), -1, x.shape[-1])) @ params[name] + params.get(f"{name}_bias", 0.0),
                self.num_heads,
            )
            for name, source in sources.items()
        )
        o = np.zeros_like(q)
        for t in range(q.shape[1]):
            scores = (q[:, t, None] * k).sum(axis=-1) / q.shape[-1] ** 0.5
            weights = reference.softmax(np.swapaxes(scores, 1, 2))
            o[:, t] = np.einsum("bhs,bshk->bhk", weights, v)
        return np.reshape(reference.merge_heads(o) @ params["out"] + params.get("out_bias", 0.0), x.shape)
