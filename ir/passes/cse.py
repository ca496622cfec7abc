"""Common subexpression elimination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ir._attributes import op_key
from ir.graph import Graph, Node, Value
from ir.ops.structure import Component, Input, Parameter
from ir.passes.base import Pass
from ir.rewrite import Rewriter, rebuild


@dataclass(frozen=True)
class Cse(Pass):
    """Compute equal expressions once; the first one's scope is kept.

    Equal means the same operation with the same attributes, hints aside, on the same values, in any order where it is
    commutative.
    Parameters are never equal to each other, and a component node may hold parameters, so neither is merged.

    Before: `%2 = add %0, %1`, `%3 = add %1, %0`, `%4 = mul %2, %3`. After: `%2 = add %0, %1`, `%3 = mul %2, %2`.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph without repeated expressions."""
        seen: dict[tuple[str, tuple[Value, ...]], Sequence[Value]] = {}

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if isinstance(node.op, Input | Parameter | Component):
                return rewriter.add(node)
            operands = tuple(sorted(node.operands)) if node.op.commutative else node.operands
            key = op_key(node.op, without=node.op.hints), operands
            if key not in seen:
                seen[key] = rewriter.add(node)
            return seen[key]

        return rebuild(graph, visit)
