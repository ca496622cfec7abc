"""Values of a small graph as index expressions: what each element is, given its position.

A `Source` answers "what is the element at this position" with a TIR expression. Sources compose through operations
without storing anything, which is how chains of elementwise and shape operations become one loop. The position along
the innermost axis may be a vector of positions; then the element is a vector too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels import vector_math as vm
from ir.graph import Graph, Value
from ir.op import Op
from ir.ops import attention as at
from ir.ops import elementwise as ew
from ir.ops import indexing as ix
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input
from ir.types import TensorType

Index = Sequence[Any]
"""A position: an integer or TIR expression for each axis."""


@dataclass(frozen=True)
class Source:
    """A value as a function of position.

    Attributes:
        type: Its type.
        at: Element at a position.
        flat: Element at a row-major offset.
    """

    type: TensorType
    at: Callable[[Index], Expr]
    flat: Callable[[Any], Expr]


def leaf(buffer: Buffer, type_: TensorType) -> Source:
    """A value that lies in a one-dimensional buffer."""
    if type_.size == 1:
        return Source(type_, lambda index: buffer[0], lambda offset: buffer[0])
    return Source(type_, lambda index: buffer[linear(index, type_.shape)], lambda offset: buffer[offset])


def linear(index: Index, shape: tuple[int, ...]) -> Any:
    """Row-major offset of a position; axes of size one add nothing."""
    offset: Any = 0
    for position, size in zip(index, shape, strict=True):
        offset = offset * size + (position if size > 1 else 0)
    return offset


def unravel(offset: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Position of a row-major offset."""
    index: list[Any] = []
    below = math.prod(shape)
    for axis, size in enumerate(shape):
        below //= size
        quotient = offset if below == 1 else offset // below
        outermost = math.prod(shape[:axis]) == 1
        index.append(0 if size == 1 else quotient if outermost else quotient % size)
    return tuple(index)


def sources(graph: Graph, buffers: dict[str, Buffer]) -> dict[Value, Source]:
    """Sources of every value of a graph of fusible operations, inputs lying in flat buffers by name."""
    made: dict[Value, Source] = {}
    for node in graph.nodes:
        value = node.results[0]
        if isinstance(node.op, Input):
            made[value] = leaf(buffers[node.op.label], node.types[0])
        elif isinstance(node.op, Constant):
            made[value] = number_source(node.op)
        elif type(node.op) in EXPRESSIONS:
            operands = tuple(made[operand] for operand in node.operands)
            made[value] = EXPRESSIONS[type(node.op)](node.op, node.types[0], operands)
    return made


def number_source(op: Constant) -> Source:
    """A constant of one element."""
    number = op.evaluate().item()
    literal = tirx.const(number, op.type.dtype)
    return Source(op.type, lambda index: literal, lambda offset: literal)


def is_fusible(op: Op) -> bool:
    """Whether an operation can be an index expression; of constants, only single numbers."""
    return type(op) in EXPRESSIONS or (isinstance(op, Constant) and op.type.size == 1)


def _pointwise(function: Callable[..., Expr]) -> Callable[[Op, TensorType, tuple[Source, ...]], Source]:
    """Row of an elementwise operation: operands are read at the same position, broadcast axes at zero."""

    def row(op: Op, result: TensorType, operands: tuple[Source, ...]) -> Source:
        def at(index: Index) -> Expr:
            reads = [operand.at(_broadcast_index(index, operand.type.shape)) for operand in operands]
            return function(*same_lanes(*reads))

        def flat(offset: Any) -> Expr:
            if any(operand.type.size not in (1, result.size) for operand in operands):
                return at(unravel(offset, result.shape))
            reads = [operand.flat(0 if operand.type.size == 1 else offset) for operand in operands]
            return function(*same_lanes(*reads))

        return Source(result, at, flat)

    return row


def same_lanes(*values: Any) -> list[Expr]:
    """Repeat scalars so that all values are vectors of one length, if any is a vector."""
    widest = max(vm.lanes_of(value) for value in values)
    return [tirx.Broadcast(value, widest) if vm.lanes_of(value) < widest else value for value in values]


def _broadcast_index(index: Index, shape: tuple[int, ...]) -> Index:
    trailing = index[len(index) - len(shape) :]
    return tuple(0 if size == 1 else position for position, size in zip(trailing, shape, strict=True))


def _moved(result: TensorType, operand: Source, position: Callable[[Index], Index]) -> Source:
    """An operation that reads its operand at another position."""

    def at(index: Index) -> Expr:
        return operand.at(position(index))

    return Source(result, at, lambda offset: at(unravel(offset, result.shape)))


def _reshape(op: sh.Reshape, result: TensorType, operands: tuple[Source, ...]) -> Source:
    operand = operands[0]
    return Source(result, lambda index: operand.flat(linear(index, result.shape)), operand.flat)


def _transpose(op: sh.Transpose, result: TensorType, operands: tuple[Source, ...]) -> Source:
    inverse = [op.permutation.index(axis) for axis in range(len(op.permutation))]
    return _moved(result, operands[0], lambda index: tuple(index[axis] for axis in inverse))


def _slice(op: sh.Slice, result: TensorType, operands: tuple[Source, ...]) -> Source:
    axis = op.axis % result.rank

    def position(index: Index) -> Index:
        return (*index[:axis], index[axis] * op.stride + op.start, *index[axis + 1 :])

    return _moved(result, operands[0], position)


def _broadcast(op: sh.Broadcast, result: TensorType, operands: tuple[Source, ...]) -> Source:
    return _moved(result, operands[0], lambda index: _broadcast_index(index, operands[0].type.shape))


def _concat(op: sh.Concat, result: TensorType, operands: tuple[Source, ...]) -> Source:
    axis = op.axis % result.rank

    def at(index: Index) -> Expr:
        start, chosen = 0, None
        for operand in operands:
            size = operand.type.shape[axis]
            local = _clamp(index[axis] - start, size)
            element = operand.at((*index[:axis], local, *index[axis + 1 :]))
            chosen = element if chosen is None else _select(index[axis] < start, chosen, element)
            start += size
        assert chosen is not None
        return chosen

    return Source(result, at, lambda offset: at(unravel(offset, result.shape)))


def _pad(op: sh.Pad, result: TensorType, operands: tuple[Source, ...]) -> Source:
    operand = operands[0]

    def at(index: Index) -> Expr:
        inside: Any = True
        local: list[Any] = []
        for position, low, high, size in zip(index, op.low, op.high, operand.type.shape, strict=True):
            shifted = position - low
            if low:
                inside = _both(inside, shifted >= 0)
            if high:
                inside = _both(inside, shifted < size)
            local.append(_clamp(shifted, size) if low or high else shifted)
        element = operand.at(local)
        return _select(inside, element, tirx.const(op.value, operand.type.dtype))

    return Source(result, at, lambda offset: at(unravel(offset, result.shape)))


def _take(op: ix.Take, result: TensorType, operands: tuple[Source, ...]) -> Source:
    table, indices = operands
    rank = indices.type.rank
    return _moved(result, table, lambda index: (indices.at(index[:rank]), *index[rank:]))


def _gather(op: ix.Gather, result: TensorType, operands: tuple[Source, ...]) -> Source:
    x, indices = operands
    axis = op.axis % result.rank

    def position(index: Index) -> Index:
        chosen = indices.at(_broadcast_index(index, indices.type.shape))
        return (*index[:axis], chosen, *index[axis + 1 :])

    return _moved(result, x, position)


def _dynamic_update(op: ix.DynamicUpdate, result: TensorType, operands: tuple[Source, ...]) -> Source:
    base, update, position = operands
    axis = op.axis % result.rank
    length = update.type.shape[axis]

    def at(index: Index) -> Expr:
        local = index[axis] - position.flat(0)
        written = update.at((*index[:axis], _clamp(local, length), *index[axis + 1 :]))
        return _select(_both(local >= 0, local < length), written, base.at(index))

    return Source(result, at, lambda offset: at(unravel(offset, result.shape)))


def _rope(op: at.Rope, result: TensorType, operands: tuple[Source, ...]) -> Source:
    """Rotation at a run-time position; with one known beforehand a kernel reads its angles from a table."""
    x, offset = operands
    half = result.shape[3] // 2

    def at_(index: Index) -> Expr:
        batch, step, head, k = index
        position = _converted(offset.flat(0) + step, "float32")
        pair = _converted(k % half, "float32") if half > 1 else tirx.const(0.0, "float32")
        angle = position * vm.exp(pair * tirx.const(-math.log(op.base) / half, "float32"))
        own, other = x.at(index), x.at((batch, step, head, (k + half) % (2 * half)))
        signed = _select(k < half, -other, other)
        return own * tirx.cos(angle) + signed * tirx.sin(angle)

    return Source(result, at_, lambda place: at_(unravel(place, result.shape)))


def _clamp(position: Any, size: int) -> Any:
    """A position that is safe to read; what is read there is discarded when it lies outside.

    It goes through memory of its own: both sides of a selection are read, and simplification would take the clamp away
    from the side whose condition implies it.
    """
    if isinstance(position, int):
        return min(max(position, 0), size - 1)
    return vm.keep_integers(tirx.max(tirx.min(position, tirx.const(size - 1, "int32")), tirx.const(0, "int32")))


def _both(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return b if a is True else a
    if isinstance(a, bool) or isinstance(b, bool):
        return False
    return tirx.And(*same_lanes(a, b))


def _select(condition: Any, a: Expr, b: Expr) -> Expr:
    if isinstance(condition, bool):
        return a if condition else b
    return tirx.Select(*same_lanes(condition, a, b))


def _compare(op: ew.Compare, result: TensorType, operands: tuple[Source, ...]) -> Source:
    function = {"lt": tirx.LT, "le": tirx.LE, "eq": tirx.EQ}[op.kind]
    return _pointwise(function)(op, result, operands)


def _cast(op: ew.Cast, result: TensorType, operands: tuple[Source, ...]) -> Source:
    return _pointwise(lambda x: _converted(x, op.dtype))(op, result, operands)


def _converted(x: Expr, dtype: str) -> Expr:
    lanes = vm.lanes_of(x)
    return x.astype(dtype if lanes == 1 else f"{dtype}x{lanes}")


EXPRESSIONS: Final[dict[type[Op], Callable[[Any, TensorType, tuple[Source, ...]], Source]]] = {
    ew.Neg: _pointwise(lambda x: -x),
    ew.Exp: _pointwise(vm.exp),
    ew.Log: _pointwise(vm.log),
    ew.Sqrt: _pointwise(tirx.sqrt),
    ew.Rsqrt: _pointwise(vm.rsqrt),
    ew.Abs: _pointwise(lambda x: tirx.max(x, -x)),
    ew.Sin: _pointwise(tirx.sin),
    ew.Cos: _pointwise(tirx.cos),
    ew.Tanh: _pointwise(vm.tanh),
    ew.Erf: _pointwise(vm.erf),
    ew.Sigmoid: _pointwise(vm.sigmoid),
    ew.Relu: _pointwise(vm.relu),
    ew.Silu: _pointwise(vm.silu),
    ew.Gelu: _pointwise(vm.gelu),
    ew.Softplus: _pointwise(vm.softplus),
    ew.Square: _pointwise(lambda x: x * x),
    ew.Add: _pointwise(lambda a, b: a + b),
    ew.Sub: _pointwise(lambda a, b: a - b),
    ew.Mul: _pointwise(lambda a, b: a * b),
    ew.Div: _pointwise(lambda a, b: a / b),
    ew.Maximum: _pointwise(tirx.max),
    ew.Minimum: _pointwise(tirx.min),
    ew.Pow: _pointwise(tirx.power),
    ew.Compare: _compare,
    ew.Where: _pointwise(tirx.Select),
    ew.Cast: _cast,
    sh.Reshape: _reshape,
    sh.Transpose: _transpose,
    sh.Slice: _slice,
    sh.Broadcast: _broadcast,
    sh.Concat: _concat,
    sh.Pad: _pad,
    ix.Take: _take,
    ix.DynamicUpdate: _dynamic_update,
    ix.Gather: _gather,
    at.Rope: _rope,
}
"""How each fusible operation reads its operands: the operation, its result type, its operands' sources."""
