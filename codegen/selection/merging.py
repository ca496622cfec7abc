"""Products of one input as one product, whose readers find their columns in a window of the wider result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Kernel, View
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.selection.state import KernelCall, Operand, Static
from ir.graph import Graph, Value

WINDOWS: Final[dict[type[Kernel], tuple[str, ...]]] = {
    AttentionKernel: ("q_view", "k_view", "v_view"),
    GemmKernel: ("a_view",),
    OuterScanKernel: ("q_view", "k_view", "v_view", "g_view"),
    RopeKernel: ("x_view",),
    SelectiveScanKernel: ("c_view", "b_view", "x_view", "dt_view"),
}
"""For the first operands of a kernel, the field that says which window of a wider buffer they are."""

Read = tuple[KernelCall, int]


def merge_products(graph: Graph, calls: Sequence[KernelCall], alias: Mapping[Value, Value]) -> list[KernelCall]:
    """Compute products of one input and static weights together where every reader can read a window.

    gemm(x, q); gemm(x, k); gemm(x, v); attention(q, k, v)  becomes  gemm(x, [q | k | v]); attention(3 windows)

    Args:
        graph: What the calls serve.
        calls: Kernel calls in order.
        alias: Values that are another value's memory under another shape.
    """
    needed = {alias.get(value, value) for _, value in graph.outputs}
    readers: defaultdict[Value, list[Read]] = defaultdict(list)
    for call in calls:
        for index, operand in enumerate(call.operands):
            if isinstance(operand, Value):
                readers[alias.get(operand, operand)].append((call, index))

    groups: defaultdict[Hashable, list[KernelCall]] = defaultdict(list)
    for call in calls:
        made = call.results[0]
        if _is_plain_product(call) and made not in needed and all(_reads_windows(*read) for read in readers[made]):
            groups[_shared(graph, call, alias)].append(call)

    merged: dict[int, KernelCall | None] = {}  # by the place of a call; None for those that another one covers
    windows: dict[Value, tuple[Value, View]] = {}
    places = {id(call): place for place, call in enumerate(calls)}
    for group in groups.values():
        if len(group) > 1:
            merged.update(dict.fromkeys((places[id(call)] for call in group), None))
            merged[places[id(group[0])]] = _merge(graph, group, windows)
    kept = [merged.get(place, call) for place, call in enumerate(calls)]
    return [_reading_windows(call, windows, alias) for call in kept if call is not None]


def _is_plain_product(call: KernelCall) -> bool:
    """Whether a call is a product without anything in its epilogue but a bias."""
    kernel = call.kernel
    return (
        isinstance(kernel, GemmKernel)
        and kernel == GemmKernel(kernel.m, kernel.n, kernel.k, bias=kernel.bias, precision=kernel.precision)
        and all(isinstance(operand, Static) for operand in call.operands[1:])
    )


def _reads_windows(call: KernelCall, index: int) -> bool:
    fields = WINDOWS.get(type(call.kernel), ())
    if isinstance(call.kernel, OuterScanKernel) and not call.kernel.has_gate:
        fields = fields[:3]
    return index < len(fields) and getattr(call.kernel, fields[index]) is None


def _shared(graph: Graph, call: KernelCall, alias: Mapping[Value, Value]) -> Hashable:
    """What products must have in common to be computed together."""
    x, *static = call.operands
    assert isinstance(x, Value)
    forms = tuple((part.transpose, graph.type_of(part.values[0]).rank) for part in static if isinstance(part, Static))
    return alias.get(x, x), replace(call.kernel, n=1), forms


def _merge(graph: Graph, group: Sequence[KernelCall], windows: dict[Value, tuple[Value, View]]) -> KernelCall:
    """Make one product of several, and note where each result lies in its result."""
    sizes = [call.kernel.outputs[0].shape[1] for call in group]
    first = group[0]
    node = graph.node(first.results[0].node)
    whole = Value(node.id, len(node.types))  # a value of the compiled model that no node has
    offset = 0
    for call, size in zip(group, sizes, strict=True):
        windows[call.results[0]] = (whole, View(sum(sizes), offset))
        offset += size
    operands: list[Operand] = [first.operands[0]]
    for index in range(1, len(first.operands)):
        parts = [call.operands[index] for call in group]
        values = tuple(value for part in parts if isinstance(part, Static) for value in part.values)
        operands.append(replace(parts[0], values=values))
    nodes = tuple(sorted(number for call in group for number in call.nodes))
    return KernelCall(replace(first.kernel, n=sum(sizes)), tuple(operands), (whole,), nodes)


def _reading_windows(
    call: KernelCall, windows: Mapping[Value, tuple[Value, View]], alias: Mapping[Value, Value]
) -> KernelCall:
    kernel, operands = call.kernel, list(call.operands)
    for index, operand in enumerate(operands):
        if isinstance(operand, Value) and alias.get(operand, operand) in windows:
            operands[index], view = windows[alias.get(operand, operand)]
            kernel = replace(kernel, **{WINDOWS[type(kernel)][index]: view})
    return replace(call, kernel=kernel, operands=tuple(operands))
