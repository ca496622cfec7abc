"""Small questions about a graph that several choices of kernels ask."""

from __future__ import annotations

from codegen.selection.products import ACTIVATION_NAMES
from codegen.selection.state import Selection
from ir.graph import Node, Value
from ir.ops import elementwise as ew
from ir.ops import shape as sh


def find_gate(state: Selection, value: Value) -> tuple[Value, str, Value, list[int]] | None:
    """Find the run-time factor that a value is multiplied by, if that product is all that becomes of the value.

    mul(value, silu(z))  gives  z, "silu", the product

    Returns:
        The factor, below the activation that makes it if nothing else reads that; the activation, `identity` if there
        is none; the product; and the nodes in between.
    """
    value, absorbed = after_reshapes(state, value)
    user = state.only_user(value)
    if user is None or not isinstance(user.op, ew.Mul) or user.operands[0] == user.operands[1]:
        return None
    factor = user.operands[1] if user.operands[0] == value else user.operands[0]
    if factor.node in state.static or state.graph.type_of(factor) != state.graph.type_of(value):
        return None
    if value.node in nodes_below(state, factor):
        return None  # the gate itself needs the value
    activated, between = through_reshapes(state, factor)
    name = ACTIVATION_NAMES.get(type(activated.op))
    if name is None or not state.is_free(activated) or state.only_user(activated.results[0]) is None:
        return factor, "identity", user.results[0], [*absorbed, user.id]
    return activated.operands[0], name, user.results[0], [*absorbed, *between, activated.id, user.id]


def nodes_below(state: Selection, value: Value) -> set[int]:
    """Numbers of all nodes that a value depends on."""
    found: set[int] = set()
    pending = [value.node]
    while pending:
        number = pending.pop()
        if number not in found:
            found.add(number)
            pending += [operand.node for operand in state.graph.node(number).operands]
    return found


def through_reshapes(state: Selection, value: Value) -> tuple[Node, list[int]]:
    """The node below a value's reshapes, and those reshapes where nothing else reads them."""
    absorbed: list[int] = []
    node = state.producer(value)
    while isinstance(node.op, sh.Reshape) and state.only_user(node.results[0]) is not None:
        absorbed.append(node.id)
        node = state.producer(node.operands[0])
    return node, absorbed


def after_reshapes(state: Selection, value: Value) -> tuple[Value, list[int]]:
    """The last of the reshapes that are all that becomes of a value, and their nodes."""
    absorbed: list[int] = []
    while True:
        user = state.only_user(value)
        if user is None or not isinstance(user.op, sh.Reshape):
            return value, absorbed
        absorbed.append(user.id)
        value = user.results[0]
