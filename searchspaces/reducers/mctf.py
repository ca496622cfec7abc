"""Tokens fused in pairs by several criteria."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Reducer, option
from ir.op import Array

_SMALL = 1e-12  # keeps the logarithms of no similarity and no attention finite
_NEVER = -1e9  # score of a pair that must not be fused


class Mctf(Reducer):
    """Multi-criteria token fusion (Lee et al. 2024, MCTF): the most fitting pairs of tokens become one each.

    Even and odd tokens are matched: W_ij = ((cos(x_i, x_j) + 1) / 2)^(1 / t_s) (a_i a_j)^(-1 / t_i), a the attention
    that a token receives, averaged over heads and queries. First half of the `merged` tokens, the even ones of largest
    W, go to the odd ones that fit best; then, `bidirectional`, the other half, odd ones, to even ones that are left. A
    fused token is the mean of its members, weighted by a. The class token, number 0, stays. Result: the even tokens
    left, then the odd ones. A temperature of 0 leaves its criterion out; without the second, one way and unweighted it
    is ToMe's matching (Bolya et al. 2023). The criterion of size, which needs the sizes of earlier layers, is left out.
    """

    paper = "Lee et al. 2024, Multi-criteria Token Fusion with One-step-ahead Attention, arXiv 2403.10030"
    needs_attention = True
    cases = (
        Case({"merged": 3}, time=9),
        Case({"merged": 4, "bidirectional": False, "info_temperature": 0.0, "weighted": False}, time=12, d_model=5),
        Case({"merged": 9, "info_temperature": 2.0}, time=6, batch=1),
        Case({"merged": 1}, time=7),
    )

    merged: int = option(16, minimum=1, maximum=4096, doc="Tokens fewer; at most half of those beside the class token.")
    similarity_temperature: float = option(1.0, minimum=0.0, maximum=1000.0, doc="t_s; 0 leaves similarity out.")
    info_temperature: float = option(20.0, minimum=0.0, maximum=1000.0, doc="t_i; 0 leaves attention out.")
    bidirectional: bool = option(True, doc="Fuse half of them from odd into even tokens.")
    weighted: bool = option(True, doc="Weigh the members of a token by the attention that they receive.")

    def _counts(self, tokens: int) -> tuple[int, int]:
        """Even tokens that go, and odd ones."""
        fewer = min(self.merged, (tokens - 1) // 2)
        return (fewer // 2, fewer - fewer // 2) if self.bidirectional else (fewer, 0)

    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        batch, tokens, d_model = x.shape
        first, second = self._counts(tokens)
        received = b.reshape(b.mean(weights, 1, 2), batch, tokens, 1)
        scores = self._scores(b, x, received)
        members = b.concat(2, x * received, received) if self.weighted else b.pad(x, 2, 0, 1, 1.0)
        even, odd = (b.slice(members, 1, start, tokens, 2) for start in (0, 1))
        stay = [b.constant(np.array([list(range(half.shape[1]))] * batch)) for half in (even, odd)]
        if first:
            gone, moves = _moves(b, scores, first)
            odd = odd + b.matmul(moves, even, transpose_a=True)
            scores = scores + b.reshape(gone, batch, -1, 1) * _NEVER
            stay[0] = _others(b, gone, first)
        if second:
            gone, moves = _moves(b, b.transpose(scores, 0, 2, 1), second)
            even = even + b.matmul(moves, odd, transpose_a=True)
            stay[1] = _others(b, gone, second)
        places = b.concat(1, stay[0], stay[1] + b.constant(np.array(even.shape[1])))
        fused = b.gather(b.concat(1, even, odd), b.reshape(places, batch, -1, 1), 1)
        return b.slice(fused, 2, 0, d_model) / b.slice(fused, 2, d_model, d_model + 1)

    def _scores(self, b: Builder, x: Tensor, received: Tensor) -> Tensor:
        """Logarithms of W `[B, even, odd]`; never for the class token."""
        tokens = x.shape[1]
        pairs = np.zeros((1, (tokens + 1) // 2, tokens // 2))
        pairs[:, 0] = _NEVER
        scores = b.constant(pairs)
        if self.similarity_temperature:
            unit = x * b.rsqrt(b.sum(b.square(x), -1, keepdims=True) + _SMALL)
            even, odd = (b.slice(unit, 1, start, tokens, 2) for start in (0, 1))
            alike = (b.matmul(even, odd, transpose_b=True) + 1.0) * 0.5
            scores = scores + b.log(alike + _SMALL) * (1.0 / self.similarity_temperature)
        if self.info_temperature:
            rare = b.log(b.maximum(received, _SMALL)) * (-1.0 / self.info_temperature)
            even, odd = (b.slice(rare, 1, start, tokens, 2) for start in (0, 1))
            scores = scores + even + b.transpose(odd, 0, 2, 1)
        return scores if scores.shape[0] == x.shape[0] else b.broadcast(scores, x.shape[0], *pairs.shape[1:])

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        assert weights is not None
        received = weights.mean(axis=(1, 2))
        return np.stack([self._fuse(tokens, a) for tokens, a in zip(x, received, strict=True)])

    def _fuse(self, x: Array, a: Array) -> Array:
        """The tokens left of `[T, D]`, pair after pair."""
        first, second = self._counts(len(x))
        unit = x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + _SMALL)

        def fit(i: int, j: int) -> float:
            value = 1.0
            if self.similarity_temperature:
                value *= float((unit[i] @ unit[j] + 1.0) / 2.0) ** (1.0 / self.similarity_temperature)
            if self.info_temperature:
                value *= float(a[i] * a[j]) ** (-1.0 / self.info_temperature)
            return value

        even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        members = {number: [number] for number in range(len(x))}
        best = {i: max(odd, key=lambda j, i=i: fit(i, j)) for i in even[1:]}
        for i in sorted(best, key=lambda i: -fit(i, best[i]))[:first]:
            members[best[i]] += members.pop(i)
        even = [i for i in even if i in members]
        best = {j: max(even[1:], key=lambda i, j=j: fit(i, j)) for j in odd} if second else {}
        for j in sorted(best, key=lambda j: -fit(best[j], j))[:second]:
            members[best[j]] += members.pop(j)
        share = a if self.weighted else np.ones_like(a)
        return np.stack(
            [np.average(x[members[n]], axis=0, weights=share[members[n]]) for n in even + odd if n in members]
        )


def _moves(b: Builder, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which tokens go, 1 or 0 `[B, N]`, and where each goes, `[B, N, M]`, by scores `[B, N, M]`."""
    batch, sources, targets = scores.shape
    best, where = b.top_k(scores, 1)
    _, chosen = b.top_k(b.reshape(best, batch, sources), count)
    one, numbers = b.constant(1.0), b.constant(np.reshape(np.array(range(sources)), (1, 1, sources)))
    goes = b.sum(b.where(b.equal(b.reshape(chosen, batch, count, 1), numbers), one, 0.0), 1)
    columns = b.constant(np.reshape(np.array(range(targets)), (1, 1, targets)))
    return goes, b.where(b.equal(where, columns), one, 0.0) * b.reshape(goes, batch, sources, 1)


def _others(b: Builder, goes: Tensor, count: int) -> Tensor:
    """Which tokens stay where some go, `[B, N]`, in order."""
    tokens = goes.shape[1]
    order = b.constant(np.reshape(np.array(range(tokens, 0, -1), np.float32), (1, tokens)))
    _, places = b.top_k(order - goes * float(2 * tokens), tokens - count)
    return places
