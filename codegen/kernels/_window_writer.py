"""The loop nests of depthwise convolution and pooling: see `codegen.kernels.window`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels._tail import Tail
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    bind,
    ceil_div,
    choose,
    flat_view,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.expressions import unravel
from ir.ops.convolution import Pool

if TYPE_CHECKING:
    from codegen.kernels.window import WindowKernel

LOWEST = float(np.finfo(np.float32).min)


class _Writer:
    """What the two ways to write a window operation share: the loops around a strip, and what is done with its sums."""

    def __init__(self, kernel: WindowKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.taps = kernel, Vectors(isa.lanes), kernel.taps
        self.pool = kernel.op if isinstance(kernel.op, Pool) else None
        self.is_max = self.pool is not None and self.pool.kind == "max"
        self.counts = self.pool is not None and not self.is_max and not self.pool.count_padding
        first = 1 + (kernel.weight is not None)
        self.x, self.y = flat_view(buffers[0]), flat_view(buffers[-1])
        self.weight = flat_view(buffers[1]) if kernel.weight is not None else None
        self.channels, self.vectors = kernel.channels, int(knobs["vectors"])
        self.inputs, self.depth, self.fan = kernel.x.shape[-1], kernel.depth, kernel.group_outputs
        self.chunks, self.parallel = int(knobs["chunks"]), bool(knobs["parallel"])
        self.tail = Tail(kernel.tail, buffers[first:-1], self.vec, kernel.rows, self.channels)
        self.strips = Split(self.taps.outputs[-1], int(knobs["strip"]))

    def write(self) -> None:
        """Loop over the output positions of all axes but the last, and over blocks of channels."""
        shape = self.kernel.result.shape[:-2]
        width = self.vectors * self.vec.lanes
        blocks = Split(ceil_div(self.channels, width), ceil_div(ceil_div(self.channels, width), self.chunks))
        rows, units = math.prod(shape), math.prod(shape) * blocks.count
        with parallel_block(units) if self.parallel else serial(0, units) as unit:
            self.row = unit % rows if blocks.count > 1 else unit
            piece = unit // rows if blocks.count > 1 else 0
            self.batch, *self.place = unravel(self.row, shape)
            self.scale = self._outer_scale()
            longer = (piece < blocks.longer).astype("int32") if isinstance(piece, Expr) and blocks.longer else 0
            self._write_row(blocks.start(piece), blocks.small + longer)

    def _write_row(self, first: Index, count: Index) -> None:
        """Write one line of outputs for `count` blocks of channels from `first` on."""
        raise AssertionError("abstract")

    def _each_block(self, first: Index, count: Index, write: Callable[[Index, list[int | None]], None]) -> None:
        """Call `write(first channel, live lanes of its vectors)` for each block."""
        width = self.vectors * self.vec.lanes
        rest = self.channels % width
        full: list[int | None] = [None] * self.vectors
        part: list[int | None] = [None] * (rest // self.vec.lanes)
        part += [rest % self.vec.lanes] if rest % self.vec.lanes else []
        if self.channels < width:
            write(0, part)
            return
        whole = self.channels // width
        with ExitStack() as loop:
            block = first if isinstance(count, int) and count == 1 else first + loop.enter_context(serial(0, count))
            if rest:
                assert isinstance(block, Expr)
                choose(block < whole, lambda: write(block * width, full), lambda: write(whole * width, part))
            else:
                write(block * width, full)

    def _outer_scale(self) -> Expr | None:
        """One over the taps of all axes but the last that lie inside, where that depends on the place."""
        if not self.counts or not any(map(any, self.taps.padding[:-1])):
            return None
        count: Index = 1
        for axis, position in enumerate(self.place):
            low, high = self.taps.inside(position, axis)
            count = count * (high - low)
        number = count.astype("float32") if isinstance(count, Expr) else tirx.const(float(count), "float32")
        return bind(tirx.const(1.0, "float32") / number)

    def _factor(self, inside: int) -> Expr | None:
        """What the sum over a window is multiplied by; `inside` of its taps along the last axis are."""
        if self.pool is None or self.is_max:
            return None
        taps = self.taps.window
        outer = 1 if self.scale is not None else math.prod(taps[:-1])
        last = inside if self.counts else taps[-1]
        constant = self.vec.splat(1.0 / (outer * last))
        return constant if self.scale is None else constant * self.vec.splat(self.scale)

    def _weights(self, tap: Index, column: Index, live: int | None) -> Expr:
        """The factors of a tap, or of one input channel of it, for a vector of channels."""
        assert self.weight is not None
        if self.kernel.packed:
            rows = math.prod(self.taps.window) * self.depth
            return self.vec.load(self.weight, column * rows + tap * self.vec.lanes)
        return self.vec.load(self.weight, tap * self.channels + column, live=live)

    def _combined(self, total: Expr, value: Expr) -> Expr:
        return tirx.max(total, value) if self.is_max else total + value

    def _sums(self, count: int, live: list[int | None]) -> list[list[Register]]:
        start = LOWEST if self.is_max else 0.0
        return [[self.vec.register(start) for _ in live] for _ in range(count)]

    def _finish(self, values: list[list[Expr]], output: Index, column: Index, live: list[int | None]) -> None:
        """Apply the tail to the values of a strip and store them."""
        row = self.row * self.taps.outputs[-1] + output
        if self.tail.is_simple:
            for i, line in enumerate(values):
                for v, (value, count) in enumerate(zip(line, live, strict=True)):
                    self._store(value, row + i, column + v * self.vec.lanes, count)
            return
        width = len(live) * self.vec.lanes
        parked = scratch((len(values) * width,))
        for i, line in enumerate(values):
            for v, value in enumerate(line):
                self.vec.store(parked, value, i * width + v * self.vec.lanes)
        with serial(0, len(values)) as i:
            for v, count in enumerate(live):
                place = v * self.vec.lanes
                self._store(self.vec.load(parked, i * width + place), row + i, column + place, count)

    def _store(self, value: Expr, row: Index, column: Index, live: int | None) -> None:
        finished = self.tail.apply(value, row, column, live)
        self.vec.store(self.y, finished, row * self.channels + column, live=live)


class StripWriter(_Writer):
    """Writes every tap of a strip out; strips at the borders leave those outside away."""

    def _write_row(self, first: Index, count: Index) -> None:
        for start, strips, length in self._runs():
            if strips == 1:
                self._each_block(first, count, lambda c, live, s=start, n=length: self._strip(s, n, c, live))
                continue
            with serial(0, strips) as strip:
                output = start + strip * length
                self._each_block(first, count, lambda c, live, s=output, n=length: self._strip(s, n, c, live))

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Strips as (first output, how many in a loop, length): one at a border, all of a length between."""
        pending: tuple[int, int, int] | None = None
        for strip in range(self.strips.count):
            start, length = int(self.strips.start(strip)), self.strips.small + (strip < self.strips.longer)
            if pending and self.taps.is_inside(start, length) and pending[2] == length:
                pending = (pending[0], pending[1] + 1, length)
                continue
            if pending:
                yield pending
                pending = None
            if self.taps.is_inside(start, length):
                pending = (start, 1, length)
            else:
                yield start, 1, length
        if pending:
            yield pending

    def _strip(self, output: Index, length: int, column: Index, live: list[int | None]) -> None:
        """Write a strip; a known place is one whose taps may be outside."""
        seen = self._seen(output, length)
        if self.weight is None:
            values = self._pooled(output, length, seen, column, live)
        else:
            values = self._convolved(output, length, seen, column, live)
        self._finish(values, output, column, live)

    def _seen(self, output: Index, length: int) -> dict[int, list[tuple[int, int]]]:
        """For each input that a strip sees, from its first on, the outputs and taps that meet there."""
        taps, found = self.taps, dict[int, list[tuple[int, int]]]()
        for i in range(length):
            for tap in range(taps.window[-1]):
                place = i * taps.strides[-1] + tap * taps.dilation[-1]
                if not isinstance(output, int) or 0 <= int(taps.first(output)) + place < taps.sizes[-1]:
                    found.setdefault(place, []).append((i, tap))
        return dict(sorted(found.items()))

    def _load(self, row: Index, output: Index, place: int, column: Index, live: int | None) -> Expr:
        position = row * self.taps.sizes[-1] + self.taps.first(output) + place
        if self.depth == self.fan == 1:
            return self.vec.load(self.x, position * self.inputs + column, live=live)
        count = ceil_div(live or self.vec.lanes, self.fan) * self.depth
        return self.vec.load(self.x, position * self.inputs + column // self.fan * self.depth, live=count)

    def _spread(self, value: Expr, channel: int) -> Expr:
        """Bring one input channel of each group to the lanes of its outputs."""
        if self.depth == self.fan == 1:
            return value
        return bind(tirx.Shuffle([value], [i // self.fan * self.depth + channel for i in range(self.vec.lanes)]))

    def _convolved(
        self, output: Index, length: int, seen: dict[int, list[tuple[int, int]]], column: Index, live: list[int | None]
    ) -> list[list[Expr]]:
        sums = self._sums(length, live)
        with self.taps.outer(self.batch, self.place) as (number, row):
            for v, count in enumerate(live):
                at = column + v * self.vec.lanes
                tap = number * self.taps.window[-1]
                weights = {
                    (t, j): bind(self._weights((tap + t) * self.depth + j, at, count))
                    for t in sorted({t for pairs in seen.values() for _, t in pairs})
                    for j in range(self.depth)
                }
                for place, pairs in seen.items():
                    loaded = bind(self._load(row, output, place, at, count))
                    for j in range(self.depth):
                        value = self._spread(loaded, j)
                        for i, t in pairs:
                            sums[i][v].set(sums[i][v].get() + value * weights[t, j])
        return [[register.get() for register in line] for line in sums]

    def _pooled(
        self, output: Index, length: int, seen: dict[int, list[tuple[int, int]]], column: Index, live: list[int | None]
    ) -> list[list[Expr]]:
        """Combine each column of inputs first, for all the outputs that see it."""
        columns = dict(zip(seen, self._sums(len(seen), live), strict=True))
        with self.taps.outer(self.batch, self.place) as (_, row):
            for place, registers in columns.items():
                for v, (register, count) in enumerate(zip(registers, live, strict=True)):
                    value = self._load(row, output, place, column + v * self.vec.lanes, count)
                    register.set(self._combined(register.get(), value))
        values: list[list[Expr]] = []
        for i in range(length):
            mine = [place for place, pairs in seen.items() if any(i == j for j, _ in pairs)]
            line: list[Expr] = []
            for v in range(len(live)):
                total = self.vec.splat(LOWEST if self.is_max else 0.0)
                for number, place in enumerate(mine):
                    total = columns[place][v].get() if not number else self._combined(total, columns[place][v].get())
                factor = self._factor(len(mine))
                line.append(bind(total if factor is None else total * factor))
            values.append(line)
        return values


class CopyWriter(_Writer):
    """Reads a copy of its lines of input, with the padding of the last axis around it, tap by tap in a loop."""

    def _write_row(self, first: Index, count: Index) -> None:
        self._each_block(first, count, self._block)

    def _block(self, column: Index, live: list[int | None]) -> None:
        self.width = len(live) * self.vec.lanes
        self.line = self.taps.reach(self.taps.outputs[-1])
        lines = math.prod(self.taps.window[:-1])
        copy = scratch((lines * self.line * self.width,))
        with self.taps.outer(self.batch, self.place) as (number, row):
            self._copy(copy, number, row, column, live)
        with serial(0, self.strips.count) as strip:
            self.strips.for_each(strip, lambda output, length: self._strip(copy, output, length, column, live))

    def _copy(self, copy: Buffer, line: Index, row: Index, column: Index, live: list[int | None]) -> None:
        """Copy one line of input."""
        low = self.taps.padding[-1][0]
        size = max(min(self.taps.sizes[-1], self.line - low), 0)
        blank = self.vec.splat(LOWEST if self.is_max else 0.0)

        def put(position: Index, value: Callable[[int], Expr]) -> None:
            for v in range(len(live)):
                self.vec.store(copy, value(v), (line * self.line + position) * self.width + v * self.vec.lanes)

        with serial(0, min(low, self.line)) as position:
            put(position, lambda v: blank)
        with serial(0, size) as position:
            source = (row * self.taps.sizes[-1] + position) * self.inputs + column
            put(low + position, lambda v: self.vec.load(self.x, source + v * self.vec.lanes, live=live[v]))
        with serial(min(low + size, self.line), self.line) as position:
            put(position, lambda v: blank)

    def _strip(self, copy: Buffer, output: Index, length: int, column: Index, live: list[int | None]) -> None:
        sums = self._sums(length, live)
        width, taps = self.taps.window[-1], self.taps
        with taps.outer(self.batch, self.place) as (number, _), serial(0, width) as tap:
            for v, count in enumerate(live):
                factor: Expr | None = None
                if self.weight is not None:
                    factor = bind(self._weights(number * width + tap, column + v * self.vec.lanes, count))
                for i in range(length):
                    place = (output + i) * taps.strides[-1] + tap * taps.dilation[-1]
                    value = self.vec.load(copy, (number * self.line + place) * self.width + v * self.vec.lanes)
                    self._accumulate(sums[i][v], value, factor)
        values = [[register.get() for register in line] for line in sums]
        if self.pool is not None and not self.is_max:
            factors = [self._factor_at(output + i) for i in range(length)]
            values = [[value * factor for value in line] for line, factor in zip(values, factors, strict=True)]
        self._finish(values, output, column, live)

    def _accumulate(self, register: Register, value: Expr, factor: Expr | None) -> None:
        register.set(self._combined(register.get(), value if factor is None else value * factor))

    def _factor_at(self, output: Index) -> Expr:
        """What the sum over the window of an output is multiplied by."""
        factor = self._factor(1)
        assert factor is not None
        if not self.counts:
            return factor
        low, high = self.taps.inside(output, len(self.taps.sizes) - 1)
        count = high - low
        return factor / self.vec.splat(count.astype("float32") if isinstance(count, Expr) else float(count))
