"""The loop nest of a convolution that mixes channels: see `codegen.kernels.conv`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from codegen._tvm import Buffer, Expr
from codegen.kernels._tail import Tail
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.emit import (
    ALIAS_BYTES,
    LINE_BYTES,
    Index,
    Register,
    Split,
    Vectors,
    bind,
    ceil_div,
    choose,
    column_vectors,
    flat_view,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.expressions import unravel

if TYPE_CHECKING:
    from codegen.kernels.conv import ConvKernel


class ConvWriter:
    """Writes one convolution."""

    def __init__(self, kernel: ConvKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.taps, self.threads = kernel, Vectors(isa.lanes), kernel.taps, isa.threads
        self.x, self.y = flat_view(buffers[0]), flat_view(buffers[-1])
        self.weight = buffers[1] if kernel.packed else flat_view(buffers[1])
        self.outputs = kernel.weight.shape[-1]
        self.tail = Tail(kernel.tail, buffers[2:-1], self.vec, kernel.rows, self.outputs)
        self.tiles = Split(self.taps.outputs[-1], int(knobs["rows"]))
        self.width = int(knobs["vectors"]) * isa.lanes
        self.panels = ceil_div(kernel.group_outputs, self.width)
        self.shape = kernel.result.shape[:-2]
        self.lines = Split(math.prod(self.shape), ceil_div(math.prod(self.shape), int(knobs["chunks"])))
        self.channels, self.depth = kernel.x.shape[-1], kernel.weight.shape[-2]
        competes = self.taps.strides[-1] * self.channels * 4 % ALIAS_BYTES == 0 and self.channels > self.vec.lanes
        self.pitch = self.channels + LINE_BYTES // 4 if competes else self.channels
        self.copies = competes or any(self.taps.padding[-1])
        self.line = self.taps.sizes[-1] + sum(self.taps.padding[-1])

    def write(self) -> None:
        """Loop over groups, panels of their channels and lines of outputs."""
        if self.copies:
            self.x = self._copied()
        units = self.kernel.op.groups * self.panels * self.lines.count
        with parallel_block(units, flops=self.kernel.flops) as unit:
            panel, chunk = unit // self.lines.count, unit % self.lines.count
            group = panel // self.panels
            first = panel % self.panels * self.width  # channel within the group
            last = self.kernel.group_outputs % self.width
            if not last or self.panels == 1:
                self._panel(panel, group, first, chunk, last or self.width)
                return
            choose(
                panel % self.panels < self.panels - 1,
                lambda: self._panel(panel, group, first, chunk, self.width),
                lambda: self._panel(panel, group, first, chunk, last),
            )

    def _copied(self) -> Buffer:
        """Copy the input, with the padding of the last axis around each line and the pixels `pitch` apart."""
        lines = math.prod(self.kernel.x.shape[:-2])
        copy = scratch((lines * self.line * self.pitch,))
        low, size = self.taps.padding[-1][0], self.taps.sizes[-1]

        def clear(line: Expr, first: int, last: int) -> None:
            with serial(first, last) as pixel:
                self._each_vector(
                    lambda c, live: self.vec.store(
                        copy, self.vec.splat(0.0), (line * self.line + pixel) * self.pitch + c, live=live
                    )
                )

        def move(line: Expr, pixel: Expr, column: Index, live: int | None) -> None:
            value = self.vec.load(self.x, (line * size + pixel) * self.channels + column, live=live)
            self.vec.store(copy, value, (line * self.line + low + pixel) * self.pitch + column, live=live)

        with parallel_block(lines, flops=self.kernel.flops) as line:
            clear(line, 0, low)
            with serial(0, size) as pixel:
                self._each_vector(lambda c, live: move(line, pixel, c, live))
            clear(line, low + size, self.line)
        return copy

    def _each_vector(self, write: Callable[[Index, int | None], None]) -> None:
        full, rest = divmod(self.channels, self.vec.lanes)
        if full:
            with serial(0, full) as vector:
                write(vector * self.vec.lanes, None)
        if rest:
            write(full * self.vec.lanes, rest)

    def _panel(self, panel: Expr, group: Expr, first: Expr, chunk: Expr, columns: int) -> None:
        """Write `columns` channels of a group for the lines of one chunk."""
        live = column_vectors(columns, self.vec.lanes)
        longer = (chunk < self.lines.longer).astype("int32") if self.lines.longer else 0
        start = self.lines.start(chunk)
        with serial(start, start + self.lines.small + longer) as line:
            self.batch, *self.place = unravel(line, self.shape)
            with serial(0, self.tiles.count) as tile:
                self.tiles.for_each(
                    tile, lambda output, rows: self._tile(panel, group, first, line, output, rows, live)
                )

    def _tile(
        self, panel: Expr, group: Expr, first: Expr, line: Expr, output: Index, rows: int, live: list[int | None]
    ) -> None:
        """Write one tile of outputs of a line."""
        sums = [[self.vec.register(0.0) for _ in live] for _ in range(rows)]
        column = bind(group * self.kernel.group_outputs + first)
        with self.taps.outer(self.batch, self.place) as (number, row):
            pixel = row * self.line + output * self.taps.strides[-1]
            self._line(sums, panel, group, column, number, pixel, live)
        values = [[register.get() for register in line_] for line_ in sums]
        place = line * self.taps.outputs[-1] + output
        if self.tail.is_simple:
            for i, row_values in enumerate(values):
                self._finish(row_values, place + i, column, live)
            return
        lanes = self.vec.lanes
        parked = scratch((rows, len(live) * lanes))  # a loop keeps long tails short to compile
        for i, row_values in enumerate(values):
            for v, value in enumerate(row_values):
                self.vec.store(parked, value, i, v * lanes)
        with serial(0, rows) as i:
            self._finish([self.vec.load(parked, i, v * lanes) for v in range(len(live))], place + i, column, live)

    def _line(
        self,
        sums: list[list[Register]],
        panel: Expr,
        group: Expr,
        column: Expr,
        number: Index,
        pixel: Index,
        live: list[int | None],
    ) -> None:
        """Add the taps of one line of the window."""
        width, step = self.taps.window[-1], self.taps.dilation[-1]
        if self.depth == self.pitch and step == 1:  # neighbouring taps are one run of memory
            self._run(sums, panel, column, pixel * self.pitch, number * (width * self.depth), width * self.depth, live)
            return
        with serial(0, width) as tap:
            place = (pixel + tap * step) * self.pitch + group * self.depth
            self._run(sums, panel, column, place, (number * width + tap) * self.depth, self.depth, live)

    def _run(
        self,
        sums: list[list[Register]],
        panel: Expr,
        column: Expr,
        place: Index,
        start: Index,
        length: int,
        live: list[int | None],
    ) -> None:
        """Add the products of a run of inputs with the rows of weights from `start` on."""
        apart = self.taps.strides[-1] * self.pitch
        with serial(0, length) as k:
            weights = [self._weights(panel, start + k, column, v, count) for v, count in enumerate(live)]
            for i, line in enumerate(sums):
                value = self.vec.splat(self.x[place + k + i * apart])
                for register, weight in zip(line, weights, strict=True):
                    register.set(register.get() + value * weight)

    def _weights(self, panel: Expr, row: Index, column: Expr, v: int, live: int | None) -> Expr:
        if self.kernel.packed:
            return self.vec.load(self.weight, panel, row, v * self.vec.lanes)
        return self.vec.load(self.weight, row * self.outputs + column + v * self.vec.lanes, live=live)

    def _finish(self, values: list[Expr], row: Index, column: Index, live: list[int | None]) -> None:
        for v, (value, count) in enumerate(zip(values, live, strict=True)):
            at = column + v * self.vec.lanes
            self.vec.store(self.y, self.tail.apply(value, row, at, count), row * self.outputs + at, live=count)
