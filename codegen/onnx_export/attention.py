"""Rows of attention and rotary position.

Shape letters: B batch, T queries, S keys, H query heads, G key heads, R query heads of one key head, K and V sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from codegen.onnx_export.emitter import Emitter, Site, Table
from ir.ops import attention as at

_LOWEST: Final = float(np.finfo(np.float32).min)
"""Score of a hidden key: its weight is exactly zero beside any other, and no infinity makes NaN of a row."""


@dataclass(frozen=True)
class _Positions:
    """What is known of a query's distance to each key.

    Attributes:
        distance: Absolute, float `[T, S]`; empty where nothing asks for it.
        visible: Which keys it may see, bool `[T, S]`; empty where all.
    """

    distance: str = ""
    visible: str = ""


def _attention(e: Emitter, site: Site, q: str, k: str, v: str, *rest: str) -> str:
    op: at.Attention = site.op
    (batch, queries, heads, _), (_, keys, groups, _) = site.types[0].shape, site.types[1].shape
    rows = heads // groups * queries
    if op.precision == "bfloat16":
        q, k, v = (e.rounded(x, site.dtype) for x in (q, k, v))
    positions = _at_run_time(e, site, rest[0]) if op.has_offset else _known(e, site)
    by_head = e.transpose(e("Mul", q, e.floats(op.scale, site.dtype)), 0, 2, 1, 3)
    grouped = e.reshape(by_head, (batch, groups, rows, -1)) if heads != groups else by_head
    scores = e("MatMul", grouped, e.transpose(k, 0, 2, 3, 1))
    scores = e.reshape(scores, (batch, heads, queries, keys)) if heads != groups else scores
    if op.alibi is not None:
        slopes = e.floats(-np.reshape(op.alibi, (heads, 1, 1)), site.dtype)
        scores = e("Add", scores, e("Mul", slopes, positions.distance))
    bias = rest[-1] if op.has_bias else ""
    scores = e("Add", scores, bias) if bias else scores
    weights = _weights(e, site, scores, positions.visible, bias)
    if op.precision == "bfloat16":
        weights = e.rounded(weights, site.dtype)
    weights = e.reshape(weights, (batch, groups, rows, keys)) if heads != groups else weights
    read = e("MatMul", weights, e.transpose(v, 0, 2, 1, 3))
    read = e.reshape(read, (batch, heads, queries, -1)) if heads != groups else read
    if op.normaliser == "softmax" and (positions.visible or bias):
        read = _without_blind(e, site, read, positions.visible, bias)
    return e.transpose(read, 0, 2, 1, 3)


def _known(e: Emitter, site: Site) -> _Positions:
    """Positions without an offset: the queries are the last ones."""
    op: at.Attention = site.op
    queries, keys = site.types[0].shape[1], site.types[1].shape[1]
    distance = (keys - queries + np.arange(queries))[:, None] - np.arange(keys)
    visible = op.visible(distance)
    return _Positions(
        e.floats(np.abs(distance), site.dtype) if op.alibi is not None else "",
        "" if visible.all() else e.constant(visible),
    )


def _at_run_time(e: Emitter, site: Site, offset: str) -> _Positions:
    op: at.Attention = site.op
    queries, keys = site.types[0].shape[1], site.types[1].shape[1]
    standing = e("Add", offset, e.constant(np.arange(queries, dtype=np.int32)[:, None]))
    distance = e("Sub", standing, e.constant(np.arange(keys, dtype=np.int32)))
    rules: list[str] = []
    if op.causal:
        rules.append(e("GreaterOrEqual", distance, e.constant(np.asarray(0, np.int32))))
    absolute = e("Abs", distance) if op.window is not None or op.alibi is not None else ""
    if op.window is not None:
        rules.append(e("Less", absolute, e.constant(np.asarray(op.window, np.int32))))
    visible = e("And", *rules) if len(rules) == 2 else "".join(rules)
    return _Positions(e.cast(absolute, site.dtype) if op.alibi is not None else "", visible)


def _weights(e: Emitter, site: Site, scores: str, visible: str, bias: str) -> str:
    """Weights of scores `[B, H, T, S]`: zeros where keys are hidden, unless a query sees none at all."""
    op: at.Attention = site.op
    zero, one, lowest = (e.floats(value, site.dtype) for value in (0.0, 1.0, _LOWEST))
    if op.normaliser == "sigmoid":
        shifted = e("Add", scores, e.floats(op.shift_of(site.types[1].shape[1]), site.dtype))
        weights = e("Reciprocal", e("Add", one, e("Exp", e("Neg", shifted))))  # small weights too keep all digits
        return e("Where", visible, weights, zero) if visible else weights
    scores = e("Max", scores, lowest) if bias else scores
    scores = e("Where", visible, scores, lowest) if visible else scores
    weights = e("Softmax", scores, axis=-1)
    if op.normaliser == "softmax":
        return weights
    low, high = op.stretch
    stretched = e("Add", e("Mul", weights, e.floats(high - low, site.dtype)), e.floats(low, site.dtype))
    weights = e("Clip", stretched, zero, one)
    weights = e("Where", visible, weights, zero) if visible else weights
    return e("Where", e("Greater", bias, lowest), weights, zero) if bias else weights


def _without_blind(e: Emitter, site: Site, read: str, visible: str, bias: str) -> str:
    """Zeros for queries that see no key; a bias hides a key by minus infinity."""
    queries, keys = site.types[0].shape[1], site.types[1].shape[1]
    if not bias and not site.op.has_offset:
        distance = (keys - queries + np.arange(queries))[:, None] - np.arange(keys)
        sees = site.op.visible(distance).any(-1, keepdims=True)
        return read if sees.all() else e("Mul", read, e.floats(sees, site.dtype))
    lowest = e.floats(_LOWEST, site.dtype)
    open_pairs = bias or e.floats(0.0, site.dtype)
    if visible:
        open_pairs = e("Where", visible, open_pairs, lowest)
    elif site.types[-1].rank == 0:
        open_pairs = e.reshape(open_pairs, (1,))
    sees = e("Greater", e("ReduceMax", open_pairs, e.ints(-1), keepdims=1), lowest)
    return e("Mul", read, e.cast(sees, site.dtype))


def _rope(e: Emitter, site: Site, x: str, *offset: str) -> str:
    half, steps = site.types[0].shape[3] // 2, site.types[0].shape[1]
    rates = site.op.base ** (-np.arange(half) / half)
    cos, sin = _angles_at_run_time(e, site, rates, *offset) if offset else _angles(e, site, rates, steps)
    first, second = e.many(2, "Split", x, axis=-1, num_outputs=2)
    turned = e("Sub", e("Mul", first, cos), e("Mul", second, sin))
    beside = e("Add", e("Mul", second, cos), e("Mul", first, sin))
    return e("Concat", turned, beside, axis=-1)


def _angles(e: Emitter, site: Site, rates: np.ndarray, steps: int) -> tuple[str, str]:
    """Cosines and sines `[T, 1, K / 2]`."""
    angle = (np.arange(steps)[:, None] * rates)[:, None, :]
    return e.floats(np.cos(angle), site.dtype), e.floats(np.sin(angle), site.dtype)


def _angles_at_run_time(e: Emitter, site: Site, rates: np.ndarray, offset: str) -> tuple[str, str]:
    """The same for a first position that is data, the angles in float64: in float32 far positions lose digits."""
    steps = e.constant(np.arange(site.types[0].shape[1], dtype=np.int32).reshape(-1, 1, 1))
    angle = e("Mul", e.cast(e("Add", offset, steps), "float64"), e.constant(rates.astype(np.float64)))
    return e.cast(e("Cos", angle), site.dtype), e.cast(e("Sin", angle), site.dtype)


ROWS: Table = {at.Attention: _attention, at.Rope: _rope}
