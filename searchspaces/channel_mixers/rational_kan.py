"""Kolmogorov-Arnold layers with rational functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, ChannelMixer, option
from ir.op import Array
from ir.ops.elementwise import Abs
from ir.types import Axis

_IDENTITY: Final = ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
_SILU: Final = (  # SiLU between -3 and 3, rounded from the paper's fit
    (0.0, 0.5, 0.25, 0.0532663, 0.005803, 0.0002752),
    (0.0, 0.106529, 0.0, 0.0005502),
)
_SILU_GAIN: Final = 2.81782  # 1 / E[silu(z)^2] for standard normal z


class RationalKan(ChannelMixer):
    """Two group-rational Kolmogorov-Arnold layers, GR-KAN (Yang and Wang 2024).

    y = phi_2(phi_1(x) W_up + b) W_down + c with hidden width F = round(expansion * D) and

    phi(x) = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1| |x| + ... + |b_4| |x|^4),

    the numerator of each phi shared by all channels, the denominator by one of `groups` groups of them; with absolute
    values of each term as in the authors' code. phi_1 begins as the identity, phi_2 as SiLU, and the matrices so that
    the variance stays. 2 D F + D + F + 2 (6 + 4 groups) parameters.
    """

    paper = "Yang, Wang 2024, Kolmogorov-Arnold Transformer, arXiv 2409.10594"
    cases = (
        Case({"groups": 4}),
        Case({"groups": 1, "expansion": 1.4}, batch=1, time=3, d_model=5),
        Case({"groups": 2, "expansion": 0.5}),
    )

    expansion: float = option(4.0, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    groups: int = option(8, minimum=1, maximum=4096, doc="Groups of channels with a denominator of their own.")

    def check(self, d_model: int) -> str | None:
        for size in (d_model, self._hidden(d_model)):
            if size % self.groups:
                return f"groups {self.groups} does not divide {size} channels"
        return None

    def _hidden(self, d_model: int) -> int:
        return max(1, round(self.expansion * d_model))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model, hidden = Axis("d_model", x.shape[-1]), Axis("hidden", self._hidden(x.shape[-1]))
        h = b.linear(self._rational(b, x, "first", *_IDENTITY), "up", (hidden,), bias=True)
        h = self._rational(b, h, "second", *_SILU)
        down = b.parameter("down", ((hidden,), (d_model,)), f"fan_in({_SILU_GAIN})")
        return b.matmul(h, down) + b.parameter("down_bias", ((d_model,),), "constant(0)")

    def _rational(
        self, b: Builder, x: Tensor, name: str, numerator: Sequence[float], denominator: Sequence[float]
    ) -> Tensor:
        """phi of x, its parameters `name_a0` to `name_a5` and `name_b1` to `name_b4`; both polynomials by Horner."""
        grouped = b.reshape(x, *x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        size = b.apply(Abs(), grouped)
        one, groups = ((Axis("scalar", 1),),), ((Axis("groups", self.groups),), (Axis("channel", 1),))
        a = [b.parameter(f"{name}_a{i}", one, f"constant({value})") for i, value in enumerate(numerator)]
        d = [b.parameter(f"{name}_b{i}", groups, f"constant({value})") for i, value in enumerate(denominator, 1)]
        top = a[-1] * grouped
        for factor in reversed(a[1:-1]):
            top = (top + factor) * grouped
        below = b.apply(Abs(), d[-1]) * size
        for factor in reversed(d[:-1]):
            below = (below + b.apply(Abs(), factor)) * size
        return b.reshape((top + a[0]) / (below + 1.0), *x.shape)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        h = self._phi(params, "first", x) @ params["up"] + params["up_bias"]
        return self._phi(params, "second", h) @ params["down"] + params["down_bias"]

    def _phi(self, params: Mapping[str, Array], name: str, x: Array) -> Array:
        y, size = np.zeros_like(x), x.shape[-1] // self.groups
        for channel in range(x.shape[-1]):
            own, group = x[..., channel], channel // size
            top = sum(params[f"{name}_a{i}"][0] * own**i for i in range(6))
            below = 1.0 + sum(abs(params[f"{name}_b{i}"][group, 0]) * np.abs(own) ** i for i in range(1, 5))
            y[..., channel] = top / below
        return y
