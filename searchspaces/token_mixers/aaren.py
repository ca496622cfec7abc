"""Attention with a learned query, as a recurrence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference

_NOTHING = -1e30  # the largest score before the first token


class Aaren(TokenMixer):
    """Attention as a recurrent network (Feng et al. 2024): softmax attention whose query is learned, not made of x.

    In each of H heads of size K = D / H with query q: s_t = q . k_t / sqrt(K),
    o_t = sum_{i <= t} e^{s_i} v_i / sum_{i <= t} e^{s_i}; y = concat_h(o) W_out. The largest score so far is kept
    beside both sums, so that no exponential overflows. 3 D^2 + D parameters. Linear in T. State: the largest score and
    both sums, H (K + 2).
    """

    paper = "Feng et al. 2024, Attention as an RNN, arXiv 2405.13956"
    causality = "causal"
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 2}, batch=1, time=13, d_model=8),
        Case({"num_heads": 1}, time=3, d_model=4),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")

    def check(self, d_model: int) -> str | None:
        return f"num_heads {self.num_heads} does not divide d_model {d_model}" if d_model % self.num_heads else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        scores, v = self._scores(b, x)
        largest = self._running_max(b, scores)
        before = b.pad(b.slice(largest, 1, 0, x.shape[1] - 1), 1, 1, 0, _NOTHING) if x.shape[1] > 1 else largest
        keep, weight = b.exp(b.minimum(before - largest, 0.0)), b.exp(scores - largest)
        total = b.linear_scan(keep, weight)
        summed = b.linear_scan(b.broadcast(keep, *v.shape), weight * v)
        return self._output(b, summed / total)

    def _scores(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B, T, H, 1]` and values `[B, T, H, K]`."""
        axes = (Axis("heads", self.num_heads), Axis("head_dim", x.shape[-1] // self.num_heads))
        k, v = (b.split_heads(b.linear(x, name, axes), self.num_heads) for name in ("k", "v"))
        q = b.reshape(b.parameter("query", (axes,), "normal(1)"), self.num_heads, axes[1].size)
        return b.sum(q * k, -1, keepdims=True) * axes[1].size ** -0.5, v

    def _running_max(self, b: Builder, x: Tensor) -> Tensor:
        """Largest of all elements so far along axis 1, by doubling steps."""
        step, tokens = 1, x.shape[1]
        while step < tokens:
            x = b.maximum(x, b.pad(b.slice(x, 1, 0, tokens - step), 1, step, 0, _NOTHING))
            step *= 2
        return x

    def _output(self, b: Builder, o: Tensor) -> Tensor:
        heads, head_dim = o.shape[2:]
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        return b.matmul(b.merge_heads(o), b.parameter("out", (merged, (Axis("d_model", heads * head_dim),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        single = TensorType((batch, 1, self.num_heads, 1))
        return {
            "largest": single,
            "total": single,
            "summed": TensorType((batch, 1, self.num_heads, d_model // self.num_heads)),
        }

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores, v = self._scores(b, x)
        first = b.equal(position, b.constant(np.array(0)))
        before = b.where(first, b.constant(_NOTHING), state["largest"])
        largest = b.maximum(before, scores)
        keep, weight = b.exp(before - largest), b.exp(scores - largest)
        total, summed = keep * state["total"] + weight, keep * state["summed"] + weight * v
        return self._output(b, summed / total), {"largest": largest, "total": total, "summed": summed}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("k", "v"))
        q = np.reshape(params["query"], k.shape[2:])
        scores, o = (q * k).sum(axis=-1) / k.shape[-1] ** 0.5, np.zeros_like(v)
        for t in range(x.shape[1]):
            weights = reference.softmax(np.moveaxis(scores[:, : t + 1], 1, -1))
            o[:, t] = np.einsum("bhs,bshv->bhv", weights, v[:, : t + 1])
        return reference.merge_heads(o) @ params["out"]
