"""Attention of blocks of queries, queries along the lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels._attention_rows import RowWriter
from codegen.kernels._attention_site import LEAST_SUM, LOWEST, Site
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    bind,
    branch,
    ceil_div,
    choose,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.vector_math import LOG2_E, splat_int

if TYPE_CHECKING:
    from codegen.kernels.attention import AttentionKernel


class BlockWriter(Site):
    """Blocks of queries along the lanes."""

    def __init__(self, kernel: AttentionKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        super().__init__(kernel, isa, knobs, buffers)
        self.vectors, self.tile_keys, self.chunk = int(knobs["vectors"]), int(knobs["keys"]), int(knobs["chunk"])
        self.width = self.vectors * isa.lanes
        self.single_chunk = kernel.kv_len <= self.chunk
        self.value_tiles = Split(kernel.value_dim, self.tile_keys)
        self.blocked = kernel.q_len - int(knobs["tail"])
        self.blocks = ceil_div(self.blocked, self.width)
        full_bias = kernel.bias_shape is not None and min(kernel.bias_shape[2:]) > 1
        self.turns_bias = full_bias and not self.bias_is_packed

    def write(self) -> None:
        """Loop over batch, heads and blocks of queries; the last block of a head is followed by its single queries."""
        kernel, blocks = self.kernel, self.blocks
        with parallel_block(kernel.batch * kernel.heads * blocks, flops=kernel.flops) as unit:
            turn = bind(self._place(unit, blocks))
            block = turn
            if kernel.causal and blocks > 1:  # short and long blocks in turn, so that threads get equal work
                block = tirx.Select(turn % 2 == 0, turn // 2, blocks - 1 - turn // 2)
            self._block(bind(block))
            if self.blocked < kernel.q_len and blocks == 1:
                self._write_tail()
            elif self.blocked < kernel.q_len:
                with branch(turn >= blocks - 1):
                    self._write_tail()

    def _write_tail(self) -> None:
        """Write the queries after the last block of the head at hand."""
        rows = RowWriter(self.kernel, self.isa, self.knobs, self.buffers)
        rows.at(self.batch, self.head)
        rows.write_tail(self.blocked)

    def _block(self, block: Expr) -> None:
        """Write one block of queries."""
        self.first_query = bind(block * self.width)
        self.position = self._first_position(self.first_query)
        self._allocate()
        self.highest = [self.vec.register(LOWEST) for _ in range(self.vectors)]
        self.before = [self.vec.register() for _ in range(self.vectors)]
        self.total = [self.vec.register(0.0) for _ in range(self.vectors)]
        self._load_queries()
        self._clear_mixed()
        last = tirx.min(self.first_query + self.width, self.blocked) - 1 - self.first_query + self.position
        low, high = self._key_range(self.position, last)
        start, stop = low // self.chunk, (high + self.chunk - 1) // self.chunk
        if self.kernel.normaliser == "clipped_softmax":
            with serial(start, stop) as chunk:
                self._add_up(*self._score_chunk(bind(chunk * self.chunk), low, high))
            for total in self.total:  # from here on what weights are multiplied by
                total.set(self._clip_factor(total.get()))
        with serial(start, stop) as chunk:
            self._chunk(bind(chunk * self.chunk), low, high)
        self._store_outputs()

    def _allocate(self) -> None:
        """Set memory aside for a block."""
        kernel, lanes = self.kernel, self.vec.lanes
        self.queries = scratch((ceil_div(kernel.head_dim, lanes) * lanes, self.width))
        self.scores = scratch((self._chunk_keys(), self.width))
        self.mixed = scratch((ceil_div(kernel.value_dim, lanes) * lanes, self.width))
        if self.turns_bias:
            self.turned_bias = scratch((ceil_div(self._chunk_keys(), lanes) * lanes + lanes, self.width))

    def _chunk_keys(self) -> int:
        return min(self.chunk, ceil_div(self.kernel.kv_len, self.tile_keys) * self.tile_keys)

    def _load_queries(self) -> None:
        """Transpose the block's queries into `[K, R]`, scaled."""
        kernel, vec = self.kernel, self.vec

        def square(v: Index, element: Index, live: int | None) -> None:
            rows = []
            for i in range(vec.lanes):
                query = self.first_query + v * vec.lanes + i
                if self.blocked % self.width:
                    query = tirx.min(query, self.blocked - 1)
                row = self.batch * kernel.q_len + query
                rows.append(
                    vec.load(self.q, row, self.q_column + element, live=live) * vec.splat(kernel.scale * LOG2_E)
                )
            for i, column in enumerate(vec.transpose(rows)):
                vec.store(self.queries, column, element + i, v * vec.lanes)

        self._for_squares(kernel.head_dim, square)

    def _for_squares(self, elements: int, write) -> None:
        """Visit the squares of lanes x lanes that cover a block: `write(vector, first element, live elements)`."""
        full, rest = divmod(elements, self.vec.lanes)
        with serial(0, self.vectors) as v:
            if full:
                with serial(0, full) as group:
                    write(v, group * self.vec.lanes, None)
            if rest:
                write(v, full * self.vec.lanes, rest)

    def _clear_mixed(self) -> None:
        """Start from zero: needed where several chunks add up, and where a block may see no key at all."""
        with serial(0, self.mixed.shape[0]) as element:
            for v in range(self.vectors):
                self.vec.store(self.mixed, self.vec.splat(0.0), element, v * self.vec.lanes)

    def _chunk(self, start: Expr, low: Index, high: Index) -> None:
        """Weigh and mix one chunk of keys."""
        scored = self.kernel.normaliser == "clipped_softmax" and self.single_chunk
        first, stop = self._bounds(start, low, high) if scored else self._score_chunk(start, low, high)
        if self.kernel.normaliser == "softmax":
            self._rescale()
        self._weigh(first, stop)
        with serial(0, self.value_tiles.count) as tile:
            self.value_tiles.for_each(tile, lambda element, count: self._mix(element, count, start, first, stop))

    def _bounds(self, start: Expr, low: Index, high: Index) -> tuple[Expr, Expr]:
        """Return the first key of a chunk that is looked at, and the end, counted from its start: whole tiles."""
        tiles_per_chunk = self.chunk // self.tile_keys
        start_tile = start // self.tile_keys
        first_tile = tirx.max(low // self.tile_keys, start_tile)
        stop_tile = tirx.min((high + self.tile_keys - 1) // self.tile_keys, start_tile + tiles_per_chunk)
        first = bind(first_tile * self.tile_keys - start)
        return first, bind(tirx.min(stop_tile * self.tile_keys, self.kernel.kv_len) - start)

    def _score_chunk(self, start: Expr, low: Index, high: Index) -> tuple[Expr, Expr]:
        """Score one chunk of keys; returns its bounds."""
        first, stop = self._bounds(start, low, high)
        if self.turns_bias:
            self._turn_bias(start, first, stop)
        for before, highest in zip(self.before, self.highest, strict=True):
            before.set(highest.get())
        first_tile = bind((start + first) // self.tile_keys)
        with serial(first_tile, (start + stop + (self.tile_keys - 1)) // self.tile_keys) as tile:
            self._tile(bind(tile * self.tile_keys), start)
        return first, stop

    def _turn_bias(self, start: Expr, first: Expr, stop: Expr) -> None:
        """Transpose a block of the bias, times log2(e), so that queries lie along the lanes."""
        vec, keys = self.vec, self.kernel.kv_len
        with serial(0, self.vectors) as v, serial(0, (stop - first + (vec.lanes - 1)) // vec.lanes) as group:
            key = bind(first + group * vec.lanes)
            live = tirx.min(keys - start - key, vec.lanes)
            rows = []
            for i in range(vec.lanes):
                query = tirx.min(self.first_query + v * vec.lanes + i, self.kernel.q_len - 1)
                place = self.bias_base + query * keys + start + key
                rows.append(vec.load(self.flat_bias, place, live=live) * vec.splat(LOG2_E))
            for i, column in enumerate(vec.transpose(rows)):
                vec.store(self.turned_bias, column, key + i, v * vec.lanes)

    def _start_value(self, v: int, key: Expr, start: Expr) -> Expr:
        """Return what the scores of a key start from: its bias."""
        if self.bias is None:
            return self.vec.splat(self._shift)
        if self.turns_bias:
            bias = self.vec.load(self.turned_bias, key - start, v * self.vec.lanes)
        else:
            bias = self._bias_of_key(self.first_query + v * self.vec.lanes, key)
        return bias + self.vec.splat(self._shift) if self._shift else bias

    def _start_tile(self, key: Expr, count: int, start: Expr) -> list[list[Register]]:
        """Return the accumulators of a tile."""
        return [
            [self.vec.register(self._start_value(v, key + i, start)) for v in range(self.vectors)] for i in range(count)
        ]

    def _tile(self, key: Expr, start: Expr) -> None:
        """Score one tile of keys; the last tile of all may be shorter."""
        rest = self.kernel.kv_len % self.tile_keys
        if not rest:
            self._score_tile(key, self.tile_keys, start)
        elif self.kernel.kv_len < self.tile_keys:
            self._score_tile(key, rest, start)
        else:
            choose(
                key + self.tile_keys <= self.kernel.kv_len,
                lambda: self._score_tile(key, self.tile_keys, start),
                lambda: self._score_tile(key, rest, start),
            )

    def _score_tile(self, key: Expr, count: int, start: Expr) -> None:
        vec, kernel = self.vec, self.kernel
        sums = self._start_tile(key, count, start)
        row = self.batch * kernel.kv_len + key
        with serial(0, kernel.head_dim) as d:
            queries = [vec.load(self.queries, d, v * vec.lanes) for v in range(self.vectors)]
            for i, line in enumerate(sums):
                self._add_products(line, vec.splat(self.k[row + i, self.k_column + d]), queries)
        if not kernel.causal and kernel.window is None:
            self._keep_scores(sums, key, start, masked=False)
            return
        choose(
            self._touches_mask(key, count),
            lambda: self._keep_scores(sums, key, start, masked=True),
            lambda: self._keep_scores(sums, key, start, masked=False),
        )

    def _touches_mask(self, key: Expr, count: int) -> Expr:
        """Tell whether some query of the block must not see some key of the tile."""
        after = key + (count - 1) - self.position
        before = self.position + (self.width - 1) - key
        window = self.kernel.window
        if window is None:
            return after > 0
        return tirx.Or(after > 0 if self.kernel.causal else after >= window, before >= window)

    @staticmethod
    def _add_products(line: list[Register], value: Expr, others: list[Expr]) -> None:
        for register, other in zip(line, others, strict=True):
            register.set(register.get() + value * other)

    def _keep_scores(self, sums: list[list[Register]], key: Expr, start: Expr, *, masked: bool) -> None:
        """Finish the scores of a tile, store them and raise the running maximum."""
        vec = self.vec
        for v in range(self.vectors):
            position = vec.lane_numbers(self.position + v * vec.lanes)
            highest = self.highest[v]
            for i, line in enumerate(sums):
                score = self._hide(line[v].get(), splat_int(key + i, vec.lanes), position, masked=masked)
                line[v].set(score)
                vec.store(self.scores, line[v].get(), key - start + i, v * vec.lanes)
                if self.kernel.normaliser != "sigmoid":
                    highest.set(tirx.max(highest.get(), line[v].get()))

    def _rescale(self) -> None:
        """Bring the running sum to the new maximum."""
        if not self.single_chunk:
            for before, highest, total in zip(self.before, self.highest, self.total, strict=True):
                before.set(self._power(before.get() - highest.get()))
                total.set(total.get() * before.get())

    def _add_up(self, first: Expr, stop: Expr) -> None:
        """Add the powers of the chunk's scores to the running sum."""
        self._rescale()
        with serial(first, stop) as key:
            for v, total in enumerate(self.total):
                total.set(total.get() + self._power(self._score_of(key, v) - self.highest[v].get()))

    def _score_of(self, key: Index, v: int) -> Expr:
        return self.vec.load(self.scores, key, v * self.vec.lanes)

    def _weight(self, key: Index, v: int) -> Expr:
        """Return the weight of a key of the chunk."""
        score = self._score_of(key, v)
        if self.kernel.normaliser == "sigmoid":
            return bind(self._sigmoid(score))
        weight = bind(self._power(score - self.highest[v].get()))
        if self.kernel.normaliser == "clipped_softmax":
            return bind(self._clip(weight, self.total[v].get()))
        return weight

    def _weigh(self, first: Expr, stop: Expr) -> None:
        """Turn the chunk's scores into weights; those of a softmax are added to the running sum."""
        with serial(first, stop) as key:
            for v, total in enumerate(self.total):
                weight = self._weight(key, v)
                self.vec.store(self.scores, weight, key, v * self.vec.lanes)
                if self.kernel.normaliser == "softmax":
                    total.set(total.get() + weight)

    def _mixed_so_far(self, element: Index, v: int) -> Expr:
        """Return the sum that a chunk's weighted values are added to."""
        if self.single_chunk:
            return self.vec.splat(0.0)
        mixed = self.vec.load(self.mixed, element, v * self.vec.lanes)
        return mixed * self.before[v].get() if self.kernel.normaliser == "softmax" else mixed

    def _mix(self, element: Index, count: int, start: Expr, first: Expr, stop: Expr) -> None:
        """Add the chunk's weighted values to some elements of the outputs."""
        vec = self.vec
        sums = [[vec.register() for _ in range(self.vectors)] for _ in range(count)]
        cells = [(i, v, register) for i, line in enumerate(sums) for v, register in enumerate(line)]
        for i, v, register in cells:
            register.set(self._mixed_so_far(element + i, v))
        row = self.batch * self.kernel.kv_len + start
        with serial(first, stop) as key:
            weights = [vec.load(self.scores, key, v * vec.lanes) for v in range(self.vectors)]
            for i, line in enumerate(sums):
                self._add_products(line, vec.splat(self.v[row + key, self.v_column + element + i]), weights)
        for i, v, register in cells:
            vec.store(self.mixed, register.get(), element + i, v * vec.lanes)

    def _store_outputs(self) -> None:
        """Divide by the sums and write the outputs back as rows."""
        kernel, vec = self.kernel, self.vec
        for total in self.total:
            if kernel.normaliser == "softmax":
                share = vec.splat(1.0) / total.get()
                total.set(tirx.Select(total.get() > vec.splat(LEAST_SUM), share, vec.splat(0.0)))
            else:
                total.set(vec.splat(1.0))
        factors = scratch((self.width,))
        for v, total in enumerate(self.total):
            vec.store(factors, total.get(), v * vec.lanes)
        ragged = self.blocked % self.width
        parked = scratch((vec.lanes, vec.lanes)) if ragged else None

        def square(v: Index, element: Index, live: int | None) -> None:
            columns = [
                vec.load(self.mixed, element + i, v * vec.lanes) * vec.load(factors, v * vec.lanes)
                for i in range(vec.lanes)
            ]
            first = self.first_query + v * vec.lanes
            row = self.batch * kernel.q_len + first
            column = self.head * kernel.value_dim + element
            for i, values in enumerate(vec.transpose(columns)):
                if parked is None:
                    self._store_row(values, row + i, column, live)
                else:
                    vec.store(parked, values, i, 0)
            if parked is not None:
                with serial(0, tirx.min(self.blocked - first, vec.lanes)) as i:
                    self._store_row(vec.load(parked, i, 0), row + i, column, live)

        self._for_squares(kernel.value_dim, square)
