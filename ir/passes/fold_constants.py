"""Compute at build time what depends on constants only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ir.graph import Graph, Node, Value
from ir.op import Array
from ir.ops.shape import Broadcast
from ir.ops.structure import NUMPY_DTYPES, Component, Constant
from ir.passes.base import Pass
from ir.rewrite import Rewriter, rebuild
from ir.types import TensorType


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace operations on constants by their value, computed in float64 and rounded once.

    Before: `%0 = constant 2.0`, `%1 = constant 3.0`, `%2 = mul %0, %1`. After: `%0 = constant 6.0`.

    Broadcasts stay: their result holds nothing that the operand does not. bfloat16 results stay too, since numpy has no
    such type to round to.

    Attributes:
        max_elements: Results with more elements stay computed at run time.
        allow_rounding: Also fold where the exact value has to be rounded to its dtype, as running it would round it.
    """

    max_elements: int = 65536
    allow_rounding: bool = True

    def run(self, graph: Graph) -> Graph:
        """The graph with constant expressions replaced."""

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            producers = [rewriter.producer(operand).op for operand in node.operands]
            constants = [op for op in producers if isinstance(op, Constant)]
            folded = self._fold(node, constants) if constants and len(constants) == len(producers) else None
            if folded is None:
                return rewriter.add(node)
            return tuple(rewriter.emit(constant) for constant in folded)

        return rebuild(graph, visit)

    def _fold(self, node: Node, operands: Sequence[Constant]) -> list[Constant] | None:
        if isinstance(node.op, Broadcast | Component) or any(kind.size > self.max_elements for kind in node.types):
            return None
        with np.errstate(all="ignore"):
            results = node.op.evaluate_all(tuple(_widened(constant) for constant in operands))
            stored = [_stored(result, kind) for result, kind in zip(results, node.types, strict=True)]
        exact = all(
            np.array_equal(result, array, equal_nan=array.dtype.kind == "f")
            for result, array in zip(results, stored, strict=True)
        )
        if any(kind.dtype == "bfloat16" for kind in node.types) or not (exact or self.allow_rounding):
            return None
        return [Constant(kind, array.tobytes()) for kind, array in zip(node.types, stored, strict=True)]


def _widened(constant: Constant) -> Array:
    array = constant.evaluate()
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _stored(result: Array, kind: TensorType) -> Array:
    return np.reshape(np.ascontiguousarray(result, dtype=NUMPY_DTYPES[kind.dtype]), kind.shape)
