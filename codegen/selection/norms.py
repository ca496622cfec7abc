"""Choices for norms, with what stands around them."""

from __future__ import annotations

from codegen.kernels.norm import NormKernel
from codegen.selection.patterns import find_gate
from codegen.selection.state import Operand, Selection, row_count
from ir.graph import Node
from ir.ops import elementwise as ew
from ir.ops import normalization as nm


def take_gated_norm(state: Selection, node: Node) -> None:
    """A norm that is gated, unless it waits for the sum before it; asked before products take the gate's activation."""
    if not isinstance(state.producer(node.operands[0]).op, ew.Add) and find_gate(state, node.results[0]) is not None:
        norm(state, node)


def norm(state: Selection, node: Node) -> None:
    """A norm, with the addition before it if nothing else has taken that, or with the gate after it.

    layer_norm(add(x, y), scale)  becomes  norm(x, y, scale), which also writes the sum
    mul(rms_norm(x, scale), silu(z))  becomes  norm(x, scale, z)
    """
    op, type_ = node.op, node.types[0]
    assert isinstance(op, nm.LayerNorm | nm.RmsNorm)
    factors = node.operands[1:]
    static = all(factor.node in state.static for factor in factors)  # others may themselves need the sum or the gate
    below = state.producer(node.operands[0])
    fuse = static and isinstance(below.op, ew.Add) and state.is_free(below) and _same_run_time_types(state, below)
    gate = find_gate(state, node.results[0]) if static and not fuse else None
    kernel = NormKernel(
        rows=row_count(type_.shape),
        width=type_.shape[-1],
        kind="layer_norm" if isinstance(op, nm.LayerNorm) else "rms_norm",
        epsilon=op.epsilon,
        residual=fuse,
        scale=len(factors) > 0,
        bias=len(factors) > 1,
        gate=gate[1] if gate else None,
    )
    operands: list[Operand] = [*node.operands]
    if fuse:
        operands[:1] = below.operands
        state.add(kernel, operands, [node.results[0], below.results[0]], [below.id, node.id])
    elif gate:
        z, _, product, absorbed = gate
        state.add(kernel, [*operands, z], [product], [node.id, *absorbed])
    else:
        state.add(kernel, operands, node.results, [node.id])


def _same_run_time_types(state: Selection, node: Node) -> bool:
    static = any(operand.node in state.static for operand in node.operands)
    return not static and all(t == node.types[0] for t in state.graph.operand_types(node))
