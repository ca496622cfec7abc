"""Compute products in a narrower type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops.contraction import PRECISIONS, Matmul
from ir.ops.structure import Constant, Parameter
from ir.passes.base import Pass
from ir.rewrite import Rewriter, rebuild


@dataclass(frozen=True)
class LowerPrecision(Pass):
    """Set the precision of the operations that gain from it; values between operations keep their dtype.

    These are all that have a precision, but for products of two values that are both made at run time: their operands
    would be rounded anew in every call.

    matmul x w  ->  matmul x w {precision="bfloat16"}

    Attributes:
        precision: What the operands of products are rounded to.
    """

    precision: str

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise GraphError("unknown precision", expected=" or ".join(PRECISIONS), found=repr(self.precision))

    def run(self, graph: Graph) -> Graph:
        """The graph whose products round their operands."""
        static = _static_values(graph)

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if not _has_precision(node.op):
                return rewriter.add(node)
            weight = graph.node(node.id).operands[1]
            narrow = not isinstance(node.op, Matmul) or weight in static
            op = replace(node.op, precision=self.precision if narrow else "float32")
            return rewriter.add(Node(node.id, op, node.operands, node.types, node.scope))

        return rebuild(graph, visit)


def precision_of(graph: Graph) -> str:
    """Return `bfloat16` where a product of the graph rounds its operands to that, else `float32`."""
    rounded = any(getattr(node.op, "precision", None) == "bfloat16" for node in graph.nodes)
    return "bfloat16" if rounded else "float32"


def _has_precision(op: Op) -> bool:
    return any(field.name == "precision" for field in fields(op))


def _static_values(graph: Graph) -> set[Value]:
    """Values that depend on parameters and constants alone."""
    static: set[Value] = set()
    for node in graph.nodes:
        known = isinstance(node.op, Parameter | Constant)
        if known or (node.operands and all(operand in static for operand in node.operands)):
            static.update(node.results)
    return static
