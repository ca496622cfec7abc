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
MOVES: Final = (sh.Reshape, sh.Transpose, sh.Slice, sh.Concat, sh.Pad, sh.Broadcast)
"""Operations that several nodes of a chain may each repeat: an address instead of a pass over memory."""
MOST_REPEATS: Final = 4
LARGEST_CHAIN: Final = 24
"""Nodes of a chain, so that its expression stays quick to compile."""


def fuse_chains(state: Selection, live: list[Node]) -> None:
    """Group what is left: a node joins the chain that reads it, unless that would repeat costly work.

    exp(x) -> mul(_, y) -> sum  becomes one kernel
    """
    chains: dict[int, list[Node]] = {}
    home: dict[int, int] = {}
    repeats: dict[int, int] = {}
    for node in reversed(live):
        if not state.is_free(node) or isinstance(node.op, Input):
            continue
        if not is_fusible(node.op) and not isinstance(node.op, rd.Reduction):
            raise CompileError("no kernel for this operation", where=node.path, found=node.op.name)
        readers = _readers(state, node)
        roots = {home.get(reader.id) for reader in readers}
        root = roots.pop() if len(roots) == 1 else None
        if root is not None and _may_join(state, node, readers, chains[root], repeats.get(root, 1)):
            chains[root].append(node)
            home[node.id] = root
            repeats[root] = repeats.get(root, 1) * len(readers)
        elif not isinstance(node.op, sh.Reshape):
            chains[node.id] = [node]
            home[node.id] = node.id
    for root, members in chains.items():
        _add_chain(state, state.graph.node(root), members[::-1])


def _readers(state: Selection, node: Node) -> list[Node]:
    """The nodes that read a node, if all of them still need a kernel and nothing else needs its value."""
    users = state.graph.users(node.results[0])
    if node.results[0] in state.outputs or not all(state.is_free(user) for user in users):
        return []
    return list(users)


def _may_join(state: Selection, node: Node, readers: list[Node], chain: list[Node], repeated: int) -> bool:
    """Whether a node may be computed where the nodes of a chain read it; only moves are where several do.

    concat(slice(y), slice(y)), y = concat(slice(x), slice(x))  becomes one kernel
    """
    if isinstance(node.op, rd.Reduction) or len(chain) >= LARGEST_CHAIN:
        return False
    if len(readers) > 1 and not (isinstance(node.op, MOVES) and repeated * len(readers) <= MOST_REPEATS):
        return False
    reads = max(t.size for reader in readers for t in (*reader.types, *state.graph.operand_types(reader)))
    twice = len(readers) > 1 or readers[0].operands.count(node.results[0]) > 1
    if (twice or reads > node.types[0].size) and any(
        isinstance(member.op, COSTLY) for member in _upstream_free(state, node)
    ):
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
