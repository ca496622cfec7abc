"""The loop nest of one packed product: see `codegen.kernels.gemm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from codegen._tvm import Buffer, Expr
from codegen.kernels import strassen
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.bfloat16 import WORD, Bfloat16, load_vector, store_vector, words_of
from codegen.kernels.emit import (
    ALIAS_BYTES,
    LINE_BYTES,
    BlockPrefetch,
    Index,
    Register,
    Split,
    Vectors,
    bind,
    ceil_div,
    choose,
    column_vectors,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.vector_math import ACTIVATIONS, splat_int

if TYPE_CHECKING:
    from codegen.kernels.gemm import GemmKernel

CHEAP_ACTIVATIONS: Final = frozenset({"relu", "relu2"})
CONVERSION_FLOPS: Final = 2  # time to round a number, in flops of a product


class GemmWriter:
    """Writes one GEMM; holds what every part of the loop nest needs."""

    def __init__(self, kernel: GemmKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.isa, self.vec, self.bf16 = kernel, isa, Vectors(isa.lanes), Bfloat16(isa)
        self.a, self.w, *rest = buffers
        self.out = rest.pop()
        self.residual = rest.pop() if kernel.residual else None
        self.bias = rest.pop() if kernel.bias else None
        self.tiles = Split(kernel.m, int(knobs["rows"]))
        self.chunks = Split(self.tiles.count, ceil_div(self.tiles.count, int(knobs["chunks"])))
        self.panel_outputs = int(knobs["vectors"]) * isa.lanes // (2 if kernel.gate else 1)
        self.panels = ceil_div(kernel.n, self.panel_outputs)
        self.panels_first = knobs["order"] == "panels"
        self.k_blocks = Split(kernel.steps, int(knobs["k_block"]))
        self.weight_prefetch = BlockPrefetch(self.w, self.chunks.longest if self.k_blocks.count == 1 else 1)
        self.strassen = kernel.strassen_loops(isa, knobs) if knobs["strassen"] else None

    def write(self) -> None:
        """Loop over panels and chunks of rows, in one flat parallel loop."""
        if self.strassen:
            self._write_strassen(self.strassen)
            return
        if "bfloat16" in (self.kernel.precision, self.kernel.out_dtype):
            with self.bf16.instructions():
                if self.kernel.precision == "bfloat16":
                    stored = self.kernel.a_dtype == "bfloat16" and self.isa.bf16_dot
                    self.a = words_of(self.a) if stored else self._rounded_copy()
                self._write_panels()
            return
        self._write_panels()

    def _rounded_copy(self) -> Buffer:
        """Copy a, rounded to bfloat16 once for all panels; rows of the copy do not compete for lines of the cache.

        The copy holds words where the processor multiplies pairs, else float32 numbers.
        """
        m, k, lanes, pairs = self.kernel.m, self.kernel.k, self.vec.lanes, self.isa.bf16_dot
        offset = self.kernel.a_view.offset if self.kernel.a_view else 0
        width = ceil_div(k, lanes) * lanes // (WORD if pairs else 1)
        copy = scratch((m, width + LINE_BYTES // 4 * (width * 4 % ALIAS_BYTES == 0)), "int32" if pairs else "float32")

        def convert(row: Expr, vector: Index, live: int | None) -> None:
            place = row, vector * lanes + offset
            if self.kernel.a_dtype == "bfloat16":
                numbers = self.bf16.numbers(load_vector(self.a, lanes, *place, live=live))
                self.vec.store(copy, numbers, row, vector * lanes)
                return
            numbers = self.vec.load(self.a, *place, live=live)
            if pairs:
                store_vector(copy, self.bf16.round_words(numbers), lanes // WORD, row, vector * (lanes // WORD))
            else:
                self.vec.store(copy, self.bf16.round_numbers(numbers), row, vector * lanes)

        pieces = Split(m, ceil_div(m, min(m, self.isa.threads)))
        with parallel_block(pieces.count, flops=CONVERSION_FLOPS * m * k) as piece:
            longer = (piece < pieces.longer).astype("int32") if pieces.longer else 0
            first = pieces.start(piece)
            with serial(first, first + pieces.small + longer) as row:
                if k // lanes:
                    with serial(0, k // lanes) as vector:
                        convert(row, vector, None)
                if k % lanes:
                    convert(row, k // lanes, k % lanes)
        return copy

    def _write_panels(self) -> None:
        with parallel_block(self.panels * self.chunks.count, flops=self.kernel.flops) as unit:
            inner = self.chunks.count if self.panels_first else self.panels
            outer_index, inner_index = unit // inner, unit % inner
            panel, chunk = (outer_index, inner_index) if self.panels_first else (inner_index, outer_index)
            last = self.kernel.n % self.panel_outputs
            if not last or self.panels == 1:
                self._panel(panel, chunk, last or self.panel_outputs)
            else:
                choose(
                    panel < self.panels - 1,
                    lambda: self._panel(panel, chunk, self.panel_outputs),
                    lambda: self._panel(panel, chunk, last),
                )

    def _write_strassen(self, loops: strassen.StrassenLoops) -> None:
        lanes, last = self.vec.lanes, self.kernel.n % self.panel_outputs

        def finish(values: list[Expr], panel: Index, row: Index, from_end: int) -> None:
            columns = last if last and from_end == 0 else self.panel_outputs
            live = column_vectors(columns, lanes)
            self._finish(values[: self._vectors(live)], panel, row, live)

        offset = self.kernel.a_view.offset if self.kernel.a_view else 0
        loops.write(self.a, offset, self.w, self._start_value, finish)

    def _panel(self, panel: Expr, chunk: Expr, columns: int) -> None:
        """Write one panel that has `columns` output columns, over the tiles of one chunk of rows."""
        live = column_vectors(columns, self.vec.lanes)
        longer = (chunk < self.chunks.longer).astype("int32") if self.chunks.longer else 0
        first = self.chunks.start(chunk)
        if self.k_blocks.count == 1:
            with serial(first, first + self.chunks.small + longer) as tile:
                self.tiles.for_each(tile, lambda row, rows: self._tile(panel, tile - first, row, rows, live))
            return
        self._blocked_panel(panel, first, self.chunks.small + longer, live)

    def _tile(self, panel: Expr, tile: Index, row: Index, rows: int, live: list[int | None]) -> None:
        sums = [[self.vec.register() for _ in range(self._vectors(live))] for _ in range(rows)]
        for line in sums:
            for v, register in enumerate(line):
                register.set(self._start_value(panel, v))
        self._accumulate(sums, panel, tile, row, 0, self.kernel.steps)
        if (self.kernel.gate or self.kernel.activation or "relu") in CHEAP_ACTIVATIONS:
            for i, line in enumerate(sums):
                self._finish([register.get() for register in line], panel, row + i, live)
            return
        parked = scratch((rows, self._vectors(live) * self.vec.lanes))  # a loop keeps long epilogues short to compile
        for i, line in enumerate(sums):
            for v, register in enumerate(line):
                self.vec.store(parked, register.get(), i, v * self.vec.lanes)
        with serial(0, rows) as i:
            self._finish(self._load_row(parked, i, live), panel, row + i, live)

    def _load_row(self, buffer: Buffer, row: Index, live: list[int | None]) -> list[Expr]:
        return [self.vec.load(buffer, row, v * self.vec.lanes) for v in range(self._vectors(live))]

    def _vectors(self, live: list[int | None]) -> int:
        return len(live) * (2 if self.kernel.gate else 1)

    def _start_value(self, panel: Expr, v: int) -> Expr:
        """Start from the bias, unless the product is scaled first."""
        if self.bias is None or self.kernel.scale != 1.0:
            return self.vec.splat(0.0)
        return self._bias(panel, v)

    def _bias(self, panel: Expr, v: int) -> Expr:
        assert self.bias is not None
        return self.vec.load(self.bias, panel * self.w.shape[-1] + v * self.vec.lanes)

    def _accumulate(
        self, sums: list[list[Register]], panel: Expr, tile: Index, row: Index, start: Index, stop: Index
    ) -> None:
        if self.kernel.precision == "bfloat16":
            self._accumulate_pairs(sums, panel, tile, row, start, stop)
            return
        offset = self.kernel.a_view.offset if self.kernel.a_view else 0
        with serial(start, stop) as k:
            self.weight_prefetch.fetch_next(tile, panel, k)
            weights = [self.vec.load(self.w, panel, k, v * self.vec.lanes) for v in range(len(sums[0]))]
            for i, line in enumerate(sums):
                value = self.vec.splat(self.a[row + i, k + offset])
                for register, weight in zip(line, weights, strict=True):
                    register.set(register.get() + value * weight)

    def _accumulate_pairs(
        self, sums: list[list[Register]], panel: Expr, tile: Index, row: Index, start: Index, stop: Index
    ) -> None:
        with serial(start, stop) as pair:
            self.weight_prefetch.fetch_next(tile, panel, pair)
            weights = [self.vec.load(self.w, panel, pair, v * self.vec.lanes) for v in range(len(sums[0]))]
            if not self.isa.bf16_dot:
                self._accumulate_halves(sums, weights, row, pair)
                return
            for i, line in enumerate(sums):
                words = splat_int(self.a[row + i, pair], self.vec.lanes)
                for register, weight in zip(line, weights, strict=True):
                    register.set(self.bf16.dot(register.get(), words, weight))

    def _accumulate_halves(self, sums: list[list[Register]], weights: list[Expr], row: Index, pair: Expr) -> None:
        """Multiply the even rows of the weight, then the odd ones, widened to float32."""
        for half, widen in enumerate((self.bf16.even, self.bf16.odd)):
            widened = [bind(widen(weight)) for weight in weights]
            for i, line in enumerate(sums):
                value = self.vec.splat(self.a[row + i, pair * WORD + half])
                for register, weight in zip(line, widened, strict=True):
                    register.set(register.get() + value * weight)

    def _blocked_panel(self, panel: Expr, first: Index, tiles: Index, live: list[int | None]) -> None:
        """Write a panel whose k is cut into blocks; partial sums of the chunk wait in a scratch buffer."""
        most_rows = (self.chunks.small + bool(self.chunks.longer)) * (self.tiles.small + bool(self.tiles.longer))
        width = self._vectors(live) * self.vec.lanes
        partial = scratch((most_rows, width))

        def block(k_start: Index, row: Index, rows: int, local: Index) -> None:
            sums = [[self.vec.register() for _ in range(self._vectors(live))] for _ in range(rows)]
            cells = [(i, v, register) for i, line in enumerate(sums) for v, register in enumerate(line)]
            for i, v, register in cells:
                register.set(self.vec.load(partial, local + i, v * self.vec.lanes))
            self._accumulate(sums, panel, 0, row, k_start, k_start + length)
            for i, v, register in cells:
                self.vec.store(partial, register.get(), local + i, v * self.vec.lanes)

        def finish(row: Index, rows: int, local: Index) -> None:
            with serial(0, rows) as i:
                self._finish(self._load_row(partial, local + i, live), panel, row + i, live)

        first_row = self.tiles.start(first)
        with serial(0, most_rows) as row:
            for v in range(self._vectors(live)):
                self.vec.store(partial, self._start_value(panel, v), row, v * self.vec.lanes)
        for length, blocks, base in self._block_lengths():
            with serial(0, blocks) as index, serial(first, first + tiles) as tile:
                k_start = base + index * length
                self.tiles.for_each(tile, lambda row, rows, k=k_start: block(k, row, rows, row - first_row))
        with serial(first, first + tiles) as tile:
            self.tiles.for_each(tile, lambda row, rows: finish(row, rows, row - first_row))

    def _block_lengths(self) -> list[tuple[int, int, int]]:
        """List (length, count, first k) of the at most two kinds of k blocks."""
        longer, small = self.k_blocks.longer, self.k_blocks.small
        kinds = [(small + 1, longer, 0), (small, self.k_blocks.count - longer, longer * (small + 1))]
        return [kind for kind in kinds if kind[1]]

    def _finish(self, values: list[Expr], panel: Expr, row: Index, live: list[int | None]) -> None:
        """Apply the epilogue to one row and store it."""
        kernel = self.kernel
        if kernel.scale != 1.0:
            values = [value * self.vec.splat(kernel.scale) for value in values]
            if self.bias is not None:
                values = [value + self._bias(panel, v) for v, value in enumerate(values)]
        if kernel.gate:
            gate = ACTIVATIONS[kernel.gate]
            values = [value * gate(gated) for value, gated in zip(values[::2], values[1::2], strict=True)]
        elif kernel.activation:
            values = [ACTIVATIONS[kernel.activation](value) for value in values]
        for v, (value, count) in enumerate(zip(values, live, strict=True)):
            column = panel * self.panel_outputs + v * self.vec.lanes
            if self.residual is not None:
                value = value + self.vec.load(self.residual, row, column, live=count)
            if kernel.out_dtype == "bfloat16":
                store_vector(self.out, self.bf16.round(value), self.vec.lanes, row, column, live=count)
            else:
                self.vec.store(self.out, value, row, column, live=count)
