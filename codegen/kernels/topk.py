"""The k largest or smallest elements of each row, with their positions.

Each element becomes one 64-bit key: above, the bits of the number in an order that integers share; below, the position
counted backwards. Keys are all different, and the largest key is the largest element at the lowest position, so no step
has to think of ties. A few elements are selected one by one, each the largest key below the last: a wide row is cut
into blocks whose largest keys are kept, so only the block that lost one is read again. Many come out of a bitonic sort
(Batcher 1968), always in the same direction: each merge begins by comparing a block with its mirror.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Register,
    Vectors,
    bind,
    build_function,
    ceil_div,
    parallel_block,
    scratch,
    serial,
)
from ir.ops.sorting import TopK
from ir.types import TensorType

LOWEST: Final = -(2**63)
HIGHEST: Final = 2**63 - 1
LAST_POSITION: Final = 2**31 - 1
SELECT_CYCLES: Final = (20, 2.5)  # of one maximum: to begin with, and for each vector
ONE_BLOCK: Final = 8  # vectors up to which a row is read whole for each element
SORT_CYCLES: Final = 1.7  # for each vector and square of the logarithm of the length
SUMS: Final = 4  # running maxima of a pass, so that they do not wait for each other


@dataclass(frozen=True)
class TopKKernel(Kernel):
    """Values and positions of the k largest (or smallest) elements of each row, in order.

    Operands: x `[rows, width]`; values `[rows, k]`, positions int32 `[rows, k]`.

    Attributes:
        rows: Rows.
        width: Elements of a row.
        k: How many to find.
        largest: The largest, falling; else the smallest, rising.
    """

    rows: int
    width: int
    k: int
    largest: bool = True

    family: ClassVar[str] = "top_k"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """The rows."""
        return (TensorType((self.rows, self.width)),)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """Values and positions."""
        return TopK(self.k, self.largest).infer_types(self.inputs)

    @property
    def flops(self) -> int:
        """Comparisons counted by the operation."""
        return TopK(self.k, self.largest).flops(self.inputs, self.outputs)

    @property
    def stack_bytes(self) -> int:
        """Stack of a unit: the keys of a row."""
        return 8 * _power_of_two(self.width)

    def knobs(self, isa: Isa) -> Knobs:
        """Select where that many passes are shorter than a sort."""
        lanes = max(isa.lanes // 2, 1)
        start, each = SELECT_CYCLES
        vectors = ceil_div(self.width, lanes)
        selecting = self.k * (start + each * vectors)
        if vectors > ONE_BLOCK:
            block = _block_vectors(vectors, lanes)
            selecting = each * vectors + self.k * (2 * start + each * (block + vectors / block / lanes))
        length = _power_of_two(max(self.width, 2 * lanes))
        return {"method": "select" if selecting <= SORT_CYCLES * math.log2(length) ** 2 * length / lanes else "sort"}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Either method."""
        rule = self.knobs(isa)
        return [rule, {"method": "sort" if rule["method"] == "select" else "select"}]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write one row after the other."""
        return build_function(self, isa, knobs, lambda *buffers: _Writer(self, isa, buffers).write(knobs["method"]))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Sort in float64."""
        return TopK(self.k, self.largest).evaluate(np.asarray(arrays[0], np.float64))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _block_vectors(vectors: int, lanes: int) -> int:
    """Vectors of a block: as many as there are vectors of blocks, so that both are read quickly."""
    return max(SUMS, _power_of_two(round(math.sqrt(vectors / lanes))))


class _Writer:
    """Writes the loop over rows; a vector holds half as many keys as float32 numbers."""

    def __init__(self, kernel: TopKKernel, isa: Isa, buffers: tuple[Buffer, ...]) -> None:
        self.kernel = kernel
        self.lanes = max(isa.lanes // 2, 1)
        self.vec = Vectors(self.lanes)
        self.x, self.values, self.positions = buffers
        self.vectors = ceil_div(kernel.width, self.lanes)

    def write(self, method: object) -> None:
        """Find the keys of each row and turn them back into numbers."""
        kernel = self.kernel
        block = _block_vectors(self.vectors, self.lanes) if self.vectors > ONE_BLOCK else self.vectors
        length = ceil_div(self.vectors, block) * block * self.lanes
        if method == "sort":
            length = _power_of_two(max(kernel.width, 2 * self.lanes))
        with parallel_block(kernel.rows, flops=8 * kernel.rows * kernel.width) as row:
            self.keys = scratch((length,), "int64")
            self._make_keys(row, length)
            if method == "sort":
                self._sort(length)
                with serial(0, kernel.k) as rank:
                    self._put(row, rank, self.keys[rank])
            elif block < self.vectors:
                self._select_from_blocks(row, block, length // (block * self.lanes))
            else:
                self._select(row)

    # -- keys --------------------------------------------------------------------------------------------------------

    def _make_keys(self, row: Expr, length: int) -> None:
        full, rest = divmod(self.kernel.width, self.lanes)
        if full:
            with serial(0, full) as vector:
                self._store(self._key(row, vector * self.lanes, None), vector * self.lanes)
        if rest:
            key = self._key(row, full * self.lanes, rest)
            exists = self.vec.lane_numbers(0) < tirx.Broadcast(tirx.const(rest, "int32"), self.lanes)
            self._store(tirx.Select(exists, key, self._splat(LOWEST)), full * self.lanes)
        if length > self.vectors * self.lanes:
            with serial(self.vectors, length // self.lanes) as vector:
                self._store(self._splat(LOWEST), vector * self.lanes)

    def _key(self, row: Expr, column: Index, live: int | None) -> Expr:
        """Keys of consecutive elements."""
        lanes = self.lanes
        number = bind(self.vec.load(self.x, row, column, live=live))
        bits = bind(tirx.Select(number == self.vec.splat(0.0), _splat_int(0, lanes), self._cast_bits(number)))
        magnitude = _splat_int(0x7FFFFFFF, lanes)
        ordered = tirx.bitwise_xor(bits, tirx.bitwise_and(bits >> _splat_int(31, lanes), magnitude))
        if not self.kernel.largest:
            ordered = _splat_int(-1, lanes) - ordered
        place = _splat_int(LAST_POSITION, lanes) - self.vec.lane_numbers(column)
        return (self._wide(ordered) << self._splat(32)) + self._wide(place)

    def _cast_bits(self, number: Expr) -> Expr:
        return tirx.reinterpret(f"int32x{self.lanes}" if self.lanes > 1 else "int32", number)

    def _wide(self, value: Expr) -> Expr:
        return tirx.Cast(f"int64x{self.lanes}" if self.lanes > 1 else "int64", value)

    def _splat(self, value: int | Expr) -> Expr:
        scalar = value if isinstance(value, Expr) else tirx.const(value, "int64")
        return tirx.Broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def _load(self, place: Index) -> Expr:
        return self.keys[tirx.Ramp(place, 1, self.lanes)]

    def _store(self, value: Expr, place: Index) -> None:
        T.buffer_store(self.keys, value, [tirx.Ramp(place, 1, self.lanes)])

    def _register(self, value: Expr) -> Register:
        made = Register(scratch((self.lanes,), "int64"), self.lanes)
        made.set(value)
        return made

    def _put(self, row: Expr, rank: Index, key: Expr) -> Expr:
        """Store the number and the position that a key stands for; return the position."""
        place = bind(LAST_POSITION - tirx.Cast("int32", tirx.bitwise_and(key, tirx.const(LAST_POSITION, "int64"))))
        T.buffer_store(self.values, self.x[row, place], [row, rank])
        T.buffer_store(self.positions, place, [row, rank])
        return place

    # -- selection ---------------------------------------------------------------------------------------------------

    def _select(self, row: Expr) -> None:
        """Take the largest key below the last one found, k times."""
        found = scratch((1,), "int64")
        T.buffer_store(found, tirx.const(HIGHEST, "int64"), [0])
        with serial(0, self.kernel.k) as rank:
            T.buffer_store(found, self._largest_below(found[0], 0, self.vectors), [0])
            self._put(row, rank, found[0])

    def _select_from_blocks(self, row: Expr, block: int, blocks: int) -> None:
        """Take the largest of the blocks' largest keys, k times, and look for the next one in its block."""
        lanes = self.lanes
        vectors = ceil_div(blocks, lanes)
        found, maxima = scratch((1,), "int64"), scratch((vectors * lanes,), "int64")
        T.buffer_store(maxima, self._splat(LOWEST), [tirx.Ramp((vectors - 1) * lanes, 1, lanes)])
        with serial(0, blocks) as number:
            highest = tirx.const(HIGHEST, "int64")
            T.buffer_store(maxima, self._largest_below(highest, number * (block * lanes), block), [number])
        with serial(0, self.kernel.k) as rank:
            best = self._register(self._splat(LOWEST))
            with serial(0, vectors) as vector:
                best.set(tirx.max(best.get(), maxima[tirx.Ramp(vector * lanes, 1, lanes)]))
            T.buffer_store(found, self._largest_lane(best), [0])
            number = bind(self._put(row, rank, found[0]) // (block * lanes))
            T.buffer_store(maxima, self._largest_below(found[0], number * (block * lanes), block), [number])

    def _largest_below(self, limit: Expr, first: Index, vectors: int) -> Expr:
        """The largest key below a limit among some vectors of keys."""
        sums = [self._register(self._splat(LOWEST)) for _ in range(min(SUMS, vectors))]
        last = self._register(self._splat(limit))
        groups, rest = divmod(vectors, len(sums))
        with serial(0, groups) as group:
            for number, total in enumerate(sums):
                self._take_largest(total, last, first + (group * len(sums) + number) * self.lanes)
        for number in range(rest):
            self._take_largest(sums[number], last, first + (groups * len(sums) + number) * self.lanes)
        for total in sums[1:]:
            sums[0].set(tirx.max(sums[0].get(), total.get()))
        return self._largest_lane(sums[0])

    def _take_largest(self, total: Register, last: Register, place: Index) -> None:
        key = self._load(place)
        total.set(tirx.max(total.get(), tirx.Select(key < last.get(), key, self._splat(LOWEST))))

    def _largest_lane(self, register: Register) -> Expr:
        distance = self.lanes // 2
        while distance:
            order = [lane ^ distance for lane in range(self.lanes)]
            register.set(tirx.max(register.get(), tirx.Shuffle([register.get()], order)))
            distance //= 2
        return register.element(0)

    # -- sort --------------------------------------------------------------------------------------------------------

    def _sort(self, length: int) -> None:
        """Sort the keys, largest first."""
        lanes = self.lanes
        self._in_vectors(length, lambda register: self._sort_vector(register))
        size = 2 * lanes
        while size <= length:
            self._mirror(length, size)
            distance = size // 4
            while distance >= lanes:
                self._exchange(length, distance)
                distance //= 2
            self._in_vectors(length, lambda register: self._merge_vector(register, lanes // 2))
            size *= 2

    def _in_vectors(self, length: int, change: Callable[[Register], None]) -> None:
        with serial(0, length // self.lanes) as vector:
            register = self._register(self._load(vector * self.lanes))
            change(register)
            self._store(register.get(), vector * self.lanes)

    def _sort_vector(self, register: Register) -> None:
        size = 2
        while size <= self.lanes:
            self._swap_lanes(register, [lane ^ (size - 1) for lane in range(self.lanes)])
            self._merge_vector(register, size // 4)
            size *= 2

    def _merge_vector(self, register: Register, distance: int) -> None:
        while distance:
            self._swap_lanes(register, [lane ^ distance for lane in range(self.lanes)])
            distance //= 2

    def _swap_lanes(self, register: Register, partner: list[int]) -> None:
        """Bring the larger of each pair of lanes to the lower one."""
        other = self._register(tirx.Shuffle([register.get()], partner))
        larger = self._register(tirx.max(register.get(), other.get()))
        smaller = self._register(tirx.min(register.get(), other.get()))
        order = [lane if lane < partner[lane] else self.lanes + lane for lane in range(self.lanes)]
        register.set(tirx.Shuffle([larger.get(), smaller.get()], order))

    def _mirror(self, length: int, size: int) -> None:
        """Compare the first half of each block with its second half read backwards."""
        lanes, pairs = self.lanes, size // 2 // self.lanes
        backwards = list(reversed(range(lanes)))
        with serial(0, length // size) as block, serial(0, pairs) as pair:
            low, high = block * size + pair * lanes, block * size + (size - lanes) - pair * lanes
            first, second = self._register(self._load(low)), self._register(self._load(high))
            turned = self._register(tirx.Shuffle([second.get()], backwards))
            smaller = self._register(tirx.min(first.get(), turned.get()))
            self._store(tirx.max(first.get(), turned.get()), low)
            self._store(tirx.Shuffle([smaller.get()], backwards), high)

    def _exchange(self, length: int, distance: int) -> None:
        """Compare elements at a distance within blocks of twice that."""
        lanes = self.lanes
        with serial(0, length // (2 * distance)) as block, serial(0, distance // lanes) as pair:
            low = block * (2 * distance) + pair * lanes
            first, second = self._register(self._load(low)), self._register(self._load(low + distance))
            self._store(tirx.max(first.get(), second.get()), low)
            self._store(tirx.min(first.get(), second.get()), low + distance)


def _splat_int(value: int, lanes: int) -> Expr:
    scalar = tirx.const(value, "int32")
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar
