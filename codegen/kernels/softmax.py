"""Softmax along an axis that is not the last: inner axes along the lanes, so nothing is transposed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.kernels import vector_math as vm
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Vectors,
    build_function,
    ceil_div,
    choose,
    column_vectors,
    flat_view,
    parallel_block,
    serial,
)
from ir.types import TensorType

SERIAL_BELOW: Final = 16 * 1024
"""Elements below which starting threads costs more than it saves."""
MOST_VECTORS: Final = 4
"""Vectors of inner positions walked together: whole runs of memory, and powers that do not wait for each other."""


@dataclass(frozen=True)
class SoftmaxKernel(Kernel):
    """`y_t = exp(x_t) / sum_s exp(x_s)` along the middle axis of `[outer, steps, inner]`.

    Operands: x; y.

    Attributes:
        outer: Product of the axes before.
        steps: Length of the axis.
        inner: Product of the axes after.
    """

    outer: int
    steps: int
    inner: int

    family: ClassVar[str] = "softmax"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """The scores."""
        return (TensorType((self.outer, self.steps, self.inner)),)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The shares."""
        return self.inputs

    @property
    def flops(self) -> int:
        """As `NormKernel` counts them: maximum, difference, power, sum, product."""
        return 5 * self.outputs[0].size

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to do."""
        vectors = min(MOST_VECTORS, ceil_div(self.inner, isa.lanes))
        return {"vectors": vectors, "parallel": isa.threads > 1 and self.outputs[0].size >= SERIAL_BELOW}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Fewer vectors at a time."""
        rule = self.knobs(isa)
        return [rule, *({**rule, "vectors": vectors} for vectors in range(1, int(rule["vectors"])))]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write three passes over the axis for each block of inner positions."""
        return build_function(self, isa, knobs, lambda *buffers: self._write(isa, knobs, buffers))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Compute in float64."""
        x = np.asarray(arrays[0], np.float64)
        powers = np.exp(x - x.max(1, keepdims=True))
        return (powers / powers.sum(1, keepdims=True),)

    @staticmethod
    def along(shape: tuple[int, ...], axis: int) -> SoftmaxKernel:
        """The kernel for an axis of a shape."""
        axis %= len(shape)
        return SoftmaxKernel(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    def _write(self, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        x, y = (flat_view(buffer) for buffer in buffers)
        vec, width = Vectors(isa.lanes), int(knobs["vectors"]) * isa.lanes
        blocks, rest = ceil_div(self.inner, width), self.inner % width

        def write(first: Index, columns: int) -> None:
            self._block(vec, x, y, first, column_vectors(columns, isa.lanes))

        with parallel_block(self.outer * blocks) if knobs["parallel"] else serial(0, self.outer * blocks) as unit:
            first = unit // blocks * (self.steps * self.inner) + unit % blocks * width
            if not rest or blocks == 1:
                write(first, rest or width)
            else:
                choose(unit % blocks < blocks - 1, lambda: write(first, width), lambda: write(first, rest))

    def _block(self, vec: Vectors, x: Buffer, y: Buffer, first: Index, live: list[int | None]) -> None:
        """Write a block of neighbouring inner positions."""
        peaks = [vec.register(float(np.finfo(np.float32).min)) for _ in live]
        sums = [vec.register(0.0) for _ in live]

        def each(body: Callable[[int, Index, int | None], None]) -> None:
            with serial(0, self.steps) as step:
                for v, count in enumerate(live):
                    body(v, first + step * self.inner + v * vec.lanes, count)

        def highest(v: int, place: Index, count: int | None) -> None:
            peaks[v].set(tirx.max(peaks[v].get(), vec.load(x, place, live=count)))

        def power(v: int, place: Index, count: int | None) -> None:
            value = vm.keep(vm.exp(vec.load(x, place, live=count) - peaks[v].get()))
            sums[v].set(sums[v].get() + value)
            vec.store(y, value, place, live=count)

        def share(v: int, place: Index, count: int | None) -> None:
            vec.store(y, vec.load(y, place, live=count) * sums[v].get(), place, live=count)

        each(highest)
        each(power)
        one: Expr = vec.splat(1.0)
        for register in sums:
            register.set(one / register.get())
        each(share)
