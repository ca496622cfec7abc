"""Flow attention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, context_option, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference

_EPSILON = 1e-6  # keeps flows from zero
_BOUND = 1.0  # what outgoing flows are cut to before the causal competition, as in the authors' code


class FlowAttention(TokenMixer):
    """Flow attention (Wu et al. 2022): linear attention whose sources compete and whose sinks share what they get.

    With phi = sigmoid, in each of H heads: incoming flow I_i = phi(q_i) . sum_j phi(k_j), outgoing O_j = phi(k_j) .
    sum_i phi(q_i); conserved I'_i = phi(q_i) . sum_j phi(k_j) / O_j, O'_j = phi(k_j) . sum_i phi(q_i) / I_i.
    o_i = sigmoid(I'_i) * (phi(q_i) / I_i) . sum_j phi(k_j) (N softmax_j(O'_j) v_j)^T. A causal one sums over j <= i
    (i <= j for O), takes means instead of sums for the flows, and keeps O' between -1 and 1. Linear in T. State:
    H (K^2 + 4 K + 1).
    """

    paper = "Wu et al. 2022, Flowformer: Linearizing Transformers with Conservation Flows, arXiv 2202.06258"
    cases = (
        Case({"num_heads": 3, "causal": True}),
        Case({"num_heads": 3, "causal": False}),
        Case({"num_heads": 1, "causal": True}, batch=1, time=11, d_model=5),
        Case({"num_heads": 2, "causal": False}, time=3, d_model=6),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    causal: bool = context_option(True, doc="Sum over earlier tokens only.")

    def check(self, d_model: int) -> str | None:
        return f"num_heads {self.num_heads} does not divide d_model {d_model}" if d_model % self.num_heads else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        q, k, v = self._project(b, x)
        if self.causal:
            count = b.constant(np.expand_dims(np.arange(1.0, x.shape[1] + 1), (0, 2, 3)))
            sums = [b.cumsum(k, 1), b.cumsum(q, 1)]
            incoming, outgoing = self._flow(b, q, sums[0]) / count, self._flow(b, k, sums[1]) / count
            sums = [b.cumsum(k / outgoing, 1), b.cumsum(q / incoming, 1)]
            shares, strength = self._conserved(b, q, k, sums, count)
            values = v * (strength / b.cumsum(strength, 1) * count)
            o, _ = b.outer_scan(q / (incoming * count), k, values)
            return self._output(b, o * b.sigmoid(shares))
        incoming = self._flow(b, q, b.sum(k, 1, keepdims=True))
        outgoing = self._flow(b, k, b.sum(q, 1, keepdims=True))
        shares = self._flow(b, q, b.sum(k / outgoing, 1, keepdims=True))
        strength = b.softmax(self._flow(b, k, b.sum(q / incoming, 1, keepdims=True)), 1) * float(x.shape[1])
        q_BHTK, k_BHTK, v_BHTV = (b.transpose(t, 0, 2, 1, 3) for t in (q / incoming, k, v * strength))
        o = b.transpose(b.matmul(q_BHTK, b.matmul(k_BHTK, v_BHTV, transpose_a=True)), 0, 2, 1, 3)
        return self._output(b, o * b.sigmoid(shares))

    def _project(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) and v, each `[B, T, H, K]`."""
        axes = (Axis("heads", self.num_heads), Axis("head_dim", x.shape[-1] // self.num_heads))
        q, k, v = (b.split_heads(b.linear(x, name, axes), self.num_heads) for name in ("q", "k", "v"))
        return b.sigmoid(q), b.sigmoid(k), v

    def _flow(self, b: Builder, one: Tensor, total: Tensor) -> Tensor:
        """Product of each token's features with a sum of features, `[B, T, H, 1]`."""
        return b.sum((one + _EPSILON) * (total + _EPSILON), -1, keepdims=True)

    def _conserved(self, b: Builder, q: Tensor, k: Tensor, sums: list[Tensor], count: Tensor) -> tuple[Tensor, Tensor]:
        """I' of each token, and e to the power of its O'."""
        shares, strength = self._flow(b, q, sums[0]) / count, self._flow(b, k, sums[1]) / count
        return shares, b.exp(b.minimum(b.maximum(strength, -_BOUND), _BOUND))

    def _output(self, b: Builder, o: Tensor) -> Tensor:
        heads, head_dim = o.shape[2:]
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        return b.matmul(b.merge_heads(o), b.parameter("out", (merged, (Axis("d_model", heads * head_dim),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        size = d_model // self.num_heads
        line = TensorType((batch, 1, self.num_heads, size))
        names = ("keys", "queries", "keys_out", "queries_in")
        return {
            "memory": TensorType((batch, self.num_heads, size, size)),
            **dict.fromkeys(names, line),
            "strength": TensorType((batch, 1, self.num_heads, 1)),
        }

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(b, x)
        count = b.cast(position, "float32") + 1.0
        after = {"keys": state["keys"] + k, "queries": state["queries"] + q}
        incoming, outgoing = self._flow(b, q, after["keys"]) / count, self._flow(b, k, after["queries"]) / count
        after["keys_out"], after["queries_in"] = state["keys_out"] + k / outgoing, state["queries_in"] + q / incoming
        shares, strength = self._conserved(b, q, k, [after["keys_out"], after["queries_in"]], count)
        after["strength"] = state["strength"] + strength
        values = v * (strength / after["strength"] * count)
        o, after["memory"] = b.outer_scan(q / (incoming * count), k, values, state=state["memory"])
        return self._output(b, o * b.sigmoid(shares)), after

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        q, k = reference.sigmoid(q), reference.sigmoid(k)
        tokens = x.shape[1]
        seen = [t + 1 if self.causal else tokens for t in range(tokens)]
        count = [t + 1.0 if self.causal else 1.0 for t in range(tokens)]

        def flow(one: Array, others: Array) -> Array:
            sums = [others[:, : seen[t]].sum(axis=1) + _EPSILON for t in range(tokens)]
            return np.stack([((one[:, t] + _EPSILON) * sums[t]).sum(axis=-1) / count[t] for t in range(tokens)], axis=1)

        incoming, outgoing = flow(q, k), flow(k, q)
        shares, strength = flow(q, k / outgoing[..., None]), flow(k, q / incoming[..., None])
        bounded = np.minimum(np.maximum(strength, -_BOUND), _BOUND)
        strength = np.exp(bounded if self.causal else strength)
        o = np.zeros_like(v)
        for t in range(tokens):
            for s in range(seen[t]):
                share = strength[:, s] / strength[:, : seen[s]].sum(axis=1) * (s + 1 if self.causal else tokens)
                weight = (q[:, t] * k[:, s]).sum(axis=-1) / (incoming[:, t] * count[t]) * share
                o[:, t] += weight[..., None] * v[:, s]
        return reference.merge_heads(o * reference.sigmoid(shares)[..., None]) @ params["out"]
