"""What both forms of fused attention share: operands, head indices, positions, masks, biases and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from codegen._tvm import Buffer, Expr, tirx
from codegen.kernels.base import Isa, Knobs
from codegen.kernels.bfloat16 import Bfloat16, store_vector
from codegen.kernels.emit import Index, Vectors, bind, flat_view, load_at, select_constant
from codegen.kernels.vector_math import LOG2_E, exp2_nonpositive, splat_int

if TYPE_CHECKING:
    from codegen.kernels.attention import AttentionKernel

# Hidden scores lie far below the lowest running maximum, so their weight is 2^-125 at most, even in a row all hidden.
# All scores are in units of log2(e), folded into the scaled queries, so that weights are powers of 2. A query that
# sees a key has a sum of weights of at least 1, its largest.
HIDDEN: Final = -1e30
LOWEST: Final = -1e29
LEAST_SUM: Final = 0.5
DEGREE: Final = 5  # of the polynomial in exponentials: its error is that of one float32 rounding


class Site:
    """Operands of a kernel, and the batch entry, head and query at hand."""

    query: Expr
    position: Expr

    def __init__(self, kernel: AttentionKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.isa, self.vec, self.knobs, self.buffers = kernel, isa, Vectors(isa.lanes), knobs, buffers
        self.q, self.k, self.v, *rest = buffers
        self.out = rest.pop()
        self.bias = rest.pop() if kernel.bias_shape else None
        self.offset = rest.pop() if kernel.offset else None
        self.bias_is_packed = kernel.packs(len(kernel.inputs) - 1)
        self.degree = DEGREE

    def _place(self, unit: Expr, blocks: int) -> Expr:
        """Split a work unit into batch entry, head and block; return the block."""
        heads = self.kernel.heads
        self.at(bind(unit // (blocks * heads)), bind(unit // blocks % heads))
        return unit % blocks

    def at(self, batch: Expr, head: Expr) -> None:
        """Turn to a head of a batch entry."""
        kernel = self.kernel
        self.batch, self.head = batch, head
        kv_head = self.head // (kernel.heads // kernel.kv_heads)
        q_view, k_view, v_view = kernel.views
        self.q_column = bind(q_view.offset + self.head * kernel.head_dim)
        self.k_column = bind(k_view.offset + kv_head * kernel.head_dim)
        self.v_column = bind(v_view.offset + kv_head * kernel.value_dim)
        if kernel.alibi_slopes:
            self.slope = bind(select_constant(self.head, [slope * LOG2_E for slope in kernel.alibi_slopes]))
        if self.bias is not None:
            self.flat_bias = flat_view(self.bias)
            assert kernel.bias_shape
            batches, heads, *_ = kernel.bias_shape
            size = self.flat_bias.shape[0] // (batches * heads)
            plane = (self.batch if batches > 1 else 0) * heads + (self.head if heads > 1 else 0)
            self.bias_base = bind(plane * size + tirx.const(0, "int32"))

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

    def _hide(self, score: Expr, key: Expr, position: Expr, *, masked: bool) -> Expr:
        """Lower scores by distance, and hide what the mask hides; keys and positions are int32 vectors."""
        kernel, lanes = self.kernel, self.vec.lanes
        distance = position - key
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

    def _store_row(self, values: Expr, row: Index, column: Index, live: int | None) -> None:
        if self.kernel.out_dtype == "bfloat16":
            store_vector(self.out, Bfloat16(self.isa).round(values), self.vec.lanes, row, column, live=live)
        else:
            self.vec.store(self.out, values, row, column, live=live)

    @property
    def _shift(self) -> float:
        return self.kernel.shift * LOG2_E if self.kernel.normaliser == "sigmoid" else 0.0

    def _bias_of_key(self, query: Index, key: Index) -> Expr:
        """Return the bias of a key for as many queries as there are lanes, times log2(e)."""
        assert self.kernel.bias_shape
        _, _, queries, keys = self.kernel.bias_shape
        lanes, factor = self.vec.lanes, self.vec.splat(LOG2_E)
        column = key if keys > 1 else 0
        if self.bias_is_packed:
            return self.vec.load(self.flat_bias, self.bias_base + column * self._bias_stride() + query)
        if queries == 1:
            return self.vec.splat(self.flat_bias[self.bias_base + column]) * factor
        inside = tirx.min(self.vec.lane_numbers(query), splat_int(queries - 1, lanes)) * splat_int(keys, lanes)
        return load_at(self.flat_bias, inside + splat_int(self.bias_base + column, lanes)) * factor

    def _bias_of_query(self, query: Index, key: Index) -> Expr:
        """Return the bias of a query for as many keys as there are lanes, times log2(e)."""
        assert self.kernel.bias_shape
        _, _, queries, keys = self.kernel.bias_shape
        lanes, factor = self.vec.lanes, self.vec.splat(LOG2_E)
        if self.bias_is_packed:
            inside = splat_int(0, lanes)
            if keys > 1:
                inside = tirx.min(self.vec.lane_numbers(key), splat_int(keys - 1, lanes))
            row = inside * splat_int(self._bias_stride(), lanes)
            return load_at(self.flat_bias, row + splat_int(self.bias_base + query, lanes))
        first = self.bias_base + (query * keys if queries > 1 else 0)
        if keys == 1:
            return self.vec.splat(self.flat_bias[first]) * factor
        live = tirx.min(keys - key, lanes) if keys % lanes else None
        return self.vec.load(self.flat_bias, first + key, live=live) * factor

    def _bias_stride(self) -> int:
        """Elements between the biases of two keys of a packed bias."""
        return self.kernel.packed_shape(len(self.kernel.inputs) - 1, self.isa, self.knobs)[3]

    def _power(self, exponent: Expr) -> Expr:
        return exp2_nonpositive(exponent, self.degree)

    def _sigmoid(self, score: Expr) -> Expr:
        """1 / (1 + 2^-score)."""
        score, one = bind(score), self.vec.splat(1.0)
        small = bind(self._power(tirx.min(score, self.vec.splat(0.0) - score)))
        return tirx.Select(score >= self.vec.splat(0.0), one, small) / (one + small)

    def _clip(self, weight: Expr, factor: Expr) -> Expr:
        """Stretch a weight, that `factor` brings to the stretched range, and clip it to [0, 1]."""
        stretched = weight * factor + self.vec.splat(self.kernel.stretch[0])
        return tirx.max(tirx.min(stretched, self.vec.splat(1.0)), self.vec.splat(0.0))

    def _clip_factor(self, total: Expr) -> Expr:
        """Return what weights are multiplied by before they are clipped; 0 where no key is seen."""
        low, high = self.kernel.stretch
        share = self.vec.splat(high - low) / total
        return tirx.Select(total > self.vec.splat(LEAST_SUM), share, self.vec.splat(0.0))
