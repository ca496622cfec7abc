"""Put the turns of loops one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ir.graph import Graph, Node, Value
from ir.ops.control import Loop
from ir.passes.base import Pass
from ir.rewrite import Rewriter, inline, rebuild


@dataclass(frozen=True)
class UnrollLoops(Pass):
    """Replace each loop by its body, as often as it runs: for code generators that know no loops over kernels.

    Before: `%2 = loop %0, %1 {times=2, body=graph body {... %2 = mul %0, %1 ...}}`. After: `%2 = mul %0, %1`,
    `%3 = mul %2, %1`.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph without loops."""
        if not any(isinstance(node.op, Loop) for node in graph.nodes):
            return graph

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if not isinstance(node.op, Loop):
                return rewriter.add(node)
            values = tuple(node.operands)
            for _ in range(node.op.times):
                carried = inline(rewriter, node.op.body.graph, values, visit)
                values = (*carried, *values[len(carried) :])
            return values[: len(node.types)]

        return rebuild(graph, visit)
