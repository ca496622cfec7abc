"""What depends on parameters and constants alone, and who reads what, for passes that fold one into the other."""

from __future__ import annotations

from ir.graph import Graph, Value
from ir.ops.elementwise import Add
from ir.ops.structure import Constant, Input, Parameter
from ir.rewrite import Rewriter


def is_static(r: Rewriter, value: Value) -> bool:
    """Whether a value depends on parameters and constants alone."""
    node = r.producer(value)
    if isinstance(node.op, Parameter | Constant):
        return True
    return not isinstance(node.op, Input) and all(is_static(r, operand) for operand in node.operands)


def is_read_once(graph: Graph, value: Value) -> bool:
    """Whether only one node needs a value, and, where a sum makes it, the first of its terms."""
    node = graph.node(value.node)
    inner = node.operands[0] if isinstance(node.op, Add) else value
    outputs = {output for _, output in graph.outputs}
    return all(len(graph.users(each)) == 1 and each not in outputs for each in (value, inner))
