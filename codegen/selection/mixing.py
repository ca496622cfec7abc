"""Choices for recurrences by the delta rule, for routing and for transforms; rows of `generators.GENERATORS`."""

from __future__ import annotations

from typing import Final

from codegen.kernels.delta_scan import DeltaScanKernel
from codegen.kernels.fft import FftKernel
from codegen.kernels.long_conv import LongConvKernel
from codegen.kernels.scatter import ScatterAddKernel
from codegen.kernels.topk import TopKKernel
from codegen.selection.state import Selection, Table, row_count
from ir.errors import CompileError
from ir.graph import Node
from ir.ops import indexing as ix
from ir.ops import recurrence as rc
from ir.ops import sorting as so
from ir.ops import spectral as sp
from ir.ops.structure import Constant


def delta_scan(state: Selection, node: Node) -> None:
    """The fused delta rule; its last state is made only where it is read."""
    op = node.op
    assert isinstance(op, rc.OuterScan)
    batch, steps, heads, keys = state.graph.type_of(node.operands[0]).shape
    wants_state = bool(state.graph.users(node.results[1])) or node.results[1] in state.outputs
    kernel = DeltaScanKernel(
        batch=batch,
        t=steps,
        heads=heads,
        dk=keys,
        dv=state.graph.type_of(node.operands[2]).shape[3],
        decay=op.decay,
        scale=op.scale,
        initial_state=op.has_state,
        final_state=wants_state,
    )
    state.add(kernel, node.operands, node.results if wants_state else node.results[:1], [node.id])


STACK_BYTES: Final = 4 * 1024 * 1024
"""Most that a kernel may hold on its stack; threads commonly have 8 MiB."""


def _require_stack(node: Node, wanted: int) -> None:
    """Refuse an axis so long that one unit's work does not fit the stack.

    Raises:
        CompileError: It does not.
    """
    if wanted > STACK_BYTES:
        message, limit = "the axis is too long to be compiled", f"at most {STACK_BYTES} bytes of work"
        raise CompileError(message, where=node.path, expected=limit, found=f"{wanted} bytes")


def top_k(state: Selection, node: Node) -> None:
    """A selection or a sort of each row."""
    op, shape = node.op, state.graph.operand_types(node)[0].shape
    assert isinstance(op, so.TopK)
    kernel = TopKKernel(row_count(shape), shape[-1], op.k, op.largest)
    _require_stack(node, kernel.stack_bytes)
    state.add(kernel, node.operands, node.results, [node.id])


def scatter_add(state: Selection, node: Node) -> None:
    """Additions at positions that are data; what gathers is fused with its neighbours instead."""
    op = node.op
    assert isinstance(op, ix.ScatterAdd)
    base, indices, updates = (kind.shape for kind in state.graph.operand_types(node))
    kernel = ScatterAddKernel(base, indices, updates, op.axis % len(base))
    state.add(kernel, node.operands, node.results, [node.id])


def fourier(state: Selection, node: Node) -> None:
    """A transform along any axis, with its table of roots."""
    op, shape = node.op, state.graph.operand_types(node)[0].shape
    assert isinstance(op, sp.Fft | sp.Rfft | sp.Irfft)
    kind = f"i{op.name}" if isinstance(op, sp.Fft) and op.inverse else op.name
    kernel = FftKernel.along(kind, shape, op.axis, op.length if isinstance(op, sp.Irfft) else shape[op.axis])
    _require_stack(node, kernel.stack_bytes)
    table = Table(Constant.from_array(kernel.table()))
    state.add(kernel, [*node.operands, table], node.results, [node.id])


def long_conv(state: Selection, node: Node) -> None:
    """A convolution by transforms; a filter that is known is transformed when the model is compiled."""
    x, taps = node.operands
    batch, steps, channels = state.graph.type_of(x).shape
    constant = taps.node in state.static
    kernel = LongConvKernel(batch, steps, channels, state.graph.type_of(taps).shape[0], constant=constant)
    _require_stack(node, kernel.stack_bytes)
    table = Table(Constant.from_array(kernel.table()))
    state.add(kernel, [x, taps, table], node.results, [node.id])
