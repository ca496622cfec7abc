"""Linear recurrences over time, one specification for all.

Shape letters: B batch, T time, H heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ir.op import Array, Op, Types, op, require
from ir.types import TensorType

Decay = Literal["none", "head", "key", "state"]
Form = Literal["auto", "recurrent", "chunkwise", "parallel"]
DECAYS: tuple[Decay, ...] = ("none", "head", "key", "state")
FORMS: tuple[Form, ...] = ("auto", "recurrent", "chunkwise", "parallel")


@op
class LinearScan(Op):
    """s_t = a_t * s_{t-1} + b_t along axis 1 with s_0 = 0: operands a and b `[B, T, ...]`, result every s_t."""

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        require(a == b and a.rank >= 2 and a.is_float, "linear_scan needs two equal [B, T, ...]", found=f"{a} and {b}")
        return a

    def evaluate(self, a: Array, b: Array) -> Array:
        states, state = np.empty_like(b), np.zeros_like(b[:, 0])
        for t in range(b.shape[1]):
            state = a[:, t] * state + b[:, t]
            states[:, t] = state
        return states

    def flops(self, operands: Types, results: Types) -> int:
        return 2 * results[0].size


@op
class OuterScan(Op):
    """S_t = a_t * S_{t-1} + k_t v_t^T and o_t = scale * q_t^T S_t, with a matrix state S `[K, V]` in each head.

    Operands: q and k `[B, T, H, K]`, v `[B, T, H, V]`; then by `decay`, always as logarithms:
        none: nothing, a = 1 (linear attention).
        head: g `[B, T, H]`, a_t = exp(g_t) (retention, Mamba-2).
        key: g `[B, T, H, K]`, a_t[k, :] = exp(g_t[k]) (gated linear attention).
        state: g `[B, T, H, V]` and rate `[H, K, V]`, a_t[k, v] = exp(g_t[v] * rate[k, v]) (selective scan of Mamba).
    Then beta `[B, T, H]` if `delta`, then the initial state `[B, H, K, V]` if `has_state`. Results: o `[B, T, H, V]`
    and the last state `[B, H, K, V]`.

    With `delta` each step writes what the decayed state lacks instead of v_t (the delta rule):
    S_t = a_t * S_{t-1} + beta_t k_t (v_t - (a_t * S_{t-1})^T k_t)^T. Any decay but `state`.
    Source: Yang et al. 2024, arXiv 2406.06484; with a decay, arXiv 2412.06464.

    `form` and `chunk` choose how a backend computes it; the result is the same.
    """

    hints = frozenset({"form", "chunk"})
    later = frozenset({"delta"})

    decay: Decay = "none"
    scale: float = 1.0
    has_state: bool = False
    form: Form = "auto"
    chunk: int = 64
    delta: bool = False

    def infer(self, q: TensorType, k: TensorType, v: TensorType, *rest: TensorType) -> Types:
        require(q.rank == 4 and q == k and v.rank == 4, "outer_scan needs [B, T, H, K]", found=f"{q}, {k}, {v}")
        batch, _, heads, keys = q.shape
        values = v.shape[3]
        require(v.shape[:3] == q.shape[:3], "values do not fit the keys", found=f"{v} beside {k}")
        require(self.decay in DECAYS, "unknown decay", expected=", ".join(DECAYS), found=self.decay)
        require(self.form in FORMS, "unknown form", expected=", ".join(FORMS), found=self.form)
        require(self.chunk > 0, "chunk must be positive", found=self.chunk)
        require(not (self.delta and self.decay == "state"), "the delta rule has no state decay", found=self.decay)
        same = q.is_float and {v.dtype, *(t.dtype for t in rest)} == {q.dtype}
        require(same, "outer_scan needs equal float dtypes", found=", ".join(map(str, (q, v, *rest))))
        shapes: dict[Decay, list[tuple[int, ...]]] = {
            "none": [],
            "head": [q.shape[:3]],
            "key": [q.shape],
            "state": [v.shape, (heads, keys, values)],
        }
        expected = shapes[self.decay] + [q.shape[:3]] * self.delta + [(batch, heads, keys, values)] * self.has_state
        found = [t.shape for t in rest]
        require(found == expected, "decay or state operands do not fit", expected=str(expected), found=found)
        return v, v.with_shape((batch, heads, keys, values))

    def evaluate(self, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, Array]:
        batch, steps, heads, keys = q.shape
        state = rest[-1].astype(v.dtype) if self.has_state else np.zeros((batch, heads, keys, v.shape[3]), v.dtype)
        outputs = np.empty_like(v)
        for t in range(steps):
            state = self._decay_at(t, rest) * state
            written = v[:, t]
            if self.delta:
                beta = rest[-2 if self.has_state else -1][:, t, :, None]
                written = beta * (written - np.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t, :, :, None] * written[:, :, None, :]
            outputs[:, t] = self.scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        return outputs, state

    def _decay_at(self, t: int, rest: tuple[Array, ...]) -> Array | float:
        """Decay a_t, broadcastable to `[B, H, K, V]`."""
        match self.decay:
            case "none":
                return 1.0
            case "head":
                return np.exp(rest[0][:, t, :, None, None])
            case "key":
                return np.exp(rest[0][:, t, :, :, None])
            case "state":
                return np.exp(rest[0][:, t, :, None, :] * rest[1])

    def flops(self, operands: Types, results: Types) -> int:
        batch, steps, heads, keys = operands[0].shape
        cells = batch * steps * heads * keys * operands[2].shape[3]
        return cells * ({"none": 4, "head": 5, "key": 5, "state": 7}[self.decay] + 2 * self.delta)

    def macs(self, operands: Types, results: Types) -> int:
        return self.flops(operands, results) // 2
