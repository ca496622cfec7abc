"""Tokens as a matrix times tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Reducer, option
from ir.op import Array
from searchspaces import reference

Rule = Literal["prune", "merge", "many_to_many"]
_SMALL = 1e-12  # keeps the length of a zero token from dividing by zero


class TokenTransform(Reducer):
    """Fewer tokens as one product Y = W X (Zeng et al. 2025, Token Transforming).

    The first token stays. Of the N others the M = ceil(keep * N) that all tokens attend most, over heads, are chosen.
    `prune`: rows of W are one-hot. `merge`: each token goes to the chosen one that is most like it by cosine, and the
    members of each are averaged. `many_to_many`: w_m = softmax_n(cos(x_m, x_n) / temperature). No parameters, no
    training; nothing changes at keep 1.
    """

    paper = "Zeng et al. 2025, Token Transforming: A Unified and Training-Free Token Compression Framework"
    needs_attention = True
    cases = (
        Case({"keep": 0.5, "rule": "prune"}),
        Case({"keep": 0.5, "rule": "merge"}, time=9),
        Case({"keep": 0.6, "rule": "many_to_many"}, batch=1, time=8, d_model=5),
        Case({"keep": 1.0}, time=5),
    )

    keep: float = option(0.7, minimum=0.01, maximum=1.0, doc="Tokens that are left over tokens there were.")
    rule: Rule = option("many_to_many", choices=("prune", "merge", "many_to_many"), doc="What a new token is made of.")
    temperature: float = option(0.1, minimum=1e-3, maximum=100.0, doc="Divides similarities: smaller mixes fewer.")

    def _kept(self, tokens: int) -> int:
        return math.ceil(self.keep * (tokens - 1))

    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        batch, tokens, _ = x.shape
        others_count, kept = tokens - 1, self._kept(tokens)
        if kept == others_count:
            return x
        first, others = b.split(x, 1, 1, others_count)
        received = b.slice(b.mean(weights, 1, 2), 1, 1, tokens)
        _, places = b.top_k(received, kept)
        numbers = b.constant(np.expand_dims(np.arange(others_count), (0, 1)))
        one = b.constant(1.0)
        one_hot = b.where(b.equal(b.reshape(places, batch, kept, 1), numbers), one, 0.0)
        if self.rule == "prune":
            return b.concat(1, first, b.matmul(one_hot, others))
        unit = others * b.rsqrt(b.sum(b.square(others), -1, keepdims=True) + _SMALL)
        alike = b.matmul(b.matmul(one_hot, unit), unit, transpose_b=True)
        if self.rule == "many_to_many":
            return b.concat(1, first, b.matmul(b.softmax(alike * (1.0 / self.temperature)), others))
        # a chosen token is its own best match: no similarity is above 1
        members = b.where(b.equal(alike + one_hot, b.max(alike + one_hot, 1, keepdims=True)), one, 0.0)
        return b.concat(1, first, b.matmul(members, others) / b.sum(members, -1, keepdims=True))

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        assert weights is not None
        kept = self._kept(x.shape[1])
        if kept == x.shape[1] - 1:
            return x
        made = [self._transformed(tokens, attention, kept) for tokens, attention in zip(x, weights, strict=True)]
        return np.stack(made)

    def _transformed(self, tokens: Array, attention: Array, kept: int) -> Array:
        others, received = tokens[1:], attention.mean(axis=(0, 1))[1:]
        chosen = sorted(range(len(others)), key=lambda i: -received[i])[:kept]
        unit = others / np.sqrt((others**2).sum(axis=-1, keepdims=True) + _SMALL)
        if self.rule == "prune":
            rows = [others[m] for m in chosen]
        elif self.rule == "many_to_many":
            rows = [reference.softmax(unit @ unit[m] / self.temperature) @ others for m in chosen]
        else:
            homes = [
                n if n in chosen else max(chosen, key=lambda m, n=n: unit[m] @ unit[n]) for n in range(len(others))
            ]
            rows = [np.mean([others[n] for n, home in enumerate(homes) if home == m], axis=0) for m in chosen]
        return np.stack([tokens[0], *rows])
