"""What follows a window operation in the same pass: elementwise operations on each result in its register."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from codegen._tvm import Buffer, Expr
from codegen.kernels.base import Array
from codegen.kernels.emit import Index, Vectors, flat_view
from codegen.kernels.expressions import EXPRESSIONS, Source, number_source
from ir.graph import Graph
from ir.interpret import evaluate
from ir.ops import elementwise as ew
from ir.ops.shape import Reshape
from ir.ops.structure import Constant, Input
from ir.types import TensorType

SIMPLE: Final = (ew.Neg, ew.Relu, ew.Square, ew.Abs, ew.Add, ew.Sub, ew.Mul, ew.Maximum, ew.Minimum, Reshape)
"""Operations of an instruction or two, written out for each result; others go in a loop."""


def operand_kind(operand: TensorType, rows: int, channels: int) -> str | None:
    """How each channel of each row meets an operand of a tail; None where it cannot.

    Returns:
        `number`, `vector` (one for each channel), `row` (one for each row), `full`, or None.
    """
    if operand.dtype != "float32":
        return None
    if operand.size == 1:
        return "number"
    if operand.shape[-1] == channels:
        return {channels: "vector", rows * channels: "full"}.get(operand.size)
    return "row" if operand.shape[-1] == 1 and operand.size == rows else None


class Tail:
    """Writes a tail: a graph whose first input is the result `[..., C]` of a window operation.

    Its other inputs have an `operand_kind`, its operations are elementwise or reshapes that keep the last axis.
    """

    def __init__(self, graph: Graph | None, buffers: Sequence[Buffer], vec: Vectors, rows: int, channels: int) -> None:
        self.graph, self.vec, self.channels = graph, vec, channels
        names = list(graph.inputs)[1:] if graph else []
        self.buffers = {name: flat_view(buffer) for name, buffer in zip(names, buffers, strict=True)}
        types = {name: graph.inputs[name].types[0] for name in names} if graph else {}
        self.kinds = {name: operand_kind(types[name], rows, channels) for name in names}

    @property
    def is_simple(self) -> bool:
        """Whether it is short enough to be written out for each result."""
        operations = [n.op for n in self.graph.nodes if not isinstance(n.op, Input | Constant)] if self.graph else []
        return all(isinstance(op, SIMPLE) for op in operations)

    def apply(self, value: Expr, row: Index, column: Index, live: int | None) -> Expr:
        """The chain applied to the channels from `column` on of one row."""
        if self.graph is None:
            return value
        made: dict[object, Source] = {}
        for position, node in enumerate(self.graph.nodes):
            kind = node.types[0]
            if isinstance(node.op, Input):
                read = self._operand(node.op.label, row, column, live) if position else value
                source = Source(kind, lambda _, read=read: read, lambda _, read=read: read)
            elif isinstance(node.op, Constant):
                source = number_source(node.op)
            else:
                source = EXPRESSIONS[type(node.op)](node.op, kind, tuple(made[operand] for operand in node.operands))
            made[node.results[0]] = source
        result = made[self.graph.outputs[0][1]]
        return result.at((0,) * result.type.rank)

    def _operand(self, name: str, row: Index, column: Index, live: int | None) -> Expr:
        buffer, kind = self.buffers[name], self.kinds[name]
        if kind in ("number", "row"):
            return self.vec.splat(buffer[0 if kind == "number" else row])
        return self.vec.load(buffer, column if kind == "vector" else row * self.channels + column, live=live)


def tail_operands(graph: Graph | None) -> tuple[TensorType, ...]:
    """Types of what a tail reads beside the result before it."""
    return tuple(node.types[0] for node in graph.inputs.values())[1:] if graph else ()


def tail_reference(graph: Graph | None, value: Array, operands: Sequence[Array]) -> Array:
    """Interpret a tail in float64."""
    if graph is None:
        return value
    return evaluate(graph, dict(zip(graph.inputs, (value, *operands), strict=True)), {})[graph.outputs[0][0]]


def tail_flops(graph: Graph | None) -> int:
    """Operations of a tail."""
    if graph is None:
        return 0
    return sum(node.op.flops(graph.operand_types(node), node.types) for node in graph.nodes)


def row_count(shape: tuple[int, ...]) -> int:
    """Product of all axes but the last."""
    return math.prod(shape[:-1])
