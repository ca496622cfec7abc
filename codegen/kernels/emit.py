"""Small vocabulary for writing TIR: functions, parallel blocks, vector registers, masks, tile splits, transposes.

Kernels write TIR nodes directly through TVM's builder; nothing is parsed from source, so a kernel is built in about a
millisecond. Unrolled loops are Python loops. A register is a local buffer one vector long, which LLVM keeps in a
register.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from codegen._tvm import KERNEL_ATTRIBUTE, Buffer, Expr, IRBuilder, PrimFunc, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import Isa, Kernel, Knobs, storage_dtype
from codegen.kernels.vector_math import keep, splat, splat_int

Index = int | Expr
PARALLEL_FLOPS: Final = 100_000  # about two microseconds of one core, the time to start a parallel loop
LINE_BYTES: Final = 64
ALIAS_BYTES: Final = 1024
"""Rows that are multiples of this apart compete for the same lines of the first-level cache."""
ELEMENT_BYTES: Final = 4

_FOR_READING: Final = tuple(tirx.IntImm("int32", flag) for flag in (0, 3, 1))  # read; keep in all levels; data


def build_function(kernel: Kernel, isa: Isa, knobs: Knobs, write: Callable[..., None]) -> PrimFunc:
    """Wrap `write(*buffers)`, the body over the kernel's inputs and outputs, into a private scheduled function."""
    operands = [
        (f"x{index}", kernel.packed_shape(index, isa, knobs), kernel.packed_dtype(index))
        for index in range(len(kernel.inputs))
    ] + [(f"y{index}", operand.shape, storage_dtype(operand.dtype)) for index, operand in enumerate(kernel.outputs)]
    with IRBuilder() as builder:
        with T.prim_func(private=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, KERNEL_ATTRIBUTE: True})
            write(*(T.arg(name, T.buffer(shape, dtype, layout=None)) for name, shape, dtype in operands))
    return builder.get()


@contextmanager
def parallel_block(extent: int, *, flops: int | None = None) -> Iterator[Expr]:
    """Run the body for each index, spread over the threads; buffers made inside are private to an index.

    Args:
        extent: Number of indices.
        flops: Work of the whole loop; so little that waking a thread takes longer stays on the calling thread.
    """
    alone = extent == 1 or (flops is not None and flops < PARALLEL_FLOPS)
    with T.serial(0, extent) if alone else T.parallel(0, extent) as index:
        yield index


@contextmanager
def branch(condition: Expr) -> Iterator[None]:
    """Run the body where the condition holds."""
    with T.If(condition):
        with T.Then():
            yield


def choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Run one of two bodies."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def serial(start: Index, stop: Index) -> T.frame.ForFrame:
    """Return the frame of a sequential loop."""
    return T.serial(start, stop)


def bind(value: Index) -> Expr:
    """Name a value at this place in the program, so that it is computed once."""
    return keep(value) if isinstance(value, Expr) else T.Bind(value)


def scratch(shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
    """Return a buffer private to the current block."""
    return T.alloc_buffer(shape, dtype, layout=None)


def store(buffer: Buffer, value: Expr, *index: Index) -> None:
    """Store one scalar."""
    T.buffer_store(buffer, value, list(index))


def flat_view(buffer: Buffer) -> Buffer:
    """Return the same memory seen as one dimension."""
    return T.decl_buffer((math.prod(int(size) for size in buffer.shape),), buffer.dtype, data=buffer.data, layout=None)


def prefetch(buffer: Buffer, *index: Index) -> None:
    """Ask for the line of the cache that holds an element; what lies past the end of the buffer is harmless."""
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", T.address_of(buffer[index]), *_FOR_READING))


@dataclass(frozen=True)
class BlockPrefetch:
    """A matrix read block by block, each block by several tiles before the next one.

    While one block is read, its tiles fetch the next one, in equal parts: it comes from memory as evenly as it can. The
    processor would only see it coming at its first tile. A block with a single tile is left to the processor.

    Attributes:
        buffer: What is read, of 4-byte elements; its last two dimensions are the rows of a block and their elements.
        tiles: Most tiles that read a block.
    """

    buffer: Buffer
    tiles: int

    def fetch_next(self, tile: Index, *row: Index) -> None:
        """Fetch the next block's part that belongs to one row of this block.

        Args:
            tile: Number of the tile that reads this block.
            row: Place of the row in the buffer.
        """
        if self.tiles == 1:
            return
        *_, rows, width = (int(size) for size in self.buffer.shape)
        *block, step = row
        part = ceil_div(width, self.tiles)
        first = tile * (rows * width // self.tiles) + step * part
        for line in range(ceil_div(part * ELEMENT_BYTES, LINE_BYTES)):
            prefetch(self.buffer, *block, rows, first + line * (LINE_BYTES // ELEMENT_BYTES))


def load_at(buffer: Buffer, index: Expr) -> Expr:
    """Load the elements at a vector of positions of a one-dimensional buffer."""
    return buffer[index]


@dataclass(frozen=True)
class Register:
    """A vector variable."""

    buffer: Buffer
    lanes: int

    def get(self) -> Expr:
        """Return the current value."""
        return self.buffer[tirx.Ramp(0, 1, self.lanes)]

    def set(self, value: Expr) -> None:
        """Assign."""
        T.buffer_store(self.buffer, value, [tirx.Ramp(0, 1, self.lanes)])

    def element(self, lane: Index) -> Expr:
        """Return one lane."""
        return self.buffer[lane]


@dataclass(frozen=True)
class Vectors:
    """Vector operations of one width.

    Attributes:
        lanes: Float32 elements in a vector.
    """

    lanes: int

    def splat(self, value: float | Expr) -> Expr:
        """Return a vector of one value."""
        return splat(value, self.lanes)

    def register(self, value: float | Expr | None = None) -> Register:
        """Return a new vector variable, set to a value if one is given."""
        made = Register(scratch((self.lanes,)), self.lanes)
        if value is not None:
            made.set(self.splat(value) if isinstance(value, float) else value)
        return made

    def load(self, buffer: Buffer, *index: Index, live: Index | None = None) -> Expr:
        """Load consecutive elements of the last dimension.

        Args:
            buffer: Where from.
            index: Position of the first element.
            live: Lanes that exist; the rest read as zero. All of them if None.
        """
        *outer, column = index
        if self._all_live(live):
            return buffer[(*outer, tirx.Ramp(column, 1, self.lanes))]
        mask = self._mask(live)
        loaded = T.masked_load(f"float32x{self.lanes}", buffer, *outer, tirx.Ramp(column, 1, self.lanes), mask)
        return tirx.Select(mask, loaded, self.splat(0.0))  # TVM leaves the lanes behind the mask undefined

    def store(self, buffer: Buffer, value: Expr, *index: Index, live: Index | None = None) -> None:
        """Store consecutive elements of the last dimension; lanes from `live` on are left alone."""
        *outer, column = index
        ramp = tirx.Ramp(column, 1, self.lanes)
        if self._all_live(live):
            T.buffer_store(buffer, value, [*outer, ramp])
        else:
            T.evaluate(T.masked_store(buffer, value, *outer, ramp, self._mask(live)))

    def lane_numbers(self, start: Index) -> Expr:
        """Return the int32 vector start, start + 1, ..."""
        return tirx.Ramp(start, 1, self.lanes)

    def _all_live(self, live: Index | None) -> bool:
        return live is None or (isinstance(live, int) and live >= self.lanes)

    def _mask(self, live: Index | None) -> Expr:
        assert live is not None
        return tirx.Ramp(0, 1, self.lanes) < splat_int(live, self.lanes)

    def transpose(self, rows: Sequence[Expr]) -> list[Expr]:
        """Transpose a square of vectors in log2(lanes) rounds of shuffles."""
        rows = [bind(row) for row in rows]
        distance = 1
        while distance < self.lanes:
            low, high = self._exchange_patterns(distance)
            for first in range(self.lanes):
                if first & distance:
                    continue
                pair = [rows[first], rows[first + distance]]
                rows[first], rows[first + distance] = bind(tirx.Shuffle(pair, low)), bind(tirx.Shuffle(pair, high))
            distance *= 2
        return rows

    def sum_each(self, rows: Sequence[Expr]) -> Expr:
        """Return the vector whose lane i is the sum over the lanes of row i, one row a lane."""
        sums = [bind(row) for row in rows]
        distance = 1
        while distance < self.lanes:
            low, high = self._exchange_patterns(distance)
            sums = [
                bind(tirx.Shuffle([even, odd], low) + tirx.Shuffle([even, odd], high))
                for even, odd in zip(sums[::2], sums[1::2], strict=True)
            ]
            distance *= 2
        return sums[0]

    def _exchange_patterns(self, distance: int) -> tuple[list[int], list[int]]:
        """Return the two shuffles of a pair (a, b) that swap the off-diagonal blocks of size `distance`."""
        low = [i if not i & distance else self.lanes + i - distance for i in range(self.lanes)]
        high = [i + distance if not i & distance else self.lanes + i for i in range(self.lanes)]
        return low, high

    def reduce(self, value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """Combine all lanes into a scalar, halving the vector each time."""
        lanes = self.lanes
        value = bind(value)
        while lanes > 1:
            lanes //= 2
            low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
            value = bind(combine(tirx.Shuffle([value], low), tirx.Shuffle([value], high)))
        return value


@dataclass(frozen=True)
class Split:
    """A length covered by the fewest tiles of at most `largest`, as even as they can be: larger tiles first.

    Attributes:
        total: Length to cover.
        largest: Longest tile allowed.
    """

    total: int
    largest: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.total // self.largest)

    @property
    def small(self) -> int:
        """Length of the shorter kind of tile."""
        return self.total // self.count

    @property
    def longer(self) -> int:
        """Number of tiles that are one longer than `small`."""
        return self.total % self.count

    @property
    def longest(self) -> int:
        """Length of the longer kind of tile."""
        return self.small + (self.longer > 0)

    def start(self, tile: Index) -> Index:
        """Return where a tile begins."""
        if isinstance(tile, int):
            return tile * self.small + min(tile, self.longer)
        return tile * self.small + (tirx.min(tile, self.longer) if self.longer else 0)

    def for_each(self, tile: Expr, write: Callable[[Index, int], None]) -> None:
        """Write the body of one tile, `write(start, length)`, once for each of the at most two lengths."""
        if not self.longer:
            write(self.start(tile), self.small)
            return
        choose(
            tile < self.longer,
            lambda: write(tile * (self.small + 1), self.small + 1),
            lambda: write(tile * self.small + self.longer, self.small),
        )


def column_vectors(columns: int, lanes: int) -> list[int | None]:
    """List the live lanes of each vector that covers `columns`; None is a full vector."""
    full, rest = divmod(columns, lanes)
    return [None] * full + ([rest] if rest else [])


def ceil_div(total: int, size: int) -> int:
    """Divide, rounding up."""
    return -(-total // size)


def select_constant(index: Expr, values: Sequence[float]) -> Expr:
    """Look a small table up by a run-time index."""
    result: Expr = tirx.const(values[-1], "float32")
    for position in range(len(values) - 2, -1, -1):
        result = tirx.Select(index == position, tirx.const(values[position], "float32"), result)
    return result
