"""Convolutions and poolings, with the elementwise operations that follow as their tail."""

from __future__ import annotations

from typing import Final

from codegen.kernels._tail import operand_kind
from codegen.kernels.base import Kernel
from codegen.kernels.conv import ConvKernel
from codegen.kernels.window import WindowKernel, is_narrow
from codegen.selection.state import Selection, row_count
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops import convolution as cv
from ir.ops import elementwise as ew
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input
from ir.types import TensorType

LONGEST_TAIL: Final = 8
"""Operations of a tail, so that it stays quick to compile."""


def take_window(state: Selection, node: Node) -> None:
    """One kernel with as much of what follows as its tail takes.

    conv(x, w) -> add(_, bias) -> silu  becomes  one kernel
    """
    op = node.op
    assert isinstance(op, cv.Conv | cv.Pool)
    types = state.graph.operand_types(node)
    members = _followers(state, node)
    tail, operands = _tail(state, node, members)
    packed = len(node.operands) > 1 and node.operands[1].node in state.static
    kernel: Kernel
    if isinstance(op, cv.Pool):
        kernel = WindowKernel(types[0], None, op, tail)
    elif is_narrow(op, types[1]):
        kernel = WindowKernel(types[0], types[1], op, tail, packed)
    else:
        kernel = ConvKernel(types[0], types[1], op, tail, packed)
    last = members[-1] if members else node
    state.add(kernel, [*node.operands, *operands], last.results, [node.id, *(member.id for member in members)])


def _followers(state: Selection, node: Node) -> list[Node]:
    """The run of elementwise operations, each the only reader of the one before; reshapes only between them."""
    found: list[Node] = []
    last, rows = node, row_count(node.types[0].shape)
    while (user := state.only_user(last.results[0])) is not None and len(found) < LONGEST_TAIL:
        if not _fits(state, user, last.results[0], rows, node.types[0].shape[-1]):
            break
        found.append(user)
        last = user
    while found and isinstance(found[-1].op, sh.Reshape):
        found.pop()
    return found


def _fits(state: Selection, user: Node, value: Value, rows: int, channels: int) -> bool:
    result = user.types[0]
    if result.shape[-1:] != (channels,) or result.size != rows * channels or result.dtype != "float32":
        return False
    if not isinstance(user.op, ew.Unary | ew.Binary | sh.Reshape):
        return False
    others = [operand for operand in user.operands if operand != value]
    return all(operand_kind(state.graph.type_of(other), rows, channels) for other in others)


def _tail(state: Selection, node: Node, members: list[Node]) -> tuple[Graph | None, list[Value]]:
    """The graph of a tail and the values of its operands."""
    if not members:
        return None, []
    nodes: list[Node] = []
    known: dict[Value, Value] = {}
    operands: list[Value] = []

    def place(op: Op, reads: tuple[Value, ...], type_: TensorType) -> Value:
        made = Node(len(nodes), op, reads, (type_,))
        nodes.append(made)
        return made.results[0]

    known[node.results[0]] = place(Input("x0", node.types[0]), (), node.types[0])
    for member in members:
        for operand in member.operands:
            if operand in known:
                continue
            producer, kind = state.producer(operand), state.graph.type_of(operand)
            if isinstance(producer.op, Constant) and kind.size == 1:
                known[operand] = place(producer.op, (), kind)
            else:
                operands.append(operand)
                known[operand] = place(Input(f"x{len(operands)}", kind), (), kind)
        known[member.results[0]] = place(
            member.op, tuple(known[operand] for operand in member.operands), member.types[0]
        )
    return Graph(nodes, [("y", known[members[-1].results[0]])]), operands
