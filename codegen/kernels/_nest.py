"""Chains that only move and combine numbers, as one nest of loops in which every read has fixed strides.

Which element of an input a chain reads for each output is computed, not derived: the moves run on arrays of positions.
Where the positions turn out to be strides over loops, the loops are as long as they can be, whatever reshapes and
transposes stood between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from codegen._tvm import Buffer, Expr, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import Isa
from codegen.kernels.emit import Index, Vectors, bind, ceil_div, choose, scratch, serial
from codegen.kernels.expressions import EXPRESSIONS, Source, number_source, unravel
from codegen.kernels.vector_math import lanes_of
from ir.graph import Graph, Value
from ir.ops import elementwise as ew
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input
from ir.types import TensorType

MOVES: Final = (sh.Reshape, sh.Transpose, sh.Slice, sh.Broadcast)
COMBINATIONS: Final = (ew.Unary, ew.Binary, ew.Compare, ew.Where, ew.Cast)
MOST_ELEMENTS: Final = 1 << 22
"""Outputs up to which positions are computed."""
MOST_READS: Final = 6
MOST_LOOPS: Final = 8
SHORTEST_ROW: Final = 4
"""Elements of an innermost loop that are worth a vector."""
SHARED_STEPS: Final = 16
"""Steps of the loop that threads share, if there are so many."""

Read = tuple[str, np.ndarray]


@dataclass(frozen=True)
class Nest:
    """Loops over an output in row-major order, and what they read.

    Attributes:
        shape: Lengths of the loops.
        names: Input of each read, in the order in which the chain's expression meets them.
        starts: Its first element.
        strides: For each read, the elements between two steps of each loop.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    starts: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def find_nest(graph: Graph) -> Nest | None:
    """Find the loops of a chain; None where a read has no fixed strides, or more is done than to move and combine.

    A chain without reshapes and transposes needs no search: its loops are the axes of its output.
    """
    root = graph.outputs[0][1]
    if not any(isinstance(node.op, sh.Reshape | sh.Transpose) for node in graph.nodes):
        return None
    kinds = [*(node.types[0] for node in graph.inputs.values()), graph.type_of(root)]
    if any(kind.dtype != "float32" for kind in kinds) or not 1 < graph.type_of(root).size <= MOST_ELEMENTS:
        return None
    reads = _reads(graph, root)
    if reads is None:
        return None
    maps = [(name, np.broadcast_to(positions, graph.type_of(root).shape).ravel()) for name, positions in reads]
    below = {1}  # elements of the output below each loop
    for _, positions in maps:
        found = _periods(positions)
        if found is None:
            return None
        below |= found
    sizes = sorted(below | {graph.type_of(root).size})
    if len(sizes) - 1 > MOST_LOOPS or any(large % small for small, large in itertools.pairwise(sizes)):
        return None
    shape = tuple(large // small for small, large in itertools.pairwise(sizes))[::-1]
    strides = tuple(tuple(int(p[step] - p[0]) for step in sizes[:-1])[::-1] for _, p in maps)
    return Nest(shape, tuple(name for name, _ in maps), tuple(int(p[0]) for _, p in maps), strides)


def _reads(graph: Graph, root: Value) -> list[Read] | None:
    """Positions that each read of the root's expression takes, shaped like the root."""
    made: dict[Value, list[Read]] = {}
    for node in graph.nodes:
        shape = node.types[0].shape
        reads = [read for operand in node.operands for read in made[operand]]
        if isinstance(node.op, Input):
            reads = [(node.op.label, np.arange(node.types[0].size).reshape(shape))]
        elif isinstance(node.op, MOVES):
            reads = [(name, np.asarray(node.op.evaluate(positions))) for name, positions in reads]
        elif isinstance(node.op, COMBINATIONS):
            reads = [(name, np.broadcast_to(positions, shape)) for name, positions in reads]
        elif not isinstance(node.op, Constant):
            return None
        if len(reads) > MOST_READS:
            return None
        made[node.results[0]] = reads
    return made[root]


def _periods(positions: np.ndarray) -> set[int] | None:
    """Lengths of the nested runs in which positions go by one step, outermost left away; None where there are none."""
    found, period = set[int](), 1
    while positions.size > 1:
        steps = np.diff(positions)
        breaks = np.flatnonzero(steps != steps[0]) + 1
        run = int(np.gcd.reduce(np.append(breaks, positions.size)))
        if run == 1:
            return None
        period *= run
        found.add(period)
        positions = positions[::run]
    return found


class NestWriter:
    """Writes the nest of a chain, a vector of the innermost loop at a time.

    A read whose innermost stride is not 0 or 1 goes through squares that are turned in registers.
    """

    def __init__(self, graph: Graph, nest: Nest, buffers: Mapping[str, Buffer], output: Buffer, isa: Isa) -> None:
        self.graph, self.nest, self.output, self.vec = graph, nest, output, Vectors(isa.lanes)
        self.buffers = [buffers[name] for name in nest.names]
        self.far = [number for number, strides in enumerate(nest.strides) if strides[-1] not in (0, 1)]
        self.across = self._turned_loop()
        self.own = [math.prod(nest.shape[axis + 1 :]) for axis in range(len(nest.shape))]  # strides of the output

    @property
    def is_worth_it(self) -> bool:
        """Whether rows are long enough, and what is far apart can be turned."""
        return self.nest.shape[-1] >= SHORTEST_ROW and (not self.far or self.across is not None)

    def _turned_loop(self) -> int | None:
        """The loop along which all reads that are far apart are neighbours."""
        half = self.vec.lanes // 2
        for axis, size in enumerate(self.nest.shape[:-1]):
            if min(size, self.nest.shape[-1]) >= half and all(self.nest.strides[n][axis] == 1 for n in self.far):
                return axis
        return None

    def write(self, parallel: bool) -> None:
        """Write the loops."""
        inner = len(self.nest.shape) - 1
        if self.across is None or not self.far:
            with self._loops({axis: self.nest.shape[axis] for axis in range(inner)}, parallel) as at:
                self._row(at)
            return
        size, lanes = self.nest.shape[self.across], self.vec.lanes
        loops = {axis: self.nest.shape[axis] for axis in range(inner) if axis != self.across}
        with self._loops({**loops, self.across: ceil_div(size, lanes)}, parallel) as at:
            tile = at.pop(self.across)
            self._halves(tile, size, lambda first, rows: self._band(at, first, rows))

    @contextmanager
    def _loops(self, sizes: Mapping[int, int], parallel: bool) -> Iterator[dict[int, Index]]:
        """Run the body at each place of some loops, the outer ones of which make one that threads may share."""
        axes, shared = list(sizes), 1
        while shared < len(axes) and math.prod(sizes[axis] for axis in axes[:shared]) < SHARED_STEPS:
            shared += 1
        head = tuple(sizes[axis] for axis in axes[:shared])
        units = math.prod(head)
        with ExitStack() as loops:
            unit = loops.enter_context(T.parallel(0, units) if parallel and units > 1 else serial(0, units))
            at: dict[int, Index] = dict(zip(axes[:shared], unravel(unit, head), strict=True))
            for axis in axes[shared:]:
                at[axis] = loops.enter_context(serial(0, sizes[axis]))
            yield at

    def _halves(self, tile: Index, size: int, write: Callable[[Index, int], None]) -> None:
        """Call `write(first, count)` for a whole tile, or for the part of one at the end."""
        whole, rest = divmod(size, self.vec.lanes)
        if not rest or not whole:
            write(tile * self.vec.lanes, rest or self.vec.lanes)
            return
        assert isinstance(tile, Expr)
        choose(
            tile < whole,
            lambda: write(tile * self.vec.lanes, self.vec.lanes),
            lambda: write(whole * self.vec.lanes, rest),
        )

    def _place(self, strides: tuple[int, ...] | list[int], at: Mapping[int, Index], start: int = 0) -> Index:
        place: Index = start
        for axis, index in at.items():
            place = place + index * strides[axis]
        return place

    def _row(self, at: Mapping[int, Index]) -> None:
        """Write one run of the innermost loop."""
        bases = [bind(self._place(s, at, start)) for s, start in zip(self.nest.strides, self.nest.starts, strict=True)]
        own = bind(self._place(self.own, at))

        def vector(column: Index, live: int | None) -> None:
            reads = [self._read(number, base, column, live) for number, base in enumerate(bases)]
            self.vec.store(self.output, self._value(reads), own + column, live=live)

        self._each_vector(vector)

    def _each_vector(self, write: Callable[[Index, int | None], None]) -> None:
        whole, rest = divmod(self.nest.shape[-1], self.vec.lanes)
        if whole:
            with serial(0, whole) as number:
                write(number * self.vec.lanes, None)
        if rest:
            write(whole * self.vec.lanes, rest)

    def _read(self, number: int, base: Index, column: Index, live: int | None) -> Expr:
        if self.nest.strides[number][-1] == 0:
            return self.vec.splat(self.buffers[number][base])
        return self.vec.load(self.buffers[number], base + column, live=live)

    def _band(self, at: Mapping[int, Index], first: Index, rows: int) -> None:
        """Write `rows` runs that neighbour along the turned loop, square by square."""
        axis = self.across
        assert axis is not None
        at = {**at, axis: first}
        bases = [bind(self._place(s, at, start)) for s, start in zip(self.nest.strides, self.nest.starts, strict=True)]
        own, lanes = bind(self._place(self.own, at)), self.vec.lanes
        squares = {number: scratch((lanes * lanes,)) for number in self.far}

        def square(column: Index, live: int | None) -> None:
            for number, turned in squares.items():
                self._turn(number, bases[number], column, live, rows, turned)
            with serial(0, rows) as row:
                reads = [
                    self.vec.load(squares[number], row * lanes)
                    if number in squares
                    else self._read(number, base + row * self.nest.strides[number][axis], column, live)
                    for number, base in enumerate(bases)
                ]
                place = own + row * self.own[axis] + column
                self.vec.store(self.output, self._value(reads), place, live=live)

        self._each_vector(square)

    def _turn(self, number: int, base: Index, column: Index, live: int | None, rows: int, turned: Buffer) -> None:
        """Load a square along the turned loop and store it along the innermost."""
        lanes, step = self.vec.lanes, self.nest.strides[number][-1]
        part = None if rows == lanes else rows
        lines = [
            self.vec.load(self.buffers[number], base + (column + min(i, (live or lanes) - 1)) * step, live=part)
            for i in range(lanes)
        ]
        for row, line in enumerate(self.vec.transpose(lines)[:rows]):
            self.vec.store(turned, line, row * lanes)

    def _value(self, reads: list[Expr]) -> Expr:
        """The chain's expression of its reads."""
        pending = list(reads)
        producers = {node.results[0]: node for node in self.graph.nodes}

        def emit(value: Value) -> Expr:
            node = producers[value]
            if isinstance(node.op, Input):
                return pending.pop(0)
            if isinstance(node.op, Constant):
                return number_source(node.op).at(())
            operands = [emit(operand) for operand in node.operands]
            if isinstance(node.op, MOVES):
                return operands[0]
            row = EXPRESSIONS[type(node.op)]
            scalar = TensorType((), node.types[0].dtype)
            sources = tuple(Source(scalar, lambda _, o=o: o, lambda _, o=o: o) for o in operands)
            return row(node.op, scalar, sources).at(())

        result = emit(self.graph.outputs[0][1])
        return result if lanes_of(result) > 1 else tirx.Broadcast(result, self.vec.lanes)
