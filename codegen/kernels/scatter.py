"""Adding rows at positions that are data: every column by itself, updates in their order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import (
    Index,
    Split,
    Vectors,
    bind,
    build_function,
    ceil_div,
    flat_view,
    parallel_block,
    serial,
    store,
)
from codegen.kernels.expressions import linear, unravel
from ir.ops.indexing import ScatterAdd
from ir.types import TensorType

WIDEST: Final = 8  # vectors of a unit, for each of which a position is read once


@dataclass(frozen=True)
class ScatterAddKernel(Kernel):
    """A copy of the base with updates added at indices along one axis.

    Operands: base, indices, updates; the sum.

    Attributes:
        base: Shape of the base.
        indices: Shape of the indices; axes of size one beside the axis serve every position.
        updates: Shape of the updates.
        axis: The axis, counted from the front.
    """

    base: tuple[int, ...]
    indices: tuple[int, ...]
    updates: tuple[int, ...]
    axis: int

    family: ClassVar[str] = "scatter_add"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Base, indices, updates."""
        return TensorType(self.base), TensorType(self.indices, "int32"), TensorType(self.updates)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The sum."""
        return (TensorType(self.base),)

    @property
    def flops(self) -> int:
        """An addition for each update."""
        return math.prod(self.updates)

    def knobs(self, isa: Isa) -> Knobs:
        """Give each unit as many columns as it can hold."""
        return {"vectors": min(WIDEST, ceil_div(self._inner, isa.lanes))}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Wide units read positions less often, narrow ones spread over the threads."""
        rule = self.knobs(isa)
        return [rule, *({"vectors": vectors} for vectors in (1, 2, 4) if vectors < int(rule["vectors"]))]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write one loop over the updates for each part of the columns."""

        def write(*buffers: Buffer) -> None:
            flat = [flat_view(buffer) for buffer in buffers]
            if self._shares_indices:
                self._write_rows(Vectors(isa.lanes), int(knobs["vectors"]), flat)
            else:
                self._write_elements(flat)

        return build_function(self, isa, knobs, write)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Add one update after the other in float64."""
        base, indices, updates = arrays
        return (ScatterAdd(self.axis).evaluate(base.astype(np.float64), indices, updates.astype(np.float64)),)

    @property
    def _inner(self) -> int:
        return math.prod(self.base[self.axis + 1 :])

    @property
    def _shares_indices(self) -> bool:
        """Whether one index serves all columns, so that columns can be vectors."""
        return math.prod(self.indices[self.axis + 1 :]) == 1

    def _target(self, indices: Buffer, before: Expr, step: Expr, inside: Index) -> Expr:
        """Position along the axis that an update is for."""
        outer = unravel(before, self.base[: self.axis])
        inner = unravel(inside, self.base[self.axis + 1 :])
        return bind(indices[linear((*outer, step, *inner), self.indices)])

    def _write_rows(self, vec: Vectors, widest: int, flat: list[Buffer]) -> None:
        base, indices, updates, out = flat
        rows, count, inner = self.base[self.axis], self.updates[self.axis], self._inner
        parts = Split(ceil_div(inner, vec.lanes), widest)
        work = math.prod(self.base) + 2 * self.flops
        with parallel_block(math.prod(self.base[: self.axis]) * parts.count, flops=work) as unit:
            before = bind(unit // parts.count)

            def write(first: Index, vectors: int) -> None:
                columns = [(first + v) * vec.lanes for v in range(vectors)]
                short = inner % vec.lanes
                lives = [None] * (vectors - 1) + [inner - columns[-1] if short else None]
                with serial(0, rows) as row:
                    place = (before * rows + row) * inner
                    for column, live in zip(columns, lives, strict=True):
                        vec.store(out, vec.load(base, place + column, live=live), place + column, live=live)
                with serial(0, count) as step:
                    source = (before * count + step) * inner
                    place = bind((before * rows + self._target(indices, before, step, 0)) * inner)
                    for column, live in zip(columns, lives, strict=True):
                        value = vec.load(updates, source + column, live=live)
                        vec.store(out, vec.load(out, place + column, live=live) + value, place + column, live=live)

            parts.for_each(unit % parts.count, write)

    def _write_elements(self, flat: list[Buffer]) -> None:
        base, indices, updates, out = flat
        rows, count, inner = self.base[self.axis], self.updates[self.axis], self._inner
        work = math.prod(self.base) + 2 * self.flops
        with parallel_block(math.prod(self.base[: self.axis]), flops=work) as before:
            with serial(0, rows * inner) as element:
                place = before * (rows * inner) + element
                store(out, base[place], place)
            with serial(0, count) as step, serial(0, inner) as column:
                target = self._target(indices, before, step, column)
                place = bind((before * rows + target) * inner + column)
                store(out, out[place] + updates[(before * count + step) * inner + column], place)
