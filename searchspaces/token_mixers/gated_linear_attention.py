"""Gated linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, State, TokenMixer, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis, TensorType
from searchspaces import reference


class GatedLinearAttention(TokenMixer):
    """Gated linear attention (Yang et al. 2024): a matrix state whose rows decay by data-dependent gates.

    In each of H heads, with keys of size K = expand_k * D / H and values of size V = expand_v * D / H:
    a_t = sigmoid(x_t W_1 W_2 + b)^(1 / tau), S_t = Diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K);
    y_t = (concat_h(rms_norm(o_t)) * swish(x_t W_r)) W_out. Linear in T. State: H K V.
    """

    paper = "Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635"
    aliases: ClassVar[Aliases] = {"gla": {}}
    causality = "causal"
    forms = FORMS
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "gate_rank": 3, "gate_temperature": 2.0}, time=11),
        Case({"num_heads": 1, "gate_temperature": 0.5}, batch=1, time=3, d_model=6),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    expand_k: float = option(0.5, minimum=0.01, maximum=16.0, doc="Width of all keys over model width.")
    expand_v: float = option(1.0, minimum=0.01, maximum=16.0, doc="Width of all values over model width.")
    gate_rank: int = option(16, minimum=1, maximum=4096, doc="Rank of the gate's matrix.")
    gate_temperature: float = option(
        16.0, minimum=0.01, doc="Divides the logarithm of the gate: larger forgets slower."
    )
    form: Form = option("auto", choices=FORMS, doc="How the recurrence is computed.")

    def check(self, d_model: int) -> str | None:
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = round(expand * d_model)
            if width < 1 or width % self.num_heads:
                return f"num_heads {self.num_heads} does not divide {name} * d_model = {width}"
        return None

    def _sizes(self, d_model: int) -> tuple[Axis, Axis, Axis]:
        """Axes of heads, key size and value size."""
        key_dim, value_dim = (round(expand * d_model) // self.num_heads for expand in (self.expand_k, self.expand_v))
        return Axis("heads", self.num_heads), Axis("key_dim", key_dim), Axis("value_dim", value_dim)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return self._mix(b, x, None)[0]

    def _mix(self, b: Builder, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        heads, key_dim, value_dim = self._sizes(x.shape[-1])
        rank = Axis("rank", self.gate_rank)
        q, k = (b.split_heads(b.linear(x, name, (heads, key_dim)), heads.size) for name in ("q", "k"))
        v = b.split_heads(b.linear(x, "v", (heads, value_dim)), heads.size)
        z = b.matmul(b.linear(x, "gate_down", (rank,)), b.parameter("gate_up", ((rank,), (heads, key_dim))))
        z = z + b.parameter("gate_bias", ((heads, key_dim),), "constant(0)")
        log_decay = b.split_heads(b.softplus(-z) * (-1.0 / self.gate_temperature), heads.size)
        scale = key_dim.size**-0.5
        o, last = b.outer_scan(q, k, v, log_decay, decay="key", scale=scale, state=state, form=self.form)
        o = b.merge_heads(b.rms_norm(o, b.parameter("norm", ((value_dim,),), "constant(1)")))
        o = o * b.silu(b.linear(x, "output_gate", (heads, value_dim)))
        return b.matmul(o, b.parameter("out", ((heads, value_dim), (Axis("d_model", x.shape[-1]),)))), last

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"memory": TensorType((batch, *(axis.size for axis in self._sizes(d_model))))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, last = self._mix(b, x, state["memory"])
        return y, {"memory": last}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        alpha = reference.sigmoid(x @ params["gate_down"] @ params["gate_up"] + params["gate_bias"])
        a = reference.split_heads(alpha ** (1.0 / self.gate_temperature), self.num_heads)
        batch, steps, heads, key_dim = q.shape
        memory, o = np.zeros((batch, heads, key_dim, v.shape[-1])), np.zeros_like(v)
        for t in range(steps):
            memory = a[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
            o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], memory) / key_dim**0.5
        o = reference.merge_heads(reference.rms_norm(o) * params["norm"])
        return (o * reference.silu(x @ params["output_gate"])) @ params["out"]
