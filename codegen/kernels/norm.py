"""Layer norm, root-mean-square norm and softmax over rows, with the residual addition before them in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.kernels import vector_math as vm
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.bfloat16 import Bfloat16, store_vector
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    bind,
    build_function,
    column_vectors,
    parallel_block,
    scratch,
    serial,
)
from ir.types import TensorType

SERIAL_BELOW: Final = 16 * 1024
"""Elements below which starting threads costs more than it saves."""
ACCUMULATORS: Final = 4
"""Independent running sums, to hide the latency of addition."""


Term = Callable[[Expr, Index], Expr]
Combine = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class NormKernel(Kernel):
    """`y = norm(x [+ residual]) [* scale] [+ bias] [* gate(z)]` for every row of `[rows, width]`.

    Operands: x, residual if any, scale if any, bias if any, z `[rows, width]` if there is a gate; y, then the sum
    `x + residual` if there is a residual. x and z may each be a window of a wider buffer, whose rows hold `heads` rows.

    Attributes:
        rows: Rows.
        width: Elements of a row.
        kind: What is done to a row.
        epsilon: Added to the variance or mean square; unused by softmax.
        residual: Whether a second tensor is added first; the sum is written too.
        scale: Whether the result is multiplied by a vector.
        bias: Whether a vector is added.
        gate: Activation of the gate z, by which the result is multiplied; none if there is no gate.
        heads: Rows that lie side by side in a row of a wider buffer.
        x_view: Buffer that holds x, where there is no residual.
        gate_view: Buffer that holds z.
        out_dtype: How the normalised rows are stored; the sum stays float32.
    """

    rows: int
    width: int
    kind: Literal["layer_norm", "rms_norm", "softmax"]
    epsilon: float = 0.0
    residual: bool = False
    scale: bool = False
    bias: bool = False
    gate: str | None = None
    heads: int = 1
    x_view: View | None = None
    gate_view: View | None = None
    out_dtype: str = "float32"

    family: ClassVar[str] = "norm"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands x, residual, scale, bias, z."""
        full, row = TensorType((self.rows, self.width)), TensorType((self.width,))
        gate = [self._buffer(self.gate_view)] if self.gate else []
        return (self._buffer(self.x_view), *[full] * self.residual, *[row] * self.scale, *[row] * self.bias, *gate)

    def _buffer(self, view: View | None) -> TensorType:
        return TensorType((self.rows // self.heads, view.width) if view else (self.rows, self.width))

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The normalised rows, and the sum if there is a residual."""
        shape = (self.rows, self.width)
        return (TensorType(shape, self.out_dtype), *[TensorType(shape)] * self.residual)

    @property
    def flops(self) -> int:
        """Arithmetic of the passes over each element."""
        base = {"layer_norm": 7, "rms_norm": 4, "softmax": 5}[self.kind]
        return self.rows * self.width * (base + self.residual + self.scale + self.bias + 2 * (self.gate is not None))

    def can_round(self, index: int) -> bool:
        """The normalised rows, not the sum, may be rounded."""
        return index == 0

    def in_bfloat16(self, inputs: frozenset[int], outputs: frozenset[int]) -> NormKernel:
        """Return the norm whose rows are stored as bfloat16."""
        del inputs
        return replace(self, out_dtype="bfloat16") if 0 in outputs else self

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to do, each on a run of rows."""
        parallel = isa.threads > 1 and self.rows * self.width >= SERIAL_BELOW
        return {"pieces": min(self.rows, isa.threads * 4 if parallel else 1)}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """One piece, or some for each thread."""
        space = [self.knobs(isa)]
        for pieces in (1, isa.threads, isa.threads * 4):
            candidate: Knobs = {"pieces": min(self.rows, pieces)}
            if candidate not in space:
                space.append(candidate)
        return space

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the passes over each row."""
        return build_function(
            self, isa, knobs, lambda *buffers: _Writer(self, isa, buffers).write(int(knobs["pieces"]))
        )

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Compute in float64."""
        x, *rest = (np.asarray(array, np.float64) for array in arrays)
        x = self._rows(x, self.x_view)
        total = x + rest.pop(0) if self.residual else x
        if self.kind == "softmax":
            powers = np.exp(total - total.max(-1, keepdims=True))
            y = powers / powers.sum(-1, keepdims=True)
        else:
            centred = total - total.mean(-1, keepdims=True) if self.kind == "layer_norm" else total
            y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        y = y * rest.pop(0) if self.scale else y
        y = y + rest.pop(0) if self.bias else y
        y = y * vm.ACTIVATION_REFERENCES[self.gate](self._rows(rest.pop(0), self.gate_view)) if self.gate else y
        return (y, total) if self.residual else (y,)

    def _rows(self, array: Array, view: View | None) -> Array:
        window = array[:, view.offset : view.offset + self.heads * self.width] if view else array
        return window.reshape(self.rows, self.width)


class _Writer:
    """Writes one norm; holds what every pass needs."""

    def __init__(self, kernel: NormKernel, isa: Isa, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.bf16 = kernel, Vectors(isa.lanes), Bfloat16(isa)
        pending = list(buffers)
        self.x = pending.pop(0)
        self.residual = pending.pop(0) if kernel.residual else None
        self.scale = pending.pop(0) if kernel.scale else None
        self.bias = pending.pop(0) if kernel.bias else None
        self.gate = pending.pop(0) if kernel.gate else None
        self.y = pending.pop(0)
        self.total = pending.pop(0) if kernel.residual else self.x
        self.columns = column_vectors(kernel.width, isa.lanes)

    def write(self, pieces: int) -> None:
        """Share the rows out in runs."""
        if self.kernel.out_dtype == "bfloat16":
            with self.bf16.instructions():
                self._write(pieces)
        else:
            self._write(pieces)

    def _write(self, pieces: int) -> None:
        split = Split(self.kernel.rows, -(-self.kernel.rows // pieces))
        with parallel_block(split.count) as piece:
            longer = (piece < split.longer).astype("int32") if split.longer else 0
            first = split.start(piece)
            with serial(first, first + split.small + longer) as row:
                self._row(row)

    def _row(self, row: Expr) -> None:
        if self.residual is not None:
            residual = self.residual
            self._each(lambda column, live: self._add(residual, row, column, live))
        if self.kernel.kind == "softmax":
            self._softmax(row)
        else:
            self._norm(row)

    def _x(self, row: Expr, column: Index, live: int | None) -> Expr:
        """Load a vector of what is normalised."""
        return self._load(self.total, self.kernel.x_view, row, column, live)

    def _load(self, buffer: Buffer, view: View | None, row: Expr, column: Index, live: int | None) -> Expr:
        if view is None:
            return self.vec.load(buffer, row, column, live=live)
        heads, width = self.kernel.heads, self.kernel.width
        start = view.offset + row % heads * width if heads > 1 else view.offset
        return self.vec.load(buffer, row // heads if heads > 1 else row, start + column, live=live)

    def _add(self, residual: Buffer, row: Expr, column: Index, live: int | None) -> None:
        value = self.vec.load(self.x, row, column, live=live) + self.vec.load(residual, row, column, live=live)
        self.vec.store(self.total, value, row, column, live=live)

    def _each(self, body: Callable[[Index, int | None], None]) -> None:
        """Call `body(column, live)` over the vectors of a row: a loop over full ones, then the rest."""
        full = self.columns.count(None)
        if full:
            with serial(0, full) as vector:
                body(vector * self.vec.lanes, None)
        if self.columns[-1] is not None:
            body(full * self.vec.lanes, self.columns[-1])

    def _reduce(self, row: Expr, start: float, term: Term, combine: Combine) -> Expr:
        """Combine `term(vector)` over a row; lanes beyond the row never count."""
        full = self.columns.count(None)
        accumulators = [self.vec.register(start) for _ in range(min(ACCUMULATORS, max(full, 1)))]
        count = len(accumulators)
        if full // count:
            with serial(0, full // count) as step:
                for i, register in enumerate(accumulators):
                    self._accumulate(register, row, (step * count + i) * self.vec.lanes, None, start, term, combine)
        for vector in range(full // count * count, full):
            self._accumulate(accumulators[0], row, vector * self.vec.lanes, None, start, term, combine)
        if self.columns[-1] is not None:
            self._accumulate(accumulators[-1], row, full * self.vec.lanes, self.columns[-1], start, term, combine)
        total = accumulators[0].get()
        for register in accumulators[1:]:
            total = combine(total, register.get())
        return self.vec.reduce(total, combine)

    def _accumulate(
        self, register: Register, row: Expr, column: Index, live: int | None, start: float, term: Term, combine: Combine
    ) -> None:
        value = term(self._x(row, column, live), column)
        if live is not None:
            inside = self.vec.lane_numbers(0) < vm.splat_int(live, self.vec.lanes)
            value = tirx.Select(inside, value, self.vec.splat(start))
        register.set(combine(register.get(), value))

    def _norm(self, row: Expr) -> None:
        width = float(self.kernel.width)
        mean: Expr | None = None
        if self.kernel.kind == "layer_norm":
            mean = bind(self._reduce(row, 0.0, lambda x, _: x, _add) / tirx.const(width, "float32"))

        def centred(x: Expr) -> Expr:
            return x if mean is None else x - self.vec.splat(mean)

        def squared(x: Expr, _: Index) -> Expr:
            return vm.let(centred(x), lambda c: c * c)

        square = self._reduce(row, 0.0, squared, _add) / tirx.const(width, "float32")
        factor = bind(tirx.const(1.0, "float32") / tirx.sqrt(square + tirx.const(self.kernel.epsilon, "float32")))

        def finish(column: Index, live: int | None) -> None:
            value = centred(self._x(row, column, live)) * self.vec.splat(factor)
            self._store(self._affine(value, row, column, live), row, column, live)

        self._each(finish)

    def _softmax(self, row: Expr) -> None:
        peak = bind(self._reduce(row, float(np.finfo(np.float32).min), lambda x, _: x, tirx.max))
        powers = scratch((len(self.columns) * self.vec.lanes,))

        def power(x: Expr, column: Index) -> Expr:
            value = bind(vm.exp(x - self.vec.splat(peak)))
            self.vec.store(powers, value, column)
            return value

        factor = bind(tirx.const(1.0, "float32") / self._reduce(row, 0.0, power, _add))

        def finish(column: Index, live: int | None) -> None:
            value = self.vec.load(powers, column) * self.vec.splat(factor)
            self._store(self._affine(value, row, column, live), row, column, live)

        self._each(finish)

    def _store(self, value: Expr, row: Expr, column: Index, live: int | None) -> None:
        if self.kernel.out_dtype == "bfloat16":
            store_vector(self.y, self.bf16.round(value), self.vec.lanes, row, column, live=live)
        else:
            self.vec.store(self.y, value, row, column, live=live)

    def _affine(self, value: Expr, row: Expr, column: Index, live: int | None) -> Expr:
        if self.scale is not None:
            value = value * self.vec.load(self.scale, column, live=live)
        if self.bias is not None:
            value = value + self.vec.load(self.bias, column, live=live)
        if self.gate is None or self.kernel.gate is None:
            return value
        z = bind(self._load(self.gate, self.kernel.gate_view, row, column, live))
        return value * vm.ACTIVATIONS[self.kernel.gate](z)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b
