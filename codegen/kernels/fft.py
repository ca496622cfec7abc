"""Fourier transforms along one axis: the axes inside along the lanes, or rows along the lanes where it is the last one.

Transforms of real numbers of even length work on half as many complex points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.kernels._fft_writer import (
    Complex,
    Points,
    Transform,
    conjugate,
    for_each_pair,
    merge_pair,
    points,
    roots,
    split_pair,
)
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Vectors,
    bind,
    branch,
    build_function,
    ceil_div,
    choose,
    parallel_block,
    scratch,
    serial,
)
from ir.ops.spectral import Fft, Irfft, Rfft
from ir.types import TensorType

WORK_BYTES: Final = 2 * 1024 * 1024
"""The work areas of a unit, on the stack; passes run through them in order, so a cache need not hold them."""
NARROWEST: Final = 4


@dataclass(frozen=True)
class FftKernel(Kernel):
    """A transform along the middle axis of `[outer, n, inner]`.

    Operands: one part (`rfft`) or two, the roots of unity made by `table`; one part (`irfft`) or two.

    Attributes:
        kind: `fft`, `ifft`, `rfft` or `irfft`.
        outer: Product of the axes before.
        length: Length of the axis in time.
        inner: Product of the axes after.
    """

    kind: str
    outer: int
    length: int
    inner: int

    family: ClassVar[str] = "fft"

    @property
    def op(self) -> Fft | Rfft | Irfft:
        """The graph operation."""
        if self.kind in ("fft", "ifft"):
            return Fft(1, inverse=self.kind == "ifft")
        return Rfft(1) if self.kind == "rfft" else Irfft(1, self.length)

    @property
    def parts(self) -> tuple[TensorType, ...]:
        """Inputs of the operation."""
        size = self.length // 2 + 1 if self.kind == "irfft" else self.length
        return (TensorType((self.outer, size, self.inner)),) * (1 if self.kind == "rfft" else 2)

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Parts and roots of unity."""
        return (*self.parts, TensorType((self.length, 2)))

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """What the operation gives."""
        return self.op.infer_types(self.parts)

    @property
    def flops(self) -> int:
        """Counted by the operation."""
        return self.op.flops(self.parts, self.outputs)

    @property
    def is_halved(self) -> bool:
        """Whether pairs of real numbers are complex points."""
        return self.kind in ("rfft", "irfft") and self.length % 2 == 0

    @property
    def stack_bytes(self) -> int:
        """Stack of a unit with the narrowest vectors: two areas of points, a third for large primes, turned rows."""
        points_ = self.length // 2 if self.is_halved else self.length
        turned = sum(kind.shape[1] for kind in (*self.parts, *self.outputs)) if self.inner == 1 else 0
        return 4 * NARROWEST * (6 * points_ + turned)

    def table(self) -> Array:
        """Return the roots of unity of the length."""
        return roots(self.length)

    def knobs(self, isa: Isa) -> Knobs:
        """Take vectors as wide as the work areas and the lanes allow; radix 8 needs more than 16 registers."""
        lanes, across = isa.lanes, self.inner if self.inner > 1 else self.outer
        while lanes > NARROWEST and (24 * lanes * self.length > WORK_BYTES or lanes // 2 >= across):
            lanes //= 2
        return {"lanes": lanes, "radix": 8 if isa.registers >= 32 else 4}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return widths from a whole register down, both radices."""
        space = [self.knobs(isa)]
        widths = [lanes for lanes in (16, 8, 4) if lanes <= isa.lanes]
        every: list[Knobs] = [{"lanes": lanes, "radix": radix} for lanes in widths for radix in (8, 4)]
        return space + [candidate for candidate in every if candidate not in space]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write one unit for each vector of columns or of rows."""
        return build_function(self, isa, knobs, lambda *buffers: self._write(knobs, buffers))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Transform in float64."""
        return self.op.evaluate_all(tuple(np.asarray(array, np.float64) for array in arrays[:-1]))

    def _write(self, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        vec = Vectors(int(knobs["lanes"]))
        count = len(self.parts)
        sources, table, targets = buffers[:count], buffers[count], buffers[count + 1 :]
        columns = ceil_div(self.inner, vec.lanes)
        units = self.outer * columns if self.inner > 1 else ceil_div(self.outer, vec.lanes)
        rest = self.inner % vec.lanes

        def transform(place: _Place) -> None:
            _Writer(self, vec, int(knobs["radix"]), table, place).write(sources, targets)

        with parallel_block(units, flops=self.flops) as unit:
            if self.inner == 1:
                transform(_Rows(vec, self.outer, bind(unit * vec.lanes)))
                return
            outer, column = bind(unit // columns), bind(unit % columns * vec.lanes)
            if not rest or columns == 1:
                transform(_Columns(vec, outer, column, rest or None))
            else:
                choose(
                    unit % columns < columns - 1,
                    lambda: transform(_Columns(vec, outer, column, None)),
                    lambda: transform(_Columns(vec, outer, column, rest)),
                )

    @staticmethod
    def along(kind: str, shape: tuple[int, ...], axis: int, length: int) -> FftKernel:
        """The kernel for an axis of a shape."""
        axis %= len(shape)
        return FftKernel(kind, math.prod(shape[:axis]), length, math.prod(shape[axis + 1 :]))


Load = Callable[[Index], Expr]
Store = Callable[[Index, Expr], None]


class _Place(ABC):
    """Which numbers of a tensor are the lanes of a unit."""

    @abstractmethod
    def source(self, buffer: Buffer) -> Load:
        """Return how to load the lanes at a place along the axis."""

    @abstractmethod
    def target(self, buffer: Buffer) -> Store:
        """Return how to store the lanes at a place along the axis."""

    @abstractmethod
    def finish(self) -> None:
        """Bring what was stored to where it belongs."""


@dataclass
class _Columns(_Place):
    """Consecutive columns of the axes inside."""

    vec: Vectors
    outer: Expr
    column: Expr
    live: int | None

    def source(self, buffer: Buffer) -> Load:
        return lambda place: bind(self.vec.load(buffer, self.outer, place, self.column, live=self.live))

    def target(self, buffer: Buffer) -> Store:
        return lambda place, value: self.vec.store(buffer, value, self.outer, place, self.column, live=self.live)

    def finish(self) -> None:
        pass


class _Rows(_Place):
    """Consecutive rows, turned into lanes a square at a time on the way in and out."""

    def __init__(self, vec: Vectors, rows: int, first: Expr) -> None:
        self.vec, self.rows, self.first = vec, rows, first
        self.stored: list[tuple[Buffer, Buffer]] = []

    def source(self, buffer: Buffer) -> Load:
        turned, lanes = self._area(buffer), self.vec.lanes

        def square(column: Index, live: int | None) -> None:
            lines = [
                self.vec.load(buffer, tirx.min(self.first + row, self.rows - 1), column, 0, live=live)
                for row in range(lanes)
            ]
            for place, value in enumerate(self.vec.transpose(lines)):
                self.vec.store(turned, value, column + place, 0)

        self._squares(int(buffer.shape[1]), square)
        return lambda place: bind(self.vec.load(turned, place, 0))

    def target(self, buffer: Buffer) -> Store:
        turned = self._area(buffer)
        self.stored.append((turned, buffer))
        return lambda place, value: self.vec.store(turned, value, place, 0)

    def finish(self) -> None:
        for turned, buffer in self.stored:
            self._squares(
                int(buffer.shape[1]), lambda column, live, t=turned, b=buffer: self._turn_back(t, b, column, live)
            )

    def _turn_back(self, turned: Buffer, buffer: Buffer, column: Index, live: int | None) -> None:
        lanes = self.vec.lanes
        lines = self.vec.transpose([self.vec.load(turned, column + place, 0) for place in range(lanes)])
        for row, line in enumerate(lines):
            if self.rows % lanes:
                with branch(self.first + row < self.rows):
                    self.vec.store(buffer, line, self.first + row, column, 0, live=live)
            else:
                self.vec.store(buffer, line, self.first + row, column, 0, live=live)

    def _area(self, buffer: Buffer) -> Buffer:
        lanes = self.vec.lanes
        return scratch((ceil_div(int(buffer.shape[1]), lanes) * lanes, lanes))

    def _squares(self, size: int, body: Callable[[Index, int | None], None]) -> None:
        full, rest = divmod(size, self.vec.lanes)
        if full:
            with serial(0, full) as square:
                body(bind(square * self.vec.lanes), None)
        if rest:
            body(full * self.vec.lanes, rest)


class _Writer:
    """Writes the transform of one unit."""

    def __init__(self, kernel: FftKernel, vec: Vectors, radix: int, table: Buffer, place: _Place) -> None:
        self.kernel, self.vec, self.place = kernel, vec, place
        halved = kernel.is_halved
        self.count = kernel.length // 2 if halved else kernel.length
        self.transform = Transform(vec, self.count, radix, table, step=2 if halved else 1)
        self.work = [points(vec, self.count) for _ in range(2)]

    def write(self, sources: tuple[Buffer, ...], targets: tuple[Buffer, ...]) -> None:
        """Write the transform that the kernel's kind asks for."""
        loads = [self.place.source(buffer) for buffer in sources]
        stores = [self.place.target(buffer) for buffer in targets]
        if self.kernel.kind in ("fft", "ifft"):
            self._complex(loads, stores)
        elif self.kernel.kind == "rfft":
            (self._forward_pairs if self.kernel.is_halved else self._forward_odd)(loads[0], stores)
        else:
            (self._inverse_pairs if self.kernel.is_halved else self._inverse_odd)(loads, stores[0])
        self.place.finish()

    def _complex(self, loads: list[Load], stores: list[Store]) -> None:
        inverse = self.kernel.kind == "ifft"
        factor = self.vec.splat(1.0 / self.count)

        def read(place: Index, first: int, last: int) -> Complex:
            return loads[0](place), loads[1](place)

        def write(place: Index, first: int, last: int, value: Complex) -> None:
            for store, part in zip(stores, value, strict=True):
                store(place, part * factor if inverse else part)

        self.transform.write(self.work, read, write, inverse=inverse)

    def _forward_odd(self, load: Load, stores: list[Store]) -> None:
        """An odd number of real numbers, as complex ones; the second half of the result mirrors the first."""
        half = self.count // 2

        def read(place: Index, first: int, last: int) -> Complex:
            return load(place), self.vec.splat(0.0)

        def write(place: Index, first: int, last: int, value: Complex) -> None:
            if last <= half:
                self._put(stores, place, value)
            elif first <= half:
                with branch(bind(place) <= half):
                    self._put(stores, place, value)

        self.transform.write(self.work, read, write)

    def _forward_pairs(self, load: Load, stores: list[Store]) -> None:
        result = self.transform.write(self.work, lambda place, first, last: (load(place * 2), load(place * 2 + 1)))
        assert result is not None
        half = self.vec.splat(0.5)

        def split(place: Index, mirror: Index, other: Index) -> None:
            even, turned = split_pair(result.get(place), result.get(mirror), self._root(place))
            self._put(stores, place, ((even[0] + turned[0]) * half, (even[1] + turned[1]) * half))
            self._put(stores, other, ((even[0] - turned[0]) * half, (turned[1] - even[1]) * half))

        for_each_pair(self.count, split)

    def _inverse_odd(self, loads: list[Load], store: Store) -> None:
        area, length = self.work[1], self.count
        area.set(0, (loads[0](0), self.vec.splat(0.0)))
        with serial(1, length // 2 + 1) as k:
            value = loads[0](k), loads[1](k)
            area.set(k, value)
            area.set(length - k, conjugate(value))
        self._back(area, lambda place, value: store(place, value[0]))

    def _inverse_pairs(self, loads: list[Load], store: Store) -> None:
        area = self.work[1]

        def merge(place: Index, mirror: Index, other: Index) -> None:
            here, there = ((loads[0](k), loads[1](k)) for k in (place, other))
            even = bind(here[0] + there[0]), bind(here[1] - there[1])
            turned = bind(here[0] - there[0]), bind(here[1] + there[1])
            if isinstance(place, int):  # the ends, whose imaginary parts count as zero
                even, turned = ((part[0], self.vec.splat(0.0)) for part in (even, turned))
            first, second = merge_pair(even, turned, self._root(place))
            area.set(place, first)
            area.set(mirror, second)

        for_each_pair(self.count, merge)

        def put(place: Index, value: Complex) -> None:
            store(place * 2, value[0])
            store(place * 2 + 1, value[1])

        self._back(area, put)

    def _back(self, area: Points, put: Callable[[Index, Complex], None]) -> None:
        """Transform back what lies in the second work area, divided by the length."""
        factor = self.vec.splat(1.0 / self.kernel.length)

        def write(place: Index, first: int, last: int, value: Complex) -> None:
            put(place, (value[0] * factor, value[1] * factor))

        self.transform.write(self.work, area.read, write, inverse=True)

    def _put(self, stores: list[Store], place: Index, value: Complex) -> None:
        for store, part in zip(stores, value, strict=True):
            store(place, part)

    def _root(self, k: Index) -> Complex:
        """A root of unity of the real length."""
        table = self.transform.table
        return bind(self.vec.splat(table[k, 0])), bind(self.vec.splat(table[k, 1]))
