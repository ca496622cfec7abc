"""Attention of one head over a part of the channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.norms.group_norm import GroupNorm


def _without_batch_norms(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The parameters with each batch norm folded into the product before it."""
    folded: dict[str, Array] = {}
    for name in ("q", "k", "v", "out"):
        folded[name], folded[f"{name}_bias"] = reference.fold_batch_norm(params, name)
    return folded


class SingleHeadAttention(TokenMixer):
    """Single-head attention over a share of the channels (Yun and Ro 2024, SHViT).

    x = [a, c] with a `[B, T, P]`, P the even number nearest to share * D; a' = group_norm(a) over all tokens;
    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s with q, k, v = bn(a' W), sizes K, K, P; y = bn(relu([o, c]) W_out).
    P (2 K + P) + D^2 parameters beside the norms. T^2 in tokens.
    """

    paper = "Yun, Ro 2024, SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, arXiv 2401.16456"
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"key_dim": 5}, d_model=14),
        Case({"key_dim": 3, "share": 0.5}, batch=1, time=9, d_model=9),
        Case({"key_dim": 4, "share": 1.0, "norm": False}, time=5, d_model=6),
    )
    limits = (
        Limit(
            "over all channels, without norms, and with values above zero it is softmax attention of one head",
            Case({"key_dim": 12, "share": 1.0, "norm": False}),
            "softmax_attention",
            {"num_heads": 1, "bias": True, "causal": False},
            values={"v_norm_bias": 60.0},
            adapt=_without_batch_norms,
        ),
    )

    share: float = option(0.214, minimum=0.01, maximum=1.0, doc="Share of the channels that attend.")
    key_dim: int = option(16, minimum=1, maximum=1024, doc="Size of queries and keys.")
    norm: bool = option(True, doc="Group norm of the channels that attend.")

    def _attending(self, d_model: int) -> int:
        return min(d_model, max(1, 2 * round(self.share * d_model / 2)))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model, size = x.shape[-1], self._attending(x.shape[-1])
        a = b.slice(x, -1, 0, size)
        if self.norm:
            with b.scope("norm"):
                a = GroupNorm.create({}).build(b, a)
        sizes = {"q": self.key_dim, "k": self.key_dim, "v": size}
        q, k, v = (
            b.split_heads(b.batch_norm(b.linear(a, name, (Axis("head_dim", width),)), f"{name}_norm"), 1)
            for name, width in sizes.items()
        )
        o = b.merge_heads(b.attention(q, k, v))
        y = o if size == d_model else b.concat(-1, o, b.slice(x, -1, size, d_model))
        return b.batch_norm(b.linear(b.relu(y), "out", (Axis("d_model", d_model),)), "out_norm")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        size = self._attending(x.shape[-1])
        a, y = x[..., :size], np.array(x)
        if self.norm:
            mean, variance = a.mean(axis=(1, 2), keepdims=True), a.var(axis=(1, 2), keepdims=True)
            a = (a - mean) / np.sqrt(variance + 1e-5) * params["norm.scale"] + params["norm.bias"]
        q, k, v = (reference.batch_norm(params, f"{name}_norm", a @ params[name]) for name in ("q", "k", "v"))
        for t in range(x.shape[1]):
            weights = reference.softmax(np.einsum("bk,bsk->bs", q[:, t], k) / self.key_dim**0.5)
            y[:, t, :size] = np.einsum("bs,bsp->bp", weights, v)
        return reference.batch_norm(params, "out_norm", np.maximum(y, 0.0) @ params["out"])
