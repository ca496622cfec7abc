"""HGRN2: hierarchically gated recurrences with a matrix state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis, TensorType
from searchspaces import reference


class Hgrn2(TokenMixer):
    """HGRN2 (Qin et al. 2024): gated linear attention whose key is what the forget gate leaves.

    In each of H heads of size K = V = D / H: f_t = l + (1 - l) sigmoid(x_t W_f), k_t = 1 - f_t,
    S_t = Diag(f_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t with q_t = silu(x_t W_q), v_t = x_t W_v;
    y_t = concat_h(rms_norm(o_t)) W_out. 4 D^2 parameters. Linear in T. State: H K V.
    """

    paper = "Qin et al. 2024, HGRN2: Gated Linear RNNs with State Expansion, arXiv 2404.07904"
    causality = "causal"
    forms = FORMS
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 2, "lower_bound": 0.5}, batch=1, time=11),
        Case({"num_heads": 1}, time=3, d_model=5),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    lower_bound: float = option(0.0, minimum=0.0, maximum=0.999, doc="Smallest share of the state that stays.")
    form: Form = option("auto", choices=FORMS, doc="How the recurrence is computed.")

    def check(self, d_model: int) -> str | None:
        return f"num_heads {self.num_heads} does not divide d_model {d_model}" if d_model % self.num_heads else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return self._mix(b, x, None)[0]

    def _mix(self, b: Builder, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        d_model, heads = Axis("d_model", x.shape[-1]), Axis("heads", self.num_heads)
        head_dim = Axis("head_dim", d_model.size // heads.size)
        q, z, v = (b.split_heads(b.linear(x, name, (heads, head_dim)), heads.size) for name in ("q", "forget", "v"))
        f = b.sigmoid(z) * (1.0 - self.lower_bound) + self.lower_bound
        log_decay = b.log(f) if self.lower_bound else -b.softplus(-z)
        o, last = b.outer_scan(b.silu(q), 1.0 - f, v, log_decay, decay="key", state=state, form=self.form)
        o = b.merge_heads(b.rms_norm(o, b.parameter("norm", ((head_dim,),), "constant(1)")))
        return b.matmul(o, b.parameter("out", ((heads, head_dim), (d_model,)))), last

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        head_dim = d_model // self.num_heads
        return {"memory": TensorType((batch, self.num_heads, head_dim, head_dim))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, last = self._mix(b, x, state["memory"])
        return y, {"memory": last}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, z, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "forget", "v"))
        f = self.lower_bound + (1.0 - self.lower_bound) * reference.sigmoid(z)
        batch, steps, heads, size = v.shape
        memory, o = np.zeros((batch, heads, size, size)), np.zeros_like(v)
        for t in range(steps):
            memory = f[:, t, :, :, None] * memory + (1.0 - f[:, t, :, :, None]) * v[:, t, :, None, :]
            o[:, t] = np.einsum("bhk,bhkv->bhv", reference.silu(q[:, t]), memory)
        return reference.merge_heads(reference.rms_norm(o) * params["norm"]) @ params["out"]
