"""Elementwise recurrences along one axis: running sums and s_t = a_t * s_{t-1} + b_t, inner axes along the lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Vectors,
    build_function,
    ceil_div,
    choose,
    flat_view,
    parallel_block,
    serial,
)
from ir.ops.recurrence import LinearScan
from ir.ops.reduction import Cumsum
from ir.types import TensorType

SERIAL_BELOW: Final = 16 * 1024
"""Elements below which starting threads costs more than it saves."""


@dataclass(frozen=True)
class ScanKernel(Kernel):
    """`s_t = s_{t-1} + b_t`, or `a_t * s_{t-1} + b_t` if `decay`, along the middle axis of `[outer, steps, inner]`.

    Operands: a if `decay`, b; every s_t.

    Attributes:
        outer: Product of the axes before.
        steps: Length of the axis.
        inner: Product of the axes after.
        decay: Whether there are factors.
    """

    outer: int
    steps: int
    inner: int
    decay: bool = False

    family: ClassVar[str] = "scan"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Factors if any, and updates."""
        return (TensorType((self.outer, self.steps, self.inner)),) * (1 + self.decay)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """States."""
        return (TensorType((self.outer, self.steps, self.inner)),)

    @property
    def flops(self) -> int:
        """An addition, and a product if there are factors."""
        return self.outputs[0].size * (1 + self.decay)

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to do."""
        return {"parallel": isa.threads > 1 and self.outputs[0].size >= SERIAL_BELOW}

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write one sequential loop for each vector of inner positions."""
        return build_function(self, isa, knobs, lambda *buffers: self._write(isa, bool(knobs["parallel"]), buffers))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Step in float64."""
        operands = tuple(np.asarray(array, np.float64) for array in arrays)
        op = LinearScan() if self.decay else Cumsum(axis=1)
        return op.evaluate_all(operands)

    def _write(self, isa: Isa, parallel: bool, buffers: tuple[Buffer, ...]) -> None:
        *inputs, states = (flat_view(buffer) for buffer in buffers)
        vec = Vectors(isa.lanes)
        vectors, rest = ceil_div(self.inner, isa.lanes), self.inner % isa.lanes
        with parallel_block(self.outer * vectors) if parallel else serial(0, self.outer * vectors) as unit:
            column = unit % vectors * isa.lanes
            base = unit // vectors * (self.steps * self.inner) + column

            def write(live: int | None) -> None:
                state = vec.register(0.0)
                with serial(0, self.steps) as step:
                    place = base + step * self.inner
                    state.set(self._next(vec, inputs, state.get(), place, live))
                    vec.store(states, state.get(), place, live=live)

            if not rest or vectors == 1:
                write(rest or None)
            else:
                choose(unit % vectors < vectors - 1, lambda: write(None), lambda: write(rest))

    def _next(self, vec: Vectors, inputs: list[Buffer], state: Expr, place: Index, live: int | None) -> Expr:
        update = vec.load(inputs[-1], place, live=live)
        return vec.load(inputs[0], place, live=live) * state + update if self.decay else state + update

    @staticmethod
    def along(shape: tuple[int, ...], axis: int, *, decay: bool) -> ScanKernel:
        """The kernel for an axis of a shape."""
        axis %= len(shape)
        return ScanKernel(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), decay)
