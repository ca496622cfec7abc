"""Chains of elementwise and shape operations, with or without a reduction at their end, and rotary positions."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from codegen._tvm import Expr, PrimFunc, tirx
from codegen.gpu.emit import (
    Operand,
    bind,
    branch,
    build_function,
    each,
    launch,
    number,
    private,
    put,
    reduce_threads,
    serial,
    shared,
    strided,
)
from codegen.kernels.base import Knobs
from codegen.kernels.expressions import Source, sources, unravel
from codegen.kernels.fused import FusedKernel
from codegen.kernels.rope import RopeKernel
from codegen.targets.base import Gpu
from ir.ops.reduction import Max, Mean, Reduction

TOGETHER_FROM: Final = 64
"""Numbers reduced to one from which a work-group shares them, where there are few results."""
MANY: Final = 16 * 1024
"""Results that keep a device busy with a thread each."""


def fused_knobs(kernel: FusedKernel, gpu: Gpu) -> Knobs:
    """Share a long reduction out to a work-group unless there are results enough."""
    if not isinstance(kernel.root, Reduction):
        return {}
    count = _reduced_size(kernel)
    together = count >= TOGETHER_FROM and kernel.outputs[0].size < MANY
    return {"threads": min(gpu.max_threads, 256, 1 << (count - 1).bit_length()) if together else 1}


def write_fused(kernel: FusedKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each result, or a work-group for each sum."""
    del gpu

    def write(*operands: Operand) -> None:
        *inputs, output = operands
        named: dict[str, Any] = dict(zip(kernel.graph.inputs, inputs, strict=True))
        made = sources(kernel.graph, named)
        root = kernel.graph.node(kernel.graph.outputs[0][1].node)
        if isinstance(root.op, Reduction):
            _reduce(root.op, made[root.operands[0]], int(knobs["threads"]), output)
        else:
            with each(output.type.size) as place:
                output.put(made[root.results[0]].flat(place), place)

    return build_function(kernel, write)


def _reduced_size(kernel: FusedKernel) -> int:
    root = kernel.graph.node(kernel.graph.outputs[0][1].node)
    shape = kernel.graph.operand_types(root)[0].shape
    assert isinstance(root.op, Reduction)
    return math.prod(shape[axis] for axis in root.op.axes)


def _reduce(op: Reduction, value: Source, threads: int, output: Operand) -> None:
    shape = value.type.shape
    reduced = sorted(axis % len(shape) for axis in op.axes)
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    count = math.prod(shape[axis] for axis in reduced)
    start = number(float(np.finfo(np.float32).min) if isinstance(op, Max) else 0.0)

    def element(result: Expr, step: Expr) -> Expr:
        outside = unravel(result, tuple(shape[axis] for axis in kept))
        inside = unravel(step, tuple(shape[axis] for axis in reduced))
        by_axis = dict(zip((*kept, *reduced), (*outside, *inside), strict=True))
        return value.at(tuple(by_axis[axis] for axis in range(len(shape))))

    def combine(a: Expr, b: Expr) -> Expr:
        return tirx.max(a, b) if isinstance(op, Max) else a + b

    def finish(total: Expr) -> Expr:
        return total * number(1.0 / count) if isinstance(op, Mean) else total

    if threads == 1:
        with each(output.type.size) as result:
            total = private(1)
            put(total, start, 0)
            with serial(0, count) as step:
                put(total, combine(total[0], element(result, step)), 0)
            output.put(finish(total[0]), result)
        return
    with launch(output.type.size, threads) as (result, thread):
        area, partial = shared(threads), private(1)
        put(partial, start, 0)
        with strided(thread, threads, count) as step:
            put(partial, combine(partial[0], element(result, step)), 0)
        total = reduce_threads(partial[0], thread, threads, combine, area)
        with branch(thread < 1):
            output.put(finish(total), result)


def write_rope(kernel: RopeKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each pair."""
    del gpu, knobs

    def write(x: Operand, table: Operand, *rest: Operand) -> None:
        *offset, out = rest
        half, width = kernel.dim // 2, kernel.heads * kernel.dim
        view = kernel.x_view
        with each(kernel.batch * kernel.t * kernel.heads * half) as place:
            pair = bind(place % half)
            head = bind(place // half % kernel.heads)
            row = bind(place // (half * kernel.heads))
            position = row % kernel.t + offset[0][0] if offset else row % kernel.t
            position = bind(tirx.max(tirx.min(position, kernel.rows - 1), 0))
            column = head * kernel.dim + pair
            source = bind(row * (view.width if view else width) + (view.offset if view else 0) + column)
            cos, sin = table[position * kernel.dim + pair], table[position * kernel.dim + half + pair]
            first, second = x[source], x[source + half]
            out.put(first * cos - second * sin, row * width + column)
            out.put(second * cos + first * sin, row * width + column + half)

    return build_function(kernel, write)
