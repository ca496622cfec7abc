"""Convolutions side by side as one: what training keeps apart, deployment merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ir.graph import Graph, Node, Value
from ir.ops.convolution import Conv
from ir.ops.elementwise import Add
from ir.ops.shape import Broadcast, Pad, Reshape
from ir.ops.structure import Constant
from ir.passes._static import is_read_once, is_static
from ir.passes.base import Pass
from ir.rewrite import Rewriter, rebuild


@dataclass(frozen=True)
class _Branch:
    """A convolution with what is added to it."""

    conv: Node
    shift: Value | None


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Add the kernels of convolutions that read one input and are added, and the identity to a depthwise one.

    add (conv x w3) (conv x w1)  ->  conv x (add w3 (pad w1))
    add x (conv x w)             ->  conv x (add w centre), each channel by itself

    So are re-parameterised blocks deployed (Ding et al. 2021, RepVGG, arXiv 2101.03697). The kernels must be parameters
    and constants alone, and nothing else may read the branches.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph with branches merged."""

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if not isinstance(node.op, Add):
                return rewriter.add(node)
            first, second = graph.node(node.id).operands
            left = _branch(rewriter, node.operands[0]) if is_read_once(graph, first) else None
            right = _branch(rewriter, node.operands[1]) if is_read_once(graph, second) else None
            merged = _merged(rewriter, node, left, right)
            return rewriter.add(node) if merged is None else (merged,)

        return rebuild(graph, visit)


def _merged(r: Rewriter, node: Node, left: _Branch | None, right: _Branch | None) -> Value | None:
    if left and right:
        return _sum(r, left, right) or _sum(r, right, left)
    for branch, other in ((left, node.operands[1]), (right, node.operands[0])):
        if branch and other == branch.conv.operands[0]:
            return _with_identity(r, branch)
    return None


def _branch(r: Rewriter, value: Value) -> _Branch | None:
    node, shift = r.producer(value), None
    if isinstance(node.op, Add) and r.type_of(node.operands[1]).rank == 1 and is_static(r, node.operands[1]):
        node, shift = r.producer(node.operands[0]), node.operands[1]
    return _Branch(node, shift) if isinstance(node.op, Conv) and is_static(r, node.operands[1]) else None


def _sum(r: Rewriter, wide: _Branch, narrow: _Branch) -> Value | None:
    """Both branches as the wide one, if the narrow one's window lies within its."""
    first, second = wide.conv.op, narrow.conv.op
    assert isinstance(first, Conv)
    assert isinstance(second, Conv)
    alike = (first.strides, first.dilation, first.groups) == (second.strides, second.dilation, second.groups)
    if not alike or max(first.dilation) > 1 or wide.conv.operands[0] != narrow.conv.operands[0]:
        return None
    outer, inner = (r.type_of(branch.conv.operands[1]).shape for branch in (wide, narrow))
    low = tuple(a - b for (a, _), (b, _) in zip(first.padding, second.padding, strict=True))
    high = tuple(a - b - offset for a, b, offset in zip(outer, inner, low, strict=False))
    if outer[-2:] != inner[-2:] or min(*low, *high) < 0:
        return None
    kernel = narrow.conv.operands[1]
    if max(*low, *high) > 0:
        kernel = r.emit(Pad((*low, 0, 0), (*high, 0, 0), 0.0), kernel)
    return _finish(r, wide.conv, r.emit(Add(), wide.conv.operands[1], kernel), wide.shift, narrow.shift)


def _with_identity(r: Rewriter, branch: _Branch) -> Value | None:
    """A depthwise convolution that also keeps its input."""
    op, kernel = branch.conv.op, branch.conv.operands[1]
    assert isinstance(op, Conv)
    shape = r.type_of(kernel).shape
    channels = r.type_of(branch.conv.operands[0]).shape[-1]
    centred = all(2 * low + 1 == size == 2 * high + 1 for size, (low, high) in zip(shape, op.padding, strict=False))
    if not (centred and op.groups == channels == shape[-1]) or max(*op.strides, *op.dilation) > 1:
        return None
    centre = np.zeros(shape[:-2], np.float32)
    centre[tuple(size // 2 for size in shape[:-2])] = 1.0
    one = r.emit(Constant.from_array(centre))
    one = r.emit(Broadcast(shape), r.emit(Reshape((*shape[:-2], 1, 1)), one))
    return _finish(r, branch.conv, r.emit(Add(), kernel, one), branch.shift, None)


def _finish(r: Rewriter, conv: Node, kernel: Value, *shifts: Value | None) -> Value:
    result = r.emit(conv.op, conv.operands[0], kernel)
    given = [shift for shift in shifts if shift is not None]
    if not given:
        return result
    shift = given[0] if len(given) == 1 else r.emit(Add(), *given)
    return r.emit(Add(), result, shift)
