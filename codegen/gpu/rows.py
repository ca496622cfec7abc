"""Norms and softmax: a work-group for each row, or a thread for each column where the axis is not the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

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
    launch,
    number,
    private,
    put,
    reduce_threads,
    serial,
    shared,
    strided,
)
from codegen.kernels.base import Knobs, View
from codegen.kernels.norm import NormKernel
from codegen.kernels.softmax import SoftmaxKernel
from codegen.kernels.vector_math import ACTIVATIONS
from codegen.targets.base import Gpu

GROUP: Final = 128
"""Threads of a work-group of rows, which short rows share."""
LOWEST: Final = float(np.finfo(np.float32).min)


def norm_knobs(kernel: NormKernel, gpu: Gpu) -> Knobs:
    """Give a row as many threads as it has elements, up to a work-group; short rows share one."""
    threads = min(1 << (kernel.width - 1).bit_length(), gpu.max_threads, 256)
    rows = 1
    while threads * rows < GROUP and rows < kernel.rows:
        rows *= 2
    return {"threads": threads, "rows": rows}


def write_norm(kernel: NormKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the passes over each row."""
    del gpu
    return build_function(kernel, lambda *operands: _NormWriter(kernel, knobs, operands).write())


class _NormWriter:
    """Writes one norm; holds what every pass needs."""

    def __init__(self, kernel: NormKernel, knobs: Knobs, operands: tuple[Operand, ...]) -> None:
        self.kernel, self.threads, self.side = kernel, int(knobs["threads"]), int(knobs["rows"])
        pending = list(operands)
        self.x = pending.pop(0)
        self.residual = pending.pop(0) if kernel.residual else None
        self.scale = pending.pop(0) if kernel.scale else None
        self.bias = pending.pop(0) if kernel.bias else None
        self.gate = pending.pop(0) if kernel.gate else None
        self.y = pending.pop(0)
        self.total = pending.pop(0) if kernel.residual else None

    def write(self) -> None:
        """Give each work-group its rows; rows past the last one are computed as the last and not stored."""
        kernel, threads, side = self.kernel, self.threads, self.side
        with launch(-(-kernel.rows // side), threads * side) as (group, thread):
            self.area = shared(threads * side)
            self.lane = bind(thread % threads) if side > 1 else thread
            self.base: Index = bind(thread // threads * threads) if side > 1 else 0
            row = group * side + thread // threads if side > 1 else group
            self.exists = row < kernel.rows if kernel.rows % side else None
            self.row = bind(tirx.min(row, kernel.rows - 1)) if kernel.rows % side else row
            if kernel.kind == "softmax":
                self._softmax()
            else:
                self._norm()

    def _each(self, body: Callable[[Expr], None]) -> None:
        with strided(self.lane, self.threads, self.kernel.width) as column:
            body(column)

    def _reduce(self, start: float, term: Callable[[Expr], Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
        partial = private(1)
        put(partial, number(start), 0)
        self._each(lambda column: put(partial, combine(partial[0], term(column)), 0))
        return reduce_threads(partial[0], self.lane, self.threads, combine, self.area, self.base)

    def _value(self, column: Expr) -> Expr:
        """Return an element of what is normalised."""
        value = self.x[self._place(self.kernel.x_view, column)]
        return value if self.residual is None else value + self.residual[self.row * self.kernel.width + column]

    def _place(self, view: View | None, column: Expr) -> Expr:
        kernel = self.kernel
        if view is None:
            return self.row * kernel.width + column
        return self.row // kernel.heads * view.width + view.offset + self.row % kernel.heads * kernel.width + column

    def _norm(self) -> None:
        kernel, share = self.kernel, number(1.0 / self.kernel.width)
        mean: Expr | None = None
        if kernel.kind == "layer_norm":
            mean = self._reduce(0.0, self._value, lambda a, b: a + b) * share

        def centred(column: Expr) -> Expr:
            value = self._value(column)
            return value if mean is None else value - mean

        def square(column: Expr) -> Expr:
            kept = private(1)
            put(kept, centred(column), 0)
            return kept[0] * kept[0]

        variance = self._reduce(0.0, square, lambda a, b: a + b) * share
        factor = private(1)
        put(factor, number(1.0) / tirx.sqrt(variance + number(kernel.epsilon)), 0)
        self._each(lambda column: self._store(column, centred(column) * factor[0]))

    def _softmax(self) -> None:
        peak = self._reduce(LOWEST, self._value, tirx.max)
        total = self._reduce(0.0, lambda column: tirx.exp(self._value(column) - peak), lambda a, b: a + b)
        factor = private(1)
        put(factor, number(1.0) / total, 0)
        self._each(lambda column: self._store(column, tirx.exp(self._value(column) - peak) * factor[0]))

    def _store(self, column: Expr, value: Expr) -> None:
        kernel = self.kernel
        if self.scale is not None:
            value = value * self.scale[column]
        if self.bias is not None:
            value = value + self.bias[column]
        if self.gate is not None and kernel.gate is not None:
            value = value * ACTIVATIONS[kernel.gate](self.gate[self._place(kernel.gate_view, column)])
        place = self.row * kernel.width + column
        if self.exists is None:
            self._write(value, column, place)
        else:
            with branch(self.exists):
                self._write(value, column, place)

    def _write(self, value: Expr, column: Expr, place: Expr) -> None:
        if self.total is not None:
            self.total.put(self._value(column), place)
        self.y.put(value, place)


def write_softmax(kernel: SoftmaxKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each position beside the axis: neighbours read neighbouring memory."""
    del gpu, knobs

    def write(x: Operand, y: Operand) -> None:
        with each(kernel.outer * kernel.inner, 64) as unit:
            base = bind(unit // kernel.inner * (kernel.steps * kernel.inner) + unit % kernel.inner)
            peak, total = private(1, LOWEST), private(1, 0.0)
            with serial(0, kernel.steps) as step:
                put(peak, tirx.max(peak[0], x[base + step * kernel.inner]), 0)
            with serial(0, kernel.steps) as step:
                add_to(total, tirx.exp(x[base + step * kernel.inner] - peak[0]), 0)
            with serial(0, kernel.steps) as step:
                place = base + step * kernel.inner
                y.put(tirx.exp(x[place] - peak[0]) / total[0], place)

    return build_function(kernel, write)
