"""Mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, ChannelMixer, Limit, option
from ir.op import Array
from ir.types import Axes, Axis
from searchspaces import reference
from searchspaces.parts import ACTIVATIONS, Activation


def _averaged(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Matrices of one wide perceptron: three experts of equal weight."""
    return {**params, "down": params["down"] / 3.0, "down_bias": params["down_bias"].mean(axis=0)}


class MixtureOfExperts(ChannelMixer):
    """Perceptrons of which each token uses some (Shazeer et al. 2017), with experts for all tokens (Dai et al. 2024).

    y = sum_e w_e expert_e(x) + shared(x), the sum over the k experts of highest score (x W_router)_e out of E. Their
    weights w are the softmax of their scores, or their share in the softmax of all scores (`top_of_softmax`). An expert
    is act(x W_up) W_down of hidden width F = round(expansion * D), or with `gated` (act(x W_gate) * (x W_up)) W_down;
    `shared` likewise, of width round(shared_expansion * D). The router may stay as it began (Chen et al. 2023,
    SMoE-Dropout).

    No token is dropped and no expert has a capacity: all E experts are computed and weighed, those that a token does
    not use by zero. 2 E D F parameters, 3 E D F gated, D E of the router.
    """

    paper = (
        "Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv 1701.06538; "
        "Chen et al. 2023, Sparse MoE as the New Dropout, arXiv 2303.01610; "
        "Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066; Fei et al. 2024, DiT-MoE, arXiv 2407.11633"
    )
    aliases: ClassVar[Aliases] = {
        "moe": {},
        "smoe_dropout": {"trained_router": False, "activation": "relu", "bias": True},
    }
    cases = (
        Case({"num_experts": 3, "top_k": 2, "expansion": 1.5}),
        Case(
            {"num_experts": 5, "top_k": 1, "weighting": "top_of_softmax", "gated": True, "activation": "silu"}, time=5
        ),
        Case({"num_experts": 3, "top_k": 2, "shared_expansion": 0.6, "gated": True, "bias": False}, batch=1, d_model=5),
        Case({"num_experts": 4, "top_k": 3, "trained_router": False, "activation": "relu", "bias": True}),
        Case({"num_experts": 3, "top_k": 3, "bias": True, "shared_expansion": 1.0}, time=3, d_model=5),
    )
    limits = (
        Limit("one expert is a perceptron", Case({"num_experts": 1, "top_k": 1, "bias": True}), "mlp", {"bias": True}),
        Limit(
            "one gated expert is a gated linear unit",
            Case({"num_experts": 1, "top_k": 1, "gated": True, "activation": "silu"}),
            "glu",
            {"expansion": 4.0, "multiple": 1},
        ),
        Limit(
            "all experts by an undecided router are one wide perceptron",
            Case({"num_experts": 3, "top_k": 3, "expansion": 2.0, "bias": True}),
            "mlp",
            {"expansion": 6.0, "bias": True},
            values={"router": 0.0, "router_bias": 0.0},
            adapt=_averaged,
        ),
    )

    num_experts: int = option(8, minimum=1, maximum=4096, doc="Experts.")
    top_k: int = option(2, minimum=1, maximum=4096, doc="Experts that a token uses.")
    expansion: float = option(4.0, minimum=0.01, maximum=64.0, doc="Hidden width of an expert over model width.")
    shared_expansion: float = option(0.0, minimum=0.0, maximum=64.0, doc="The same of the expert for all; 0 for none.")
    activation: Activation = option("gelu", choices=tuple(ACTIVATIONS), doc="Function inside the experts.")
    gated: bool = option(False, doc="Experts are gated linear units.")
    bias: bool = option(False, doc="Add learned biases to the router and after the experts' matrices.")
    weighting: Literal["softmax_of_top", "top_of_softmax"] = option(
        "softmax_of_top", choices=("softmax_of_top", "top_of_softmax"), doc="Whether weights of a token sum to 1."
    )
    trained_router: bool = option(True, doc="Train the router; else it stays as it began.")

    def check(self, d_model: int) -> str | None:
        if self.top_k > self.num_experts:
            return f"top_k {self.top_k} is more than num_experts {self.num_experts}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        experts, d_model = Axis("experts", self.num_experts), Axis("d_model", x.shape[-1])
        weights = self._weights(b, x)
        width = max(1, round(self.expansion * d_model.size))
        both = (experts, Axis("hidden", width))
        h = b.reshape(self._hidden(b, x, "", both), *x.shape[:-1], self.num_experts, width)
        h = b.reshape(h * b.reshape(weights, *weights.shape, 1), *x.shape[:-1], self.num_experts * width)
        y = b.matmul(h, b.parameter("down", (both, (d_model,)), f"fan_in({self.num_experts})"))
        if self.bias:
            y = y + b.matmul(weights, b.parameter("down_bias", ((experts,), (d_model,)), "constant(0)"))
        if self.shared_expansion:
            hidden = (Axis("hidden", max(1, round(self.shared_expansion * d_model.size))),)
            shared = b.matmul(self._hidden(b, x, "shared_", hidden), b.parameter("shared_down", (hidden, (d_model,))))
            y = y + shared
            y = y + b.parameter("shared_down_bias", ((d_model,),), "constant(0)") if self.bias else y
        return y

    def _hidden(self, b: Builder, x: Tensor, prefix: str, axes: tuple[Axis, ...]) -> Tensor:
        """What the second matrix of an expert gets, for all experts side by side."""
        up = b.linear(x, f"{prefix}up", axes, bias=self.bias)
        activation = ACTIVATIONS[self.activation]
        return activation(b, b.linear(x, f"{prefix}gate", axes)) * up if self.gated else activation(b, up)

    def _weights(self, b: Builder, x: Tensor) -> Tensor:
        """Weight of each expert `[..., E]`, zero for those that a token does not use."""
        experts = (Axis("experts", self.num_experts),)
        axes: Axes = ((Axis("d_model", x.shape[-1]),), experts)
        scores = b.matmul(x, b.parameter("router", axes, trained=self.trained_router))
        if self.bias:
            scores = scores + b.parameter("router_bias", (experts,), "constant(0)", trained=self.trained_router)
        if self.weighting == "top_of_softmax" or self.top_k == self.num_experts:
            scores = b.softmax(scores)
        if self.top_k == self.num_experts:
            return scores
        top, chosen = b.top_k(scores, self.top_k)
        if self.weighting == "softmax_of_top":
            top = b.softmax(top)
        return b.scatter_add(b.broadcast(b.constant(0.0), *scores.shape), chosen, top, -1)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        tokens = np.reshape(x, (-1, x.shape[-1]))
        y = np.zeros_like(tokens)
        for t, token in enumerate(tokens):
            scores = token @ params["router"] + params.get("router_bias", 0.0)
            chosen = np.argsort(-scores, kind="stable")[: self.top_k]
            share = reference.softmax(scores)[chosen]
            weights = share if self.weighting == "top_of_softmax" else reference.softmax(scores[chosen])
            for e, weight in zip(chosen, weights, strict=True):
                y[t] += weight * self._expert(params, "", token, int(e), self.num_experts)
            if self.shared_expansion:
                y[t] += self._expert(params, "shared_", token, 0, 1)
        return np.reshape(y, x.shape)

    def _expert(self, params: Mapping[str, Array], prefix: str, token: Array, e: int, count: int) -> Array:
        """Output of expert e of the `count` whose matrices lie side by side."""
        width = params[f"{prefix}up"].shape[1] // count
        own = slice(e * width, (e + 1) * width)
        up = token @ params[f"{prefix}up"][:, own]
        if self.bias:
            up = up + params[f"{prefix}up_bias"][own]
        activation = reference.ACTIVATIONS[self.activation]
        h = activation(token @ params[f"{prefix}gate"][:, own]) * up if self.gated else activation(up)
        y = h @ params[f"{prefix}down"][own]
        return y + np.reshape(params[f"{prefix}down_bias"], (count, -1))[e] if self.bias else y
