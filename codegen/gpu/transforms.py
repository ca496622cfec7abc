"""Fourier transforms and long convolutions by their definition: a thread for each result, nothing to wait for."""

from __future__ import annotations

from codegen._tvm import Expr, PrimFunc, tirx
from codegen.gpu.emit import (
    Operand,
    add_to,
    bind,
    build_function,
    each,
    number,
    private,
    put,
    serial,
)
from codegen.kernels.base import Knobs
from codegen.kernels.fft import FftKernel
from codegen.kernels.long_conv import LongConvKernel
from codegen.targets.base import Gpu


def write_fft(kernel: FftKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the sum over all inputs, with roots of unity from the table."""
    del gpu, knobs
    inverse, real_output = kernel.kind in ("ifft", "irfft"), kernel.kind == "irfft"
    size_in, size_out = kernel.parts[0].shape[1], kernel.outputs[0].shape[1]
    n, inner = kernel.length, kernel.inner

    def write(*operands: Operand) -> None:
        parts = operands[: len(kernel.parts)]
        table, *results = operands[len(kernel.parts) :]
        with each(kernel.outer * size_out * inner, 64) as place:
            column, k = bind(place % inner), bind(place // inner % size_out)
            base = bind(place // (inner * size_out) * (size_in * inner) + column)
            real, imaginary, turn = private(1, 0.0), private(1, 0.0), private(1, 0, "int32")
            with serial(0, size_in) as step:
                source = base + step * inner
                cos, sin = table[turn[0] * 2], table[turn[0] * 2 + 1]
                sin = -sin if inverse else sin
                x = parts[0][source]
                y = parts[1][source] if len(parts) > 1 else None
                weight = _mirror_weight(step, n) if real_output else None
                _add(real, x * cos if y is None else x * cos - y * sin, weight)
                if not real_output:
                    _add(imaginary, x * sin if y is None else x * sin + y * cos, None)
                put(turn, turn[0] + k, 0)
                put(turn, tirx.Select(turn[0] >= n, turn[0] - n, turn[0]), 0)
            factor = number(1.0 / n) if inverse else None
            for result, total in zip(results, (real, imaginary), strict=False):
                result.put(total[0] if factor is None else total[0] * factor, place)

    return build_function(kernel, write)


def _add(total: Expr, value: Expr, weight: Expr | None) -> None:
    add_to(total, value if weight is None else value * weight, 0)


def _mirror_weight(step: Expr, n: int) -> Expr:
    """Count every frequency twice, for its mirror, but the first and, of an even length, the middle one."""
    alone = tirx.EQ(step, 0)
    if n % 2 == 0:
        alone = tirx.Or(alone, tirx.EQ(step, n // 2))
    return tirx.Select(alone, number(1.0), number(2.0))


def write_long_conv(kernel: LongConvKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the sum over the taps that lie inside the sequence."""
    del gpu, knobs
    channels = kernel.channels

    def write(x: Operand, taps: Operand, *rest: Operand) -> None:
        out = rest[-1]
        with each(kernel.batch * kernel.t * channels, 64) as place:
            channel, step = bind(place % channels), bind(place // channels % kernel.t)
            total = private(1, 0.0)
            with serial(0, tirx.min(step + 1, kernel.taps)) as tap:
                add_to(total, taps[tap * channels + channel] * x[place - tap * channels], 0)
            out.put(total[0], place)

    return build_function(kernel, write)
