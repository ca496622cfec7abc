"""No position."""

from __future__ import annotations

from ir.component import Position


class NoPosition(Position):
    """Nothing says where a token stands, beyond what a causal or local mixer reveals by itself.

    Causal models learn positions without being told (Haviv et al. 2022).
    """

    paper = "Haviv et al. 2022, Transformer Language Models without Positional Encodings..., arXiv 2203.16634"

    @classmethod
    def key(cls) -> str:
        return "none"
