"""Convolution and pooling over 1 to 3 spatial axes, channels last: channels along the lanes, taps in a loop.

Each output position adds up the taps that fall inside the input, so padding is never stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Register,
    Vectors,
    branch,
    build_function,
    column_vectors,
    flat_view,
    parallel_block,
    serial,
)
from codegen.kernels.expressions import unravel
from ir.ops.convolution import Conv, Pool
from ir.types import TensorType

SERIAL_BELOW: Final = 32 * 1024
"""Multiply-adds below which starting threads costs more than it saves."""


@dataclass(frozen=True)
class WindowKernel(Kernel):
    """An `ir` convolution or pooling on `[B, *S, C]`.

    Operands: x, then the weights `[*W, C / groups, O]` of a convolution; the output.

    Attributes:
        x: Type of the input.
        weight: Type of the weights; None for pooling.
        op: The operation.
    """

    x: TensorType
    weight: TensorType | None
    op: Conv | Pool

    family: ClassVar[str] = "window"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Input and weights."""
        return (self.x,) if self.weight is None else (self.x, self.weight)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """What the operation gives."""
        return self.op.infer_types(self.inputs)

    @property
    def flops(self) -> int:
        """Counted by the operation."""
        return self.op.flops(self.inputs, self.outputs)

    @property
    def window(self) -> tuple[int, ...]:
        """Taps along each spatial axis."""
        return self.op.window if isinstance(self.op, Pool) else self.inputs[1].shape[:-2]

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to do."""
        return {"parallel": isa.threads > 1 and self.flops >= SERIAL_BELOW}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Threads or none."""
        rule = self.knobs(isa)
        return [rule, {"parallel": not rule["parallel"]}] if isa.threads > 1 else [rule]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the loop nest."""
        return build_function(
            self, isa, knobs, lambda *buffers: _Writer(self, isa, buffers).write(bool(knobs["parallel"]))
        )

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Interpret the operation in float64."""
        return self.op.evaluate_all(tuple(np.asarray(array, np.float64) for array in arrays))


class _Writer:
    """Writes one window operation; holds what every part of the loop nest needs."""

    def __init__(self, kernel: WindowKernel, isa: Isa, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.op = kernel, Vectors(isa.lanes), kernel.op
        flat = [flat_view(buffer) for buffer in buffers]
        self.x, self.y = flat[0], flat[-1]
        self.weight = flat[1] if kernel.weight is not None else None
        self.sizes, self.channels = kernel.x.shape[1:-1], kernel.x.shape[-1]
        self.out_shape = kernel.outputs[0].shape
        self.dilation = self.op.dilation if isinstance(self.op, Conv) else (1,) * len(self.sizes)
        self.groups = self.op.groups if isinstance(self.op, Conv) else self.channels
        self.outputs = self.out_shape[-1]

    def write(self, parallel: bool) -> None:
        """Loop over output positions; each writes all its channels."""
        rows = math.prod(self.out_shape[:-1])
        with parallel_block(rows) if parallel else serial(0, rows) as row:
            batch, *place = unravel(row, self.out_shape[:-1])
            for group in range(1 if self._is_depthwise() else self.groups):
                self._channels(row, batch, place, group)

    def _is_depthwise(self) -> bool:
        return self.groups == self.channels and self.outputs == self.channels

    def _channels(self, row: Expr, batch: Index, place: list[Index], group: int) -> None:
        width = self.outputs if self._is_depthwise() else self.outputs // self.groups
        columns = column_vectors(width, self.vec.lanes)
        full, base = columns.count(None), group * width
        if full:
            with serial(0, full) as vector:
                self._vector(row, batch, place, group, base + vector * self.vec.lanes, None)
        if columns[-1] is not None:
            self._vector(row, batch, place, group, base + full * self.vec.lanes, columns[-1])

    def _vector(self, row: Expr, batch: Index, place: list[Index], group: int, column: Index, live: int | None) -> None:
        pool = self.op if isinstance(self.op, Pool) else None
        largest = pool is not None and pool.kind == "max"
        total = self.vec.register(float(np.finfo(np.float32).min) if largest else 0.0)
        counted = self.vec.register(0.0) if pool and not largest and not pool.count_padding else None

        def tap(position: Index, number: int) -> None:
            if self._is_depthwise():
                self._depthwise_tap(total, position, number, column, live)
            else:
                self._dense_tap(total, position, number, group, column, live)
            if counted is not None:
                counted.set(counted.get() + self.vec.splat(1.0))

        self._taps(batch, place, tap)
        value = total.get()
        if counted is not None:
            value = value / counted.get()
        elif pool and not largest:
            value = value * self.vec.splat(1.0 / math.prod(self.kernel.window))
        self.vec.store(self.y, value, row * self.outputs + column, live=live)

    def _taps(self, batch: Index, place: list[Index], body: Callable[[Index, int], None]) -> None:
        """Run `body(row of x, number of the tap)` for each tap that lies inside the input."""
        for number, tap in enumerate(itertools.product(*map(range, self.kernel.window))):
            inside: list[Any] = []
            position: Any = batch
            for axis, step in enumerate(tap):
                low, high = self.op.padding[axis]
                local = place[axis] * self.op.strides[axis] + (step * self.dilation[axis] - low)
                inside += [local >= 0] if low and not isinstance(local, int) else []
                inside += [local < self.sizes[axis]] if high and not isinstance(local, int) else []
                if isinstance(local, int) and not 0 <= local < self.sizes[axis]:
                    break
                position = position * self.sizes[axis] + local
            else:
                if inside:
                    with branch(inside[0] if len(inside) == 1 else tirx.all(*inside)):
                        body(position, number)
                else:
                    body(position, number)

    def _depthwise_tap(self, total: Register, position: Index, number: int, column: Index, live: int | None) -> None:
        value = self.vec.load(self.x, position * self.channels + column, live=live)
        if self.weight is not None:
            value = value * self.vec.load(self.weight, column + number * self.channels, live=live)
        largest = isinstance(self.op, Pool) and self.op.kind == "max"
        total.set(tirx.max(total.get(), value) if largest else total.get() + value)

    def _dense_tap(
        self, total: Register, position: Index, number: int, group: int, column: Index, live: int | None
    ) -> None:
        assert self.weight is not None
        per_group = self.channels // self.groups
        with serial(0, per_group) as channel:
            value = self.vec.splat(self.x[position * self.channels + group * per_group + channel])
            weights = self.vec.load(self.weight, (number * per_group + channel) * self.outputs + column, live=live)
            total.set(total.get() + value * weights)
