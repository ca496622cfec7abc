"""Seven products of half the size instead of eight: one level of Strassen's algorithm inside a packed GEMM.

The weight is known when the model is compiled, so its seven sums are packed then and cost nothing later. The seven
sums of A are written once, 7/4 of A. Every product adds its tile to one or two quadrants of a block of C that stays in
the cache. What remains is 7/8 of the multiply-adds, for 7/4 of the weight's memory and a slightly larger rounding
error: the sums of two operands are rounded once more.

A is halved by rows and by K, the weight by K and by neighbouring panels, C by rows and by neighbouring panels. M rows,
K the reduced length, W the width of a panel; halves of odd lengths are padded with zeros.

Source: Strassen 1969, "Gaussian elimination is not optimal"; Huang et al. 2016, "Strassen's algorithm reloaded", for
keeping the sums out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from codegen._tvm import Buffer, Expr
from codegen.kernels.base import Array
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    bind,
    branch,
    ceil_div,
    choose,
    parallel_block,
    scratch,
    select_constant,
    serial,
    store,
)

FLOAT_BYTES: Final = 4
ALIAS_BYTES: Final = 1024  # rows that are multiples of this apart compete for the same lines of the first-level cache
CACHED_BYTES: Final = 2 << 20  # up to about here, stores of the sums overlap with the next loads
BLOCK_ROWS: Final = 512  # rows whose sums are held at a time


class Term(NamedTuple):
    """A quadrant, by its row half and its column half, and its sign in a sum."""

    row: int
    column: int
    sign: int


class Product(NamedTuple):
    """One product: the sum of quadrants of A, that of the weight, and the quadrants of C that it enters."""

    a: tuple[Term, ...]
    weight: tuple[Term, ...]
    c: tuple[Term, ...]


PRODUCTS: Final = (
    Product((Term(0, 0, 1), Term(1, 1, 1)), (Term(0, 0, 1), Term(1, 1, 1)), (Term(0, 0, 1), Term(1, 1, 1))),
    Product((Term(1, 0, 1), Term(1, 1, 1)), (Term(0, 0, 1),), (Term(1, 0, 1), Term(1, 1, -1))),
    Product((Term(0, 0, 1),), (Term(0, 1, 1), Term(1, 1, -1)), (Term(0, 1, 1), Term(1, 1, 1))),
    Product((Term(1, 1, 1),), (Term(1, 0, 1), Term(0, 0, -1)), (Term(0, 0, 1), Term(1, 0, 1))),
    Product((Term(0, 0, 1), Term(0, 1, 1)), (Term(1, 1, 1),), (Term(0, 0, -1), Term(0, 1, 1))),
    Product((Term(1, 0, 1), Term(0, 0, -1)), (Term(0, 0, 1), Term(0, 1, 1)), (Term(1, 1, 1),)),
    Product((Term(0, 1, 1), Term(1, 1, -1)), (Term(1, 0, 1), Term(1, 1, 1)), (Term(0, 0, 1),)),
)
"""Strassen's seven products."""


def packed_shape(panels: int, k: int, width: int) -> tuple[int, int, int, int]:
    """Return the shape of a packed weight: pairs of panels, products, half of K, W."""
    return ceil_div(panels, 2), len(PRODUCTS), ceil_div(k, 2), width


def pack(panels_PKW: Array) -> Array:
    """Sum the quadrants of a weight cut into panels `[P, K, W]`, in float64 until the sums are rounded."""
    panels, k, width = panels_PKW.shape
    pairs, products, half, _ = packed_shape(panels, k, width)
    padded = np.zeros((2 * pairs, 2 * half, width))
    padded[:panels, :k] = panels_PKW
    quadrants = padded.reshape(pairs, 2, 2, half, width)  # pair, panel of the pair, half of K, K, W
    packed = np.zeros((pairs, products, half, width))
    for number, product in enumerate(PRODUCTS):
        for row, column, sign in product.weight:
            packed[:, number] += sign * quadrants[:, column, row]
    return packed.astype(np.float32)


@dataclass(frozen=True)
class StrassenLoops:
    """The loop nest around the seven products.

    Attributes:
        vec: Vector operations.
        m: Rows.
        k: Reduced length.
        panels: Panels of the weight, before they are paired.
        vectors: Vectors of a panel.
        rows: Most rows of a register tile.
        chunks: Parts that a block's rows are cut into, as units of parallel work.
    """

    vec: Vectors
    m: int
    k: int
    panels: int
    vectors: int
    rows: int
    chunks: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.vec.lanes

    @property
    def half_k(self) -> int:
        """Steps of K in a product."""
        return ceil_div(self.k, 2)

    @property
    def stride(self) -> int:
        """Elements between two rows of the sums of A."""
        lanes = self.vec.lanes
        padded = ceil_div(self.half_k, lanes) * lanes
        return padded + lanes if padded * FLOAT_BYTES % ALIAS_BYTES == 0 else padded

    def cycles(self, threads: int) -> float:
        """Estimate the time of a call, in fused multiply-adds of full rate.

        The constants were fitted to products from 37 x 100 x 77 to 512 x 3072 x 768 with 16 lanes.
        """
        pairs, half_rows = ceil_div(self.panels, 2), ceil_div(min(self.m, BLOCK_ROWS), 2)
        tiles = Split(half_rows, self.rows)
        chunks = Split(tiles.count, ceil_div(tiles.count, min(self.chunks, tiles.count)))
        units = pairs * chunks.count
        rounds = ceil_div(units, threads) * (chunks.small + bool(chunks.longer)) / (pairs * tiles.count)
        area = half_rows * self.vectors * pairs
        product = len(PRODUCTS) * self.half_k * area * (1 + 1 / (tiles.small * self.vectors))
        updates = 3 * sum(len(p.c) for p in PRODUCTS) * area
        sum_bytes = len(PRODUCTS) * half_rows * self.stride * FLOAT_BYTES
        sums = (3 if sum_bytes <= CACHED_BYTES else 8) * sum_bytes / (FLOAT_BYTES * self.vec.lanes)
        blocks = self.m / min(self.m, BLOCK_ROWS)
        return blocks * (rounds * (product + updates) + sums / threads)

    def write(
        self,
        a: Buffer,
        offset: int,
        weight: Buffer,
        start_value: Callable[[Index, int], Expr],
        finish: Callable[[list[Expr], Index, Index, int], None],
    ) -> None:
        """Write everything.

        Args:
            a: `[M, at least offset + K]`.
            offset: Column of `a` where K begins.
            weight: What `pack` made.
            start_value: Gives what the sums of a vector of a panel start from.
            finish: Takes the vectors of a panel's row, the panel, the row, and the panel's place from the end: 0 for
                the last, 1 for the one before it, 2 for any other.
        """
        blocks = Split(self.m, BLOCK_ROWS)
        sums = scratch((len(PRODUCTS), ceil_div(min(self.m, blocks.small + 1), 2), self.stride))
        with serial(0, blocks.count) as index:
            blocks.for_each(
                index, lambda row, rows: _Block(self, a, offset, weight, sums, row, rows).write(start_value, finish)
            )


class _Block:
    """Rows whose sums are held at a time: row i of the upper half goes with row i of the lower half."""

    def __init__(
        self, loops: StrassenLoops, a: Buffer, offset: int, weight: Buffer, sums: Buffer, row: Index, rows: int
    ) -> None:
        self.loops, self.vec = loops, loops.vec
        self.a, self.offset, self.weight, self.sums = a, offset, weight, sums
        self.first, self.rows = row, rows
        self.half = ceil_div(rows, 2)
        self.tiles = Split(self.half, loops.rows)
        self.chunks = Split(self.tiles.count, ceil_div(self.tiles.count, min(loops.chunks, self.tiles.count)))
        self.line = 2 * loops.width
        self.chunk_rows = (self.chunks.small + bool(self.chunks.longer)) * (self.tiles.small + bool(self.tiles.longer))

    def write(
        self,
        start_value: Callable[[Index, int], Expr],
        finish: Callable[[list[Expr], Index, Index, int], None],
    ) -> None:
        self._sum_a()
        pairs = ceil_div(self.loops.panels, 2)
        with parallel_block(pairs * self.chunks.count) as unit:
            pair, chunk = unit // self.chunks.count, unit % self.chunks.count
            longer = (chunk < self.chunks.longer).astype("int32") if self.chunks.longer else 0
            first = self.chunks.start(chunk)
            self._unit(pair, first, first + self.chunks.small + longer, start_value, finish)

    # Sums of A

    def _sum_a(self) -> None:
        lower = self.rows // 2
        with parallel_block(lower) as row:
            self._sum_row(row, has_lower=True)
        if lower < self.half:
            self._sum_row(lower, has_lower=False)

    def _sum_row(self, row: Index, *, has_lower: bool) -> None:
        """Write the seven sums of a row of the upper half and its partner."""
        lanes, half_k = self.vec.lanes, self.loops.half_k
        full = (self.loops.k - half_k) // lanes
        if full:
            with serial(0, full) as step:
                self._sum_vectors(row, step * lanes, (None, None), has_lower)
        for start in range(full * lanes, half_k, lanes):
            live = (min(lanes, half_k - start), max(0, min(lanes, self.loops.k - half_k - start)))
            self._sum_vectors(row, start, live, has_lower)

    def _sum_vectors(self, row: Index, k: Index, live: tuple[int | None, int | None], has_lower: bool) -> None:
        quadrants: dict[tuple[int, int], Register] = {}
        for lower in range(1 + has_lower):
            for column in range(2):
                if live[column] != 0:
                    place = (self.first + row + lower * self.half, self.offset + column * self.loops.half_k + k)
                    quadrants[lower, column] = self.vec.register(self.vec.load(self.a, *place, live=live[column]))
        for number, product in enumerate(PRODUCTS):
            total: Expr | None = None
            for lower, column, sign in product.a:
                if (lower, column) in quadrants:
                    value = quadrants[lower, column].get()
                    if total is None:
                        total = value if sign > 0 else self.vec.splat(0.0) - value
                    else:
                        total = total + value if sign > 0 else total - value
            self.vec.store(self.sums, self.vec.splat(0.0) if total is None else total, number, row, k)

    # Products

    def _unit(
        self,
        pair: Expr,
        first: Index,
        stop: Index,
        start_value: Callable[[Index, int], Expr],
        finish: Callable[[list[Expr], Index, Index, int], None],
    ) -> None:
        """Write both panels of a pair over the tiles `first` to `stop` of each half."""
        loops, vec = self.loops, self.vec
        block = scratch((2 * self.chunk_rows * self.line,))  # upper rows, then lower ones; lines of both panels
        first_row = self.tiles.start(first)
        with serial(0, 2 * self.chunk_rows) as row:
            for column in range(2):
                for v in range(loops.vectors):
                    place = row * self.line + column * loops.width + v * vec.lanes
                    vec.store(block, start_value(2 * pair + column, v), place)
        with serial(0, len(PRODUCTS)) as product, serial(first, stop) as tile:
            self.tiles.for_each(tile, lambda row, rows: self._tile(block, pair, product, row, rows, row - first_row))
        with serial(first, stop) as tile:
            self.tiles.for_each(tile, lambda row, rows: self._finish(block, pair, row, rows, row - first_row, finish))

    def _tile(self, block: Buffer, pair: Expr, product: Expr, row: Index, rows: int, local: Index) -> None:
        loops, vec = self.loops, self.vec
        tile = [[vec.register(0.0) for _ in range(loops.vectors)] for _ in range(rows)]
        with serial(0, loops.half_k) as k:
            weights = [vec.load(self.weight, pair, product, k, v * vec.lanes) for v in range(loops.vectors)]
            for i, line in enumerate(tile):
                value = vec.splat(self.sums[product, row + i, k])
                for register, weight in zip(line, weights, strict=True):
                    register.set(register.get() + value * weight)
        for place in range(2):
            terms = [p.c[place] if len(p.c) > place else Term(0, 0, 0) for p in PRODUCTS]
            lower, column, sign = (select_constant(product, values) for values in zip(*terms, strict=True))
            quadrant = lower * (self.chunk_rows * self.line) + column * loops.width  # exact: far below 2^24
            start = scratch((1,), "int32")  # memory, so that no pass puts the tables into every address
            store(start, local * self.line + quadrant.astype("int32"), 0)
            sign = bind(sign)
            with branch(sign != 0):
                self._add(block, tile, start[0], vec.splat(sign))

    def _add(self, block: Buffer, tile: Sequence[Sequence[Register]], start: Expr, sign: Expr) -> None:
        for i, line in enumerate(tile):
            for v, register in enumerate(line):
                place = start + (i * self.line + v * self.vec.lanes)
                self.vec.store(block, self.vec.load(block, place) + sign * register.get(), place)

    # Epilogue

    def _finish(
        self,
        block: Buffer,
        pair: Expr,
        row: Index,
        rows: int,
        local: Index,
        finish: Callable[[list[Expr], Index, Index, int], None],
    ) -> None:
        """Finish a tile's rows of each half."""
        for lower in range(2):
            exists = self.rows - self.half if lower else self.half
            with serial(0, rows) as i:
                place = local + i + lower * self.chunk_rows
                if exists < self.half:
                    with branch(bind(exists - row) > i):
                        self._finish_row(block, pair, self.first + row + i + lower * self.half, place, finish)
                else:
                    self._finish_row(block, pair, self.first + row + i + lower * self.half, place, finish)

    def _finish_row(
        self,
        block: Buffer,
        pair: Expr,
        row: Index,
        place: Index,
        finish: Callable[[list[Expr], Index, Index, int], None],
    ) -> None:
        pairs = ceil_div(self.loops.panels, 2)
        single = self.loops.panels % 2 == 1

        def panel(column: int, from_end: int) -> None:
            values = [
                self.vec.load(block, place * self.line + column * self.loops.width + v * self.vec.lanes)
                for v in range(self.loops.vectors)
            ]
            finish(values, 2 * pair + column, row, from_end)

        def both(last: bool) -> None:
            if last and single:
                panel(0, 0)
                return
            panel(0, 1 if last else 2)
            panel(1, 0 if last else 2)

        if pairs == 1:
            both(last=True)
        else:
            choose(pair < pairs - 1, lambda: both(last=False), lambda: both(last=True))
