"""The nodes of a graph, one row after the other."""

from __future__ import annotations

from codegen.onnx_export.emitter import Emitter, Site
from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.ops.structure import Constant, Input, Parameter


def write_nodes(e: Emitter, graph: Graph, values: dict[Value, str]) -> None:
    """Write every node that an output needs.

    Args:
        e: Where to write.
        graph: What to write.
        values: Names of inputs and parameters; those of all other values are added.

    Raises:
        GraphError: An operation has no row.
    """
    before = e.where
    for node in graph.nodes:
        if node.id in graph.live and not isinstance(node.op, Input | Parameter):
            e.where = f"{before}/{node.path}" if before else node.path
            results = _write(e, graph, node, values)
            values.update(zip(node.results, results, strict=True))
    e.where = before


def _write(e: Emitter, graph: Graph, node: Node, values: dict[Value, str]) -> tuple[str, ...]:
    if isinstance(node.op, Constant):
        array, kind = node.op.evaluate(), node.types[0]
        return (e.floats(array, kind.dtype) if kind.is_float else e.constant(array),)
    row = e.rows.get(type(node.op))
    if row is None:
        raise GraphError("no ONNX row for this operation", where=node.path, hint="expand components first")
    site = Site(node.op, graph.operand_types(node), node.types)
    results = row(e, site, *(values[operand] for operand in node.operands))
    return results if isinstance(results, tuple) else (results,)
