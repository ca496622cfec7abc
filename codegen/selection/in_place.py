"""Caches that a step extends: the new rows are written into the cache that came in, instead of into a copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from codegen.kernels.fused import UpdateKernel
from codegen.selection.select import aliases
from codegen.selection.state import KernelCall
from ir.graph import Graph, Value
from ir.ops.structure import Input


def update_in_place(
    graph: Graph, calls: Sequence[KernelCall], successors: Mapping[str, str] | None = None
) -> list[KernelCall]:
    """Return calls of which those that update an input for the caller write over it.

    The caller gives memory that may be written. An input that a later call reads, or the same call once more, or that
    is an output itself, is copied.

    Args:
        graph: The simplified graph.
        calls: Its kernels in order.
        successors: Inputs that may be written over, each with the only output that may take its place; any input by any
            output where None.
    """
    alias = aliases(graph, calls)
    outputs = {name: alias.get(value, value) for name, value in graph.outputs}
    returned = set(outputs.values())
    last = {
        alias.get(operand, operand): position
        for position, call in enumerate(calls)
        for operand in call.operands
        if isinstance(operand, Value)
    }
    changed: list[KernelCall] = []
    for position, call in enumerate(calls):
        kernel = UpdateKernel.of(call.kernel)
        base = call.operands[kernel.writes_over] if kernel else None
        home = alias.get(base, base) if isinstance(base, Value) else None
        if kernel and home and isinstance(given := graph.node(home.node).op, Input):
            reads = [alias.get(operand, operand) for operand in call.operands if isinstance(operand, Value)].count(home)
            given_up = home not in returned and last[home] == position and reads == 1
            follows = successors is None or outputs.get(successors.get(given.label, "")) == call.results[0]
            if given_up and call.results[0] in returned and follows:
                call = replace(call, kernel=kernel)
        changed.append(call)
    return changed
