"""Many small products of two activations, neither of them known at build time.

M rows, N columns, K the reduced length, W the panel width. A panel of B is first copied into a scratch buffer `[K, W]`
where that pays (always if it has to be transposed), then the micro-kernel of the packed product runs on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.bfloat16 import Bfloat16
from codegen.kernels.emit import (
    Index,
    Split,
    Vectors,
    bind,
    build_function,
    ceil_div,
    choose,
    column_vectors,
    parallel_block,
    scratch,
    serial,
)
from ir.ops.contraction import Precision
from ir.rounding import round_to_bfloat16
from ir.types import TensorType

STAGE_ROWS: Final = 16  # a copied panel is read so many times or more


@dataclass(frozen=True)
class BatchGemmKernel(Kernel):
    """`out[b] = scale * a[b] @ b[b]`.

    Operands: a `[B, M, K]` and b `[B, K, N]` (last two swapped by the transpose flags, first 1 by the shared flags);
    out `[B, M, N]`.

    Attributes:
        batch: Products.
        m: Rows of each.
        n: Columns of each.
        k: Reduced length.
        transpose_a: Whether a is stored `[B, K, M]`.
        transpose_b: Whether b is stored `[B, N, K]`.
        a_shared: Whether one a serves all products.
        b_shared: Whether one b serves all products.
        scale: Factor of the products.
        precision: `bfloat16` rounds both operands first; that makes it no faster.
    """

    batch: int
    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    a_shared: bool = False
    b_shared: bool = False
    scale: float = 1.0
    precision: Precision = "float32"

    family: ClassVar[str] = "batch_gemm"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands a and b."""
        a = (self.k, self.m) if self.transpose_a else (self.m, self.k)
        b = (self.n, self.k) if self.transpose_b else (self.k, self.n)
        return (
            TensorType((1 if self.a_shared else self.batch, *a)),
            TensorType((1 if self.b_shared else self.batch, *b)),
        )

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The products."""
        return (TensorType((self.batch, self.m, self.n)),)

    @property
    def flops(self) -> int:
        """Multiply-adds."""
        return 2 * self.batch * self.m * self.n * self.k

    def knobs(self, isa: Isa) -> Knobs:
        """Choose the tile that wastes the fewest accumulators; copy panels that are read often."""
        tiles = [(min((isa.registers - 1 - v) // v, 14, self.m), v) for v in (3, 4, 2, 1)]
        rows, vectors = min(tiles, key=lambda tile: self._cycles(isa, *tile))
        units = self.batch * ceil_div(self.n, vectors * isa.lanes)
        balanced = units % isa.threads == 0 or units >= 4 * isa.threads
        chunks = 1 if balanced else min(isa.threads, Split(self.m, rows).count)
        return {"rows": rows, "vectors": vectors, "chunks": chunks, "stage": self.transpose_b or self.m >= STAGE_ROWS}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other tiles, with and without copies."""
        space = [self.knobs(isa)]
        for vectors in (1, 2, 3, 4):
            rows = min((isa.registers - 1 - vectors) // vectors, 14, self.m)
            for stage in (True, False):
                candidate = {**space[0], "rows": rows, "vectors": vectors, "stage": stage or self.transpose_b}
                candidate["chunks"] = min(int(candidate["chunks"]), Split(self.m, rows).count)
                if candidate not in space:
                    space.append(candidate)
        return space

    def _cycles(self, isa: Isa, rows: int, vectors: int) -> float:
        """Estimate the work of one step of k: a tile costs its multiply-adds, its loads, or its latency."""
        split, all_vectors = Split(self.m, rows), ceil_div(self.n, isa.lanes)
        widths = [vectors] * (all_vectors // vectors) + [all_vectors % vectors] * (all_vectors % vectors > 0)
        return sum(split.count * max(split.small * width, split.small + width, 8) for width in widths)

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the products."""
        return build_function(self, isa, knobs, lambda *buffers: _BatchWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Multiply in float64, the operands rounded as `precision` says."""
        a, b = (np.asarray(array, np.float64) for array in arrays)
        if self.precision == "bfloat16":
            a, b = round_to_bfloat16(a), round_to_bfloat16(b)
        a = a.swapaxes(1, 2) if self.transpose_a else a
        b = b.swapaxes(1, 2) if self.transpose_b else b
        return (np.broadcast_to(self.scale * (a @ b), self.outputs[0].shape),)


class _BatchWriter:
    """Writes the loop nest of one batched product."""

    def __init__(self, kernel: BatchGemmKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.stage = kernel, Vectors(isa.lanes), bool(knobs["stage"])
        self.bf16 = Bfloat16(isa)
        self.a, self.b, self.out = buffers
        self.width = int(knobs["vectors"]) * isa.lanes
        self.tiles = Split(kernel.m, int(knobs["rows"]))
        self.chunks = Split(self.tiles.count, ceil_div(self.tiles.count, int(knobs["chunks"])))

    def write(self) -> None:
        """Loop over products, panels and chunks of rows."""
        if self.kernel.precision == "bfloat16":
            with self.bf16.instructions():
                self._write_panels()
        else:
            self._write_panels()

    def _write_panels(self) -> None:
        kernel = self.kernel
        panels = ceil_div(kernel.n, self.width)
        with parallel_block(kernel.batch * panels * self.chunks.count, flops=kernel.flops) as unit:
            chunk, panel = unit % self.chunks.count, unit // self.chunks.count % panels
            self.batch = bind(unit // (self.chunks.count * panels))
            first = bind(panel * self.width)
            last = kernel.n % self.width
            if not last or panels == 1:
                self._panel(first, chunk, last or self.width)
            else:
                choose(
                    panel < panels - 1,
                    lambda: self._panel(first, chunk, self.width),
                    lambda: self._panel(first, chunk, last),
                )

    def _panel(self, first: Expr, chunk: Expr, columns: int) -> None:
        """Write the rows of one chunk for `columns` columns from `first`."""
        live = column_vectors(columns, self.vec.lanes)
        staged = self._stage(first, live) if self.stage else None
        start = self.chunks.start(chunk)
        longer = (chunk < self.chunks.longer).astype("int32") if self.chunks.longer else 0
        with serial(start, start + self.chunks.small + longer) as tile:
            self.tiles.for_each(tile, lambda row, rows: self._tile(first, row, rows, live, staged))

    def _stage(self, first: Expr, live: list[int | None]) -> Buffer:
        """Copy a panel, transposing it where b is stored that way."""
        kernel, vec = self.kernel, self.vec
        batch = 0 if kernel.b_shared else self.batch
        staged = scratch((ceil_div(kernel.k, vec.lanes) * vec.lanes, len(live) * vec.lanes))
        if not kernel.transpose_b:
            with serial(0, kernel.k) as k:
                for v, count in enumerate(live):
                    vec.store(staged, vec.load(self.b, batch, k, first + v * vec.lanes, live=count), k, v * vec.lanes)
            return staged

        def square(v: Index, k: Index, count: int | None) -> None:
            rows = []
            for i in range(vec.lanes):
                column = first + v * vec.lanes + i
                inside = tirx.min(column, kernel.n - 1) if kernel.n % vec.lanes else column
                rows.append(vec.load(self.b, batch, inside, k, live=count))
            for i, values in enumerate(vec.transpose(rows)):
                vec.store(staged, values, k + i, v * vec.lanes)

        full, rest = divmod(kernel.k, vec.lanes)
        with serial(0, len(live)) as v:
            with serial(0, full) as group:
                square(v, group * vec.lanes, None)
            if rest:
                square(v, full * vec.lanes, rest)
        return staged

    def _rounded(self, value: Expr) -> Expr:
        return bind(self.bf16.round_numbers(value)) if self.kernel.precision == "bfloat16" else value

    def _tile(self, first: Expr, row: Index, rows: int, live: list[int | None], staged: Buffer | None) -> None:
        """Write one tile of accumulators."""
        kernel, vec = self.kernel, self.vec
        sums = [[vec.register(0.0) for _ in live] for _ in range(rows)]
        a_batch, b_batch = 0 if kernel.a_shared else self.batch, 0 if kernel.b_shared else self.batch
        with serial(0, kernel.k) as k:
            if staged is None:
                columns = [
                    vec.load(self.b, b_batch, k, first + v * vec.lanes, live=count) for v, count in enumerate(live)
                ]
            else:
                columns = [vec.load(staged, k, v * vec.lanes) for v in range(len(live))]
            columns = [self._rounded(column) for column in columns]
            for i, line in enumerate(sums):
                value = self.a[a_batch, k, row + i] if kernel.transpose_a else self.a[a_batch, row + i, k]
                factor = self._rounded(vec.splat(value))
                for register, column in zip(line, columns, strict=True):
                    register.set(register.get() + factor * column)
        for i, line in enumerate(sums):
            for v, (register, count) in enumerate(zip(line, live, strict=True)):
                value = register.get() if kernel.scale == 1.0 else register.get() * vec.splat(kernel.scale)
                vec.store(self.out, value, self.batch, row + i, first + v * vec.lanes, live=count)
