"""Perceptron with a learned polynomial between its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, ChannelMixer, Limit, option
from ir.op import Array
from ir.types import Axis


def _without_weight(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The matrices of a perceptron whose second one has taken up the weight of the only power."""
    return {**params, "down": params["down"] * params["weights"][0]}


class PolyMlp(ChannelMixer):
    """Two-layer perceptron with a polynomial composition activation (Zhuo et al. 2025, PolyCom).

    y = p(x W_up) W_down with hidden width F = round(expansion * D) and powers i = 1 to r:

    - relu: p(h) = sum_i a_i relu(h)^i + a_0
    - norm: p(h) = sum_i a_i h^i / rms(h^i) + a_0, with the root mean square over the F hidden channels

    The a_i begin at 1 / r and a_0 at 0; they serve all channels.
    2 D F + r + 1 parameters, 4 D F FLOPs a token.
    """

    paper = "Zhuo et al. 2025, Polynomial Composition Activations, arXiv 2411.03884"
    aliases: ClassVar[Aliases] = {"polyrelu": {"power_of": "relu"}, "polynorm": {"power_of": "norm"}}
    cases = (
        Case(),
        Case({"power_of": "norm"}),
        Case({"power_of": "norm", "order": 2, "expansion": 1.4}, batch=1, time=3, d_model=5),
        Case({"order": 1}, d_model=5),
    )
    limits = (
        Limit(
            "the first power of the ReLU alone is the ReLU",
            Case({"order": 1}),
            "mlp",
            {"activation": "relu"},
            values={"offset": 0.0},
            adapt=_without_weight,
        ),
    )

    expansion: float = option(4.0, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    order: int = option(3, minimum=1, maximum=8, doc="Highest power.")
    power_of: Literal["relu", "norm"] = option(
        "relu", choices=("relu", "norm"), doc="Powers of the ReLU, or normed powers."
    )

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", max(1, round(self.expansion * d_model.size)))
        h = b.linear(x, "up", (hidden,))
        if self.power_of == "relu":
            h = b.relu(h)
        weights = b.parameter("weights", ((Axis("power", self.order),),), f"constant({1.0 / self.order:g})")
        total, power = b.parameter("offset", ((Axis("scalar", 1),),), "constant(0)"), h
        for exponent in range(1, self.order + 1):
            power = h if exponent == 1 else power * h
            term = b.rms_norm(power, epsilon=1e-6) if self.power_of == "norm" else power
            total = total + term * b.slice(weights, 0, exponent - 1, exponent)
        return b.matmul(total, b.parameter("down", ((hidden,), (d_model,))))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        h = x @ params["up"]
        p = np.zeros_like(h) + params["offset"][0]
        for exponent, a in enumerate(params["weights"], 1):
            if self.power_of == "relu":
                p += a * np.maximum(h, 0.0) ** exponent
            else:
                p += a * h**exponent / np.sqrt(np.mean(h ** (2 * exponent), axis=-1, keepdims=True) + 1e-6)
        return p @ params["down"]
