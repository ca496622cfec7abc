"""Fused attention: scores, mask, softmax and weighted sum of one block of queries without leaving the cache.

B batch, T queries, S keys, H query heads, G key heads, K and V head sizes, R queries in a block. Queries lie along the
lanes: a block keeps its queries transposed `[K, R]`, so scores `[S, R]`, softmax and outputs `[V, R]` are all vertical
and keys and values are read as they lie. Keys come in chunks with a running maximum and sum (Milakov and Gimelshein
2018), so memory does not grow with S. Blocks of keys that the mask hides are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import PrimFunc
from codegen.kernels._attention_rows import RowWriter
from codegen.kernels._attention_words import WordBlockWriter
from codegen.kernels._attention_writers import BlockWriter
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.emit import build_function, ceil_div
from codegen.kernels.vector_math import LOG2_E
from ir.ops.attention import Normaliser
from ir.ops.contraction import Precision
from ir.types import TensorType

FLOAT_BYTES: Final = 4
SCORE_BYTES: Final = 16 * 1024  # scores of a chunk stay in half of the first-level cache
CLIPPED_SCORE_BYTES: Final = 256 * 1024  # those of a clipped softmax, which more than one chunk computes twice: second
ROW_QUERIES: Final = 3  # up to so many queries, vectors of queries would be mostly empty
LOADS_COST: Final = {1: 1.2, 2: 1.03, 3: 1.0}
ROW_COST: Final = 1.7  # time of a single query, in that of a query of a full block
ROUNDED_ROW_COST: Final = 3.0
SPLIT_KEYS: Final = 128  # fewer keys a thread take no longer than starting it


@dataclass(frozen=True)
class AttentionKernel(Kernel):
    """`out = normaliser(scale * q k^T + bias, masked) v`; a query that sees no key gives zeros.

    Operands: q `[B*T, H*K]`, k `[B*S, G*K]`, v `[B*S, G*V]` (each maybe a window of a wider buffer), then `offset`
    (int32 scalar) if there is one, then the bias, of a shape that broadcasts to `[B, H, T, S]`; out `[B*T, H*V]`.
    Query t stands at position `offset + t`, key s at s; without `offset` the queries are the last T of S positions.

    Attributes:
        batch: Sequences.
        q_len: Queries a sequence.
        kv_len: Keys a sequence.
        heads: Query heads.
        kv_heads: Key heads; each serves `heads / kv_heads` query heads.
        head_dim: Elements of a query or key.
        value_dim: Elements of a value.
        scale: Factor of the scores.
        causal: Whether keys after the query are hidden.
        window: Keys at this distance or farther are hidden.
        alibi_slopes: One slope a head; the score falls by slope times distance.
        bias_shape: Shape of the additive bias, four dimensions, each full or 1.
        offset: Whether the first query's position is an operand.
        q_view: Buffer that holds the queries.
        k_view: Buffer that holds the keys.
        v_view: Buffer that holds the values.
        precision: `bfloat16` rounds the scaled queries, the keys, the weights and the values, and sums in float32.
        out_dtype: How the output is stored.
        normaliser: What makes weights of scores, as in `ir.ops.attention.Attention`.
        shift: What a sigmoid adds to the scores.
        stretch: What a clipped softmax is stretched to.
        bias_known: Whether the bias is known at build time; it is then packed with queries along the lanes.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = False
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    offset: bool = False
    q_view: View | None = None
    k_view: View | None = None
    v_view: View | None = None
    precision: Precision = "float32"
    out_dtype: str = "float32"
    normaliser: Normaliser = "softmax"
    shift: float = 0.0
    stretch: tuple[float, float] = (0.0, 1.0)
    bias_known: bool = False

    family: ClassVar[str] = "attention"

    @property
    def views(self) -> tuple[View, View, View]:
        """Where q, k and v lie, defaults filled in."""
        return (
            self.q_view or View(self.heads * self.head_dim),
            self.k_view or View(self.kv_heads * self.head_dim),
            self.v_view or View(self.kv_heads * self.value_dim),
        )

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands q, k, v, offset, bias."""
        q, k, v = self.views
        q_rows, k_rows = self.batch * self.q_len, self.batch * self.kv_len
        operands = [TensorType((q_rows, q.width)), TensorType((k_rows, k.width)), TensorType((k_rows, v.width))]
        if self.offset:
            operands.append(TensorType((), "int32"))
        if self.bias_shape:
            operands.append(TensorType(self.bias_shape))
        return tuple(operands)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The mixed values."""
        return (TensorType((self.batch * self.q_len, self.heads * self.value_dim), self.out_dtype),)

    def can_round(self, index: int) -> bool:
        """The output may be rounded where blocks of queries are mixed from words."""
        return index == 0 and self._on_words

    def in_bfloat16(self, inputs: frozenset[int], outputs: frozenset[int]) -> AttentionKernel:
        """Return the attention whose output is stored as bfloat16."""
        del inputs
        return replace(self, out_dtype="bfloat16") if 0 in outputs else self

    @property
    def _on_words(self) -> bool:
        """Whether products are of rounded pairs: single rows have no time to win, so their products stay float32."""
        return self.precision == "bfloat16" and self.q_len > ROW_QUERIES

    @property
    def flops(self) -> int:
        """Multiply-adds and exponentials of the pairs that the mask lets through (all of S where it is not known)."""
        distance_TS = np.arange(self.q_len)[:, None] + self.kv_len - self.q_len - np.arange(self.kv_len)
        pairs = int(self._visible(distance_TS).sum())
        return self.batch * self.heads * pairs * (2 * self.head_dim + 2 * self.value_dim + 4)

    def _visible(self, distance_TS: Array) -> Array:
        visible_TS = np.ones(distance_TS.shape, bool)
        if self.causal:
            visible_TS &= distance_TS >= 0
        if self.window is not None:
            visible_TS &= np.abs(distance_TS) < self.window
        return visible_TS

    # Packing

    def packs(self, index: int) -> bool:
        """A known bias of single queries is packed."""
        of_queries = self.bias_shape is not None and self.bias_shape[2] > 1
        return of_queries and self.bias_known and self.q_len > ROW_QUERIES and index == len(self.inputs) - 1

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """A bias `[B, H, S, T]`, T padded to what the blocks load."""
        shape = self.inputs[index].shape
        if not self.packs(index):
            return shape
        width = int(knobs["vectors"]) * isa.lanes
        covered = ceil_div(self.q_len - int(knobs["tail"]), width) * width
        padded = ceil_div(max(covered, self.q_len), isa.lanes) * isa.lanes
        return (*shape[:2], shape[3], padded)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Transpose a bias, in units of the scores."""
        if not self.packs(index):
            return None
        packed = np.zeros(self.packed_shape(index, isa, knobs), np.float32)
        packed[..., : self.q_len] = np.swapaxes(array, -1, -2) * LOG2_E
        return packed

    # Knobs

    def knobs(self, isa: Isa) -> Knobs:
        """Choose queries along the lanes (blocks) unless there are only a few (rows, as in decoding)."""
        if self.q_len <= ROW_QUERIES:
            return self._row_knobs(isa)
        return min(self._block_knobs(isa), key=lambda knobs: self._cycles(isa, knobs))

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other shares of heads, or block widths and chunk lengths."""
        space = [self.knobs(isa)]
        if self.q_len <= ROW_QUERIES:
            shares = [count for count in range(1, self.kv_heads + 1) if self.kv_heads % count == 0]
            others = [{"path": "rows", "shares": count, "splits": 1} for count in shares]
            space += [knobs for knobs in others if knobs not in space]
        for knobs in self._block_knobs(isa):
            for chunk in (int(knobs["chunk"]), 2 * int(knobs["chunk"]), 4 * int(knobs["chunk"])):
                if {**knobs, "chunk": chunk} not in space:
                    space.append({**knobs, "chunk": chunk})
        return space

    def _row_knobs(self, isa: Isa) -> Knobs:
        """Share heads out evenly over the threads, in as few shares as that takes, else split the keys."""
        shares = [count for count in range(1, self.kv_heads + 1) if self.kv_heads % count == 0]
        even = [count for count in shares if self.batch * count % isa.threads == 0]
        if even:
            return {"path": "rows", "shares": even[0], "splits": 1}
        splits = 1 if self.normaliser == "clipped_softmax" or self.kv_len < SPLIT_KEYS else isa.threads
        return {"path": "rows", "shares": shares[-1] if splits == 1 else 1, "splits": splits}

    def _block_knobs(self, isa: Isa) -> list[dict[str, int | str | bool]]:
        """List blocks of one to three vectors of queries, with the key tile that the registers allow."""
        result: list[dict[str, int | str | bool]] = []
        rest = self.q_len % isa.lanes
        score_bytes = CLIPPED_SCORE_BYTES if self.normaliser == "clipped_softmax" else SCORE_BYTES
        for vectors in (2, 3, 1):
            keys = min((isa.registers - 1 - vectors) // vectors, 8 if vectors > 1 else 12)
            chunk = max(keys, score_bytes // (vectors * isa.lanes * FLOAT_BYTES) // keys * keys)
            if self.kv_len <= 2 * chunk:
                chunk = ceil_div(self.kv_len, keys) * keys
            tails = (0, rest) if 0 < rest <= isa.lanes // 2 and self.q_len > isa.lanes else (0,)
            for tail in tails:
                result.append({"path": "blocks", "vectors": vectors, "keys": keys, "chunk": chunk, "tail": tail})
        return result

    def _cycles(self, isa: Isa, knobs: Knobs) -> float:
        """Estimate the work: padded queries times keys seen, dearer where a key is loaded for fewer vectors."""
        vectors, tail = int(knobs["vectors"]), int(knobs["tail"])
        width = vectors * isa.lanes
        blocks = ceil_div(self.q_len - tail, width)
        keys = self.kv_len / 2 + width / 2 if self.causal else self.kv_len
        if self.window is not None:
            keys = min(keys, self.window * (1 if self.causal else 2) + width)
        rounds = ceil_div(self.batch * self.heads * blocks, isa.threads)
        single = (ROUNDED_ROW_COST if self._on_words else ROW_COST) * tail * self.batch * self.heads / isa.threads
        return (rounds * width * LOADS_COST[vectors] + single) * keys

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the block or the row form."""
        writer = RowWriter if knobs["path"] == "rows" else WordBlockWriter if self._on_words else BlockWriter
        return build_function(self, isa, knobs, lambda *buffers: writer(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Compute the full score matrix in float64."""
        sizes = ((self.q_len, self.heads, self.head_dim), (self.kv_len, self.kv_heads, self.head_dim))
        sizes = (*sizes, (self.kv_len, self.kv_heads, self.value_dim))
        q_BTHK, k_BSGK, v_BSGV = (
            np.asarray(array, np.float64)[:, view.offset : view.offset + heads * size].reshape(-1, length, heads, size)
            for array, view, (length, heads, size) in zip(arrays, self.views, sizes, strict=False)
        )
        group = self.heads // self.kv_heads
        k_BSHK, v_BSHV = np.repeat(k_BSGK, group, axis=2), np.repeat(v_BSGV, group, axis=2)
        scores_BHTS = self.scale * np.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK)
        first = int(arrays[3]) if self.offset else self.kv_len - self.q_len
        distance_TS = first + np.arange(self.q_len)[:, None] - np.arange(self.kv_len)
        if self.bias_shape:
            scores_BHTS = scores_BHTS + arrays[-1]
        if self.alibi_slopes:
            scores_BHTS = scores_BHTS - np.array(self.alibi_slopes)[:, None, None] * np.abs(distance_TS)
        weights_BHTS = self._weigh(np.where(self._visible(distance_TS), scores_BHTS, -np.inf))
        out = np.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)
        return (out.reshape(self.outputs[0].shape),)

    def _weigh(self, scores_BHTS: Array) -> Array:
        """Return the weights of scores, of which those of hidden keys are minus infinity."""
        if self.normaliser == "sigmoid":
            return np.exp(-np.logaddexp(0.0, -(scores_BHTS + self.shift)))
        highest = np.max(scores_BHTS, axis=-1, keepdims=True)
        weights_BHTS = np.exp(scores_BHTS - np.where(np.isfinite(highest), highest, 0.0))
        total = weights_BHTS.sum(axis=-1, keepdims=True)
        weights_BHTS = weights_BHTS / np.where(total > 0, total, 1.0)
        if self.normaliser == "softmax":
            return weights_BHTS
        low, high = self.stretch
        return np.clip((high - low) * weights_BHTS + low, 0.0, 1.0)
