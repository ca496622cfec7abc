"""Last round: which values between kernels are stored as bfloat16.

A value that every reader rounds to bfloat16 anyway is rounded by the kernel that makes it: the result is the same, and
half of the memory traffic and all later conversions are saved. Sums that run through the model, such as a residual
stream, have readers that do not round, so they stay float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from codegen.selection.state import KernelCall
from ir.graph import Graph, Value


def store_bfloat16(graph: Graph, calls: Sequence[KernelCall], alias: Mapping[Value, Value]) -> list[KernelCall]:
    """Store as bfloat16 what nobody needs in float32.

    norm -> y; gemm(y, precision=bfloat16)  becomes  norm(out_dtype=bfloat16) -> y; gemm(y, .., a_dtype=bfloat16)

    Args:
        graph: What the calls serve.
        calls: Kernel calls in order.
        alias: Values that are another value's memory under another shape.
    """
    needed = {alias.get(value, value) for _, value in graph.outputs}
    readers: defaultdict[Value, list[tuple[KernelCall, int]]] = defaultdict(list)
    for call in calls:
        for index, operand in enumerate(call.operands):
            if isinstance(operand, Value):
                readers[alias.get(operand, operand)].append((call, index))

    def is_stored(value: Value) -> bool:
        reads = readers[value]
        return value not in needed and bool(reads) and all(call.kernel.rounds(index) for call, index in reads)

    stored = {
        value
        for call in calls
        for index, value in enumerate(call.results)
        if call.kernel.can_round(index) and is_stored(value)
    }
    return [_with_storage(call, stored, alias) for call in calls]


def _with_storage(call: KernelCall, stored: set[Value], alias: Mapping[Value, Value]) -> KernelCall:
    operands = [alias.get(operand, operand) if isinstance(operand, Value) else None for operand in call.operands]
    inputs = frozenset(index for index, operand in enumerate(operands) if operand in stored)
    outputs = frozenset(index for index, value in enumerate(call.results) if value in stored)
    return replace(call, kernel=call.kernel.in_bfloat16(inputs, outputs)) if inputs or outputs else call
