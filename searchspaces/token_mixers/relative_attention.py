"""Attention with relative positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, Limit, State, TokenMixer, context_option, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference


class RelativeAttention(TokenMixer):
    """Attention whose scores have a part for the distance of the tokens (Dai et al. 2019, Transformer-XL).

    x_ts = ((q_t + u) . k_s + (q_t + v) . (r_{t-s} W_r)) / sqrt(K), o_t = sum_s softmax_s(x_ts) v_s in each of H heads
    of size K, y = concat_h(o) W_out, with learned u and v `[H, K]` and fixed waves r_d `[D]` of the distance d:
    sin(d w_i), then cos(d w_i), with w_i = 10000^(-2i/D). 5 D H K + 2 H K parameters. T^2 in tokens. State: keys and
    values, 2 L H K.
    """

    paper = "Dai et al. 2019, Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, arXiv 1901.02860"
    aliases: ClassVar[Aliases] = {"transformer_xl_attention": {}}
    growth = 2.0
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 3, "causal": False}, time=5),
        Case({"num_heads": 2, "head_dim": 4}, batch=1, time=9, d_model=5),
    )
    limits = (
        Limit(
            "without the part for the distance it is softmax attention",
            Case({"num_heads": 3}),
            "softmax_attention",
            {"num_heads": 3},
            values={"distance": 0.0, "content_bias": 0.0},
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    head_dim: int | None = option(None, minimum=1, doc="Size of a head; null for d_model / num_heads.")
    causal: bool = context_option(True, doc="Hide later tokens.")

    def check(self, d_model: int) -> str | None:
        if self.head_dim is None and d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        q, k, v = self._project(b, x)
        first = 0 if self.causal else 1 - tokens
        between = np.arange(tokens)[:, None] - np.arange(tokens)[None, :] - first
        index = b.constant(np.reshape(np.maximum(between, 0).astype(np.int32), (1, 1, tokens, tokens)))
        bias = self._distance_scores(b, q, x.shape[-1], np.arange(first, tokens), index)
        return self._output(b, x, b.attention(self._with_bias(b, q), k, v, causal=self.causal, bias=bias))

    def _axes(self, d_model: int) -> tuple[Axis, Axis]:
        return Axis("heads", self.num_heads), Axis("head_dim", self.head_dim or d_model // self.num_heads)

    def _project(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, H, K]`."""
        axes = self._axes(x.shape[-1])
        q, k, v = (b.split_heads(b.linear(x, name, axes), self.num_heads) for name in ("q", "k", "v"))
        return q, k, v

    def _with_bias(self, b: Builder, q: Tensor, name: str = "content_bias") -> Tensor:
        axes = ((Axis("heads", q.shape[2]),), (Axis("head_dim", q.shape[3]),))
        return q + b.parameter(name, axes, "normal(0.02)")

    def _distance_scores(self, b: Builder, q: Tensor, d_model: int, distances: Array, index: Tensor) -> Tensor:
        """The scores' part `[B, H, T, S]` for distances, found at an index `[1, 1, T, S]` among those on offer."""
        waves = b.constant(_waves(distances, d_model))
        r_LHK = b.split_heads(b.linear(waves, "distance", self._axes(d_model)), self.num_heads)
        queries = b.transpose(self._with_bias(b, q, "position_bias"), 0, 2, 1, 3)
        r_1HKL = b.reshape(b.transpose(r_LHK, 1, 2, 0), 1, *q.shape[2:], len(distances))
        keys = b.broadcast(r_1HKL, q.shape[0], *r_1HKL.shape[1:])
        scores = b.matmul(queries * q.shape[-1] ** -0.5, keys)
        return b.gather(scores, index, -1)

    def _output(self, b: Builder, x: Tensor, o: Tensor) -> Tensor:
        out = b.parameter("out", (self._axes(x.shape[-1]), (Axis("d_model", x.shape[-1]),)))
        return b.matmul(b.merge_heads(o), out)

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        heads, head_dim = self._axes(d_model)
        cache = TensorType((batch, max_len, heads.size, head_dim.size))
        return {"k": cache, "v": cache}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(b, x)
        keys = b.dynamic_update(state["k"], k, position, axis=1)
        values = b.dynamic_update(state["v"], v, position, axis=1)
        slots = np.arange(keys.shape[1], dtype=np.int32)
        back = position - b.constant(np.reshape(slots, (1, 1, 1, -1)))
        index = b.maximum(back, b.constant(np.zeros((), np.int32)))
        bias = self._distance_scores(b, q, x.shape[-1], slots, index)
        o = b.attention(self._with_bias(b, q), keys, values, causal=True, offset=position, bias=bias)
        return self._output(b, x, o), {"k": keys, "v": values}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        o = np.zeros_like(q)
        for t in range(x.shape[1]):
            seen = [s for s in range(x.shape[1]) if s <= t or not self.causal]
            for h in range(self.num_heads):
                scores = np.zeros((x.shape[0], len(seen)))
                for place, s in enumerate(seen):
                    r = reference.split_heads(
                        _waves(np.array([t - s]), x.shape[-1])[None] @ params["distance"], self.num_heads
                    )
                    content = np.sum((q[:, t, h] + params["content_bias"][h]) * k[:, s, h], axis=-1)
                    scores[:, place] = content + (q[:, t, h] + params["position_bias"][h]) @ r[0, 0, h]
                weights = reference.softmax(scores / q.shape[-1] ** 0.5)
                o[:, t, h] = np.einsum("bs,bsk->bk", weights, v[:, seen, h])
        return reference.merge_heads(o) @ params["out"]


def _waves(distances: Array, size: int) -> Array:
    """Sines and then cosines of distances `[L]` at falling frequencies, `[L, size]`, to float32."""
    frequencies = 10000.0 ** (-2.0 * np.arange((size + 1) // 2) / size)
    angles = distances[:, None] * frequencies[None, :]
    waves = np.concatenate([_sine(angles), _cosine(angles[:, : size // 2])], axis=-1)
    return waves.astype(np.float32).astype(np.float64)


_sine = np.vectorize(math.sin, otypes=[np.float64])  # unlike np.sin, the same wherever an element lies
_cosine = np.vectorize(math.cos, otypes=[np.float64])
