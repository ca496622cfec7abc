"""Attention to learned tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, ChannelMixer, Limit, option
from ir.op import Array
from ir.types import Axis
from searchspaces import token_parameters


class ParameterAttention(ChannelMixer):
    """Attention of each token to learned keys and values, pattention (Wang et al. 2024, TokenFormer).

    s = x P^T, y = gelu(sqrt(n) s / |s|) V with keys P and values V `[n, D]`, n = round(expansion * D) of them: a
    perceptron whose scores have a fixed length. 2 D n parameters, 4 D n FLOPs a token.
    """

    paper = "Wang et al. 2024, TokenFormer: Rethinking Transformer Scaling with Tokenized Parameters, arXiv 2410.23168"
    aliases: ClassVar[Aliases] = {"pattention": {}}
    cases = (Case(), Case({"expansion": 1.4}, batch=1, time=3, d_model=5))
    limits = (
        Limit(
            "it grows without a change by taking each token twice",
            Case({"expansion": 1.0}),
            "parameter_attention",
            {"expansion": 2.0},
            adapt=lambda params: token_parameters.doubled(params, "tokens"),
        ),
    )

    expansion: float = option(4.0, minimum=0.1, maximum=64.0, doc="Learned tokens over model width.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        count = max(1, round(self.expansion * x.shape[-1]))
        return token_parameters.attend(b, x, "tokens", count, (Axis("d_model", x.shape[-1]),))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return token_parameters.attend_reference(params, "tokens", x)
