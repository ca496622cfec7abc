"""Class logits of a token that attends all others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_SIGNATURE = Signature(modality="image", output="class", image_size=6, channels=3, num_classes=5)


class ClassAttention(Head):
    """Layers in which only a class token changes, then its scores (Touvron et al. 2021, CaiT; Yuan et al. 2022, VOLO).

    Each layer: c <- c + attention of c to (c, x), both normed; c <- c + mlp(norm(c)), with a hidden width of expansion
    * D. `logits` `[B, classes]` = norm(c) W + bias; with `dense`, as in VOLO, plus half the largest score over tokens
    of norm(x) W_dense + bias. Linear in T.
    """

    paper = (
        "Touvron et al. 2021, Going deeper with Image Transformers, arXiv 2103.17239; "
        "Yuan et al. 2022, VOLO: Vision Outlooker for Visual Recognition, arXiv 2106.13112"
    )
    output = "class"
    cases = (
        EndCase({"num_heads": 3}, signature=_SIGNATURE),
        EndCase({"num_heads": 1, "layers": 1, "dense": True}, batch=1, time=5, d_model=5, signature=_SIGNATURE),
    )

    layers: int = option(2, minimum=1, maximum=16, doc="Layers.")
    num_heads: int = option(12, minimum=1, maximum=1024, doc="Heads.")
    expansion: float = option(3.0, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    dense: bool = option(False, doc="Score the tokens too and add half of their maximum.")

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        batch, _, d_model = x.shape
        first = b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)")
        c = b.broadcast(b.reshape(first, 1, 1, d_model), batch, 1, d_model)
        for index in range(self.layers):
            with b.scope(f"layers.{index}"):
                c = c + self._attend(b, self._norm(b, b.concat(1, c, x), "norm_mixer"))
                c = c + self._mlp(b, self._norm(b, c, "norm_channel"))
        classes = (Axis("classes", signature.num_classes),)
        normed = self._norm(b, b.concat(1, c, x) if self.dense else c, "norm")
        logits = b.linear(b.reshape(b.slice(normed, 1, 0, 1), batch, d_model), "weight", classes, bias=True)
        if not self.dense:
            return logits
        others = b.slice(normed, 1, 1, normed.shape[1])
        return logits + b.max(b.linear(others, "dense", classes, bias=True), 1) * 0.5

    def _norm(self, b: Builder, x: Tensor, name: str) -> Tensor:
        axes = ((Axis("d_model", x.shape[-1]),),)
        scale = b.parameter(f"{name}_scale", axes, "constant(1)")
        return b.layer_norm(x, scale, b.parameter(f"{name}_bias", axes, "constant(0)"))

    def _attend(self, b: Builder, tokens: Tensor) -> Tensor:
        """Attention of the first token to all."""
        d_model = tokens.shape[-1]
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        q = b.split_heads(b.linear(b.slice(tokens, 1, 0, 1), "q", heads), self.num_heads)
        k, v = (b.split_heads(b.linear(tokens, name, heads), self.num_heads) for name in "kv")
        y = b.matmul(b.merge_heads(b.attention(q, k, v)), b.parameter("out", (heads, (Axis("d_model", d_model),))))
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def _mlp(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", max(1, round(self.expansion * d_model.size)))
        h = b.gelu(b.linear(x, "up", (hidden,), bias=True))
        y = b.matmul(h, b.parameter("down", ((hidden,), (d_model,))))
        return y + b.parameter("down_bias", ((d_model,),), "constant(0)")

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        c = np.broadcast_to(params["class_token"], (x.shape[0], 1, x.shape[2]))
        for index in range(self.layers):
            own = {name.removeprefix(f"layers.{index}."): array for name, array in params.items()}
            tokens = _normed(own, "norm_mixer", np.concatenate([c, x], axis=1))
            q = reference.split_heads(tokens[:, :1] @ own["q"], self.num_heads)
            k, v = (reference.split_heads(tokens @ own[name], self.num_heads) for name in "kv")
            weights = reference.softmax(np.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5)
            o = reference.merge_heads(np.einsum("bhts,bshk->bthk", weights, v))
            c = c + o @ own["out"] + own["out_bias"]
            h = reference.gelu(_normed(own, "norm_channel", c) @ own["up"] + own["up_bias"])
            c = c + h @ own["down"] + own["down_bias"]
        logits = _normed(params, "norm", c)[:, 0] @ params["weight"] + params["weight_bias"]
        if not self.dense:
            return logits
        scores = _normed(params, "norm", x) @ params["dense"] + params["dense_bias"]
        return logits + 0.5 * scores.max(axis=1)


def _normed(params: Mapping[str, Array], name: str, x: Array) -> Array:
    return reference.layer_norm(x) * params[f"{name}_scale"] + params[f"{name}_bias"]
