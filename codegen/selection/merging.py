"""Products of one input as one product, whose readers find their columns in a window of the wider result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from codegen.kernels.base import View
from codegen.kernels.gemm import GemmKernel
from codegen.selection.state import KernelCall, Operand, Static
from codegen.selection.views import Window, reading_window, reads_window
from ir.graph import Graph, Value

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
        if not _is_plain_product(call) or made in needed:
            continue
        if all(reads_window(reader.kernel, index, call.kernel.outputs[0]) for reader, index in readers[made]):
            groups[_shared(graph, call, alias)].append(call)

    merged: dict[int, KernelCall | None] = {}  # by the place of a call; None for those that another one covers
    windows: dict[Value, tuple[Value, Window]] = {}
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


def _shared(graph: Graph, call: KernelCall, alias: Mapping[Value, Value]) -> Hashable:
    """What products must have in common to be computed together."""
    x, *static = call.operands
    assert isinstance(x, Value)
    assert isinstance(call.kernel, GemmKernel)
    forms = tuple((part.transpose, graph.type_of(part.values[0]).rank) for part in static if isinstance(part, Static))
    return alias.get(x, x), replace(call.kernel, n=1), forms


def _merge(graph: Graph, group: Sequence[KernelCall], windows: dict[Value, tuple[Value, Window]]) -> KernelCall:
    """Make one product of several, and note where each result lies in its result."""
    sizes = [call.kernel.outputs[0].shape[1] for call in group]
    first = group[0]
    assert isinstance(first.kernel, GemmKernel)
    node = graph.node(first.results[0].node)
    whole = Value(node.id, len(node.types))  # a value of the compiled model that no node has
    offset = 0
    for call, size in zip(group, sizes, strict=True):
        windows[call.results[0]] = (whole, Window(View(sum(sizes), offset), size))
        offset += size
    operands: list[Operand] = [first.operands[0]]
    for index in range(1, len(first.operands)):
        parts = [call.operands[index] for call in group]
        values = tuple(value for part in parts if isinstance(part, Static) for value in part.values)
        operands.append(replace(parts[0], values=values))
    nodes = tuple(sorted(number for call in group for number in call.nodes))
    return KernelCall(replace(first.kernel, n=sum(sizes)), tuple(operands), (whole,), nodes)


def _reading_windows(
    call: KernelCall, windows: Mapping[Value, tuple[Value, Window]], alias: Mapping[Value, Value]
) -> KernelCall:
    kernel, operands = call.kernel, list(call.operands)
    for index, operand in enumerate(operands):
        if isinstance(operand, Value) and alias.get(operand, operand) in windows:
            operands[index], window = windows[alias.get(operand, operand)]
            kernel = reading_window(kernel, index, window)
    return replace(call, kernel=kernel, operands=tuple(operands))
