"""Fused attention: scores are never stored, or only those of one query.

B batch, T queries, S keys, H query heads, G key heads, K and V head sizes. Many queries: a work-group takes a block of
queries of one head, a thread each; keys and values come to shared memory a few at a time, with a running maximum and
sum (Milakov and Gimelshein 2018). Few queries, as in decoding: a work-group takes one query, its threads share the
keys, then the elements of the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.gpu.emit import (
    Index,
    Operand,
    add_to,
    barrier,
    bind,
    branch,
    build_function,
    guarded,
    launch,
    number,
    private,
    put,
    reduce_threads,
    round_bfloat16,
    serial,
    shared,
    strided,
    unrolled,
)
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Knobs
from codegen.kernels.emit import select_constant
from codegen.targets.base import Gpu

HIDDEN: Final = -1e30
LOWEST: Final = -1e29
"""Below every score that is seen and above the hidden ones, whose weight is so zero even where all are hidden."""
FEW_QUERIES: Final = 8
BLOCK: Final = 64
"""Queries of a block."""
KEYS: Final = 16
"""Keys that come to shared memory together."""


def attention_knobs(kernel: AttentionKernel, gpu: Gpu) -> Knobs:
    """Take one query a work-group where there are few and their scores fit shared memory."""
    threads = min(128, gpu.max_threads)
    if kernel.q_len <= FEW_QUERIES and 4 * (kernel.kv_len + 2 * threads) <= gpu.shared_bytes // 2:
        return {"path": "rows", "threads": threads}
    block = BLOCK if kernel.q_len > 32 else 32 if kernel.q_len > 16 else 16
    keys = KEYS
    while keys > 1 and 4 * keys * (kernel.head_dim + kernel.value_dim) > gpu.shared_bytes // 2:
        keys //= 2
    return {"path": "blocks", "threads": block, "keys": keys}


def write_attention(kernel: AttentionKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the form that the knobs name."""
    del gpu
    writer = _Rows if knobs["path"] == "rows" else _Blocks
    return build_function(kernel, lambda *operands: writer(kernel, knobs, operands).write())


class _Site:
    """Operands of a kernel, and the batch entry, head and query at hand."""

    def __init__(self, kernel: AttentionKernel, knobs: Knobs, operands: tuple[Operand, ...]) -> None:
        self.kernel, self.threads = kernel, int(knobs["threads"])
        self.q, self.k, self.v, *rest = operands
        self.out = rest.pop()
        self.bias = rest.pop() if kernel.bias_shape else None
        self.offset = rest.pop() if kernel.offset else None

    def at(self, batch: Expr, head: Expr) -> None:
        """Turn to a head of a batch entry."""
        kernel = self.kernel
        self.batch, self.head = bind(batch), bind(head)
        self.kv_head = bind(self.head // (kernel.heads // kernel.kv_heads))
        self.slope: Expr | None = None
        if kernel.alibi_slopes:
            slope = private(1)
            put(slope, select_constant(self.head, kernel.alibi_slopes), 0)
            self.slope = slope[0]

    def position(self, query: Expr) -> Expr:
        """Return where a query stands among the keys."""
        first = self.offset[0] if self.offset is not None else self.kernel.kv_len - self.kernel.q_len
        return query + first

    def query_place(self, query: Expr) -> Expr:
        """Return where the elements of a query begin."""
        view, kernel = self.kernel.views[0], self.kernel
        return (self.batch * kernel.q_len + query) * view.width + view.offset + self.head * kernel.head_dim

    def key_place(self, key: Expr) -> Expr:
        """Return where the elements of a key begin."""
        view, kernel = self.kernel.views[1], self.kernel
        return (self.batch * kernel.kv_len + key) * view.width + view.offset + self.kv_head * kernel.head_dim

    def value_place(self, key: Expr) -> Expr:
        """Return where the elements of a value begin."""
        view, kernel = self.kernel.views[2], self.kernel
        return (self.batch * kernel.kv_len + key) * view.width + view.offset + self.kv_head * kernel.value_dim

    def out_place(self, query: Expr) -> Expr:
        """Return where the elements of a result begin."""
        kernel = self.kernel
        return ((self.batch * kernel.q_len + query) * kernel.heads + self.head) * kernel.value_dim

    def key_range(self, first: Expr, last: Expr) -> tuple[Index, Index]:
        """Return the keys that queries at positions first..last can see, as a half-open range."""
        kernel = self.kernel
        low: Index = 0
        high: Index = kernel.kv_len
        if kernel.window is not None:
            low = bind(tirx.max(first - (kernel.window - 1), 0))
            high = bind(tirx.max(tirx.min(last + kernel.window, kernel.kv_len), 0))
        if kernel.causal:
            high = bind(tirx.max(tirx.min(last + 1, kernel.kv_len), 0))
        return low, high

    def rounded(self, value: Expr) -> Expr:
        """Round an operand of a product as the kernel's precision asks."""
        return round_bfloat16(value) if self.kernel.precision == "bfloat16" else value

    def score(self, product: Expr, query: Expr, position: Expr, key: Expr) -> Expr:
        """Add bias and slope to a product of a query and a key, and hide what the mask hides."""
        kernel, score = self.kernel, product
        distance = position - key
        if self.bias is not None and kernel.bias_shape:
            score = score + self.bias[self._bias_place(query, key)]
        if self.slope is not None:
            score = score - self.slope * tirx.max(distance, -distance).astype("float32")
        if kernel.normaliser == "sigmoid" and kernel.shift:
            score = score + number(kernel.shift)
        if kernel.causal:
            score = tirx.Select(distance >= 0, score, number(HIDDEN))
        if kernel.window is not None:
            score = tirx.Select(tirx.max(distance, -distance) < kernel.window, score, number(HIDDEN))
        return score

    def _bias_place(self, query: Expr, key: Expr) -> Index:
        assert self.kernel.bias_shape
        place: Index = 0
        for index, size in zip((self.batch, self.head, query, key), self.kernel.bias_shape, strict=True):
            place = place * size + (index if size > 1 else 0)
        return place

    def clipped(self, weight: Expr, total: Expr) -> Expr:
        """Stretch a weight, of which all together give `total`, and clip it."""
        low, high = self.kernel.stretch
        share = number(high - low) * weight / tirx.max(total, number(0.5)) + number(low)
        seen = tirx.max(tirx.min(share, number(1.0)), number(0.0))
        return tirx.Select(total > number(0.5), seen, number(0.0))


def _sigmoid(score: Expr) -> Expr:
    return number(1.0) / (number(1.0) + tirx.exp(tirx.min(-score, number(80.0))))


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


class _Blocks(_Site):
    """Writes the form for many queries: a thread each."""

    def __init__(self, kernel: AttentionKernel, knobs: Knobs, operands: tuple[Operand, ...]) -> None:
        super().__init__(kernel, knobs, operands)
        self.keys = int(knobs["keys"])

    def write(self) -> None:
        """Walk the keys once, or twice where the sum of the weights must be known first."""
        kernel, threads = self.kernel, self.threads
        blocks = -(-kernel.q_len // threads)
        with launch(kernel.batch * kernel.heads * blocks, threads) as (group, thread):
            self.thread = thread
            self.at(group // (blocks * kernel.heads), group // blocks % kernel.heads)
            first = bind(group % blocks * threads)
            self.real_query = bind(first + thread)
            self.query = bind(tirx.min(self.real_query, kernel.q_len - 1))
            self.place = bind(self.position(self.query))
            last = self.position(tirx.min(first + (threads - 1), kernel.q_len - 1))
            self.range = self.key_range(self.position(first), last)
            self.tile_k = shared(self.keys * kernel.head_dim)
            self.tile_v = shared(self.keys * kernel.value_dim)
            self._load_query()
            self.acc, self.peak, self.total = private(kernel.value_dim, 0.0), private(1, LOWEST), private(1, 0.0)
            if kernel.normaliser == "clipped_softmax":
                self._walk(self._measure, values=False)
            self._walk(self._mix, values=True)
            self._store()

    def _load_query(self) -> None:
        kernel = self.kernel
        self.own, base = private(kernel.head_dim), bind(self.query_place(self.query))
        with unrolled(kernel.head_dim) as k:
            put(self.own, self.rounded(self.q[base + k] * number(kernel.scale)), k)

    def _walk(self, body: Callable[[Expr, Buffer], None], *, values: bool) -> None:
        """Bring the keys in, a tile after the other; `body(first, scores)` sees each tile."""
        low, high = self.range
        tiles = -(-self.kernel.kv_len // self.keys)
        if isinstance(low, Expr) or isinstance(high, Expr):
            tiles = bind(tirx.max(high - low + (self.keys - 1), 0) // self.keys)
        with serial(0, tiles) as tile:
            first = bind(low + tile * self.keys)
            self._bring(first, self.tile_k, self.k, self.key_place, self.kernel.head_dim)
            if values:
                self._bring(first, self.tile_v, self.v, self.value_place, self.kernel.value_dim)
            barrier()
            body(first, self._scores(first))
            barrier()

    def _bring(self, first: Expr, tile: Buffer, source: Operand, place: Callable[[Expr], Expr], size: int) -> None:
        with strided(self.thread, self.threads, self.keys * size) as number_:
            key, element = bind(first + number_ // size), number_ % size
            value = guarded(key < self.kernel.kv_len, lambda: source[place(key) + element])
            put(tile, self.rounded(value), number_)

    def _scores(self, first: Expr) -> Buffer:
        kernel = self.kernel
        scores = private(self.keys)
        with serial(0, self.keys) as j:
            product = private(1, 0.0)
            with unrolled(kernel.head_dim) as k:
                add_to(product, self.own[k] * self.tile_k[j * kernel.head_dim + k], 0)
            key = bind(first + j)
            safe = tirx.min(key, kernel.kv_len - 1)
            score = self.score(product[0], self.query, self.place, safe)
            put(scores, tirx.Select(key < kernel.kv_len, score, number(HIDDEN)), j)
        return scores

    def _raise_peak(self, scores: Buffer) -> Expr:
        """Take the largest score into account; return the factor of what was summed before."""
        before = private(1)
        put(before, self.peak[0], 0)
        with serial(0, self.keys) as j:
            put(self.peak, tirx.max(self.peak[0], scores[j]), 0)
        factor = private(1)
        put(factor, tirx.exp(before[0] - self.peak[0]), 0)
        return factor[0]

    def _measure(self, first: Expr, scores: Buffer) -> None:
        del first
        put(self.total, self.total[0] * self._raise_peak(scores), 0)
        with serial(0, self.keys) as j:
            add_to(self.total, tirx.exp(scores[j] - self.peak[0]), 0)

    def _mix(self, first: Expr, scores: Buffer) -> None:
        del first
        kernel = self.kernel
        if kernel.normaliser == "softmax":
            factor = self._raise_peak(scores)
            put(self.total, self.total[0] * factor, 0)
            with unrolled(kernel.value_dim) as v:
                put(self.acc, self.acc[v] * factor, v)
        with serial(0, self.keys) as j:
            weight = private(1)
            put(weight, self._weight(scores[j]), 0)
            if kernel.normaliser == "softmax":
                add_to(self.total, weight[0], 0)
            put(weight, self.rounded(weight[0]), 0)
            with unrolled(kernel.value_dim) as v:
                add_to(self.acc, weight[0] * self.tile_v[j * kernel.value_dim + v], v)

    def _weight(self, score: Expr) -> Expr:
        if self.kernel.normaliser == "sigmoid":
            return _sigmoid(score)
        weight = tirx.exp(score - self.peak[0])
        return self.clipped(weight, self.total[0]) if self.kernel.normaliser == "clipped_softmax" else weight

    def _store(self) -> None:
        kernel = self.kernel
        factor = private(1, 1.0)
        if kernel.normaliser == "softmax":
            share = number(1.0) / tirx.max(self.total[0], number(0.5))
            put(factor, tirx.Select(self.total[0] > number(0.5), share, number(0.0)), 0)
        with branch(self.real_query < kernel.q_len):
            base = bind(self.out_place(self.query))
            with unrolled(kernel.value_dim) as v:
                self.out.put(self.acc[v] * factor[0], base + v)


class _Rows(_Site):
    """Writes the form for few queries: a work-group each.

    Scores are padded to whole rounds of the threads, as of hidden keys, so that all threads do the same.
    """

    def write(self) -> None:
        """Compute all scores of a query, then their weights, then the mixed value."""
        kernel, threads = self.kernel, self.threads
        self.rounds = -(-kernel.kv_len // threads)
        with launch(kernel.batch * kernel.heads * kernel.q_len, threads) as (group, thread):
            self.thread = thread
            self.at(group // (kernel.q_len * kernel.heads), group // kernel.q_len % kernel.heads)
            query = bind(group % kernel.q_len)
            scores, area = shared(self.rounds * threads), shared(threads)
            self._score_keys(scores, query)
            barrier()
            self._weigh(scores, area)
            with strided(thread, threads, kernel.value_dim) as element:
                total = private(1, 0.0)
                with serial(0, kernel.kv_len) as key:
                    weight = self.rounded(scores[key])
                    add_to(total, weight * self.rounded(self.v[self.value_place(key) + element]), 0)
                self.out.put(total[0], self.out_place(query) + element)

    def _score_keys(self, scores: Buffer, query: Expr) -> None:
        kernel = self.kernel
        position, base = bind(self.position(query)), bind(self.query_place(query))
        with serial(0, self.rounds) as turn:
            number_ = bind(turn * self.threads + self.thread)
            key = bind(tirx.min(number_, kernel.kv_len - 1))
            product, start = private(1, 0.0), bind(self.key_place(key))
            with serial(0, kernel.head_dim) as k:
                left = self.rounded(self.q[base + k] * number(kernel.scale))
                add_to(product, left * self.rounded(self.k[start + k]), 0)
            score = self.score(product[0], query, position, key)
            put(scores, tirx.Select(number_ < kernel.kv_len, score, number(HIDDEN)), number_)

    def _each(self, body: Callable[[Expr], None]) -> None:
        with serial(0, self.rounds) as turn:
            body(bind(turn * self.threads + self.thread))

    def _weigh(self, scores: Buffer, area: Buffer) -> None:
        """Turn the scores into weights where they lie."""
        kernel, partial = self.kernel, private(1, LOWEST)
        if kernel.normaliser == "sigmoid":
            self._each(lambda key: put(scores, _sigmoid(scores[key]), key))
            barrier()
            return
        self._each(lambda key: put(partial, tirx.max(partial[0], scores[key]), 0))
        peak = reduce_threads(partial[0], self.thread, self.threads, tirx.max, area)
        put(partial, number(0.0), 0)

        def power(key: Expr) -> None:
            weight = private(1)
            put(weight, tirx.exp(scores[key] - peak), 0)
            put(scores, weight[0], key)
            add_to(partial, weight[0], 0)

        self._each(power)
        total = reduce_threads(partial[0], self.thread, self.threads, _add, area)

        def share(key: Expr) -> None:
            if kernel.normaliser == "clipped_softmax":
                put(scores, self.clipped(scores[key], total), key)
            else:
                part = scores[key] / tirx.max(total, number(0.5))
                put(scores, tirx.Select(total > number(0.5), part, number(0.0)), key)

        self._each(share)
        barrier()
