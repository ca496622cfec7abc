"""What window operations share: where taps lie, and elementwise operations on their results."""

from __future__ import annotations

from collections.abc import Sequence

from codegen._tvm import Expr
from codegen.gpu.emit import Index, Operand, both
from codegen.kernels._tail import operand_kind
from codegen.kernels._taps import Taps
from codegen.kernels.expressions import EXPRESSIONS, Source, number_source, unravel
from codegen.kernels.vector_math import keep
from ir.graph import Graph
from ir.ops.structure import Constant, Input


def taps_place(taps: Taps, row: Index, tap: Index) -> tuple[Expr | bool, Index]:
    """Find the input pixel that a tap of an output sees.

    Args:
        taps: Sizes of the window.
        row: Output pixel, counted over batch and space.
        tap: Tap, counted over the window.

    Returns:
        Whether it lies inside the input, and its number over batch and space.
    """
    space = len(taps.sizes)
    outputs = 1
    for size in taps.outputs:
        outputs *= size
    position = unravel(row % outputs, taps.outputs)
    offset = unravel(tap, taps.window)
    inside: Expr | bool = True
    pixel: Index = row // outputs
    for axis in range(space):
        place = taps.first(position[axis], axis) + offset[axis] * taps.dilation[axis]
        if taps.padding[axis][0]:
            inside = both(inside, place >= 0)
        last = (taps.outputs[axis] - 1) * taps.strides[axis] - taps.padding[axis][0] + taps.reach(1, axis) - 1
        if last >= taps.sizes[axis]:
            inside = both(inside, place < taps.sizes[axis])
        pixel = pixel * taps.sizes[axis] + place
    return inside, pixel


def apply_tail(
    graph: Graph | None, value: Expr, operands: Sequence[Operand], row: Index, channel: Index, rows: int, channels: int
) -> Expr:
    """Apply a tail, see `codegen.kernels._tail.Tail`, to one result."""
    if graph is None:
        return value
    value = keep(value)
    others = dict(zip(list(graph.inputs)[1:], operands, strict=True))
    made: dict[object, Source] = {}
    for position, node in enumerate(graph.nodes):
        kind = node.types[0]
        if isinstance(node.op, Input):
            read = _read(others[node.op.label], row, channel, rows, channels) if position else value
            source = Source(kind, lambda _, read=read: read, lambda _, read=read: read)
        elif isinstance(node.op, Constant):
            source = number_source(node.op)
        else:
            source = EXPRESSIONS[type(node.op)](node.op, kind, tuple(made[operand] for operand in node.operands))
        made[node.results[0]] = source
    result = made[graph.outputs[0][1]]
    return result.at((0,) * result.type.rank)


def _read(operand: Operand, row: Index, channel: Index, rows: int, channels: int) -> Expr:
    kind = operand_kind(operand.type, rows, channels)
    place = {"number": 0, "row": row, "vector": channel, "full": row * channels + channel}
    assert kind is not None
    return operand[place[kind]]
