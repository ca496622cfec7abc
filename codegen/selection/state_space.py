"""Choices for state spaces: one kernel from the scaled input to the gated output."""

from __future__ import annotations

from typing import Final

from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.selection.patterns import after_reshapes, find_gate, through_reshapes
from codegen.selection.state import Operand, Selection
from ir.graph import Node, Value
from ir.ops import elementwise as ew
from ir.ops import recurrence as rc
from ir.ops import shape as sh

POSITIVE: Final = (ew.Exp, ew.Relu, ew.Sigmoid, ew.Softplus, ew.Square)
"""Functions that are never negative."""
VIEWS: Final = (sh.Reshape, sh.Transpose, sh.Broadcast, sh.Slice)


def selective_scan(state: Selection, node: Node) -> None:
    """A scan whose decay depends on every state, with the products around it.

    mul(add(scan(c, b, mul(dt, u), dt, rate), mul(u, skip)), z)  becomes  selective_scan(c, b, u, dt, rate, skip, z)
    """
    op = node.op
    assert isinstance(op, rc.OuterScan)
    batch, steps, heads, states = state.graph.type_of(node.operands[0]).shape
    c, b, v, dt, rate, *initial = node.operands
    nodes = [node.id]
    scaled = _scaled_input(state, v, dt)
    if scaled is not None:
        v, absorbed = scaled
        nodes = [*absorbed, *nodes]
    last: Value = node.results[0]
    extra: list[Operand] = []
    skip = _skip(state, last, v) if heads == 1 else None
    if skip is not None:
        factor, last, absorbed = skip
        extra.append(factor)
        nodes += absorbed
    gate = find_gate(state, last)
    if gate is not None:
        z, _, last, absorbed = gate
        extra.append(z)
        nodes += absorbed
    wants_state = bool(state.graph.users(node.results[1])) or node.results[1] in state.outputs
    kernel = SelectiveScanKernel(
        batch=batch,
        t=steps,
        channels=state.graph.type_of(node.operands[2]).shape[3],
        state=states,
        heads=heads,
        scale=op.scale,
        decaying=_is_decaying(state, gates=dt, rate=rate),
        scaled_input=scaled is not None,
        skip=skip is not None,
        gate=gate[1] if gate else None,
        initial_state=op.has_state,
        final_state=wants_state,
    )
    results = [last, *node.results[1:]] if wants_state else [last]
    state.add(kernel, [c, b, v, dt, rate, *extra, *initial], results, nodes)


def _scaled_input(state: Selection, v: Value, dt: Value) -> tuple[Value, list[int]] | None:
    """The input that is multiplied by dt for this scan alone, and the nodes that do so."""
    product, absorbed = through_reshapes(state, v)
    if not isinstance(product.op, ew.Mul) or not state.is_free(product) or state.only_user(product.results[0]) is None:
        return None
    step = _memory(state, dt)
    for scale, x in (product.operands, product.operands[::-1]):
        same = state.graph.type_of(scale) == state.graph.type_of(x)
        if same and _memory(state, scale) == step and x.node not in state.static:
            return x, [*absorbed, product.id]
    return None


def _skip(state: Selection, value: Value, v: Value) -> tuple[Value, Value, list[int]] | None:
    """The static factor of the input that is added to a scan's output, the sum, and the nodes in between."""
    value, absorbed = after_reshapes(state, value)
    add = state.only_user(value)
    if add is None or not isinstance(add.op, ew.Add) or add.operands[0] == add.operands[1]:
        return None
    other = add.operands[1] if add.operands[0] == value else add.operands[0]
    product = state.producer(other)
    if not isinstance(product.op, ew.Mul) or not state.is_free(product) or state.only_user(other) is not add:
        return None
    width = state.graph.type_of(other).shape[-1]
    for x, factor in (product.operands, product.operands[::-1]):
        kind = state.graph.type_of(factor)
        one_each = factor.node in state.static and kind.size == width == (kind.shape or (0,))[-1]
        if one_each and _memory(state, x) == _memory(state, v) and state.graph.type_of(other) == add.types[0]:
            return factor, add.results[0], [*absorbed, product.id, add.id]
    return None


def _memory(state: Selection, value: Value) -> Value:
    """The value whose elements these are, under whatever shape."""
    node = state.producer(value)
    while isinstance(node.op, sh.Reshape):
        value = node.operands[0]
        node = state.producer(value)
    return value


def _is_decaying(state: Selection, gates: Value, rate: Value) -> bool:
    """Whether every gate * rate is certainly at most zero: a positive function times a negated one."""
    negated = _below_views(state, rate)
    return (
        isinstance(_below_views(state, gates).op, POSITIVE)
        and isinstance(negated.op, ew.Neg)
        and isinstance(_below_views(state, negated.operands[0]).op, POSITIVE)
    )


def _below_views(state: Selection, value: Value) -> Node:
    """The node that computes a value's elements, whatever their order."""
    node = state.producer(value)
    while isinstance(node.op, VIEWS):
        node = state.producer(node.operands[0])
    return node
