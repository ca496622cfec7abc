"""Canonical forms of operations that move data or work along axes. Rows of a table: operations and rule."""

from __future__ import annotations

import dataclasses
from typing import Final

from ir.graph import Node, Value
from ir.op import Op, normal_axis
from ir.ops.indexing import DynamicUpdate, Gather, ScatterAdd
from ir.ops.normalization import Softmax
from ir.ops.reduction import Cumsum, Max, Mean, Reduction, Sum
from ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ir.ops.spectral import Fft, Irfft, Rfft
from ir.rewrite import Replacement, Rewriter, Rule


def drop_identity(r: Rewriter, node: Node) -> Replacement:
    """A reshape, broadcast or pad to the operand's own shape, or the transpose of no axis -> `x`."""
    op, operand = node.op, node.operands[0]
    if isinstance(op, Transpose):
        return operand if op.permutation == tuple(range(len(op.permutation))) else None
    return operand if r.type_of(operand) == node.types[0] else None


ALONG_AXIS: Final = (Softmax, Cumsum, Slice, Concat, DynamicUpdate, Gather, ScatterAdd, Fft, Rfft, Irfft)
"""Operations with an attribute `axis`."""


def count_axis_from_front(r: Rewriter, node: Node) -> Replacement:
    """`softmax x {axis=-1}` -> `softmax x {axis=2}`."""
    op = node.op
    if not isinstance(op, ALONG_AXIS) or op.axis >= 0:
        return None
    axis = normal_axis(op.axis, r.type_of(node.operands[0]).rank)
    return r.emit_all(dataclasses.replace(op, axis=axis), *node.operands)


def state_sizes(r: Rewriter, node: Node) -> Replacement:
    """`reshape x {shape=[2, -1]}` -> `reshape x {shape=[2, 12]}`."""
    shape = node.types[0].shape
    return None if node.op == Reshape(shape) else r.emit(Reshape(shape), *node.operands)


def merge_reshapes(r: Rewriter, node: Node) -> Replacement:
    """`reshape (reshape x)` -> `reshape x`."""
    inner = r.producer(node.operands[0])
    return r.emit(node.op, inner.operands[0]) if isinstance(inner.op, Reshape) else None


def merge_transposes(r: Rewriter, node: Node) -> Replacement:
    """`transpose (transpose x)` -> `transpose x`."""
    inner = r.producer(node.operands[0])
    if not (isinstance(node.op, Transpose) and isinstance(inner.op, Transpose)):
        return None
    order = inner.op.permutation
    return r.emit(Transpose(tuple(order[axis] for axis in node.op.permutation)), inner.operands[0])


def reshape_for_transpose(r: Rewriter, node: Node) -> Replacement:
    """A transpose that moves only axes of size 1 -> `reshape`, which moves nothing."""
    if not isinstance(node.op, Transpose):
        return None
    sizes = r.type_of(node.operands[0]).shape
    moved = [axis for axis in node.op.permutation if sizes[axis] > 1]
    return r.emit(Reshape(node.types[0].shape), *node.operands) if moved == sorted(moved) else None


def simplify_slice(r: Rewriter, node: Node) -> Replacement:
    """The whole axis -> `x`; the smallest `stop` with the same elements; a slice of a slice -> one slice."""
    op, operand = node.op, node.operands[0]
    if not isinstance(op, Slice) or op.axis < 0:
        return None
    kind = r.type_of(operand)
    if kind == node.types[0]:
        return operand
    count = node.types[0].shape[op.axis]
    stride = op.stride if count > 1 else 1
    inner = r.producer(operand)
    if isinstance(inner.op, Slice) and inner.op.axis == op.axis:
        start = inner.op.start + op.start * inner.op.stride
        step = stride * inner.op.stride if count > 1 else 1
        return r.emit(Slice(op.axis, start, start + (count - 1) * step + 1, step), inner.operands[0])
    least = Slice(op.axis, op.start, op.start + (count - 1) * stride + 1, stride)
    return None if least == op else r.emit(least, operand)


def slice_within_part(r: Rewriter, node: Node) -> Replacement:
    """`slice (concat x, y)` that lies within x -> `slice x`."""
    op = node.op
    inner = r.producer(node.operands[0])
    if not (isinstance(op, Slice) and isinstance(inner.op, Concat) and inner.op.axis == op.axis):
        return None
    begin = 0
    for part in inner.operands:
        end = begin + r.type_of(part).shape[op.axis]
        if begin <= op.start and op.stop <= end:
            return r.emit(Slice(op.axis, op.start - begin, op.stop - begin, op.stride), part)
        begin = end
    return None


def flatten_concat(r: Rewriter, node: Node) -> Replacement:
    """`concat x` -> `x`; `concat (concat x, y), z` along one axis -> `concat x, y, z`."""
    if len(node.operands) == 1:
        return node.operands[0]
    parts: list[Value] = []
    for operand in node.operands:
        inner = r.producer(operand)
        parts.extend(inner.operands if inner.op == node.op else [operand])
    return r.emit(node.op, *parts) if len(parts) > len(node.operands) else None


def merge_pads(r: Rewriter, node: Node) -> Replacement:
    """`pad (pad x)` with one value -> `pad x`."""
    op, inner = node.op, r.producer(node.operands[0])
    if not (isinstance(op, Pad) and isinstance(inner.op, Pad) and repr(op.value) == repr(inner.op.value)):
        return None
    low = tuple(a + b for a, b in zip(op.low, inner.op.low, strict=True))
    high = tuple(a + b for a, b in zip(op.high, inner.op.high, strict=True))
    return r.emit(Pad(low, high, op.value), inner.operands[0])


def merge_broadcasts(r: Rewriter, node: Node) -> Replacement:
    """`broadcast (broadcast x)`, or of x with leading axes of 1 -> `broadcast x`; no repeats -> `reshape`."""
    inner, operand = r.producer(node.operands[0]), r.type_of(node.operands[0])
    if isinstance(inner.op, Broadcast) or (isinstance(inner.op, Reshape) and _only_leads(r, inner)):
        return r.emit(node.op, inner.operands[0])
    return r.emit(Reshape(node.types[0].shape), *node.operands) if node.types[0].size == operand.size else None


def _only_leads(r: Rewriter, node: Node) -> bool:
    """Whether a reshape only puts axes of size 1 in front."""
    before, after = r.type_of(node.operands[0]).shape, node.types[0].shape
    added = len(after) - len(before)
    return added >= 0 and after == (1,) * added + before


def simplify_reduction(r: Rewriter, node: Node) -> Replacement:
    """`sum x {axes=[-1, 0]}` -> `sum x {axes=[0, 2]}`; over axes of size 1 only -> `reshape x`."""
    op = node.op
    if not isinstance(op, Reduction):
        return None
    kind = r.type_of(node.operands[0])
    axes = tuple(sorted(normal_axis(axis, kind.rank) for axis in op.axes))
    if all(kind.shape[axis] == 1 for axis in axes):
        return r.emit(Reshape(node.types[0].shape), *node.operands)
    return None if axes == op.axes else r.emit(dataclasses.replace(op, axes=axes), *node.operands)


def drop_short_cumsum(r: Rewriter, node: Node) -> Replacement:
    """`cumsum x` along an axis of size 1 -> `x`."""
    return node.operands[0] if isinstance(node.op, Cumsum) and node.types[0].shape[node.op.axis] == 1 else None


def drop_whole_update(r: Rewriter, node: Node) -> Replacement:
    """`dynamic_update base, x, position` that covers the base -> `x`."""
    return node.operands[1] if r.type_of(node.operands[1]) == node.types[0] else None


SHAPE_RULES: Final[tuple[tuple[tuple[type[Op], ...], Rule], ...]] = (
    ((Reshape, Transpose, Broadcast, Pad), drop_identity),
    (ALONG_AXIS, count_axis_from_front),
    ((Reshape,), state_sizes),
    ((Reshape,), merge_reshapes),
    ((Transpose,), merge_transposes),
    ((Transpose,), reshape_for_transpose),
    ((Slice,), simplify_slice),
    ((Slice,), slice_within_part),
    ((Concat,), flatten_concat),
    ((Pad,), merge_pads),
    ((Broadcast,), merge_broadcasts),
    ((Sum, Mean, Max), simplify_reduction),
    ((Cumsum,), drop_short_cumsum),
    ((DynamicUpdate,), drop_whole_update),
)
