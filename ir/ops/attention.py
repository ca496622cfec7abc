"""Attention over heads, and rotary position.

Shape letters: B batch, T queries, S keys, H query heads, G key heads (H a multiple of G), K head size, V value size.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import numpy as np

from ir.op import Array, Op, Types, broadcast_shapes, op, require
from ir.ops.contraction import PRECISIONS, Precision
from ir.rounding import round_to_bfloat16
from ir.types import TensorType

Normaliser = Literal["softmax", "sigmoid", "clipped_softmax"]
"""What makes weights of scores."""
NORMALISERS: Final[tuple[Normaliser, ...]] = get_args(Normaliser)


def _positions(count: int, start: int = 0) -> Array:
    return np.arange(start, start + count)


@op
class Attention(Op):
    """normaliser(scale * q k^T + bias, masked) v, heads beside tokens: no transposes around it.

    Operands: q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, then `offset` (int32 scalar) if `has_offset`, then
    an additive bias that broadcasts to `[B, H, T, S]` if `has_bias`. Result `[B, T, H, V]`.

    Query t stands at position offset + t, key s at position s; without `offset` queries are the last T of S positions
    (offset S - T). `causal` hides keys after the query; `window` w keeps only keys with |distance| < w.
    `alibi` holds one slope a head: the score falls by slope * |distance| (Press et al. 2022). A query that sees no key
    gives zeros.

    With x the scores of the keys that a query sees, its weights are

    - `softmax`: exp(x) / sum(exp(x))
    - `sigmoid`: 1 / (1 + exp(-x - shift)); shift is -log(S) if None (Ramapuram et al. 2024, "Theory, Analysis, and
      Best Practices for Sigmoid Self-Attention")
    - `clipped_softmax`: clip((high - low) softmax(x) + low, 0, 1) with (low, high) = `stretch`, low <= 0 and high >= 1
      (Bondarenko et al. 2023, "Quantizable Transformers")

    With `precision="bfloat16"` queries and keys are rounded to bfloat16 before their product, weights and values before
    theirs; everything else keeps the operands' dtype.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    alibi: tuple[float, ...] | None = None
    has_offset: bool = False
    has_bias: bool = False
    precision: Precision = "float32"
    normaliser: Normaliser = "softmax"
    shift: float | None = None
    stretch: tuple[float, float] = (0.0, 1.0)

    later = frozenset({"precision", "normaliser", "shift", "stretch"})

    def infer(self, q: TensorType, k: TensorType, v: TensorType, *rest: TensorType) -> TensorType:
        require(q.rank == k.rank == v.rank == 4, "attention needs [B, T, H, K] operands", found=f"{q}, {k}, {v}")
        batch, queries, heads, head_dim = q.shape
        require(k.shape[:3] == v.shape[:3] and k.shape[0] == batch, "keys and values differ", found=f"{k} and {v}")
        require(k.shape[3] == head_dim, "query and key sizes differ", expected=str(head_dim), found=k.shape[3])
        same = q.is_float and q.dtype == k.dtype == v.dtype
        require(same, "attention needs equal float dtypes", found=f"{q}, {k}, {v}")
        require(heads % k.shape[2] == 0, "query heads are no multiple of key heads", found=f"{heads} and {k.shape[2]}")
        require(self.window is None or self.window > 0, "window must be positive", found=self.window)
        require(self.alibi is None or len(self.alibi) == heads, "alibi needs one slope a head", found=self.alibi)
        require(len(rest) == self.has_offset + self.has_bias, "wrong number of operands", found=3 + len(rest))
        self._require_options()
        if self.has_offset:
            require(rest[0] == TensorType((), "int32"), "offset must be an int32 scalar", found=rest[0])
        if self.has_bias:
            full = (batch, heads, queries, k.shape[1])
            fits = rest[-1].dtype == q.dtype and broadcast_shapes(rest[-1].shape, full) == full
            require(fits, "bias does not broadcast", found=rest[-1])
        return q.with_shape((batch, queries, heads, v.shape[3]))

    def _require_options(self) -> None:
        known = self.precision in PRECISIONS
        require(known, "unknown precision", expected=" or ".join(PRECISIONS), found=self.precision)
        known = self.normaliser in NORMALISERS
        require(known, "unknown normaliser", expected=", ".join(NORMALISERS), found=self.normaliser)
        shifts = self.shift is None or self.normaliser == "sigmoid"
        require(shifts, "only sigmoid attention has a shift", found=f"{self.normaliser} with {self.shift}")
        stretches = self.stretch == (0.0, 1.0) or self.normaliser == "clipped_softmax"
        require(stretches, "only the clipped softmax is stretched", found=f"{self.normaliser} with {self.stretch}")
        low, high = self.stretch
        require(low <= 0 and high >= 1, "stretch must reach from 0 or below to 1 or above", found=self.stretch)

    def shift_of(self, keys: int) -> float:
        """Return what the sigmoid adds to the scores."""
        return -math.log(keys) if self.shift is None else self.shift

    def evaluate(self, q: Array, k: Array, v: Array, *rest: Array) -> Array:
        if self.precision == "bfloat16":
            q, k, v = round_to_bfloat16(q), round_to_bfloat16(k), round_to_bfloat16(v)
        group = q.shape[2] // k.shape[2]
        k_BSHK, v_BSHV = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
        scores_BHTS = np.einsum("bthk,bshk->bhts", q, k_BSHK) * self.scale
        offset = int(rest[0]) if self.has_offset else k.shape[1] - q.shape[1]
        distance_TS = _positions(q.shape[1], offset)[:, None] - _positions(k.shape[1])[None, :]
        if self.alibi is not None:
            scores_BHTS = scores_BHTS - np.asarray(self.alibi)[:, None, None] * np.abs(distance_TS)
        if self.has_bias:
            scores_BHTS = scores_BHTS + rest[-1]
        weights_BHTS = self.weigh(scores_BHTS, self.visible(distance_TS))
        if self.precision == "bfloat16":
            weights_BHTS = round_to_bfloat16(weights_BHTS)
        return np.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)

    def weigh(self, scores: Array, visible: Array) -> Array:
        """Return the weights of scores along the last axis, zeros where keys are hidden."""
        scores = np.where(visible, scores, -np.inf)
        if self.normaliser == "sigmoid":
            shifted = scores + self.shift_of(scores.shape[-1])
            small = np.exp(-np.abs(shifted))
            return np.where(shifted >= 0, 1.0, small) / (1.0 + small)
        peak = np.max(scores, axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
        total = np.sum(weights, axis=-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        if self.normaliser == "softmax":
            return weights
        low, high = self.stretch
        return np.where(visible, np.minimum(np.maximum((high - low) * weights + low, 0.0), 1.0), 0.0)

    def visible(self, distance: Array) -> Array:
        """Which pairs may attend, from query position minus key position."""
        seen = np.ones(distance.shape, np.bool_)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= np.abs(distance) < self.window
        return seen

    def visible_pairs(self, queries: int, keys: int) -> int:
        """Query-key pairs that are not masked; with a run-time offset all of them count."""
        if self.has_offset:
            return queries * keys if self.window is None else queries * min(keys, self.window)
        position = _positions(queries, keys - queries)
        reach = queries + keys if self.window is None else self.window
        first = np.maximum(position - reach + 1, 0)
        last = np.minimum(position if self.causal else position + reach - 1, keys - 1)
        return int(np.maximum(last - first + 1, 0).sum())

    def flops(self, operands: Types, results: Types) -> int:
        batch, queries, heads, head_dim = operands[0].shape
        pairs = self.visible_pairs(queries, operands[1].shape[1])
        return batch * heads * pairs * (2 * head_dim + 2 * operands[2].shape[3] + 5)

    def macs(self, operands: Types, results: Types) -> int:
        batch, queries, heads, head_dim = operands[0].shape
        pairs = self.visible_pairs(queries, operands[1].shape[1])
        return batch * heads * pairs * (head_dim + operands[2].shape[3])


@op
class Rope(Op):
    """Rotary position: rotates the pairs (x_i, x_{i + K/2}) by position * base^(-2i/K).

    Operands: x `[B, T, H, K]` with even K, then `offset` (int32 scalar) if `has_offset`: token t stands at offset + t.
    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"; half-split pairing.
    """

    base: float = 10000.0
    has_offset: bool = False

    def infer(self, x: TensorType, *rest: TensorType) -> TensorType:
        require(self.base > 0, "rope needs a positive base", found=self.base)
        require(x.is_float and x.rank == 4 and x.shape[3] % 2 == 0, "rope needs [B, T, H, K] with even K", found=x)
        require(len(rest) == self.has_offset, "wrong number of operands", found=1 + len(rest))
        require(rest in ((), (TensorType((), "int32"),)), "offset must be an int32 scalar", found=rest)
        return x

    def evaluate(self, x: Array, *rest: Array) -> Array:
        half = x.shape[3] // 2
        position = _positions(x.shape[1], int(rest[0]) if self.has_offset else 0)
        angle = position[:, None] * self.base ** (-_positions(half) / half)
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def flops(self, operands: Types, results: Types) -> int:
        return 3 * results[0].size
