"""Seven products of half the size instead of eight: one level of Strassen's algorithm inside a packed GEMM.

The weight is known when the model is compiled, so its seven sums are packed then and cost nothing later. The seven
sums of A are written once, 7/4 of A. Every product adds its tile to one or two quadrants of a block of C that stays in
the cache. What remains is 7/8 of the multiply-adds, for 7/4 of the weight's memory.

Rounding: sums of two operands are rounded once more, and errors are relative to the largest numbers that meet in a sum.
Where rows of A, or columns of the weight, are of like size, as after a norm, the error is about that of the plain
product; a row that is a thousand times smaller than its partner has a thousand times its usual error. Switch it off by
`Target.without_strassen`.

A is cut into chunks of rows, each halved by rows and by K; the weight is halved by K and by neighbouring panels, C by
rows and by neighbouring panels. A unit of parallel work is a chunk with a group of pairs of panels; it makes its own
sums, so that no core reads what another has just written. M rows, K the reduced length, W the width of a panel; halves
of odd lengths are padded with zeros.

Source: Strassen 1969, "Gaussian elimination is not optimal"; Huang et al. 2016, "Strassen's algorithm reloaded", for
keeping the sums out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels.base import Array
from codegen.kernels.emit import (
    ALIAS_BYTES,
    BlockPrefetch,
    Index,
    Register,
    Split,
    Vectors,
    bind,
    branch,
    ceil_div,
    choose,
    parallel_block,
    prefetch,
    scratch,
    select_constant,
    serial,
    store,
)

FLOAT_BYTES: Final = 4
CACHED_BYTES: Final = 2 << 20  # up to about here, stores of the sums overlap with the next loads
CHUNK_ROWS: Final = 512  # rows whose sums are held at a time
EXCHANGE: Final = 40  # multiply-adds at full rate for a vector that another core wrote, beyond what overlaps


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
    """Sum the quadrants of a weight cut into panels `[P, K, W]`; a sum has two terms at most, so it rounds once."""
    panels, k, width = panels_PKW.shape
    pairs, products, half, _ = packed_shape(panels, k, width)
    padded = np.zeros((2 * pairs, 2 * half, width), np.float32)
    padded[:panels, :k] = panels_PKW
    quadrants = padded.reshape(pairs, 2, 2, half, width)  # pair, panel of the pair, half of K, K, W
    packed = np.empty((pairs, products, half, width), np.float32)
    for number, product in enumerate(PRODUCTS):
        first, *others = (sign * quadrants[:, column, row] for row, column, sign in product.weight)
        packed[:, number] = sum(others, first)
    return packed


Finish = Callable[[list[Expr], Index, Index, int], None]
"""Takes the vectors of a panel's row, the panel, the row, and the panel's place from the end: 0 for the last, 1 for the
one before it, 2 for any other."""


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
        chunks: Parts that the rows are cut into.
        groups: Parts that the pairs of panels are cut into.
    """

    vec: Vectors
    m: int
    k: int
    panels: int
    vectors: int
    rows: int
    chunks: int
    groups: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.vec.lanes

    @property
    def pairs(self) -> Split:
        """Pairs of panels in groups."""
        pairs = ceil_div(self.panels, 2)
        return Split(pairs, ceil_div(pairs, self.groups))

    @property
    def half_k(self) -> int:
        """Steps of K in a product."""
        return ceil_div(self.k, 2)

    @property
    def half_rows(self) -> int:
        """Rows of half a chunk."""
        return ceil_div(ceil_div(self.m, self.chunks), 2)

    @property
    def tiles(self) -> Split:
        """Register tiles of half a chunk."""
        return Split(self.half_rows, self.rows)

    @property
    def stride(self) -> int:
        """Elements between two rows of the sums of A."""
        lanes = self.vec.lanes
        padded = ceil_div(self.half_k, lanes) * lanes
        return padded + lanes if padded * FLOAT_BYTES % ALIAS_BYTES == 0 else padded

    def cycles(self, threads: int) -> float:
        """Estimate the time of a call, in fused multiply-adds of full rate.

        The constants were fitted to products from 37 x 100 x 77 to 512 x 3072 x 768 with 16 lanes. What comes before
        and after shares rows among threads; where groups of panels are shared, each reads and writes what others
        have at hand.
        """
        rounds = ceil_div(ceil_div(self.m, 2 * self.half_rows) * self.pairs.count, threads)
        area = self.half_rows * self.vectors * (self.pairs.small + bool(self.pairs.longer))
        heights = 1 + bool(self.tiles.longer)  # each is code to compile
        height, cells = self.tiles.small, self.tiles.small * self.vectors
        tile = max(1, (height + self.vectors) / cells) + 1 / cells + 0.005 * heights  # at least as many sums as loads
        product = len(PRODUCTS) * self.half_k * area * tile
        updates = 3 * sum(len(p.c) for p in PRODUCTS) * area
        sum_bytes = len(PRODUCTS) * self.half_rows * self.stride * FLOAT_BYTES
        sums = (3 if sum_bytes <= CACHED_BYTES else 8) * sum_bytes / (FLOAT_BYTES * self.vec.lanes)
        exchanged = self.m * (self.k + self.panels * self.width) / self.vec.lanes if self.pairs.count > 1 else 0
        return rounds * (product + updates + sums) + (EXCHANGE * exchanged / threads if threads > 1 else 0)

    def write(
        self, a: Buffer, offset: int, weight: Buffer, start_value: Callable[[Index, int], Expr], finish: Finish
    ) -> None:
        """Write everything.

        Args:
            a: `[M, at least offset + K]`.
            offset: Column of `a` where K begins.
            weight: What `pack` made.
            start_value: Gives what the sums of a vector of a panel start from.
            finish: Stores a row of a panel.
        """
        chunks, pairs = ceil_div(self.m, 2 * self.half_rows), self.pairs
        with parallel_block(chunks * pairs.count, flops=2 * self.m * self.k * self.panels * self.width) as unit:
            chunk, group = unit // pairs.count, unit % pairs.count
            rows = _Chunk(self, a, offset, weight, chunk * (2 * self.half_rows))
            rows.sum_a()
            longer = (group < pairs.longer).astype("int32") if pairs.longer else 0
            with serial(0, pairs.small + longer) as pair:
                rows.multiply(pairs.start(group) + pair, start_value, finish)


def tilings(m: int, threads: int, tiles: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """List ways to cut a product into chunks, groups and register tiles that are as even as they can be.

    Args:
        m: Rows of the product.
        threads: Threads that share it.
        tiles: Rows and vectors that a register tile may have.

    Returns:
        Rows and vectors of a tile, chunks of rows, and groups of panels.
    """
    least = ceil_div(m, CHUNK_ROWS)
    cuts = dict.fromkeys(((ceil_div(least, threads) * threads, 1), (least, threads), (least, 1)))
    found: dict[tuple[int, int, int, int], None] = {}
    for chunks, groups in cuts:
        half = ceil_div(ceil_div(m, chunks), 2)
        for most, vectors in tiles:
            fewest = ceil_div(half, most)
            for count in range(fewest, fewest + 3):
                found[ceil_div(half, count), vectors, chunks, groups] = None
    return list(found)


@dataclass(frozen=True)
class _Chunk:
    """Some rows: row i of the upper half goes with row i of the lower half."""

    loops: StrassenLoops
    a: Buffer
    offset: int
    weight: Buffer
    first: Expr
    sums: Buffer = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(PRODUCTS), self.loops.half_rows, self.loops.stride)
        object.__setattr__(self, "sums", scratch(shape))

    @property
    def all_exist(self) -> bool:
        """Whether every row of every chunk is a row of the product."""
        return self.loops.m % (2 * self.loops.half_rows) == 0

    # Sums of A

    def sum_a(self) -> None:
        """Write the seven sums of each row of the upper half and its partner."""
        half, m = self.loops.half_rows, self.loops.m
        with serial(0, half) as row:
            upper = self.first + row
            if self.all_exist:
                self._sum_row(row, [upper, upper + half])
            else:
                choose(
                    upper + half < m,
                    lambda: self._sum_row(row, [upper, upper + half]),
                    lambda: self._sum_row(row, [tirx.min(upper, m - 1)]),  # of a row past the end nothing is kept
                )

    def _sum_row(self, row: Expr, rows: list[Expr]) -> None:
        loops, lanes = self.loops, self.loops.vec.lanes
        full = (loops.k - loops.half_k) // lanes
        if full:
            with serial(0, full) as step:
                self._sum_vectors(row, rows, step * lanes, (None, None))
        for start in range(full * lanes, loops.half_k, lanes):
            live = (min(lanes, loops.half_k - start), max(0, min(lanes, loops.k - loops.half_k - start)))
            self._sum_vectors(row, rows, start, live)

    def _sum_vectors(self, row: Expr, rows: list[Expr], k: Index, live: tuple[int | None, int | None]) -> None:
        vec = self.loops.vec
        quadrants: dict[tuple[int, int], Register] = {}
        for lower, from_row in enumerate(rows):
            for column in range(2):
                if live[column] != 0:
                    place = self.offset + column * self.loops.half_k + k
                    quadrants[lower, column] = vec.register(vec.load(self.a, from_row, place, live=live[column]))
        for number, product in enumerate(PRODUCTS):
            total = vec.splat(0.0)
            for lower, column, sign in product.a:
                if (lower, column) in quadrants:
                    value = quadrants[lower, column].get()
                    total = total + value if sign > 0 else total - value
            vec.store(self.sums, total, number, row, k)

    # Products

    def multiply(self, pair: Expr, start_value: Callable[[Index, int], Expr], finish: Finish) -> None:
        """Write both panels of a pair."""
        loops, vec, half = self.loops, self.loops.vec, self.loops.half_rows
        line = 2 * loops.width
        block = scratch((2 * half * line,))  # upper rows, then lower ones; lines of both panels
        with serial(0, 2 * half) as row:
            for column in range(2):
                for v in range(loops.vectors):
                    place = row * line + column * loops.width + v * vec.lanes
                    vec.store(block, start_value(2 * pair + column, v), place)
        with serial(0, len(PRODUCTS)) as product, serial(0, loops.tiles.count) as tile:
            loops.tiles.for_each(tile, lambda row, rows: self._tile(block, pair, product, tile, row, rows))
        with serial(0, 2 * half) as row:
            if self.all_exist:
                self._finish_row(block, pair, self.first + row, row, finish)
            else:
                current = bind(self.first + row)
                with branch(current < loops.m):
                    self._finish_row(block, pair, current, row, finish)

    def _tile(self, block: Buffer, pair: Expr, product: Expr, number: Expr, row: Index, rows: int) -> None:
        loops, vec = self.loops, self.loops.vec
        weights_ahead = BlockPrefetch(self.weight, loops.tiles.count)
        line = 2 * loops.width
        tile = [[vec.register(0.0) for _ in range(loops.vectors)] for _ in range(rows)]
        with serial(0, loops.half_k) as k:
            weights_ahead.fetch_next(number, pair, product, k)
            prefetch(self.sums, product, row + rows, k * rows)  # all steps together: the rows of the next tile
            weights = [vec.load(self.weight, pair, product, k, v * vec.lanes) for v in range(loops.vectors)]
            for i, registers in enumerate(tile):
                value = vec.splat(self.sums[product, row + i, k])
                for register, weight in zip(registers, weights, strict=True):
                    register.set(register.get() + value * weight)
        for place in range(2):
            terms = [p.c[place] if len(p.c) > place else Term(0, 0, 0) for p in PRODUCTS]
            lower, column, sign = (select_constant(product, values) for values in zip(*terms, strict=True))
            quadrant = lower * (loops.half_rows * line) + column * loops.width  # exact: far below 2^24
            start = scratch((1,), "int32")  # memory, so that no pass puts the tables into every address
            store(start, row * line + quadrant.astype("int32"), 0)
            sign = bind(sign)
            with branch(tirx.NE(sign, tirx.const(0.0, "float32"))):
                self._add(block, tile, start[0], vec.splat(sign))

    def _add(self, block: Buffer, tile: Sequence[Sequence[Register]], start: Expr, sign: Expr) -> None:
        vec = self.loops.vec
        for i, registers in enumerate(tile):
            for v, register in enumerate(registers):
                place = start + (i * 2 * self.loops.width + v * vec.lanes)
                vec.store(block, vec.load(block, place) + sign * register.get(), place)

    # Epilogue

    def _finish_row(self, block: Buffer, pair: Expr, row: Expr, place: Expr, finish: Finish) -> None:
        loops, vec = self.loops, self.loops.vec
        pairs, single = ceil_div(loops.panels, 2), loops.panels % 2 == 1

        def panel(column: int, from_end: int) -> None:
            first = place * (2 * loops.width) + column * loops.width
            finish(
                [vec.load(block, first + v * vec.lanes) for v in range(loops.vectors)], 2 * pair + column, row, from_end
            )

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
