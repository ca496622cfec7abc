"""Which operands of which kernels may be a window of a wider buffer, and the kernels that read them so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Kernel, View
from codegen.kernels.fused import SERIAL_BELOW, FusedKernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.norm import NormKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from ir.graph import Node, Value
from ir.ops.shape import Reshape, Slice
from ir.ops.structure import Input
from ir.rewrite import Rewriter, rebuild
from ir.types import TensorType

FIELDS: Final[dict[type[Kernel], tuple[str, ...]]] = {
    AttentionKernel: ("q_view", "k_view", "v_view"),
    GemmKernel: ("a_view",),
    OuterScanKernel: ("q_view", "k_view", "v_view", "g_view"),
    RopeKernel: ("x_view",),
    SelectiveScanKernel: ("c_view", "b_view", "x_view", "dt_view"),
}
"""For the first operands of a kernel, the field that says which window of a wider buffer they are."""
GATES: Final = ("gate_view", "z_view")
LARGEST_GATE: Final = 4 * 1024
"""Elements of a gate that is merged: it is read last, and until then a merged result holds the memory of all parts."""


@dataclass(frozen=True)
class Window:
    """Columns of a wider buffer.

    Attributes:
        view: The buffer, and the first of the columns.
        size: Number of columns.
    """

    view: View
    size: int


def reads_window(kernel: Kernel, index: int, kind: TensorType) -> bool:
    """Tell whether an operand of a kernel that is made as `[rows, columns]` may be a window of a wider buffer."""
    operand, columns = kernel.inputs[index], kind.shape[-1]
    if isinstance(kernel, FusedKernel):
        rows_stay = operand.rank > 0 and operand.shape[-1] == columns
        return rows_stay or operand.size < SERIAL_BELOW  # finding rows and columns again costs a division each
    field = _field(kernel, index)
    if field in GATES and kind.size > LARGEST_GATE:
        return False
    fits = columns % kernel.width == 0 if isinstance(kernel, NormKernel) else operand == kind
    return field is not None and getattr(kernel, field) is None and fits


def reading_window(kernel: Kernel, index: int, window: Window) -> Kernel:
    """Return the kernel that reads an operand, of which `reads_window` holds, from a window."""
    if isinstance(kernel, FusedKernel):
        return _sliced(kernel, index, window)
    field = _field(kernel, index)
    assert field is not None
    if isinstance(kernel, NormKernel):
        kernel = replace(kernel, heads=window.size // kernel.width)
    return replace(kernel, **{field: window.view})  # pyright: ignore[reportArgumentType]  # every kernel is a dataclass


def _field(kernel: Kernel, index: int) -> str | None:
    """The field that says which window an operand is."""
    last = len(kernel.inputs) - 1
    if isinstance(kernel, NormKernel):
        if index == 0:
            return None if kernel.residual else "x_view"
        return "gate_view" if kernel.gate and index == last else None
    if isinstance(kernel, SelectiveScanKernel) and kernel.gate and index == last - kernel.initial_state:
        return "z_view"
    fields = FIELDS.get(type(kernel), ())
    if isinstance(kernel, OuterScanKernel) and not kernel.has_gate:
        fields = fields[:3]
    return fields[index] if index < len(fields) else None


def _sliced(kernel: FusedKernel, index: int, window: Window) -> FusedKernel:
    """The chain that begins by taking its columns out of the buffer."""
    name = list(kernel.graph.inputs)[index]
    kind = kernel.inputs[index]
    rows = kind.shape[:-1] if kind.rank and kind.shape[-1] == window.size else (kind.size // window.size,)
    buffer = TensorType((*rows, window.view.width), kind.dtype)

    def visit(r: Rewriter, node: Node) -> tuple[Value, ...]:
        if not isinstance(node.op, Input) or node.op.label != name:
            return tuple(r.add(node))
        (whole,) = r.add(replace(node, op=replace(node.op, label=name, type=buffer), types=(buffer,)))
        part = r.emit(Slice(len(rows), window.view.offset, window.view.offset + window.size), whole)
        return (part if r.type_of(part) == kind else r.emit(Reshape(kind.shape), part),)

    return FusedKernel(rebuild(kernel.graph, visit))
