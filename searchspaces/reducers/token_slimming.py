"""Tokens as learned mixtures of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Reducer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference


class TokenSlimming(Reducer):
    """Token slimming module (Zong et al. 2022, SiT): M tokens out of N, each a learned mixture of all.

    A = softmax_n((gelu(norm(x) W_1 + b_1) W_2 + b_2) * s), A `[N, M]`; y = A^T x. W_1 is D x ratio * D, W_2 ratio * D x
    M, s one learned number that begins at 1. With `class_token` the first token stays apart and as it is. In training
    the paper distils from the unslimmed model by a reverse module, which is no part of the deployed one.
    """

    paper = "Zong et al. 2022, Self-slimmed Vision Transformer, arXiv 2111.12624"
    cases = (
        Case({"keep": 0.5, "class_token": False}),
        Case({"keep": 0.4, "ratio": 1.0, "class_token": False}, batch=1, time=9, d_model=5),
        Case({"keep": 0.5, "class_token": True}, time=8),
    )

    keep: float = option(0.5, minimum=0.01, maximum=1.0, doc="Tokens that are left over tokens there were.")
    ratio: float = option(0.5, minimum=0.01, maximum=16.0, doc="Hidden width over model width.")
    class_token: bool = option(False, doc="Leave the first token as it is.")

    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        if not self.class_token:
            return self._slim(b, x)
        first, others = b.split(x, 1, 1, x.shape[1] - 1)
        return b.concat(1, first, self._slim(b, others))

    def _slim(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", max(1, round(self.ratio * d_model.size)))
        left = Axis("tokens", math.ceil(self.keep * x.shape[1]))
        scale, bias = (
            b.parameter("norm_scale", ((d_model,),), "constant(1)"),
            b.parameter("norm_bias", ((d_model,),), "constant(0)"),
        )
        h = b.gelu(b.linear(b.layer_norm(x, scale, bias), "up", (hidden,), bias=True))
        scores = b.matmul(h, b.parameter("down", ((hidden,), (left,)))) + b.parameter(
            "down_bias", ((left,),), "constant(0)"
        )
        a = b.softmax(scores * b.parameter("sharpness", ((Axis("one", 1),),), "constant(1)"), 1)
        return b.matmul(a, x, transpose_a=True)

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        others = x[:, 1:] if self.class_token else x
        normed = reference.layer_norm(others) * params["norm_scale"] + params["norm_bias"]
        scores = reference.gelu(normed @ params["up"] + params["up_bias"]) @ params["down"] + params["down_bias"]
        y = np.zeros((x.shape[0], scores.shape[-1], x.shape[-1]))
        for m in range(scores.shape[-1]):
            shares = reference.softmax(scores[:, :, m] * params["sharpness"])
            for n in range(others.shape[1]):
                y[:, m] += shares[:, n, None] * others[:, n]
        return np.concatenate([x[:, :1], y], axis=1) if self.class_token else y
