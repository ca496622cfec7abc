"""Attention inside blocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, State, TokenMixer, context_option, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference


class BlockAttention(TokenMixer):
    """Softmax attention inside blocks of neighbouring tokens (Qin et al. 2022, DiagAttention).

    Tokens b W to (b + 1) W - 1 attend each other, or those before them if causal, in each of H heads of size K = D / H;
    the last block may be shorter. 4 D^2 parameters. T W in tokens. State: keys and values of a block, and a count.
    """

    paper = "Qin et al. 2022, The Devil in Linear Transformer, arXiv 2210.10340"
    cases = (
        Case({"num_heads": 3, "block": 3, "causal": True}),
        Case({"num_heads": 3, "block": 3, "causal": False}),
        Case({"num_heads": 1, "block": 4, "causal": True}, batch=1, time=11, d_model=5),
        Case({"num_heads": 2, "block": 16, "causal": False}, time=3, d_model=6),
    )
    limits = (
        Limit(
            "a block of all tokens is full attention",
            Case({"num_heads": 3, "block": 7, "causal": False}),
            "softmax_attention",
            {"num_heads": 3, "causal": False},
        ),
        Limit(
            "a causal block of all tokens is full causal attention",
            Case({"num_heads": 3, "block": 9, "causal": True}),
            "softmax_attention",
            {"num_heads": 3, "causal": True},
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    block: int = option(64, minimum=2, maximum=65536, doc="Tokens of a block.")
    causal: bool = context_option(True, doc="Hide later tokens.")

    def check(self, d_model: int) -> str | None:
        return f"num_heads {self.num_heads} does not divide d_model {d_model}" if d_model % self.num_heads else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        q, k, v = self._project(b, x)
        batch, tokens, heads, size = q.shape
        whole = tokens // self.block * self.block
        made: list[Tensor] = []
        if whole:
            folded = (batch * whole // self.block, self.block, heads, size)
            blocks = (b.reshape(b.slice(t, 1, 0, whole), *folded) for t in (q, k, v))
            made.append(b.reshape(b.attention(*blocks, causal=self.causal), batch, whole, heads, size))
        if whole < tokens:
            made.append(b.attention(*(b.slice(t, 1, whole, tokens) for t in (q, k, v)), causal=self.causal))
        return self._output(b, made[0] if len(made) == 1 else b.concat(1, *made))

    def _project(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        axes = (Axis("heads", self.num_heads), Axis("head_dim", x.shape[-1] // self.num_heads))
        q, k, v = (b.split_heads(b.linear(x, name, axes), self.num_heads) for name in ("q", "k", "v"))
        return q, k, v

    def _output(self, b: Builder, o: Tensor) -> Tensor:
        heads, head_dim = o.shape[2:]
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        return b.matmul(b.merge_heads(o), b.parameter("out", (merged, (Axis("d_model", heads * head_dim),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        cache = TensorType((batch, self.block, self.num_heads, d_model // self.num_heads))
        return {"k": cache, "v": cache, "place": TensorType((1,))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(b, x)
        place = b.reshape(b.cast(state["place"], "int32"))
        keys = b.dynamic_update(state["k"], k, place, axis=1)
        values = b.dynamic_update(state["v"], v, place, axis=1)
        o = b.attention(q, keys, values, causal=True, offset=place)
        after = state["place"] + 1.0
        after = b.where(b.less(after, b.constant(float(self.block))), after, 0.0)
        return self._output(b, o), {"k": keys, "v": values, "place": after}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        o = np.zeros_like(v)
        for t in range(x.shape[1]):
            first = t // self.block * self.block
            last = t + 1 if self.causal else min(first + self.block, x.shape[1])
            scores = np.einsum("bhk,bshk->bhs", q[:, t], k[:, first:last]) / q.shape[-1] ** 0.5
            o[:, t] = np.einsum("bhs,bshv->bhv", reference.softmax(scores), v[:, first:last])
        return reference.merge_heads(o) @ params["out"]
