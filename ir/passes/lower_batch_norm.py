"""Batch norm at inference, folded into the product before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops.contraction import Matmul
from ir.ops.convolution import Conv
from ir.ops.elementwise import Add, Mul, Rsqrt, Sub
from ir.ops.normalization import BatchNorm
from ir.ops.structure import Constant
from ir.passes._static import is_read_once, is_static
from ir.passes.base import Pass
from ir.rewrite import Rewriter, rebuild

_PRODUCTS: Final[tuple[type[Op], ...]] = (Conv, Matmul)


@dataclass(frozen=True)
class LowerBatchNorm(Pass):
    """Write batch norm as a factor and a shift for each channel; the factor goes into the weights before it.

    batch_norm (conv x w)  ->  add (conv x (mul w factor)) shift
    batch_norm (add (conv x w) b)  ->  add (conv x (mul w factor)) (add (mul b factor) shift)

    Factor and shift depend on parameters alone, so they are known when the model is compiled. A product that others
    read too keeps its weights, and its batch norm becomes a multiplication and an addition.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph without batch norm."""

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if not isinstance(node.op, BatchNorm):
                return rewriter.add(node)
            alone = is_read_once(graph, graph.node(node.id).operands[0])
            return (_as_affine(rewriter, node, fold=alone),)

        return rebuild(graph, visit)


def _as_affine(r: Rewriter, node: Node, *, fold: bool) -> Value:
    op = node.op
    assert isinstance(op, BatchNorm)
    x, scale, bias, mean, variance = node.operands
    epsilon = r.emit(Constant.from_array(np.asarray(op.epsilon)))
    factor = r.emit(Mul(), scale, r.emit(Rsqrt(), r.emit(Add(), variance, epsilon)))
    shift = r.emit(Sub(), bias, r.emit(Mul(), mean, factor))
    product, offset = _product(r, x) if fold else (None, None)
    if product is None:
        return r.emit(Add(), r.emit(Mul(), x, factor), shift)
    if offset is not None:
        shift = r.emit(Add(), r.emit(Mul(), offset, factor), shift)
    weight = r.emit(Mul(), product.operands[1], factor)
    return r.emit(Add(), r.emit(product.op, product.operands[0], weight), shift)


def _product(r: Rewriter, x: Value) -> tuple[Node | None, Value | None]:
    """The product with static weights that makes x, and the static bias that was added to it."""
    node, offset = r.producer(x), None
    if isinstance(node.op, Add) and r.type_of(node.operands[1]).rank == 1 and is_static(r, node.operands[1]):
        node, offset = r.producer(node.operands[0]), node.operands[1]
    if not isinstance(node.op, _PRODUCTS) or not is_static(r, node.operands[1]):
        return None, None
    return (None, None) if isinstance(node.op, Matmul) and node.op.transpose_b else (node, offset)
