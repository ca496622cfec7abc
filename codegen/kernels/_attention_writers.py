"""TIR of the two forms of fused attention: blocks of queries along the lanes, and single rows for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    bind,
    ceil_div,
    choose,
    column_vectors,
    flat_view,
    load_at,
    parallel_block,
    scratch,
    select_constant,
    serial,
)
from codegen.kernels.vector_math import LOG2_E, exp2_nonpositive, splat_int

if TYPE_CHECKING:
    from codegen.kernels.attention import AttentionKernel

# Hidden scores lie far below the lowest running maximum, so their weight is 2^-125 at most, even in a row all hidden.
# All scores are in units of log2(e), folded into the scaled queries, so that weights are powers of 2. A query that
# sees a key has a sum of weights of at least 1, its largest.
HIDDEN: Final = -1e30
LOWEST: Final = -1e29
LEAST_SUM: Final = 0.5


class _Writer:
    """What both forms share: operands, head indices, positions, masks and biases."""

    def __init__(self, kernel: AttentionKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.knobs = kernel, Vectors(isa.lanes), knobs
        self.q, self.k, self.v, *rest = buffers
        self.out = rest.pop()
        self.bias = rest.pop() if kernel.bias_shape else None
        self.offset = rest.pop() if kernel.offset else None

    def _place(self, unit: Expr, blocks: int) -> Expr:
        """Split a work unit into batch entry, head and block; return the block."""
        kernel = self.kernel
        self.batch, self.head = bind(unit // (blocks * kernel.heads)), bind(unit // blocks % kernel.heads)
        kv_head = self.head // (kernel.heads // kernel.kv_heads)
        q_view, k_view, v_view = kernel.views
        self.q_column = bind(q_view.offset + self.head * kernel.head_dim)
        self.k_column = bind(k_view.offset + kv_head * kernel.head_dim)
        self.v_column = bind(v_view.offset + kv_head * kernel.value_dim)
        if kernel.alibi_slopes:
            self.slope = bind(select_constant(self.head, [slope * LOG2_E for slope in kernel.alibi_slopes]))
        if self.bias is not None:
            self.flat_bias = flat_view(self.bias)
        return unit % blocks

    def _first_position(self, query: Expr) -> Expr:
        offset = self.offset[()] if self.offset is not None else self.kernel.kv_len - self.kernel.q_len
        return bind(query + offset)

    def _key_range(self, first: Expr, last: Expr) -> tuple[Index, Index]:
        """Return the keys that queries at positions first..last can see, as a half-open range."""
        low: Index = 0
        high: Index = self.kernel.kv_len
        if self.kernel.window is not None:
            low = bind(tirx.max(first - (self.kernel.window - 1), 0))
            high = bind(tirx.min(last + self.kernel.window, self.kernel.kv_len))
        if self.kernel.causal:
            high = bind(tirx.min(last + 1, self.kernel.kv_len))
        return low, high

    def _score(self, score: Expr, query: Expr, key: Expr, position: Expr, *, masked: bool) -> Expr:
        """Add biases and hide what the mask hides; query index, key index and query position are int32 vectors."""
        kernel, lanes = self.kernel, self.vec.lanes
        distance = position - key
        if self.bias is not None:
            score = score + self._bias_at(query, key) * self.vec.splat(LOG2_E)
        if kernel.alibi_slopes:
            away = distance if kernel.causal else tirx.max(distance, key - position)
            score = score - self.vec.splat(self.slope) * tirx.Cast(f"float32x{lanes}", away)
        if not masked:
            return score
        hidden = self.vec.splat(HIDDEN)
        if kernel.causal:
            score = tirx.Select(distance >= splat_int(0, lanes), score, hidden)
        if kernel.window is not None:
            away = distance if kernel.causal else tirx.max(distance, key - position)
            score = tirx.Select(away < splat_int(kernel.window, lanes), score, hidden)
        return score

    def _bias_at(self, query: Expr, key: Expr) -> Expr:
        assert self.kernel.bias_shape
        batches, heads, queries, keys = self.kernel.bias_shape
        row = (self.batch if batches > 1 else 0) * heads + (self.head if heads > 1 else 0)
        base = splat_int(row * queries * keys + tirx.const(0, "int32"), self.vec.lanes)
        if queries > 1:
            inside = tirx.min(query, splat_int(queries - 1, self.vec.lanes))
            base = base + inside * splat_int(keys, self.vec.lanes)
        if keys > 1:
            base = base + tirx.min(key, splat_int(keys - 1, self.vec.lanes))
        return load_at(self.flat_bias, base)


class BlockWriter(_Writer):
    """Blocks of queries along the lanes."""

    def __init__(self, kernel: AttentionKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        super().__init__(kernel, isa, knobs, buffers)
        self.vectors, self.tile_keys, self.chunk = int(knobs["vectors"]), int(knobs["keys"]), int(knobs["chunk"])
        self.width = self.vectors * isa.lanes
        self.single_chunk = kernel.kv_len <= self.chunk
        self.value_tiles = Split(kernel.value_dim, self.tile_keys)

    def write(self) -> None:
        """Loop over batch, heads and blocks of queries."""
        kernel, lanes = self.kernel, self.vec.lanes
        blocks = ceil_div(kernel.q_len, self.width)
        with parallel_block(kernel.batch * kernel.heads * blocks, flops=kernel.flops) as unit:
            block = self._place(unit, blocks)
            if kernel.causal and blocks > 1:  # short and long blocks in turn, so that threads get equal work
                block = tirx.Select(block % 2 == 0, block // 2, blocks - 1 - block // 2)
            self.first_query = bind(block * self.width)
            self.position = self._first_position(self.first_query)
            self.queries = scratch((ceil_div(kernel.head_dim, lanes) * lanes, self.width))
            self.scores = scratch(
                (min(self.chunk, ceil_div(kernel.kv_len, self.tile_keys) * self.tile_keys), self.width)
            )
            self.mixed = scratch((ceil_div(kernel.value_dim, lanes) * lanes, self.width))
            self.highest = [self.vec.register(LOWEST) for _ in range(self.vectors)]
            self.before = [self.vec.register() for _ in range(self.vectors)]
            self.total = [self.vec.register(0.0) for _ in range(self.vectors)]
            self._load_queries()
            self._clear_mixed()
            last = tirx.min(self.first_query + self.width, kernel.q_len) - 1 - self.first_query + self.position
            low, high = self._key_range(self.position, last)
            with serial(low // self.chunk, (high + self.chunk - 1) // self.chunk) as chunk:
                self._chunk(bind(chunk * self.chunk), low, high)
            self._store_outputs()

    def _load_queries(self) -> None:
        """Transpose the block's queries into `[K, R]`, scaled."""
        kernel, vec = self.kernel, self.vec

        def square(v: Index, element: Index, live: int | None) -> None:
            rows = []
            for i in range(vec.lanes):
                query = self.first_query + v * vec.lanes + i
                if kernel.q_len % self.width:
                    query = tirx.min(query, kernel.q_len - 1)
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
        """Score, exponentiate and mix one chunk of keys."""
        tiles_per_chunk = self.chunk // self.tile_keys
        start_tile = start // self.tile_keys
        first_tile = bind(tirx.max(low // self.tile_keys, start_tile))
        stop_tile = bind(tirx.min((high + self.tile_keys - 1) // self.tile_keys, start_tile + tiles_per_chunk))
        for before, highest in zip(self.before, self.highest, strict=True):
            before.set(highest.get())
        with serial(first_tile, stop_tile) as tile:
            self._tile(bind(tile * self.tile_keys), start)
        first = bind(first_tile * self.tile_keys - start)
        stop = bind(tirx.min(stop_tile * self.tile_keys, self.kernel.kv_len) - start)
        self._exponentiate(first, stop)
        with serial(0, self.value_tiles.count) as tile:
            self.value_tiles.for_each(tile, lambda element, count: self._mix(element, count, start, first, stop))

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
        sums = [[vec.register(0.0) for _ in range(self.vectors)] for _ in range(count)]
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
            query = vec.lane_numbers(self.first_query + v * vec.lanes)
            position = vec.lane_numbers(self.position + v * vec.lanes)
            highest = self.highest[v]
            for i, line in enumerate(sums):
                score = self._score(line[v].get(), query, splat_int(key + i, vec.lanes), position, masked=masked)
                line[v].set(score)
                vec.store(self.scores, line[v].get(), key - start + i, v * vec.lanes)
                highest.set(tirx.max(highest.get(), line[v].get()))

    def _exponentiate(self, first: Expr, stop: Expr) -> None:
        """Turn the chunk's scores into weights and bring the running sum to the new maximum."""
        vec = self.vec
        if not self.single_chunk:
            for v in range(self.vectors):
                self.before[v].set(exp2_nonpositive(self.before[v].get() - self.highest[v].get()))
                self.total[v].set(self.total[v].get() * self.before[v].get())
        with serial(first, stop) as key:
            for v in range(self.vectors):
                weight = bind(exp2_nonpositive(vec.load(self.scores, key, v * vec.lanes) - self.highest[v].get()))
                vec.store(self.scores, weight, key, v * vec.lanes)
                self.total[v].set(self.total[v].get() + weight)

    def _mix(self, element: Index, count: int, start: Expr, first: Expr, stop: Expr) -> None:
        """Add the chunk's weighted values to some elements of the outputs."""
        vec = self.vec
        sums = [[vec.register() for _ in range(self.vectors)] for _ in range(count)]
        cells = [(i, v, register) for i, line in enumerate(sums) for v, register in enumerate(line)]
        for i, v, register in cells:
            if self.single_chunk:
                register.set(vec.splat(0.0))
            else:
                register.set(vec.load(self.mixed, element + i, v * vec.lanes) * self.before[v].get())
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
            total.set(tirx.Select(total.get() > vec.splat(LEAST_SUM), vec.splat(1.0) / total.get(), vec.splat(0.0)))
        factors = scratch((self.width,))
        for v, total in enumerate(self.total):
            vec.store(factors, total.get(), v * vec.lanes)
        ragged = kernel.q_len % self.width
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
                with serial(0, tirx.min(kernel.q_len - first, vec.lanes)) as i:
                    self._store_row(vec.load(parked, i, 0), row + i, column, live)

        self._for_squares(kernel.value_dim, square)

    def _store_row(self, values: Expr, row: Index, column: Index, live: int | None) -> None:
        self.vec.store(self.out, values, row, column, live=live)


class RowWriter(_Writer):
    """One query at a time, keys along the lanes of the scores: for decoding, where queries cannot fill a vector."""

    def write(self) -> None:
        """Loop over batch, heads and queries."""
        kernel, vec = self.kernel, self.vec
        with parallel_block(kernel.batch * kernel.heads * kernel.q_len, flops=kernel.flops) as unit:
            self.query = bind(self._place(unit, kernel.q_len))
            self.position = self._first_position(self.query)
            self.scores = scratch((ceil_div(kernel.kv_len, vec.lanes) * vec.lanes,))
            low, high = self._key_range(self.position, self.position)
            highest, total = vec.register(LOWEST), vec.register(0.0)
            first, stop = low // vec.lanes, (high + vec.lanes - 1) // vec.lanes
            self._load_query()
            with serial(first, stop) as group:
                self._score_group(bind(group * vec.lanes), highest)
            peak = bind(vec.splat(vec.reduce(highest.get(), tirx.max)))
            with serial(first, stop) as group:
                weight = bind(exp2_nonpositive(vec.load(self.scores, group * vec.lanes) - peak))
                vec.store(self.scores, weight, group * vec.lanes)
                total.set(total.get() + weight)
            weight_sum = bind(vec.reduce(total.get(), lambda a, b: a + b))
            factor = bind(
                tirx.Select(weight_sum > LEAST_SUM, tirx.const(1.0, "float32") / weight_sum, tirx.const(0.0, "float32"))
            )
            self._mix(low, high, factor)

    def _load_query(self) -> None:
        """Copy the scaled query, so that the loop over its vectors reads it from one place."""
        vec, kernel = self.vec, self.kernel
        self.padded = scratch((ceil_div(kernel.head_dim, vec.lanes) * vec.lanes,))
        row = self.batch * kernel.q_len + self.query
        for c, live in enumerate(column_vectors(kernel.head_dim, vec.lanes)):
            value = vec.load(self.q, row, self.q_column + c * vec.lanes, live=live)
            vec.store(self.padded, value * vec.splat(kernel.scale * LOG2_E), c * vec.lanes)

    def _score_group(self, key: Expr, highest: Register) -> None:
        """Score as many keys as there are lanes."""
        vec, kernel = self.vec, self.kernel
        sums = [vec.register(0.0) for _ in range(vec.lanes)]
        rows = []
        for i in range(vec.lanes):
            inside = tirx.min(key + i, kernel.kv_len - 1) if kernel.kv_len % vec.lanes else key + i
            rows.append(bind(self.batch * kernel.kv_len + inside))

        def add(column: Index, live: int | None) -> None:
            query = bind(vec.load(self.padded, column))
            for register, row in zip(sums, rows, strict=True):
                register.set(register.get() + query * vec.load(self.k, row, self.k_column + column, live=live))

        full, rest = divmod(kernel.head_dim, vec.lanes)
        if full:
            with serial(0, full) as c:
                add(c * vec.lanes, None)
        if rest:
            add(full * vec.lanes, rest)
        keys = vec.lane_numbers(key)
        position = splat_int(self.position, vec.lanes)
        query = splat_int(self.query, vec.lanes)
        score = self._score(vec.sum_each([s.get() for s in sums]), query, keys, position, masked=True)
        if kernel.kv_len % vec.lanes:
            score = tirx.Select(keys < splat_int(kernel.kv_len, vec.lanes), score, vec.splat(HIDDEN))
        score = bind(score)
        vec.store(self.scores, score, key)
        highest.set(tirx.max(highest.get(), score))

    def _mix(self, low: Index, high: Index, factor: Expr) -> None:
        """Sum the weighted values."""
        vec, kernel = self.vec, self.kernel
        live = column_vectors(kernel.value_dim, vec.lanes)
        sums = [vec.register(0.0) for _ in live]
        row = bind(self.batch * kernel.kv_len + tirx.const(0, "int32"))
        with serial(low, high) as key:
            weight = vec.splat(self.scores[key])
            for c, (register, count) in enumerate(zip(sums, live, strict=True)):
                value = vec.load(self.v, row + key, self.v_column + c * vec.lanes, live=count)
                register.set(register.get() + weight * value)
        out_row = self.batch * kernel.q_len + self.query
        for c, (register, count) in enumerate(zip(sums, live, strict=True)):
            column = self.head * kernel.value_dim + c * vec.lanes
            vec.store(self.out, register.get() * vec.splat(factor), out_row, column, live=count)
