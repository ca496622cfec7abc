"""Selective copying (Gu and Dao 2023, arXiv 2312.00752, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.errors import InputError
from nas.tasks._generated import GeneratedTask
from nas.tasks.base import IGNORED_TARGET, Array, require_integer
from searchspaces.signature import Signature

_BLANK, _ASK = 0, 1


@dataclass(frozen=True)
class SelectiveCopy(GeneratedTask):
    """Repeat the content of a sequence without its blanks, in order; measured in accuracy.

    `num_contents` tokens of content stand at random places among blanks, token 0. Then as many questions, token 1, ask
    for them one after the other.

    Attributes:
        seq_len: Tokens in a sequence, questions included.
        vocab_size: Tokens, the blank and the question among them.
        num_contents: Tokens to repeat.
    """

    seq_len: int = 64
    vocab_size: int = 16
    num_contents: int = 8

    name = "selective_copy"
    description = "repeat the content among blanks in order, generated, accuracy"

    def __post_init__(self) -> None:
        require_integer(self.name, "num_contents", self.num_contents, least=1)
        require_integer(self.name, "seq_len", self.seq_len, least=2)
        require_integer(self.name, "vocab_size", self.vocab_size, least=4, most=1 << 16)
        require_integer(self.name, "validation_sequences", self.validation_sequences, least=1)
        if 2 * self.num_contents > self.seq_len:
            raise InputError(
                "the sequence has no room for all contents and questions",
                where="selective_copy.seq_len",
                expected=f"at least 2 * num_contents = {2 * self.num_contents}",
                found=str(self.seq_len),
                hint="use fewer contents or longer sequences",
            )

    @property
    def signature(self) -> Signature:
        return Signature(modality="tokens", output="next_token", seq_len=self.seq_len, vocab_size=self.vocab_size)

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        contents, first = self.num_contents, self.seq_len - self.num_contents
        values = rng.integers(2, self.vocab_size, (count, contents))
        places = np.sort(rng.random((count, first)).argsort(axis=1)[:, :contents], axis=1)
        tokens = np.full((count, self.seq_len), _BLANK)
        tokens[np.arange(count)[:, None], places] = values
        tokens[:, first:] = _ASK
        targets = np.full((count, self.seq_len), IGNORED_TARGET)
        targets[:, first:] = values
        return tokens.astype(np.int32), targets.astype(np.int32)

    def solve(self, tokens: Array) -> Array:
        answers = np.zeros_like(tokens)
        for row, sequence in enumerate(tokens):
            answers[row, -self.num_contents :] = [token for token in sequence if token not in (_BLANK, _ASK)]
        return answers
