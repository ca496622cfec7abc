"""Chains of elementwise and shape operations as one pass over memory, optionally ending in a reduction.

The specification is the chain itself, a small `ir` graph, so its meaning is what the interpreter computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels._nest import NestWriter, find_nest
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import build_function, flat_view, scratch, store
from codegen.kernels.expressions import Source, same_lanes, sources, unravel
from codegen.kernels.vector_math import lanes_of, splat
from ir.graph import Graph, Node
from ir.interpret import evaluate
from ir.op import Op
from ir.ops.elementwise import Binary, Compare, Unary, Where
from ir.ops.indexing import DynamicUpdate, Take
from ir.ops.reduction import Max, Mean, Reduction, Sum
from ir.ops.shape import Reshape
from ir.ops.structure import Constant, Input
from ir.types import TensorType

SERIAL_BELOW: Final = 16 * 1024
"""Elements below which starting threads costs more than it saves."""
FLAT_CHUNK: Final = 4096
"""Elements of a parallel piece where all of memory is one row."""

ACROSS_VECTORS: Final = 4
"""Neighbouring vectors of columns that a reduction walks together: whole runs of memory."""


@dataclass(frozen=True)
class FusedKernel(Kernel):
    """A graph of fusible operations with one output, computed without storing what lies between.

    Operands: the graph's inputs in order; the output. If the output's operation is a reduction, it is the only one.

    Attributes:
        graph: Inputs, single-number constants and operations with a row in `expressions.EXPRESSIONS`.
    """

    graph: Graph

    family: ClassVar[str] = "fused"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Types of the graph's inputs."""
        return tuple(node.types[0] for node in self.graph.inputs.values())

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """Type of the graph's output."""
        return (self.graph.type_of(self.graph.outputs[0][1]),)

    @property
    def root(self) -> Op:
        """Operation that makes the output."""
        return self.graph.node(self.graph.outputs[0][1].node).op

    @property
    def flops(self) -> int:
        """Sum over the chain."""
        return sum(node.op.flops(self.graph.operand_types(node), node.types) for node in self.graph.nodes)

    @property
    def key(self) -> str:
        """Names of the operations and a digest of the whole graph."""
        names = "-".join(node.op.name for node in self.graph.nodes if not isinstance(node.op, Input | Constant))
        text = ";".join(f"{node.op}{node.operands}{node.types}" for node in self.graph.nodes)
        return f"{self.family}({names[:60] or 'copy'},{hashlib.sha256(text.encode()).hexdigest()[:16]})"

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to do."""
        work = max(operand.size for operand in (*self.inputs, *self.outputs))
        return {"parallel": isa.threads > 1 and work >= SERIAL_BELOW}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Threads or none."""
        rule = self.knobs(isa)
        return [rule, {"parallel": not rule["parallel"]}] if isa.threads > 1 else [rule]

    @property
    def is_generic(self) -> bool:
        """Whether the chain is neither flat, nor a reduction, nor rows of a table, nor loops with fixed strides."""
        root = self.graph.node(self.graph.outputs[0][1].node)
        rows = all(
            node.types[0].shape[-1:] == self.graph.operand_types(node)[0].shape[-1:]
            if isinstance(node.op, Reshape)
            else isinstance(node.op, Input | Constant | Take | Unary | Binary)
            for node in self.graph.nodes
        )
        return not (isinstance(root.op, Reduction) or rows or self._is_flat() or find_nest(self.graph))

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the loop nest."""
        return build_function(self, isa, knobs, lambda *buffers: self._write(isa, bool(knobs["parallel"]), buffers))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Interpret the graph in float64."""
        named = dict(zip(self.graph.inputs, arrays, strict=True))
        return (evaluate(self.graph, named, {})[self.graph.outputs[0][0]],)

    def _write(self, isa: Isa, parallel: bool, buffers: tuple[Buffer, ...]) -> None:
        *inputs, output = (flat_view(buffer) for buffer in buffers)
        made = sources(self.graph, dict(zip(self.graph.inputs, inputs, strict=True)))
        root = self.graph.node(self.graph.outputs[0][1].node)
        if isinstance(root.op, Reduction):
            _Reducer(root.op, made[root.operands[0]], isa, parallel, output).write()
        elif self._is_flat():
            _write_flat(made[root.results[0]], isa, parallel, output)
        elif (nest := self._nest_writer(dict(zip(self.graph.inputs, inputs, strict=True)), output, isa)) is not None:
            nest.write(parallel)
        else:
            _write_rows(made[root.results[0]], isa, parallel, output)

    def _nest_writer(self, inputs: dict[str, Buffer], output: Buffer, isa: Isa) -> NestWriter | None:
        nest = find_nest(self.graph)
        writer = NestWriter(self.graph, nest, inputs, output, isa) if nest else None
        return writer if writer and writer.is_worth_it else None

    def _is_flat(self) -> bool:
        """Whether every step keeps row-major order, so that the shape does not matter."""
        size = self.outputs[0].size
        return all(
            isinstance(node.op, Input | Constant)
            or (
                isinstance(node.op, Unary | Binary | Compare | Where | Reshape)
                and all(t.size in (1, size) for t in self.graph.operand_types(node))
            )
            for node in self.graph.nodes
        )


@dataclass(frozen=True)
class UpdateKernel(FusedKernel):
    """A chain that ends in a dynamic update, written over its base: of a cache, only the new rows are touched.

    Operands as those of the chain. The base and the output are the same memory; nothing but the update reads the base.

    Attributes:
        graph: As of `FusedKernel`; the base of its last operation is an input.
    """

    family: ClassVar[str] = "update"

    @classmethod
    def of(cls, kernel: Kernel) -> UpdateKernel | None:
        """Return the kernel in place of one that copies the base, if there can be one."""
        if not isinstance(kernel, FusedKernel) or not isinstance(kernel.root, DynamicUpdate):
            return None
        made = cls(kernel.graph)
        base = kernel.graph.node(made.update.operands[0].node)
        alone = isinstance(base.op, Input) and len(kernel.graph.users(base.results[0])) == 1
        return made if alone else None

    @property
    def update(self) -> Node:
        """The last operation."""
        return self.graph.node(self.graph.outputs[0][1].node)

    @property
    def writes_over(self) -> int:
        """The base."""
        names = list(self.graph.inputs.values())
        return names.index(self.graph.node(self.update.operands[0].node))

    @property
    def bytes_moved(self) -> int:
        """The update, read and written."""
        return 2 * self.graph.operand_types(self.update)[1].size_bytes

    def knobs(self, isa: Isa) -> Knobs:
        """Start threads only where there is enough to write."""
        work = self.graph.operand_types(self.update)[1].size
        return {"parallel": isa.threads > 1 and work >= SERIAL_BELOW}

    def _write(self, isa: Isa, parallel: bool, buffers: tuple[Buffer, ...]) -> None:
        *inputs, output = (flat_view(buffer) for buffer in buffers)
        made = sources(self.graph, dict(zip(self.graph.inputs, inputs, strict=True)))
        op, (base, update, position) = self.root, (made[operand] for operand in self.update.operands)
        assert isinstance(op, DynamicUpdate)
        shape, axis = update.type.shape, op.axis % update.type.rank
        strides = [math.prod(base.type.shape[place + 1 :]) for place in range(base.type.rank)]
        with _loop(math.prod(shape[:-1]), parallel) as row:
            before = unravel(row, shape[:-1])

            def write(first: Any, lanes: int) -> None:
                value = update.at((*before, _positions(first, lanes)))
                starts = [*before, first]
                starts[axis] = starts[axis] + position.flat(0)
                _put(output, value, sum(at * stride for at, stride in zip(starts, strides, strict=True)), lanes)

            _for_each_vector(shape[-1], isa.lanes, write)


def _loop(extent: int, parallel: bool) -> Any:
    return T.parallel(0, extent) if parallel and extent > 1 else T.serial(0, extent)


def _positions(first: Any, lanes: int) -> Any:
    """The position `first`, or the vector of positions from there."""
    return tirx.Ramp(first, 1, lanes) if lanes > 1 else first


def _put(buffer: Buffer, value: Expr, first: Any, lanes: int) -> None:
    store(buffer, splat(value, lanes) if lanes_of(value) < lanes else value, _positions(first, lanes))


def _write_flat(value: Source, isa: Isa, parallel: bool, output: Buffer) -> None:
    size = value.type.size
    chunk = FLAT_CHUNK if size >= FLAT_CHUNK else max(size // isa.lanes, 1) * isa.lanes
    lanes = min(isa.lanes, size)
    whole = size // chunk if lanes == isa.lanes else 0
    if whole:
        with _loop(whole, parallel) as piece, T.serial(0, chunk // lanes) as vector:
            first = piece * chunk + vector * lanes
            _put(output, value.flat(_positions(first, lanes)), first, lanes)
    if size - whole * chunk:
        _for_each_vector(
            size - whole * chunk,
            isa.lanes,
            lambda first, width: _put(
                output, value.flat(_positions(whole * chunk + first, width)), whole * chunk + first, width
            ),
        )


def _write_rows(value: Source, isa: Isa, parallel: bool, output: Buffer) -> None:
    shape = value.type.shape or (1,)
    columns, rows = shape[-1], math.prod(shape[:-1])
    with _loop(rows, parallel) as row:

        def write(first: Any, lanes: int) -> None:
            index = (*unravel(row, shape[:-1]), _positions(first, lanes))
            _put(output, value.at(index[len(shape) - value.type.rank :]), row * columns + first, lanes)

        _for_each_vector(columns, isa.lanes, write)


def _for_each_vector(columns: int, lanes: int, write: Callable[[Any, int], None]) -> None:
    """Call `write(first, lanes)` in a loop over full vectors, then in one over single elements."""
    if columns >= lanes:
        with T.serial(0, columns // lanes) as vector:
            write(vector * lanes, lanes)
    if columns % lanes:
        with T.serial(0, columns % lanes) as rest:
            write(columns // lanes * lanes + rest, 1)


class _Reducer:
    """Writes a reduction of a source."""

    def __init__(self, op: Reduction, value: Source, isa: Isa, parallel: bool, output: Buffer) -> None:
        self.op, self.value, self.isa, self.parallel, self.output = op, value, isa, parallel, output
        shape = value.type.shape
        self.reduced = sorted(axis % len(shape) for axis in op.axes)
        self.kept = [axis for axis in range(len(shape)) if axis not in self.reduced]
        self.count = math.prod(shape[axis] for axis in self.reduced)

    def write(self) -> None:
        """Reduce along the vector where the last axis goes, across it where it stays."""
        if len(self.value.type.shape) - 1 in self.reduced:
            self._along()
        else:
            self._across()

    def _sizes(self, axes: list[int]) -> tuple[int, ...]:
        return tuple(self.value.type.shape[axis] for axis in axes)

    def _element(self, kept: tuple[Any, ...], reduced: tuple[Any, ...]) -> Expr:
        by_axis = dict(zip((*self.kept, *self.reduced), (*kept, *reduced), strict=True))
        return self.value.at(tuple(by_axis[axis] for axis in range(len(by_axis))))

    def _combined(self, a: Expr, b: Expr) -> Expr:
        a, b = same_lanes(a, b)
        return tirx.max(a, b) if isinstance(self.op, Max) else a + b

    def _start(self) -> Expr:
        return tirx.const(float(np.finfo(np.float32).min) if isinstance(self.op, Max) else 0.0, "float32")

    def _finish(self, total: Expr) -> Expr:
        assert isinstance(self.op, Sum | Mean | Max)
        return total * splat(1.0 / self.count, lanes_of(total)) if isinstance(self.op, Mean) else total

    def _along(self) -> None:
        lanes, outer = self.isa.lanes, self._sizes(self.reduced[:-1])
        columns = self.value.type.shape[-1]
        with _loop(math.prod(self._sizes(self.kept)), self.parallel) as row:
            kept = unravel(row, self._sizes(self.kept))
            sums, total = scratch((lanes,)), scratch((1,))
            _put(sums, self._start(), 0, lanes)
            _put(total, self._start(), 0, 1)
            with T.serial(0, math.prod(outer)) as step:
                before = unravel(step, outer)

                def write(first: Any, width: int) -> None:
                    element = self._element(kept, (*before, _positions(first, width)))
                    target = sums if width > 1 else total
                    _put(target, self._combined(target[_positions(0, width)], element), 0, width)

                _for_each_vector(columns, lanes, write)
            if columns >= lanes:
                with T.serial(0, lanes) as lane:
                    store(total, self._combined(total[0], sums[lane]), 0)
            store(self.output, self._finish(total[0]), row)

    def _across(self) -> None:
        kept_sizes = self._sizes(self.kept)
        columns, lanes = kept_sizes[-1], self.isa.lanes
        wide = min(columns // lanes, ACROSS_VECTORS) * lanes
        blocks = columns // wide if wide else 0
        if blocks:
            with _loop(math.prod(kept_sizes[:-1]) * blocks, self.parallel) as unit:
                row, block = (unit // blocks, unit % blocks) if blocks > 1 else (unit, 0)
                self._column_sums(unravel(row, kept_sizes[:-1]), row * columns, block * wide, lanes, wide // lanes)
        if columns - blocks * wide:
            with _loop(math.prod(kept_sizes[:-1]), self.parallel and not blocks) as row:
                before = unravel(row, kept_sizes[:-1])

                def write(first: Any, width: int) -> None:
                    self._column_sums(before, row * columns, blocks * wide + first, width, 1)

                _for_each_vector(columns - blocks * wide, lanes, write)

    def _column_sums(self, before: tuple[Any, ...], base: Any, first: Any, width: int, vectors: int) -> None:
        """Reduce neighbouring vectors of columns together."""
        sums = [scratch((width,)) for _ in range(vectors)]
        for total in sums:
            _put(total, self._start(), 0, width)
        with T.serial(0, self.count) as step:
            reduced = unravel(step, self._sizes(self.reduced))
            for number, total in enumerate(sums):
                element = self._element((*before, _positions(first + number * width, width)), reduced)
                _put(total, self._combined(total[_positions(0, width)], element), 0, width)
        for number, total in enumerate(sums):
            _put(self.output, self._finish(total[_positions(0, width)]), base + first + number * width, width)
