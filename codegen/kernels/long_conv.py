"""Causal convolution with filters as long as the sequence, channels along the lanes.

For each vector of channels: the transform of the padded input, as half as many complex points; at each pair of
frequencies the product with the filter's transform; the inverse, which writes the output in place of padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    multiply,
    points,
    roots,
    smooth_length,
    split_pair,
)
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import Index, Vectors, bind, branch, build_function, ceil_div, choose, parallel_block, serial
from ir.ops.spectral import LongConv
from ir.types import TensorType

WORK_BYTES: Final = 2 * 1024 * 1024
"""The two work areas of a unit, on the stack; passes run through them in order, so a cache need not hold them."""
NARROWEST: Final = 4


@dataclass(frozen=True)
class LongConvKernel(Kernel):
    """`y_t = sum_{s <= t} h_s x_{t-s}` for each channel.

    Operands: x `[B, T, C]`, the filter `[L, C]`, the roots of unity made by `table`; y `[B, T, C]`.

    Attributes:
        batch: Sequences.
        t: Steps of a sequence.
        channels: Channels.
        taps: Length of the filter, at most t.
        constant: Whether the filter is known when the model is compiled; then its transform is packed.
    """

    batch: int
    t: int
    channels: int
    taps: int
    constant: bool = False

    family: ClassVar[str] = "long_conv"

    @property
    def points(self) -> int:
        """Complex points of a transform: half the padded length."""
        return smooth_length(ceil_div(self.t + self.taps - 1, 2))

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Input, filter, roots of unity."""
        x = TensorType((self.batch, self.t, self.channels))
        return x, TensorType((self.taps, self.channels)), TensorType((2 * self.points, 2))

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The convolved sequence."""
        return self.inputs[:1]

    @property
    def flops(self) -> int:
        """Counted by the operation."""
        return LongConv().flops(self.inputs[:2], self.outputs)

    @property
    def stack_bytes(self) -> int:
        """Stack of a unit with the narrowest vectors."""
        return 4 * NARROWEST * (4 * self.points + (0 if self.constant else 2 * (self.points + 1)))

    def table(self) -> Array:
        """Return the roots of unity of the padded length."""
        return roots(2 * self.points)

    def knobs(self, isa: Isa) -> Knobs:
        """Take vectors as wide as the work areas allow; radix 8 needs more than 16 registers."""
        lanes = isa.lanes
        while lanes > NARROWEST and (16 * lanes * self.points > WORK_BYTES or lanes // 2 >= self.channels):
            lanes //= 2
        return {"lanes": lanes, "radix": 8 if isa.registers >= 32 else 4}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return widths from a whole register down, both radices."""
        space = [self.knobs(isa)]
        widths = [lanes for lanes in (16, 8, 4) if lanes <= isa.lanes]
        every: list[Knobs] = [{"lanes": lanes, "radix": radix} for lanes in widths for radix in (8, 4)]
        return space + [candidate for candidate in every if candidate not in space]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write one unit for each vector of channels."""
        return build_function(self, isa, knobs, lambda *buffers: _Writer(self, knobs, buffers).write())

    def packs(self, index: int) -> bool:
        """A filter that is known is packed."""
        return index == 1 and self.constant

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """A transform for each vector of channels."""
        if not self.packs(index):
            return self.inputs[index].shape
        lanes = int(knobs["lanes"])
        return (ceil_div(self.channels, lanes), self.points + 1, 2 * lanes)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Transform the filter in float64, scaled for the inverse."""
        if not self.packs(index):
            return None
        units, frequencies, width = self.packed_shape(index, isa, knobs)
        spectrum = np.fft.rfft(array.astype(np.float64), 2 * self.points, axis=0) / (4 * self.points)
        spectrum = np.pad(spectrum, ((0, 0), (0, units * width // 2 - self.channels)))
        by_unit = spectrum.reshape(frequencies, units, width // 2).swapaxes(0, 1)
        return np.concatenate([by_unit.real, by_unit.imag], axis=2).astype(np.float32)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Add up lag by lag in float64."""
        return (LongConv().evaluate(*(np.asarray(array, np.float64) for array in arrays[:2])),)


class _Writer:
    """Writes the loop over vectors of channels."""

    def __init__(self, kernel: LongConvKernel, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.lanes = kernel, int(knobs["lanes"])
        self.vec = Vectors(self.lanes)
        self.x, self.filter, self.table, self.y = buffers
        self.half = Transform(self.vec, kernel.points, int(knobs["radix"]), self.table, step=2)

    def write(self) -> None:
        """Share the channels among the threads, and the sequences too where the filter is packed."""
        kernel = self.kernel
        units, rest = ceil_div(kernel.channels, self.lanes), kernel.channels % self.lanes
        split = kernel.batch if kernel.constant else 1
        with parallel_block(units * split, flops=kernel.flops) as unit:
            channels = bind(unit // split)
            work = [points(self.vec, kernel.points) for _ in range(2)]

            def write(live: int | None) -> None:
                if kernel.constant:
                    self._sequence(unit % split, channels, live, work, lambda k: self._packed(channels, k))
                    return
                spectrum = points(self.vec, kernel.points + 1)
                self._transform_filter(channels, live, work, spectrum)
                with serial(0, kernel.batch) as batch:
                    self._sequence(batch, channels, live, work, spectrum.get)

            if not rest:
                write(None)
            elif units == 1:
                write(rest)
            else:
                choose(channels < units - 1, lambda: write(None), lambda: write(rest))

    def _transform_filter(self, channels: Expr, live: int | None, work: list[Points], spectrum: Points) -> None:
        """The filter's transform, scaled for the inverse."""
        result = self.half.write(work, self._steps(self.filter, (), self.kernel.taps, channels, live))
        assert result is not None
        factor = self.vec.splat(1.0 / (8 * self.kernel.points))

        def put(place: Index, mirror: Index, other: Index) -> None:
            even, turned = split_pair(result.get(place), result.get(mirror), self._root(place))
            spectrum.set(place, ((even[0] + turned[0]) * factor, (even[1] + turned[1]) * factor))
            spectrum.set(other, ((even[0] - turned[0]) * factor, (turned[1] - even[1]) * factor))

        for_each_pair(self.kernel.points, put)

    def _sequence(
        self, batch: Expr, channels: Expr, live: int | None, work: list[Points], spectrum: Callable[[Index], Complex]
    ) -> None:
        """Transform one sequence, multiply, and transform back into the output."""
        steps = self.kernel.t
        result = self.half.write(work, self._steps(self.x, (batch,), steps, channels, live))
        assert result is not None

        def change(place: Index, mirror: Index, other: Index) -> None:
            root = self._root(place)
            even, turned = split_pair(result.get(place), result.get(mirror), root)
            here = multiply((bind(even[0] + turned[0]), bind(even[1] + turned[1])), spectrum(place))
            there = (bind(even[0] - turned[0]), bind(even[1] - turned[1]))
            there = multiply(there, conjugate(spectrum(other)))
            sums = bind(here[0] + there[0]), bind(here[1] + there[1])
            apart = bind(here[0] - there[0]), bind(here[1] - there[1])
            first, second = merge_pair(sums, apart, root)
            result.set(place, first)
            result.set(mirror, second)

        for_each_pair(self.kernel.points, change)

        def write(place: Index, first: int, last: int, value: Complex) -> None:
            for part in range(2):
                if 2 * first + part >= steps:
                    continue
                step = bind(place * 2 + part)
                store = partial(self.vec.store, self.y, value[part], batch, step, channels * self.lanes, live=live)
                if 2 * last + part < steps:
                    store()
                else:
                    with branch(step < steps):
                        store()

        other_area = work[0] if result is work[1] else work[1]
        self.half.write([other_area, result], result.read, write, inverse=True)

    def _packed(self, channels: Expr, k: Index) -> Complex:
        load = partial(self.vec.load, self.filter, channels, k)
        return bind(load(0)), bind(load(self.lanes))

    def _root(self, k: Index) -> Complex:
        return bind(self.vec.splat(self.table[k, 0])), bind(self.vec.splat(self.table[k, 1]))

    def _steps(
        self, source: Buffer, before: tuple[Expr, ...], steps: int, channels: Expr, live: int | None
    ) -> Callable[[Index, int, int], Complex | None]:
        """Steps in pairs as complex points, zero beyond the last."""

        def load(place: Index, part: int, last: int) -> Expr:
            step = bind(place * 2 + part)
            if 2 * last + part < steps:
                return bind(self.vec.load(source, *before, step, channels * self.lanes, live=live))
            inside = bind(tirx.min(step, steps - 1))
            value = self.vec.load(source, *before, inside, channels * self.lanes, live=live)
            exists = tirx.Broadcast(step < steps, self.lanes)
            return bind(tirx.Select(exists, value, self.vec.splat(0.0)))

        def read(place: Index, first: int, last: int) -> Complex | None:
            return None if 2 * first >= steps else (load(place, 0, last), load(place, 1, last))

        return read
