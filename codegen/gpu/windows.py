"""Depthwise and nearly depthwise convolution, and pooling: a thread for each result."""

from __future__ import annotations

import numpy as np

from codegen._tvm import Expr, PrimFunc, tirx
from codegen.gpu.emit import (
    Index,
    Operand,
    add_to,
    bind,
    branch,
    build_function,
    each,
    guarded,
    number,
    private,
    put,
    serial,
)
from codegen.gpu.tail import apply_tail, taps_place
from codegen.kernels.base import Knobs
from codegen.kernels.window import WindowKernel
from codegen.targets.base import Gpu
from ir.ops.convolution import Conv, Pool


def write_window(kernel: WindowKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the loop over the taps of one result."""
    del gpu, knobs
    rows, channels = kernel.result.size // kernel.channels, kernel.channels

    def write(x: Operand, *rest: Operand) -> None:
        pending = list(rest)
        weight = pending.pop(0) if kernel.weight is not None else None
        *operands, out = pending
        with each(rows * channels) as place:
            row, channel = bind(place // channels), bind(place % channels)
            if weight is not None:
                value = _convolve(kernel, x, weight, row, channel)
            else:
                value = _pool(kernel, x, row, channel)
            out.put(apply_tail(kernel.tail, value, operands, row, channel, rows, channels), place)

    return build_function(kernel, write)


def _convolve(kernel: WindowKernel, x: Operand, weight: Operand, row: Expr, channel: Expr) -> Expr:
    taps, depth, width = kernel.taps, kernel.depth, kernel.x.shape[-1]
    total = private(1, 0.0)
    with serial(0, _count(taps.window)) as tap, serial(0, depth) as inner:
        inside, pixel = taps_place(taps, row, tap)
        source = channel // kernel.group_outputs * depth + inner
        value = guarded(inside, lambda: x[pixel * width + source])
        add_to(total, value * weight[(tap * depth + inner) * kernel.channels + channel], 0)
    return total[0]


def _pool(kernel: WindowKernel, x: Operand, row: Expr, channel: Expr) -> Expr:
    op, taps, width = kernel.op, kernel.taps, kernel.x.shape[-1]
    assert isinstance(op, Pool)
    assert not isinstance(op, Conv)
    largest = op.kind == "max"
    total, seen = private(1, float(np.finfo(np.float32).min) if largest else 0.0), private(1, 0.0)
    with serial(0, _count(taps.window)) as tap:
        inside, pixel = taps_place(taps, row, tap)

        def take(pixel: Index = pixel) -> None:
            value = x[pixel * width + channel]
            put(total, tirx.max(total[0], value) if largest else total[0] + value, 0)
            add_to(seen, number(1.0), 0)

        if isinstance(inside, bool):
            take()
        else:
            with branch(inside):
                take()
    if largest:
        return total[0]
    return total[0] / (number(float(_count(taps.window))) if op.count_padding else seen[0])


def _count(window: tuple[int, ...]) -> int:
    count = 1
    for size in window:
        count *= size
    return count
