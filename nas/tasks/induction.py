"""Induction: what followed this token before? (Fu et al. 2023, arXiv 2212.14052, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nas.tasks._generated import GeneratedTask
from nas.tasks.base import IGNORED_TARGET, Array, require_integer
from searchspaces.signature import Signature


@dataclass(frozen=True)
class Induction(GeneratedTask):
    """Give the token that followed the marker; measured in accuracy at the end of the sequence.

    A sequence of random tokens holds the marker, token 0, once at a random place and again at its end. The answer is
    the token after the first marker.

    Attributes:
        seq_len: Tokens in a sequence.
        vocab_size: Tokens, the marker among them.
    """

    seq_len: int = 64
    vocab_size: int = 16

    name = "induction"
    description = "the token that followed the marker, generated, accuracy at the end"

    def __post_init__(self) -> None:
        require_integer(self.name, "seq_len", self.seq_len, least=4)
        require_integer(self.name, "vocab_size", self.vocab_size, least=3, most=1 << 16)
        require_integer(self.name, "validation_sequences", self.validation_sequences, least=1)

    @property
    def signature(self) -> Signature:
        return Signature(modality="tokens", output="next_token", seq_len=self.seq_len, vocab_size=self.vocab_size)

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        rows = np.arange(count)
        tokens = rng.integers(1, self.vocab_size, (count, self.seq_len))
        places = rng.integers(0, self.seq_len - 2, count)
        tokens[rows, places], tokens[:, -1] = 0, 0
        targets = np.full((count, self.seq_len), IGNORED_TARGET)
        targets[:, -1] = tokens[rows, places + 1]
        return tokens.astype(np.int32), targets.astype(np.int32)

    def solve(self, tokens: Array) -> Array:
        answers = np.zeros_like(tokens)
        for row, sequence in enumerate(tokens):
            answers[row, -1] = sequence[list(sequence).index(0) + 1]
        return answers
