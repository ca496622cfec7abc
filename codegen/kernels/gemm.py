"""Dense products on packed weights with fused epilogues.

M rows, N columns, K the reduced length, W the panel width in elements. The weight is packed `[N/W][K][W]`, zero-padded
in N, so one micro-kernel reads it as a stream. A tile of `rows x vectors` accumulators stays in registers while k
runs; tiles cover M as evenly as they can, so no tile is left with a single row unless M is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels import strassen
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    build_function,
    ceil_div,
    choose,
    column_vectors,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.vector_math import ACTIVATION_REFERENCES, ACTIVATIONS
from ir.types import TensorType

FLOAT_BYTES: Final = 4
CACHE_BYTES: Final = 512 * 1024  # half of the L2 cache of current server cores
CHUNK_BYTES: Final = 256 * 1024  # rows of A that stay in the other half
K_BLOCK_FROM: Final = 4096  # a panel of this length still streams from L2 without loss
K_BLOCK: Final = 2048
PAGE_BYTES: Final = 4096  # rows of A this far apart compete for the same lines of the first-level cache,
COMPETING_ROWS: Final = 8  # which has eight ways
SEVEN_FROM_ROWS: Final = 16
SEVEN_FROM_K: Final = 64
WORTH_SEVEN: Final = 0.94  # more code and 7/4 of the memory, for an estimate that is 3 % off, is worth this much
CHEAP_ACTIVATIONS: Final = frozenset({"relu", "relu2"})


@dataclass(frozen=True)
class GemmKernel(Kernel):
    """`out = activation(scale * a @ w + bias) + residual`, or with `gate` a gated linear unit.

    With `gate`, `w` is `[K, 2 N]` and `bias` `[2 N]`: the first N columns are the value, the others the gate, and
    `out = activation_gate(gate) * value + residual`.

    Operands: a `[M, K]` (or a window of a wider buffer), w, bias if any, residual `[M, N]` if any; out `[M, N]`.

    Attributes:
        m: Rows.
        n: Columns of the output.
        k: Reduced length.
        bias: Whether a bias is added.
        activation: Name in `vector_math.ACTIVATIONS`, applied after the bias.
        gate: Activation of the gate; makes it a gated linear unit.
        residual: Whether a tensor is added last.
        scale: Factor of the product.
        a_view: Buffer that holds `a` as `k` of its columns.
    """

    m: int
    n: int
    k: int
    bias: bool = False
    activation: str | None = None
    gate: str | None = None
    residual: bool = False
    scale: float = 1.0
    a_view: View | None = None

    family: ClassVar[str] = "gemm"

    def __post_init__(self) -> None:
        if self.activation and self.gate:
            raise ValueError("a gated product takes its activation from gate, not from activation")

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands a, w, bias, residual."""
        operands = [
            TensorType((self.m, self.a_view.width if self.a_view else self.k)),
            TensorType((self.k, self.columns)),
        ]
        if self.bias:
            operands.append(TensorType((self.columns,)))
        if self.residual:
            operands.append(TensorType((self.m, self.n)))
        return tuple(operands)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The product."""
        return (TensorType((self.m, self.n)),)

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return 2 * self.n if self.gate else self.n

    @property
    def flops(self) -> int:
        """Multiply-adds of the product, and one for each epilogue step."""
        steps = sum((self.bias, self.activation is not None, 2 * (self.gate is not None), self.residual))
        return 2 * self.m * self.columns * self.k + steps * self.m * self.n

    # Packing

    def packs(self, index: int) -> bool:
        """Weight and bias are packed."""
        return index == 1 or (self.bias and index == 2)

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """Panels `[N/W, K, W]` of the weight, and the bias padded alike."""
        if not self.packs(index):
            return self.inputs[index].shape
        panels, width = self._panels(isa, knobs), int(knobs["vectors"]) * isa.lanes
        if index == 2:
            return ((panels + panels % 2 if knobs["strassen"] else panels) * width,)
        return strassen.packed_shape(panels, self.k, width) if knobs["strassen"] else (panels, self.k, width)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Pad N to whole panels, interleave value and gate vectors, and cut into panels."""
        if not self.packs(index):
            return None
        panels, width = self._panels(isa, knobs), int(knobs["vectors"]) * isa.lanes
        panels += panels % 2 if knobs["strassen"] and index == 2 else 0
        rows = array.reshape(-1, self.columns)
        parts = [rows[:, : self.n], rows[:, self.n :]] if self.gate else [rows]
        padding = panels * width // len(parts) - self.n
        padded = [np.pad(part, ((0, 0), (0, padding))).reshape(len(rows), -1, isa.lanes) for part in parts]
        mixed = np.stack(padded, axis=2).reshape(len(rows), panels, width)
        if index == 2:
            return np.ascontiguousarray(mixed.reshape(-1), dtype=np.float32)
        cut = mixed.transpose(1, 0, 2)
        return strassen.pack(cut) if knobs["strassen"] else np.ascontiguousarray(cut, dtype=np.float32)

    def _panels(self, isa: Isa, knobs: Knobs) -> int:
        return ceil_div(self.n, self._panel_outputs(isa, knobs))

    def _panel_outputs(self, isa: Isa, knobs: Knobs) -> int:
        """Return the output columns of a full panel."""
        return int(knobs["vectors"]) * isa.lanes // (2 if self.gate else 1)

    # Knobs

    def knobs(self, isa: Isa) -> Knobs:
        """Choose the register tile with the least estimated work, then the loop order by what fits the cache."""
        tile = self._ranked_tiles(isa)[0]
        fewer = self._strassen_knobs(isa)
        if fewer and self.strassen_loops(isa, fewer[0]).cycles(isa.threads) < WORTH_SEVEN * self._time(isa, tile):
            return fewer[0]
        return self._complete(isa, *tile)

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other tiles by estimated work, and the other loop order of each."""
        best = self.knobs(isa)
        space = [best]
        for rows, vectors in self._ranked_tiles(isa):
            knobs = self._complete(isa, rows, vectors)
            for order in ("panels", "rows"):
                for k_block in dict.fromkeys((knobs["k_block"], self.k)):
                    candidate = {**knobs, "order": order, "k_block": k_block}
                    if candidate not in space:
                        space.append(candidate)
        return space + [knobs for knobs in self._strassen_knobs(isa) if knobs not in space]

    def _strassen_knobs(self, isa: Isa) -> list[Knobs]:
        """List ways to run seven half products, least estimated time first; none for small products."""
        if self.m < SEVEN_FROM_ROWS or self.k < SEVEN_FROM_K:
            return []
        half = ceil_div(min(self.m, strassen.BLOCK_ROWS), 2)
        knobs: list[Knobs] = []
        for most, vectors in self._tiles(isa):
            rows = Split(half, most).small + bool(Split(half, most).longer)
            for chunks in dict.fromkeys((1, isa.threads, 2 * isa.threads)):
                made = {**self._complete(isa, rows, vectors), "order": "panels", "k_block": self.k}
                knobs.append({**made, "chunks": chunks, "strassen": True})
        return sorted(knobs, key=lambda choice: self.strassen_loops(isa, choice).cycles(isa.threads))

    def strassen_loops(self, isa: Isa, knobs: Knobs) -> strassen.StrassenLoops:
        """Return the loop nest of the seven half products."""
        return strassen.StrassenLoops(
            vec=Vectors(isa.lanes),
            m=self.m,
            k=self.k,
            panels=self._panels(isa, knobs),
            vectors=int(knobs["vectors"]),
            rows=int(knobs["rows"]),
            chunks=int(knobs["chunks"]),
        )

    def _complete(self, isa: Isa, rows: int, vectors: int) -> dict[str, int | str | bool]:
        tiles = Split(self.m, rows).count
        panels = ceil_div(self.n, vectors * isa.lanes // (2 if self.gate else 1))
        a_bytes = self.m * self.k * FLOAT_BYTES
        order = "panels" if a_bytes <= CACHE_BYTES or self.m < self.n // 4 else "rows"
        if order == "rows":
            chunk_tiles = max(1, CHUNK_BYTES // (rows * self.k * FLOAT_BYTES))
            chunks = max(ceil_div(tiles, chunk_tiles), isa.threads)
        else:
            balanced = panels % isa.threads == 0 or panels >= 8 * isa.threads
            chunks = 1 if balanced else isa.threads
        k_block = self.k if self.k <= K_BLOCK_FROM else Split(self.k, K_BLOCK).small + 1
        return {
            "rows": rows,
            "vectors": vectors,
            "order": order,
            "chunks": min(chunks, tiles),
            "k_block": k_block,
            "strassen": False,
        }

    def _ranked_tiles(self, isa: Isa) -> list[tuple[int, int]]:
        """List register tiles, least estimated time first."""
        competing = self.inputs[0].shape[1] * FLOAT_BYTES % PAGE_BYTES == 0
        most = COMPETING_ROWS if competing else self.m
        tiles = dict.fromkeys((min(rows, most), vectors) for rows, vectors in self._tiles(isa))
        return sorted(tiles, key=lambda tile: self._time(isa, tile))

    def _time(self, isa: Isa, tile: tuple[int, int]) -> float:
        """Estimate the time of a call, in fused multiply-adds of full rate."""
        units = ceil_div(self.n, tile[1] * isa.lanes) * int(self._complete(isa, *tile)["chunks"])
        return self.k * self._cycles(isa, *tile) * ceil_div(units, isa.threads) / units

    def _tiles(self, isa: Isa) -> list[tuple[int, int]]:
        """List register tiles that leave a register for each B vector and one for the broadcast."""
        tiles = [(min((isa.registers - 1 - v) // v, 14), v) for v in (3, 4, 2, 1)]
        if isa.registers >= 32:
            tiles.insert(0, (8, 3))
        return [(min(rows, self.m), v) for rows, v in tiles if not (self.gate and v % 2)]

    def _cycles(self, isa: Isa, rows: int, vectors: int) -> float:
        """Estimate the cycles of one step of k over the whole output, in fused multiply-adds of full rate."""
        split = Split(self.m, rows)
        heights = {split.small + 1: split.longer, split.small: split.count - split.longer}
        all_vectors = ceil_div(self.n, isa.lanes) * (2 if self.gate else 1)
        widths = {vectors: all_vectors // vectors, all_vectors % vectors: 1}
        cycles = {
            (height, width): tiles * panels * max(height * width, height + width, 8) * (1 + 1 / (height * width))
            for height, tiles in heights.items()
            for width, panels in widths.items()
            if tiles and width and panels
        }
        return sum(cycles.values()) * (1 + 0.01 * len(cycles))  # each kind of tile is code to compile

    # Code

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the tiled product."""
        return build_function(self, isa, knobs, lambda *buffers: _GemmWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Multiply in float64."""
        operands = [np.asarray(array, np.float64) for array in arrays]
        a, w = operands[:2]
        offset = self.a_view.offset if self.a_view else 0
        out = self.scale * (a[:, offset : offset + self.k] @ w)
        if self.bias:
            out = out + operands[2]
        if self.activation:
            out = ACTIVATION_REFERENCES[self.activation](out)
        if self.gate:
            out = out[:, : self.n] * ACTIVATION_REFERENCES[self.gate](out[:, self.n :])
        return (out + operands[-1] if self.residual else out,)


class _GemmWriter:
    """Writes one GEMM; holds what every part of the loop nest needs."""

    def __init__(self, kernel: GemmKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec = kernel, Vectors(isa.lanes)
        self.a, self.w, *rest = buffers
        self.out = rest.pop()
        self.residual = rest.pop() if kernel.residual else None
        self.bias = rest.pop() if kernel.bias else None
        self.tiles = Split(kernel.m, int(knobs["rows"]))
        self.chunks = Split(self.tiles.count, ceil_div(self.tiles.count, int(knobs["chunks"])))
        self.panel_outputs = int(knobs["vectors"]) * isa.lanes // (2 if kernel.gate else 1)
        self.panels = ceil_div(kernel.n, self.panel_outputs)
        self.panels_first = knobs["order"] == "panels"
        self.k_blocks = Split(kernel.k, int(knobs["k_block"]))
        self.strassen = kernel.strassen_loops(isa, knobs) if knobs["strassen"] else None

    def write(self) -> None:
        """Loop over panels and chunks of rows, in one flat parallel loop."""
        if self.strassen:
            self._write_strassen(self.strassen)
            return
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
                self.tiles.for_each(tile, lambda row, rows: self._tile(panel, row, rows, live))
            return
        self._blocked_panel(panel, first, self.chunks.small + longer, live)

    def _tile(self, panel: Expr, row: Index, rows: int, live: list[int | None]) -> None:
        sums = [[self.vec.register() for _ in range(self._vectors(live))] for _ in range(rows)]
        for line in sums:
            for v, register in enumerate(line):
                register.set(self._start_value(panel, v))
        self._accumulate(sums, panel, row, 0, self.kernel.k)
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

    def _accumulate(self, sums: list[list[Register]], panel: Expr, row: Index, start: Index, stop: Index) -> None:
        offset = self.kernel.a_view.offset if self.kernel.a_view else 0
        with serial(start, stop) as k:
            weights = [self.vec.load(self.w, panel, k, v * self.vec.lanes) for v in range(len(sums[0]))]
            for i, line in enumerate(sums):
                value = self.vec.splat(self.a[row + i, k + offset])
                for register, weight in zip(line, weights, strict=True):
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
            self._accumulate(sums, panel, row, k_start, k_start + length)
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
            self.vec.store(self.out, value, row, column, live=count)
