"""Selections, sorts, and additions at positions that are data."""

from __future__ import annotations

import math

from codegen._tvm import PrimFunc, tirx
from codegen.gpu.emit import Operand, bind, branch, build_function, each, number, private, put, serial
from codegen.kernels.base import Knobs
from codegen.kernels.expressions import linear, unravel
from codegen.kernels.scatter import ScatterAddKernel
from codegen.kernels.topk import TopKKernel
from codegen.targets.base import Gpu


def write_top_k(kernel: TopKKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each element, which counts those before it: its place, if that is below k.

    Of equal elements the one at the lower position comes first. The work grows with the square of the row, but nothing
    waits for anything.
    """
    del gpu, knobs

    def write(x: Operand, values: Operand, positions: Operand) -> None:
        with each(kernel.rows * kernel.width) as place:
            row, position = bind(place // kernel.width), bind(place % kernel.width)
            own, rank = private(1), private(1, 0, "int32")
            put(own, x[place], 0)
            with serial(0, kernel.width) as other:
                value = x[row * kernel.width + other]
                first = own[0] < value if kernel.largest else value < own[0]
                before = tirx.Or(first, tirx.And(tirx.EQ(value, own[0]), other < position))
                put(rank, rank[0] + tirx.Select(before, number(1, "int32"), number(0, "int32")), 0)
            with branch(rank[0] < kernel.k):
                values.put(own[0], row * kernel.k + rank[0])
                positions.put(position, row * kernel.k + rank[0])

    return build_function(kernel, write)


def write_scatter(kernel: ScatterAddKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each element of the base, which looks for its updates, in their order."""
    del gpu, knobs
    rows, count = kernel.base[kernel.axis], kernel.updates[kernel.axis]
    inner = math.prod(kernel.base[kernel.axis + 1 :])

    def write(base: Operand, indices: Operand, updates: Operand, out: Operand) -> None:
        with each(math.prod(kernel.base)) as place:
            column, row = bind(place % inner), bind(place // inner % rows)
            outside = bind(place // (inner * rows))
            total = private(1)
            put(total, base[place], 0)
            before = unravel(outside, kernel.base[: kernel.axis])
            after = unravel(column, kernel.base[kernel.axis + 1 :])
            with serial(0, count) as step:
                target = indices[linear((*before, step, *after), kernel.indices)]
                with branch(tirx.EQ(target, row)):
                    put(total, total[0] + updates[(outside * count + step) * inner + column], 0)
            out.put(total[0], place)

    return build_function(kernel, write)
