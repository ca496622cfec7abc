"""Canonical forms of elementwise operations, matrix products and attention. Rows of a table: operations and rule."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from ir.graph import Node, Value
from ir.op import Op
from ir.ops.attention import Attention
from ir.ops.contraction import Matmul
from ir.ops.elementwise import (
    Abs,
    Add,
    Binary,
    Cast,
    Compare,
    Div,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Pow,
    Relu,
    Square,
    Sub,
    Where,
)
from ir.ops.shape import Broadcast, Transpose
from ir.ops.structure import Constant
from ir.rewrite import Replacement, Rewriter, Rule

NEUTRAL: Final[dict[type[Op], float]] = {Add: 0.0, Sub: 0.0, Mul: 1.0, Div: 1.0, Pow: 1.0}
"""Second operand with which an operation gives its first."""

LOSSLESS: Final = frozenset({("float16", "float32"), ("bfloat16", "float32")})
"""Casts that keep every value, beside those from bool."""


def uniform_value(r: Rewriter, value: Value) -> float | None:
    """The number that a constant, broadcast or not, holds everywhere; None for anything else."""
    node = r.producer(value)
    if isinstance(node.op, Broadcast):
        return uniform_value(r, node.operands[0])
    if not isinstance(node.op, Constant):
        return None
    array = np.ravel(node.op.evaluate())
    return float(array[0]) if bool(np.all(array == array[0])) else None


def _keeps_type(r: Rewriter, node: Node, value: Value) -> bool:
    return r.type_of(value) == node.types[0]


def sort_operands(r: Rewriter, node: Node) -> Replacement:
    """`add %2, %1` -> `add %1, %2`; numbers come last."""
    if not node.op.commutative:
        return None
    ordered = sorted(node.operands, key=lambda value: (uniform_value(r, value) is not None, value))
    return None if tuple(ordered) == node.operands else r.emit(node.op, *ordered)


def drop_neutral(r: Rewriter, node: Node) -> Replacement:
    """`x + 0`, `x - 0`, `x * 1`, `x / 1`, `x ** 1` -> `x`."""
    first, second = node.operands
    neutral = NEUTRAL.get(type(node.op))
    if neutral is None or uniform_value(r, second) != neutral:
        return None
    return first if _keeps_type(r, node, first) else None


def negate_for_minus_one(r: Rewriter, node: Node) -> Replacement:
    """`x * -1`, `x / -1` -> `neg x`."""
    first, second = node.operands
    holds = uniform_value(r, second) == -1.0 and r.type_of(first).is_float and _keeps_type(r, node, first)
    return r.emit(Neg(), first) if holds else None


def fold_negation(r: Rewriter, node: Node) -> Replacement:
    """`x + neg y` -> `x - y`; `x - neg y` -> `x + y`."""
    first, second = node.operands
    inner = r.producer(second)
    if isinstance(inner.op, Neg):
        return r.emit(Sub() if isinstance(node.op, Add) else Add(), first, inner.operands[0])
    outer = r.producer(first)
    if isinstance(node.op, Add) and isinstance(outer.op, Neg):
        return r.emit(Sub(), second, outer.operands[0])
    return None


def square_for_product(r: Rewriter, node: Node) -> Replacement:
    """`x * x` -> `square x`."""
    first, second = node.operands
    return r.emit(Square(), first) if first == second and r.type_of(first).is_float else None


def drop_repeated(r: Rewriter, node: Node) -> Replacement:
    """`maximum x, x`, `minimum x, x` -> `x`."""
    return node.operands[0] if node.operands[0] == node.operands[1] else None


def relu_for_maximum(r: Rewriter, node: Node) -> Replacement:
    """`maximum x, 0` -> `relu x`."""
    first, second = node.operands
    holds = uniform_value(r, second) == 0.0 and r.type_of(first).is_float and _keeps_type(r, node, first)
    return r.emit(Relu(), first) if holds else None


def drop_double_negation(r: Rewriter, node: Node) -> Replacement:
    """`neg (neg x)` -> `x`; `neg (x - y)` -> `y - x`."""
    inner = r.producer(node.operands[0])
    if isinstance(inner.op, Neg):
        return inner.operands[0]
    return r.emit(Sub(), *reversed(inner.operands)) if isinstance(inner.op, Sub) else None


def drop_hidden_sign(r: Rewriter, node: Node) -> Replacement:
    """`abs (neg x)`, `abs (abs x)` -> `abs x`; the same under `square`."""
    inner = r.producer(node.operands[0])
    return r.emit(node.op, inner.operands[0]) if isinstance(inner.op, Neg | Abs) else None


def drop_double_relu(r: Rewriter, node: Node) -> Replacement:
    """`relu (relu x)` -> `relu x`."""
    return node.operands[0] if isinstance(r.producer(node.operands[0]).op, Relu) else None


def drop_equal_branches(r: Rewriter, node: Node) -> Replacement:
    """`where c, x, x` -> `x`."""
    _, first, second = node.operands
    return first if first == second and _keeps_type(r, node, first) else None


def absorb_broadcast(r: Rewriter, node: Node) -> Replacement:
    """`add x, (broadcast y)` -> `add x, y` where the result keeps its shape."""
    for index, operand in enumerate(node.operands):
        inner = r.producer(operand)
        if not isinstance(inner.op, Broadcast):
            continue
        operands = (*node.operands[:index], inner.operands[0], *node.operands[index + 1 :])
        if node.op.infer_types(tuple(r.type_of(value) for value in operands)) == node.types:
            return r.emit(node.op, *operands)
    return None


def simplify_cast(r: Rewriter, node: Node) -> Replacement:
    """A cast to its own dtype -> `x`; `cast (cast x)` -> `cast x` where the inner one keeps every value."""
    operand = node.operands[0]
    if _keeps_type(r, node, operand):
        return operand
    inner = r.producer(operand)
    if not isinstance(inner.op, Cast):
        return None
    source = r.type_of(inner.operands[0]).dtype
    lossless = source == "bool" or (source, inner.op.dtype) in LOSSLESS
    return r.emit(node.op, inner.operands[0]) if lossless else None


def absorb_transpose(r: Rewriter, node: Node) -> Replacement:
    """`matmul x, (transpose y)` -> `matmul x, y {transpose_b=true}` where only the last two axes are exchanged."""
    assert isinstance(node.op, Matmul)
    flags = (node.op.transpose_a, node.op.transpose_b)
    for index, operand in enumerate(node.operands):
        inner = r.producer(operand)
        rank = r.type_of(operand).rank
        exchange = (*range(rank - 2), rank - 1, rank - 2)
        if isinstance(inner.op, Transpose) and inner.op.permutation == exchange:
            toggled = [flag != (position == index) for position, flag in enumerate(flags)]
            operands = (*node.operands[:index], inner.operands[0], *node.operands[index + 1 :])
            return r.emit(Matmul(*toggled, precision=node.op.precision), *operands)
    return None


def drop_inactive_masks(r: Rewriter, node: Node) -> Replacement:
    """A window beyond every token, an alibi of zeros -> none; causal with one query -> not causal."""
    op = node.op
    if not isinstance(op, Attention):
        return None
    queries, keys = r.type_of(node.operands[0]).shape[1], r.type_of(node.operands[1]).shape[1]
    window, alibi, causal = op.window, op.alibi, op.causal
    if window is not None and not op.has_offset and window >= max(queries, keys):
        window = None
    if alibi is not None and not any(alibi):
        alibi = None
    if queries == 1 and not op.has_offset:
        causal = False
    if (window, alibi, causal) == (op.window, op.alibi, op.causal):
        return None
    return r.emit(dataclasses.replace(op, window=window, alibi=alibi, causal=causal), *node.operands)


ARITHMETIC_RULES: Final[tuple[tuple[tuple[type[Op], ...], Rule], ...]] = (
    ((Binary, Compare, Where), absorb_broadcast),
    ((Binary,), sort_operands),
    ((Binary,), drop_neutral),
    ((Mul, Div), negate_for_minus_one),
    ((Add, Sub), fold_negation),
    ((Mul,), square_for_product),
    ((Maximum, Minimum), drop_repeated),
    ((Maximum,), relu_for_maximum),
    ((Neg,), drop_double_negation),
    ((Abs, Square), drop_hidden_sign),
    ((Relu,), drop_double_relu),
    ((Where,), drop_equal_branches),
    ((Cast,), simplify_cast),
    ((Matmul,), absorb_transpose),
    ((Attention,), drop_inactive_masks),
)
