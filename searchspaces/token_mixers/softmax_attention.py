"""Softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, Position, State, TokenMixer, context_option, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference, registry

_HIDDEN = -1e9  # added to scores of slots that hold no key yet


class SoftmaxAttention(TokenMixer):
    """Multi-head softmax attention (Vaswani et al. 2017), keys and values shared by groups of heads (Ainslie 2023).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s in each of H heads of size K, head h reading keys and values of group
    h // (H / G); y = concat_h(o) W_out. `num_kv_heads` G is H for multi-head, 1 for multi-query attention. `window` w
    keeps keys with |t - s| < w; `qk_norm` norms each query and key (Henry et al. 2020, here by root mean square);
    `head_gate` multiplies head h by sigmoid(x_t w_h) (Qiu et al. 2025). 2 D K (H + G) parameters.
    State: keys and values, 2 L G K; T^2 in tokens, T w with a window, whose state is 2 (w - 1) G K.
    """

    paper = (
        "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762; Ainslie et al. 2023, GQA, arXiv 2305.13245; "
        "Henry et al. 2020, Query-Key Normalization for Transformers, arXiv 2010.04245; "
        "Qiu et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708"
    )
    aliases: ClassVar[Aliases] = {
        "attention": {},
        "multi_query_attention": {"num_kv_heads": 1},
        "mqa": {"num_kv_heads": 1},
    }
    growth = 2.0
    cases = (
        Case({"num_heads": 3, "causal": True}),
        Case({"num_heads": 3, "causal": False}),
        Case({"num_heads": 2, "num_kv_heads": 1, "causal": True, "bias": True, "window": 3}),
        Case({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "causal": True, "position": "rope"}),
        Case({"num_heads": 6, "num_kv_heads": 1, "causal": True, "position": "alibi", "window": 3}),
        Case(
            {"num_heads": 3, "causal": True, "qk_norm": True, "head_gate": True, "position": "rope", "window": 4},
            time=9,
        ),
        Case({"num_heads": 3, "causal": False, "position": "alibi", "head_gate": True}, batch=1, time=5),
        Case({"num_heads": 1, "head_dim": 5, "causal": False, "qk_norm": True, "window": 2}, time=1, d_model=7),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Query heads.")
    num_kv_heads: int | None = option(None, minimum=1, doc="Heads of keys and values; null for as many as of queries.")
    head_dim: int | None = option(None, minimum=1, doc="Size of a head; null for d_model / num_heads.")
    window: int = option(0, minimum=0, doc="Tokens that attend each other, |t - s| < window; 0 for all.")
    qk_norm: bool = option(False, doc="Norm each query and key.")
    head_gate: bool = option(False, doc="Gate each head's output by the input.")
    bias: bool = option(False, doc="Add learned biases to queries, keys, values and output.")
    causal: bool = context_option(True, doc="Hide later tokens.")
    position: str = context_option("none", doc="Position component.")

    def check(self, d_model: int) -> str | None:
        if self.head_dim is None and d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            return f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
        if self.window == 1:
            return "with window 1 no token sees another; use the token mixer identity"
        return self._position().check(self._sizes(d_model)[2])

    def growth_exponent(self) -> float:
        return 1.0 if self.window else self.growth

    def build(self, b: Builder, x: Tensor) -> Tensor:
        q, k, v = self._project(b, x)
        slopes = self._position().slopes(self.num_heads)
        return self._output(b, x, b.attention(q, k, v, causal=self.causal, window=self.window or None, alibi=slopes))

    def _position(self) -> Position:
        position = registry.get("position", self.position).create({})
        assert isinstance(position, Position)
        return position

    def _sizes(self, d_model: int) -> tuple[int, int, int]:
        """Heads, heads of keys and values, size of a head."""
        return self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim or d_model // self.num_heads

    def _project(self, b: Builder, x: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, of tokens that start at a run-time position."""
        heads, groups, head_dim = self._sizes(x.shape[-1])
        size = Axis("head_dim", head_dim)
        q = b.split_heads(b.linear(x, "q", (Axis("heads", heads), size), bias=self.bias), heads)
        k = b.split_heads(b.linear(x, "k", (Axis("kv_heads", groups), size), bias=self.bias), groups)
        v = b.split_heads(b.linear(x, "v", (Axis("kv_heads", groups), size), bias=self.bias), groups)
        if self.qk_norm:
            q = b.rms_norm(q, b.parameter("q_norm", ((size,),), "constant(1)"))
            k = b.rms_norm(k, b.parameter("k_norm", ((size,),), "constant(1)"))
        position = self._position()
        return position.rotate(b, q, at), position.rotate(b, k, at), v

    def _output(self, b: Builder, x: Tensor, o: Tensor) -> Tensor:
        """Gate and merge o `[B, T, H, K]`, and map it to `[B, T, D]`."""
        batch, tokens, heads, head_dim = o.shape
        if self.head_gate:
            gate = b.sigmoid(b.linear(x, "gate", (Axis("heads", heads),)))
            o = o * b.reshape(gate, batch, tokens, heads, 1)
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        y = b.matmul(b.merge_heads(o), b.parameter("out", (merged, (Axis("d_model", x.shape[-1]),))))
        return y + b.parameter("out_bias", ((Axis("d_model", x.shape[-1]),),), "constant(0)") if self.bias else y

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        _, groups, head_dim = self._sizes(d_model)
        slots = min(max_len, self.window - 1) if self.window else max_len
        cache = TensorType((batch, slots, groups, head_dim))
        return {"k": cache, "v": cache}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(b, x, position)
        slopes = self._position().slopes(self.num_heads)
        if self.window and state["k"].shape[1] == self.window - 1:  # else the stream ends before the window is full
            o, kept = self._slide(b, (q, k, v), state, position, slopes)
            return self._output(b, x, o), kept
        keys = b.dynamic_update(state["k"], k, position, axis=1)
        values = b.dynamic_update(state["v"], v, position, axis=1)
        o = b.attention(q, keys, values, causal=True, alibi=slopes, offset=position)
        return self._output(b, x, o), {"k": keys, "v": values}

    def _slide(
        self,
        b: Builder,
        qkv: tuple[Tensor, Tensor, Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
        slopes: tuple[float, ...] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend the last `window` tokens, of which the state holds all but the newest."""
        q, k, v = qkv
        keys, values = b.concat(1, state["k"], k), b.concat(1, state["v"], v)
        age = b.constant(np.expand_dims(np.arange(self.window - 1, -1, -1), (0, 1, 2)))
        bias = b.where(b.less_equal(age, position), b.constant(0.0), _HIDDEN)
        o = b.attention(q, keys, values, alibi=slopes, bias=bias)
        return o, {"k": b.slice(keys, 1, 1, self.window), "v": b.slice(values, 1, 1, self.window)}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        heads, groups, head_dim = self._sizes(x.shape[-1])
        q, k, v = (x @ params[name] + params.get(f"{name}_bias", 0.0) for name in ("q", "k", "v"))
        q, k, v = (reference.split_heads(y, count) for y, count in ((q, heads), (k, groups), (v, groups)))
        if self.qk_norm:
            q, k = reference.rms_norm(q) * params["q_norm"], reference.rms_norm(k) * params["k_norm"]
        if self.position == "rope":
            q, k = reference.rotate(q), reference.rotate(k)
        slopes = self._position().slopes(heads) or (0.0,) * heads
        o = np.zeros_like(q)
        for t in range(x.shape[1]):
            seen = [s for s in range(x.shape[1]) if self._sees(t, s)]
            for h in range(heads):
                group = h // (heads // groups)
                distance = np.abs(t - np.array(seen))
                scores = np.einsum("bk,bsk->bs", q[:, t, h], k[:, seen, group]) / head_dim**0.5 - slopes[h] * distance
                o[:, t, h] = np.einsum("bs,bsk->bk", reference.softmax(scores), v[:, seen, group])
        if self.head_gate:
            o = o * reference.sigmoid(x @ params["gate"])[..., None]
        return reference.merge_heads(o) @ params["out"] + params.get("out_bias", 0.0)

    def _sees(self, t: int, s: int) -> bool:
        return not (self.causal and s > t) and not (self.window and abs(t - s) >= self.window)
