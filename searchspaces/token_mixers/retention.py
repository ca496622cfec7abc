"""Retention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis, TensorType
from searchspaces import reference


class Retention(TokenMixer):
    """Multi-scale retention (Sun et al. 2023, RetNet): a matrix state with a fixed decay for each head.

    Head h = 0..H-1 forgets by gamma_h = 1 - 2^(-5 - h). With queries and keys turned by their position (xPos), keys of
    size K = expand_k * D / H, values of size V = expand_v * D / H:
    o_t = sum_{s <= t} gamma_h^(t - s) (q_t . k_s / sqrt(K)) v_s, as recurrence S_t = gamma_h S_{t-1} + k_t v_t^T;
    y_t = (concat_h(group_norm(o_t)) * swish(x_t W_r)) W_out. Linear in T. State: H K V.
    """

    paper = "Sun et al. 2023, Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621"
    causality = "causal"
    forms = FORMS
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0}, d_model=8, time=11),
        Case({"num_heads": 1}, batch=1, time=3, d_model=6),
    )

    num_heads: int = option(4, minimum=1, maximum=40, doc="Heads, each with its own decay.")
    expand_k: float = option(1.0, minimum=0.01, maximum=16.0, doc="Width of all keys over model width.")
    expand_v: float = option(2.0, minimum=0.01, maximum=16.0, doc="Width of all values over model width.")
    form: Form = option("auto", choices=FORMS, doc="How the recurrence is computed.")

    def check(self, d_model: int) -> str | None:
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = round(expand * d_model)
            if width < 1 or width % self.num_heads:
                return f"num_heads {self.num_heads} does not divide {name} * d_model = {width}"
        key_dim = self._sizes(d_model)[1].size
        return f"retention needs an even key size, not {key_dim}" if key_dim % 2 else None

    def _sizes(self, d_model: int) -> tuple[Axis, Axis, Axis]:
        """Axes of heads, key size and value size."""
        key_dim, value_dim = (round(expand * d_model) // self.num_heads for expand in (self.expand_k, self.expand_v))
        return Axis("heads", self.num_heads), Axis("key_dim", key_dim), Axis("value_dim", value_dim)

    def _log_decay(self) -> Array:
        """log(gamma_h), in the precision in which a graph holds constants."""
        return np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads)))).astype(np.float32)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return self._mix(b, x, None, None)[0]

    def _mix(self, b: Builder, x: Tensor, at: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        heads, key_dim, value_dim = self._sizes(x.shape[-1])
        q, k = (b.split_heads(b.linear(x, name, (heads, key_dim)), heads.size) for name in ("q", "k"))
        q, k = b.rope(q, offset=at), b.rope(k, offset=at)
        v = b.split_heads(b.linear(x, "v", (heads, value_dim)), heads.size)
        log_decay = b.broadcast(b.constant(self._log_decay()), *q.shape[:3])
        scale = key_dim.size**-0.5
        o, last = b.outer_scan(q, k, v, log_decay, decay="head", scale=scale, state=state, form=self.form)
        o = b.merge_heads(b.layer_norm(o)) * b.silu(b.linear(x, "output_gate", (heads, value_dim)))
        return b.matmul(o, b.parameter("out", ((heads, value_dim), (Axis("d_model", x.shape[-1]),)))), last

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"memory": TensorType((batch, *(axis.size for axis in self._sizes(d_model))))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, last = self._mix(b, x, position, state["memory"])
        return y, {"memory": last}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        q, k = reference.rotate(q), reference.rotate(k)
        time = np.arange(x.shape[1], dtype=np.float64)
        distance_TS = np.expand_dims(time, 1) - time
        log_gamma_H = self._log_decay().astype(np.float64)
        decay_HTS = np.where(distance_TS >= 0, np.exp(log_gamma_H[:, None, None] * np.abs(distance_TS)), 0.0)
        weights_BHTS = np.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5 * decay_HTS
        o = reference.merge_heads(reference.layer_norm(np.einsum("bhts,bshv->bthv", weights_BHTS, v)))
        return (o * reference.silu(x @ params["output_gate"])) @ params["out"]
