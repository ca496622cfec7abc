"""Attention over most channels, and a convolution of what it gives over the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces import reference
from searchspaces.token_mixers.multi_head_conv_attention import MultiHeadConvAttention


def _as_softmax_attention(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Parameters with the batch norm before queries, keys and values folded into them."""
    factor = params["norm_scale"] / np.sqrt(params["norm_variance"] + 1e-5)
    shift = params["norm_bias"] - params["norm_mean"] * factor
    folded = dict(params)
    for name in ("q", "k", "v"):
        folded[name] = factor[:, None] * params[name]
        folded[f"{name}_bias"] = params[f"{name}_bias"] + shift @ params[name]
    return folded


class AttentionConvSplit(TokenMixer):
    """Low frequencies by attention and high ones by convolution, Next-ViT's transformer block (Li et al. 2022).

    x = [a, c] over an image, a of P channels, about share * D and a multiple of the size K of a head; z = bn(a);
    e = attention of z to the means of R consecutive tokens of z, normed by a batch norm if R > 1;
    p = bn((a + e) W_project); y = [e, p + multi_head_conv_attention(p)]. With a residual branch around it and zeros in
    c, the result is [a + e, p + ...], the published block that widens P to D channels. T^2 / R in tokens.
    """

    paper = (
        "Li et al. 2022, Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic "
        "Industrial Scenarios, arXiv 2207.05501"
    )
    spatial = True
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"head_dim": 3, "reduction": 4}, grid=(5, 4), d_model=12),
        Case({"head_dim": 2, "reduction": 3, "share": 0.5}, grid=(3, 7), d_model=8, batch=1),
        Case({"head_dim": 4, "share": 1.0}, grid=(3, 4), d_model=8),
    )
    limits = (
        Limit(
            "over all channels and with every token a key it is softmax attention",
            Case({"head_dim": 4, "share": 1.0}, grid=(3, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            adapt=_as_softmax_attention,
        ),
    )

    share: float = option(0.75, minimum=0.1, maximum=1.0, doc="Share of the channels that attend.")
    head_dim: int = option(32, minimum=1, maximum=4096, doc="Channels of a head, of attention and of convolution.")
    reduction: int = option(1, minimum=1, maximum=4096, doc="Consecutive tokens whose mean is one key and value.")

    def check(self, d_model: int) -> str | None:
        return f"head_dim {self.head_dim} does not divide d_model {d_model}" if d_model % self.head_dim else None

    def _attending(self, d_model: int) -> int:
        wanted = int(d_model * self.share)
        size = max(self.head_dim, int(wanted + self.head_dim / 2) // self.head_dim * self.head_dim)
        return min(d_model, size if size >= 0.9 * wanted else size + self.head_dim)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        size = self._attending(d_model)
        a = b.slice(x, -1, 0, size)
        z = b.reshape(b.batch_norm(a, "norm"), batch, height * width, size)
        e = b.reshape(self._attend(b, z), batch, height, width, size)
        if size == d_model:
            return e
        p = b.batch_norm(b.linear(a + e, "project", (Axis("channels", d_model - size),)), "project_norm")
        with b.scope("conv"):
            return b.concat(-1, e, p + self._convolution().build(b, p))

    def _convolution(self) -> MultiHeadConvAttention:
        return MultiHeadConvAttention.create({"head_dim": self.head_dim})

    def _attend(self, b: Builder, z: Tensor) -> Tensor:
        tokens, size = z.shape[1:]
        heads = Axis("heads", size // self.head_dim), Axis("head_dim", self.head_dim)
        means = z
        if self.reduction > 1:
            rest = -tokens % self.reduction
            means = b.pool(z, Pool("average", (self.reduction,), (self.reduction,), ((0, rest),)))
            means = b.batch_norm(means, "means_norm")
        q, k, v = (
            b.split_heads(b.linear(each, name, heads, bias=True), heads[0].size)
            for name, each in (("q", z), ("k", means), ("v", means))
        )
        e = b.matmul(
            b.merge_heads(b.attention(q, k, v)), b.parameter("out", (heads, (Axis("channels", size),)), "normal(0.02)")
        )
        return e + b.parameter("out_bias", ((Axis("channels", size),),), "constant(0)")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        size = self._attending(x.shape[-1])
        a = x[..., :size]
        z = np.reshape(reference.batch_norm(params, "norm", a), (x.shape[0], -1, size))
        e = np.reshape(self._attend_reference(params, z), a.shape)
        if size == x.shape[-1]:
            return e
        p = reference.batch_norm(params, "project_norm", (a + e) @ params["project"])
        own = {name.removeprefix("conv."): array for name, array in params.items() if name.startswith("conv.")}
        return np.concatenate([e, p + self._convolution().reference(own, p)], axis=-1)

    def _attend_reference(self, params: Mapping[str, Array], z: Array) -> Array:
        heads, means = z.shape[-1] // self.head_dim, z
        if self.reduction > 1:
            starts = range(0, z.shape[1], self.reduction)
            means = np.stack([z[:, start : start + self.reduction].mean(axis=1) for start in starts], axis=1)
            means = reference.batch_norm(params, "means_norm", means)
        q, k, v = (
            reference.split_heads(each @ params[name] + params[f"{name}_bias"], heads)
            for name, each in (("q", z), ("k", means), ("v", means))
        )
        o = np.zeros_like(q)
        for t in range(z.shape[1]):
            for h in range(heads):
                weights = reference.softmax(np.einsum("bk,bsk->bs", q[:, t, h], k[:, :, h]) / self.head_dim**0.5)
                o[:, t, h] = np.einsum("bs,bsk->bk", weights, v[:, :, h])
        return reference.merge_heads(o) @ params["out"] + params["out_bias"]
