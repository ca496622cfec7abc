"""ListOps (Nangia and Bowman 2018, arXiv 1804.06028): nested operations on lists of digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from nas.tasks._generated import GeneratedTask
from nas.tasks.base import Array, require_integer
from searchspaces.signature import Signature

_OPERATIONS: Final[tuple[Callable[[Sequence[int]], int], ...]] = (
    max,
    min,
    lambda digits: int(median(digits)),
    lambda digits: sum(digits) % 10,
)
_PAD, _CLOSE, _DIGIT = 0, 1, 2  # then ten digits, then an opening for each operation
_OPEN: Final = _DIGIT + 10
_VOCAB_SIZE: Final = _OPEN + len(_OPERATIONS)


@dataclass(frozen=True)
class Listops(GeneratedTask):
    """Evaluate `[MAX 2 9 [MIN 4 7] 0]`; measured in accuracy over the ten digits.

    Operations are maximum, minimum, median (of an even count the lower middle's mean, rounded down) and sum modulo 10.
    Shorter expressions are padded in front by token 0.

    Attributes:
        seq_len: Tokens in a sequence at most.
        depth: Nested lists at most.
        arguments: Arguments of an operation at most.
    """

    seq_len: int = 64
    depth: int = 3
    arguments: int = 4

    name = "listops"
    description = "nested max, min, median and sum of digits, generated, accuracy"

    def __post_init__(self) -> None:
        require_integer(self.name, "seq_len", self.seq_len, least=8)
        require_integer(self.name, "depth", self.depth, least=1, most=16)
        require_integer(self.name, "arguments", self.arguments, least=2, most=16)
        require_integer(self.name, "validation_sequences", self.validation_sequences, least=1)

    @property
    def signature(self) -> Signature:
        return Signature(
            modality="tokens", output="class", seq_len=self.seq_len, vocab_size=_VOCAB_SIZE, num_classes=10
        )

    @property
    def chance(self) -> float:
        return 0.1

    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        tokens, answers = np.full((count, self.seq_len), _PAD), np.zeros(count)
        for row in range(count):
            expression = self._expression(rng, self.depth, self.seq_len)
            tokens[row, self.seq_len - len(expression) :] = expression
            answers[row] = _evaluate(expression)
        return tokens.astype(np.int32), answers.astype(np.int32)

    def _expression(self, rng: np.random.Generator, depth: int, room: int) -> list[int]:
        """Draw one operation that takes at most so many tokens."""
        arguments = int(rng.integers(2, self.arguments + 1))
        written = [_OPEN + int(rng.integers(len(_OPERATIONS)))]
        for index in range(arguments):
            left = room - len(written) - 1 - (arguments - 1 - index)  # a digit for each argument that follows
            if depth > 1 and left >= 4 and rng.random() < 0.4:
                written += self._expression(rng, depth - 1, left)
            elif left >= 1:
                written.append(_DIGIT + int(rng.integers(10)))
        return [*written, _CLOSE]

    def solve(self, tokens: Array) -> Array:
        return np.array([_evaluate([int(token) for token in row if token != _PAD]) for row in tokens])


def _evaluate(expression: Sequence[int]) -> int:
    """The value of an expression, by a stack of open lists."""
    open_lists: list[tuple[int, list[int]]] = []
    for token in expression:
        if token >= _OPEN:
            open_lists.append((token - _OPEN, []))
            continue
        value = token - _DIGIT
        if token == _CLOSE:
            operation, digits = open_lists.pop()
            value = _OPERATIONS[operation](digits)
        if not open_lists:
            return value
        open_lists[-1][1].append(value)
    raise ValueError("an expression does not close")
