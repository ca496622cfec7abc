"""Third round: what is left, fused into chains."""

from __future__ import annotations

from typing import Any, Final

from codegen.kernels.expressions import is_fusible
from codegen.kernels.fused import FusedKernel
from codegen.selection.state import Selection
from ir.errors import CompileError
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops import attention as at
from ir.ops import elementwise as ew
from ir.ops import reduction as rd
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input

COSTLY: Final = (
    ew.Exp,
    ew.Log,
    ew.Sin,
    ew.Cos,
    ew.Tanh,
    ew.Erf,
    ew.Sigmoid,
    ew.Silu,
    ew.Gelu,
    ew.Softplus,
    ew.Pow,
    at.Rope,
)
"""Functions that are not computed again for each element of a broadcast."""
LARGEST_CHAIN: Final = 24
"""Nodes of a chain, so that its expression stays quick to compile."""


def fuse_chains(state: Selection, live: list[Node]) -> None:
    """Group what is left: a node joins the chain of the one node that reads it, unless that would repeat costly work.

    exp(x) -> mul(_, y) -> sum  becomes one kernel
    """
    chains: dict[int, list[Node]] = {}
    home: dict[int, int] = {}
    for node in reversed(live):
        if not state.is_free(node) or isinstance(node.op, Input):
            continue
        if not is_fusible(node.op) and not isinstance(node.op, rd.Reduction):
            raise CompileError("no kernel for this operation", where=node.path, found=node.op.name)
        reader = state.only_user(node.results[0])
        root = home.get(reader.id) if reader is not None else None
        if root is not None and reader is not None and _may_join(state, node, reader, chains[root]):
            chains[root].append(node)
            home[node.id] = root
        elif not isinstance(node.op, sh.Reshape):
            chains[node.id] = [node]
            home[node.id] = node.id
    for root, members in chains.items():
        _add_chain(state, state.graph.node(root), members[::-1])


def _may_join(state: Selection, node: Node, reader: Node, chain: list[Node]) -> bool:
    if isinstance(node.op, rd.Reduction) or len(chain) >= LARGEST_CHAIN:
        return False
    reads = max(t.size for t in (*reader.types, *state.graph.operand_types(reader)))
    repeats = reader.operands.count(node.results[0]) > 1 or reads > node.types[0].size
    if repeats and any(isinstance(member.op, COSTLY) for member in _upstream_free(state, node)):
        return False
    return not (isinstance(node.op, sh.Reshape) and not state.is_free(state.producer(node.operands[0])))


def _upstream_free(state: Selection, node: Node) -> list[Node]:
    """The node and the run of nodes below it that would join with it."""
    found, pending = [], [node]
    while pending:
        current = pending.pop()
        found.append(current)
        below = [state.producer(operand) for operand in current.operands]
        pending += [n for n in below if state.is_free(n) and is_fusible(n.op) and not isinstance(n.op, Input)]
    return found


def _add_chain(state: Selection, root: Node, members: list[Node]) -> None:
    inside = {node.id for node in members}
    nodes: list[Node] = []
    numbers: dict[Value, Value] = {}
    operands: list[Value] = []

    def place(op: Op, reads: tuple[Value, ...], node_types: Any) -> Value:
        made = Node(len(nodes), op, reads, node_types)
        nodes.append(made)
        return made.results[0]

    for node in members:
        for operand in node.operands:
            if operand in numbers or operand.node in inside:
                continue
            producer, kind = state.producer(operand), state.graph.type_of(operand)
            if isinstance(producer.op, Constant) and kind.size == 1:
                numbers[operand] = place(producer.op, (), (kind,))
            else:
                numbers[operand] = place(Input(f"x{len(operands)}", kind), (), (kind,))
                operands.append(operand)
        reads = tuple(numbers[operand] for operand in node.operands)
        numbers[node.results[0]] = place(node.op, reads, node.types)
    chain = Graph(nodes, [("y", numbers[root.results[0]])])
    state.add(FusedKernel(chain), operands, [root.results[0]], [node.id for node in members])
