"""Attention of single queries, keys along the lanes: for decoding, and for queries that would leave a block half empty.

A *row* is one query of one head. All rows of a unit of work take the same sixteen keys before any takes the next, so
that keys and values of neighbouring heads, which lie side by side, stream from memory once and in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels._attention_site import HIDDEN, LEAST_SUM, LOWEST, Site
from codegen.kernels.emit import (
    Index,
    bind,
    ceil_div,
    choose,
    column_vectors,
    parallel_block,
    scratch,
    serial,
    store,
)
from codegen.kernels.vector_math import LOG2_E, exp2_nonpositive, splat_int


@dataclass(frozen=True)
class _Sums:
    """What a run of keys leaves of each row: unscaled output, largest score, sum of weights."""

    mixed: Buffer
    peaks: Buffer
    totals: Buffer

    @classmethod
    def make(cls, rows: int, elements: int) -> _Sums:
        """Set memory aside."""
        return cls(scratch((rows, elements)), scratch((rows,)), scratch((rows,)))


class RowWriter(Site):
    """Few queries a head."""

    def write(self) -> None:
        """Share out batch entries, groups of heads and runs of keys."""
        kernel = self.kernel
        shares, splits = int(self.knobs["shares"]), int(self.knobs["splits"])
        rows = kernel.heads // shares * kernel.q_len
        units = kernel.batch * shares
        whole = _Sums.make(units * splits * rows, self._value_elements) if splits > 1 else None
        with parallel_block(units * splits, flops=kernel.flops) as work:
            unit, split = bind(work // splits), work % splits
            sums, first = (whole, bind(work * rows)) if whole else (_Sums.make(rows, self._value_elements), 0)
            turn = self._turner(unit, shares, rows)
            self._sum_rows(rows, turn, sums, first, (split, splits))
            if not whole:
                self._write_rows(rows, turn, sums)
        if whole:
            with serial(0, units) as unit:
                turn = self._turner(bind(unit), shares, rows)
                with serial(0, rows) as row:
                    turn(row)
                    self._combine(whole, unit * splits * rows + row, rows, splits)

    def write_tail(self, first_query: int) -> None:
        """Write the queries from `first_query` on, of the batch entry and head at hand."""
        rows = self.kernel.q_len - first_query
        sums = _Sums.make(rows, self._value_elements)

        def turn(row: Index) -> None:
            self.query = bind(row + first_query)
            self.position = self._first_position(self.query)

        self._sum_rows(rows, turn, sums, 0, (0, 1))
        self._write_rows(rows, turn, sums)

    def _turner(self, unit: Expr, shares: int, rows: int) -> Callable[[Index], None]:
        """Return what turns to a row of a unit: rows count heads first, then queries."""
        heads = rows // self.kernel.q_len

        def turn(row: Index) -> None:
            head = unit % shares * heads + row // self.kernel.q_len
            self.at(unit // shares, bind(head))
            self.query = bind(row % self.kernel.q_len)
            self.position = self._first_position(self.query)

        return turn

    @property
    def _value_elements(self) -> int:
        return ceil_div(self.kernel.value_dim, self.vec.lanes) * self.vec.lanes

    def _sum_rows(
        self, rows: int, turn: Callable[[Index], None], sums: _Sums, first: Index, part: tuple[Index, int]
    ) -> None:
        """Sum one part of the keys for some rows, whose sums start at row `first`."""
        kernel, vec = self.kernel, self.vec
        lanes = vec.lanes
        self.scores = scratch((rows, ceil_div(kernel.kv_len, lanes) * lanes))
        self.highest = scratch((rows, lanes))
        self.queries = scratch((rows, ceil_div(kernel.head_dim, lanes) * lanes))
        with serial(0, rows) as row:
            turn(row)
            self._start_row(row, sums.mixed, first)
        turn(rows - 1)
        last = self.position
        turn(0)
        low, high = self._key_range(self.position, last)
        start, groups = bind(low // lanes), bind((high + lanes - 1) // lanes - low // lanes)
        index, count = part
        stop = bind(start + groups * (index + 1) // count)
        if count > 1:
            start = bind(start + groups * index // count)
            low, high = bind(tirx.max(low, start * lanes)), bind(tirx.min(high, stop * lanes))
        with serial(start, stop) as group, serial(0, rows) as row:
            turn(row)
            self._score_group(bind(group * lanes), row)
        with serial(0, rows) as row:
            self._weigh(row, start, stop, sums, first + row)
        with serial(start, stop) as group, serial(0, rows) as row:
            turn(row)
            self._mix(row, bind(tirx.max(low, group * lanes)), bind(tirx.min(high, (group + 1) * lanes)), sums, first)

    def _start_row(self, row: Index, mixed: Buffer, first: Index) -> None:
        """Copy the scaled query, so that the loop over its vectors reads it from one place, and clear the sums."""
        vec, kernel = self.vec, self.kernel
        source = self.batch * kernel.q_len + self.query
        for c, live in enumerate(column_vectors(kernel.head_dim, vec.lanes)):
            value = vec.load(self.q, source, self.q_column + c * vec.lanes, live=live)
            vec.store(self.queries, value * vec.splat(kernel.scale * LOG2_E), row, c * vec.lanes)
        vec.store(self.highest, vec.splat(LOWEST), row, 0)
        for column in range(0, self._value_elements, vec.lanes):
            vec.store(mixed, vec.splat(0.0), first + row, column)

    def _score_group(self, key: Expr, row: Index) -> None:
        """Score as many keys as there are lanes."""
        vec, kernel = self.vec, self.kernel
        sums = [vec.register(0.0) for _ in range(vec.lanes)]
        places = []
        for i in range(vec.lanes):
            inside = tirx.min(key + i, kernel.kv_len - 1) if kernel.kv_len % vec.lanes else key + i
            places.append(bind(self.batch * kernel.kv_len + inside))

        def add(column: Index, live: int | None) -> None:
            query = bind(vec.load(self.queries, row, column))
            for register, place in zip(sums, places, strict=True):
                register.set(register.get() + query * vec.load(self.k, place, self.k_column + column, live=live))

        full, rest = divmod(kernel.head_dim, vec.lanes)
        if full:
            with serial(0, full) as c:
                add(c * vec.lanes, None)
        if rest:
            add(full * vec.lanes, rest)
        keys = vec.lane_numbers(key)
        score = vec.sum_each([s.get() for s in sums]) + vec.splat(self._shift)
        if self.bias is not None:
            score = score + self._bias_of_query(self.query, key)
        score = self._hide(score, keys, splat_int(self.position, vec.lanes), masked=True)
        if kernel.kv_len % vec.lanes:
            score = tirx.Select(keys < splat_int(kernel.kv_len, vec.lanes), score, vec.splat(HIDDEN))
        score = bind(score)
        vec.store(self.scores, score, row, key)
        vec.store(self.highest, tirx.max(vec.load(self.highest, row, 0), score), row, 0)

    def _weigh(self, row: Index, start: Index, stop: Index, sums: _Sums, place: Index) -> None:
        """Turn scores into weights; note their sum and the largest score."""
        vec, lanes = self.vec, self.vec.lanes
        total = vec.register(0.0)
        peak = bind(vec.reduce(vec.load(self.highest, row, 0), tirx.max))

        def weigh(column: Index) -> Expr:
            score = vec.load(self.scores, row, column)
            is_sigmoid = self.kernel.normaliser == "sigmoid"
            return bind(self._sigmoid(score) if is_sigmoid else self._power(score - vec.splat(peak)))

        with serial(start, stop) as group:
            weight = weigh(group * lanes)
            vec.store(self.scores, weight, row, group * lanes)
            total.set(total.get() + weight)
        weight_sum = bind(vec.reduce(total.get(), lambda a, b: a + b))
        store(sums.peaks, peak, place)
        store(sums.totals, weight_sum, place)
        if self.kernel.normaliser == "clipped_softmax":
            factor = bind(self._clip_factor(vec.splat(weight_sum)))
            with serial(start, stop) as group:
                weight = self._clip(vec.load(self.scores, row, group * lanes), factor)
                vec.store(self.scores, weight, row, group * lanes)

    def _mix(self, row: Index, low: Expr, high: Expr, sums: _Sums, first: Index) -> None:
        """Add the weighted values of some keys."""
        vec, kernel = self.vec, self.kernel
        live = column_vectors(kernel.value_dim, vec.lanes)
        registers = [vec.register(vec.load(sums.mixed, first + row, c * vec.lanes)) for c in range(len(live))]
        source = bind(self.batch * kernel.kv_len + tirx.const(0, "int32"))

        def add(key: Index) -> None:
            weight = vec.splat(self.scores[row, key])
            for c, (register, count) in enumerate(zip(registers, live, strict=True)):
                value = vec.load(self.v, source + key, self.v_column + c * vec.lanes, live=count)
                register.set(register.get() + weight * value)

        def add_all() -> None:
            for i in range(vec.lanes):
                add(low + i)

        def add_some() -> None:
            with serial(low, high) as key:
                add(key)

        choose(high - low >= vec.lanes, add_all, add_some)
        for c, register in enumerate(registers):
            vec.store(sums.mixed, register.get(), first + row, c * vec.lanes)

    def _write_rows(self, rows: int, turn: Callable[[Index], None], sums: _Sums) -> None:
        with serial(0, rows) as row:
            turn(row)
            self._write_row(
                self._share(sums.totals[row]), lambda column, row=row: self.vec.load(sums.mixed, row, column)
            )

    def _share(self, total: Expr) -> Expr:
        """Return what a sum of weighted values is multiplied by."""
        one, zero = tirx.const(1.0, "float32"), tirx.const(0.0, "float32")
        return bind(tirx.Select(total > LEAST_SUM, one / total, zero)) if self.kernel.normaliser == "softmax" else one

    def _write_row(self, factor: Expr, values: Callable[[int], Expr]) -> None:
        vec, kernel = self.vec, self.kernel
        out_row = self.batch * kernel.q_len + self.query
        for c, count in enumerate(column_vectors(kernel.value_dim, vec.lanes)):
            column = self.head * kernel.value_dim + c * vec.lanes
            value = values(c * vec.lanes) * vec.splat(factor)
            self._store_row(value, out_row, column, count)

    def _combine(self, sums: _Sums, place: Index, stride: int, splits: int) -> None:
        """Write the row at hand from the sums of all runs of keys, `stride` rows apart."""
        places = [bind(place + split * stride) for split in range(splits)]
        if self.kernel.normaliser == "sigmoid":
            shares = [tirx.const(1.0, "float32")] * splits
        else:
            peak = sums.peaks[places[0]]
            for other in places[1:]:
                peak = tirx.max(peak, sums.peaks[other])
            peak = bind(peak)
            shares = [bind(exp2_nonpositive(sums.peaks[other] - peak)) for other in places]
        total = sums.totals[places[0]] * shares[0]
        for other, share in zip(places[1:], shares[1:], strict=True):
            total = total + sums.totals[other] * share

        def values(column: int) -> Expr:
            parts = [
                self.vec.load(sums.mixed, other, column) * self.vec.splat(share)
                for other, share in zip(places, shares, strict=True)
            ]
            return sum(parts[1:], parts[0])

        self._write_row(self._share(bind(total)), values)
