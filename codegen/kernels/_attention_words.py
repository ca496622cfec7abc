"""Fused attention on bfloat16 words: queries, keys, weights and values rounded, softmax and sums in float32.

A unit of parallel work is a head with some of its blocks of queries. Keys and values are rounded once for the unit, not
for each block: keys in pairs along the head size, values in pairs of neighbouring keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels._attention_writers import BlockWriter
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.bfloat16 import WORD, Bfloat16, load_vector, store_vector
from codegen.kernels.emit import (
    Index,
    Register,
    bind,
    branch,
    ceil_div,
    choose,
    column_vectors,
    parallel_block,
    scratch,
    serial,
)
from codegen.kernels.vector_math import LOG2_E, splat_int

if TYPE_CHECKING:
    from codegen.kernels.attention import AttentionKernel


HALF_OF_LAST: Final = 0x8000  # added to the bits of a weight, none of which is negative, it rounds the upper half
UPPER_HALF: Final = -0x10000
TWO_ONES: Final = 0x3F803F80
ROUNDED_DEGREE: Final = 3  # weights are rounded to 8 bits


class WordBlockWriter(BlockWriter):
    """Blocks of queries along the lanes, products of pairs."""

    def __init__(self, kernel: AttentionKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        super().__init__(kernel, isa, knobs, buffers)
        self.words = Bfloat16(isa)
        self.degree = ROUNDED_DEGREE
        self.threads = isa.threads
        self.head_words = ceil_div(kernel.head_dim, WORD)
        self.padded_keys = ceil_div(kernel.kv_len, self.tile_keys) * self.tile_keys
        self.padded_values = ceil_div(kernel.value_dim, isa.lanes) * isa.lanes

    def write(self) -> None:
        """Loop over batch, heads and parts of their blocks."""
        kernel = self.kernel
        blocks = self.blocks
        heads = kernel.batch * kernel.heads
        even = heads % self.threads == 0 or heads >= 4 * self.threads
        parts = 1 if even else min(blocks, self.threads)
        with self.words.instructions(), parallel_block(heads * parts, flops=kernel.flops) as unit:
            part = self._place(unit, parts)
            self.key_words = scratch((self.padded_keys, self._key_stride()), "int32")
            self.value_words = scratch((self.padded_keys // WORD, self.padded_values), "int32")
            self._round_keys()
            self._round_values()
            with serial(0, (blocks - part + (parts - 1)) // parts if parts > 1 else blocks) as index:
                self._block(bind(part + index * parts))
            if self.blocked < kernel.q_len:
                with branch(part >= parts - 1):
                    self._write_tail()

    def _key_stride(self) -> int:
        """Words between two keys, in whole vectors of words."""
        words = self.vec.lanes // WORD
        return ceil_div(self.head_words, words) * words

    def _allocate(self) -> None:
        super()._allocate()
        elements = ceil_div(self.kernel.head_dim, self.vec.lanes) * self.vec.lanes
        self.query_words = scratch((elements // WORD, self.width), "int32")
        self.weight_words = scratch((self._chunk_keys() // WORD, self.width), "int32")

    # Operands as words

    def _round_keys(self) -> None:
        """Pairs along the head size; an odd last element is paired with zero."""
        vec, kernel = self.vec, self.kernel
        with serial(0, kernel.kv_len) as key:
            row = self.batch * kernel.kv_len + key
            for c, live in enumerate(column_vectors(kernel.head_dim, vec.lanes)):
                numbers = vec.load(self.k, row, self.k_column + c * vec.lanes, live=live)
                half = vec.lanes // WORD
                store_vector(self.key_words, self.words.round_words(numbers), half, key, c * half)

    def _round_values(self) -> None:
        """Pairs of neighbouring keys; an odd last key is paired with zero."""
        pairs, rest = divmod(self.kernel.kv_len, WORD)
        with serial(0, pairs) as pair:
            self._round_value_pair(pair, single=False)
        if rest:
            self._round_value_pair(pairs, single=True)

    def _round_value_pair(self, pair: Index, *, single: bool) -> None:
        vec, kernel = self.vec, self.kernel
        row = self.batch * kernel.kv_len + pair * WORD
        for c, live in enumerate(column_vectors(kernel.value_dim, vec.lanes)):
            column = self.v_column + c * vec.lanes
            even = bind(vec.load(self.v, row, column, live=live))
            odd = vec.splat(0.0) if single else bind(vec.load(self.v, row + 1, column, live=live))
            store_vector(self.value_words, self.words.pair(even, odd), vec.lanes, pair, c * vec.lanes)

    def _load_queries(self) -> None:
        """Transpose the block's queries into words `[K / 2, R]`, scaled before they are rounded."""
        kernel, vec = self.kernel, self.vec

        def square(v: Index, element: Index, live: int | None) -> None:
            rows = []
            for i in range(vec.lanes):
                query = tirx.min(self.first_query + v * vec.lanes + i, kernel.q_len - 1)
                row = self.batch * kernel.q_len + query
                rows.append(
                    vec.load(self.q, row, self.q_column + element, live=live) * vec.splat(kernel.scale * LOG2_E)
                )
            columns = vec.transpose(rows)
            for i in range(0, vec.lanes, WORD):
                words = self.words.pair(columns[i], columns[i + 1])
                store_vector(self.query_words, words, vec.lanes, element // WORD + i // WORD, v * vec.lanes)

        self._for_squares(kernel.head_dim, square)

    # Products

    def _score_tile(self, key: Expr, count: int, start: Expr) -> None:
        vec, kernel = self.vec, self.kernel
        sums = self._start_tile(key, count, start)
        with serial(0, self.head_words) as d:
            queries = [load_vector(self.query_words, vec.lanes, d, v * vec.lanes) for v in range(self.vectors)]
            for i, line in enumerate(sums):
                self._add_pairs(line, splat_int(self.key_words[key + i, d], vec.lanes), queries)
        if not kernel.causal and kernel.window is None:
            self._keep_scores(sums, key, start, masked=False)
            return
        choose(
            self._touches_mask(key, count),
            lambda: self._keep_scores(sums, key, start, masked=True),
            lambda: self._keep_scores(sums, key, start, masked=False),
        )

    def _add_pairs(self, line: list[Register], value: Expr, others: list[Expr]) -> None:
        for register, other in zip(line, others, strict=True):
            register.set(self.words.dot(register.get(), value, other))

    def _weigh(self, first: Expr, stop: Expr) -> None:
        """Turn the chunk's scores into pairs of weights; those of a softmax are added to the running sum as rounded."""
        with serial(first // WORD, stop // WORD) as pair:
            for v in range(self.vectors):
                self._keep_pair(pair, v, [self._weight(pair * WORD, v), self._weight(pair * WORD + 1, v)])
        if self.kernel.kv_len % WORD:  # then the last key of all stands alone
            with serial(stop // WORD, (stop + 1) // WORD) as pair:
                for v in range(self.vectors):
                    self._keep_pair(pair, v, [self._weight(pair * WORD, v)])

    def _keep_pair(self, pair: Index, v: int, weights: list[Expr]) -> None:
        lanes, total = self.vec.lanes, self.total[v]
        rounded = [tirx.reinterpret(f"int32x{lanes}", weight) + splat_int(HALF_OF_LAST, lanes) for weight in weights]
        words = (rounded[0] >> splat_int(16, lanes)) | (
            (rounded[1] & splat_int(UPPER_HALF, lanes)) if len(rounded) > 1 else splat_int(0, lanes)
        )
        store_vector(self.weight_words, words, lanes, pair, v * lanes)
        if self.kernel.normaliser == "softmax":
            total.set(self.words.dot(total.get(), words, splat_int(TWO_ONES, lanes)))

    def _mix(self, element: Index, count: int, start: Expr, first: Expr, stop: Expr) -> None:
        """Add the chunk's weighted values to some elements of the outputs."""
        vec = self.vec
        sums = [[vec.register() for _ in range(self.vectors)] for _ in range(count)]
        cells = [(i, v, register) for i, line in enumerate(sums) for v, register in enumerate(line)]
        for i, v, register in cells:
            register.set(self._mixed_so_far(element + i, v))
        first_pair = start // WORD
        with serial(first // WORD, (stop + 1) // WORD) as pair:
            weights = [load_vector(self.weight_words, vec.lanes, pair, v * vec.lanes) for v in range(self.vectors)]
            for i, line in enumerate(sums):
                self._add_pairs(line, splat_int(self.value_words[first_pair + pair, element + i], vec.lanes), weights)
        for i, v, register in cells:
            vec.store(self.mixed, register.get(), element + i, v * vec.lanes)
