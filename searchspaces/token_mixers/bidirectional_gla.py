"""Gated linear attention over an image, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, TokenMixer, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis
from searchspaces import convolutions, reference


class BidirectionalGla(TokenMixer):
    """Gated linear attention from the first pixel on and from the last one back (Liao et al. 2024, ViG).

    z = silu(conv(x)), a depthwise 3 x 3 window; q, k, v = z W in H heads, a^f, a^b = sigmoid(z W_1 W_2 + b)^(1 / tau).
    Forward S_t = Diag(a^f_t) S_(t-1) + k_t v_t^T, backward the same from the end with a^b, o_t = (S^f_t + S^b_t)^T
    q_t / (2 sqrt(K)). With g = sigmoid(z W_g + b_g): y = silu(g * rms_norm(o) + (1 - g) * rms_norm(z)) W_out, norms per
    head. Linear in the number of tokens.
    """

    paper = (
        "Liao et al. 2024, ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention, "
        "arXiv 2405.18425"
    )
    aliases: ClassVar[Aliases] = {"bigla": {}}
    spatial = True
    causality = "bidirectional"
    forms = FORMS
    cases = (
        Case({"num_heads": 3}, grid=(4, 5)),
        Case({"num_heads": 1, "expand_k": 1.0, "gate_rank": 3, "gate_temperature": 2.0}, grid=(3, 3), d_model=5),
        Case({"num_heads": 2, "output_activation": False}, grid=(5, 2), d_model=8, batch=1),
    )

    num_heads: int = option(3, minimum=1, maximum=1024, doc="Heads.")
    expand_k: float = option(0.5, minimum=0.01, maximum=16.0, doc="Width of all keys over model width.")
    gate_rank: int = option(16, minimum=1, maximum=4096, doc="Rank of the gates' matrix.")
    gate_temperature: float = option(
        16.0, minimum=0.01, doc="Divides the logarithm of the gates: larger forgets slower."
    )
    output_activation: bool = option(True, doc="Put SiLU before the last matrix.")
    form: Form = option("auto", choices=FORMS, doc="How the recurrences are computed.")

    def check(self, d_model: int) -> str | None:
        for name, width in (("d_model", d_model), ("expand_k * d_model", round(self.expand_k * d_model))):
            if width < 1 or width % self.num_heads:
                return f"num_heads {self.num_heads} does not divide {name} = {width}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads, count = Axis("heads", self.num_heads), self.num_heads
        key_dim, value_dim = (
            Axis("key_dim", round(self.expand_k * d_model) // count),
            Axis("value_dim", d_model // count),
        )
        z = b.silu(convolutions.depthwise(b, x, "kernel", 3, bias=False))
        z = b.reshape(z, batch, height * width, d_model)
        q, k = (b.split_heads(b.linear(z, name, (heads, key_dim)), count) for name in "qk")
        v = b.split_heads(b.linear(z, "v", (heads, value_dim)), count)
        low = b.linear(z, "gate_down", (Axis("rank", self.gate_rank),))
        ways: list[Tensor] = []
        for way in ("forward", "backward"):
            gates = b.matmul(low, b.parameter(f"gate_{way}", ((Axis("rank", self.gate_rank),), (heads, key_dim))))
            gates = gates + b.parameter(f"gate_{way}_bias", ((heads, key_dim),), "constant(0)")
            gates = b.split_heads(b.softplus(-gates) / -self.gate_temperature, count)
            given = (q, k, v, gates) if way == "forward" else tuple(_turned(b, part) for part in (q, k, v, gates))
            o, _ = b.outer_scan(*given, decay="key", scale=0.5 * key_dim.size**-0.5, form=self.form)
            ways.append(o if way == "forward" else _turned(b, o))
        o = b.rms_norm(ways[0] + ways[1], b.parameter("norm", ((value_dim,),), "constant(1)"))
        near = b.rms_norm(b.split_heads(z, count), b.parameter("near_norm", ((value_dim,),), "constant(1)"))
        g = b.split_heads(b.sigmoid(b.linear(z, "output_gate", (heads, value_dim), bias=True)), count)
        o = b.merge_heads(near + g * (o - near))
        o = b.silu(o) if self.output_activation else o
        y = b.matmul(o, b.parameter("out", ((heads, value_dim), (Axis("d_model", d_model),))))
        return b.reshape(y, batch, height, width, d_model)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        z = reference.silu(reference.convolve(x, params["kernel"], groups=d_model))
        z = np.reshape(z, (batch, height * width, d_model))
        q, k, v = (reference.split_heads(z @ params[name], self.num_heads) for name in "qkv")
        total = np.zeros_like(v)
        for way, order in (("forward", range(height * width)), ("backward", range(height * width - 1, -1, -1))):
            alpha = reference.sigmoid(z @ params["gate_down"] @ params[f"gate_{way}"] + params[f"gate_{way}_bias"])
            a = reference.split_heads(alpha ** (1.0 / self.gate_temperature), self.num_heads)
            memory = np.zeros((batch, self.num_heads, q.shape[-1], v.shape[-1]))
            for t in order:
                memory = a[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
                total[:, t] += np.einsum("bhk,bhkv->bhv", q[:, t], memory) / q.shape[-1] ** 0.5
        o = reference.rms_norm(total / 2.0) * params["norm"]
        near = reference.rms_norm(reference.split_heads(z, self.num_heads)) * params["near_norm"]
        g = reference.split_heads(
            reference.sigmoid(z @ params["output_gate"] + params["output_gate_bias"]), self.num_heads
        )
        o = reference.merge_heads(g * o + (1.0 - g) * near)
        o = reference.silu(o) if self.output_activation else o
        return np.reshape(o @ params["out"], x.shape)


def _turned(b: Builder, x: Tensor) -> Tensor:
    """The tokens of x `[B, T, H, K]` from the last to the first."""
    return b.gather(x, b.constant(np.reshape(range(x.shape[1] - 1, -1, -1), (1, -1, 1, 1))), 1)
