"""What generated sequence tasks share: a fixed validation split, accuracy at the positions asked, and an oracle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from nas.tasks.base import IGNORED_TARGET, Array, Batch, Metric, Task

_VALIDATION_SEED: Final = 20_231_208


@dataclass(frozen=True)
class GeneratedTask(Task):
    """Token sequences drawn from a seed; training ones as they are needed, validation ones once.

    Subclasses say how sequences are drawn and how an algorithm solves them.

    Attributes:
        validation_sequences: Sequences in the fixed validation split.
    """

    validation_sequences: int = 512

    metric = Metric("accuracy", "fraction")
    direction = "max"
    loss_kind = "cross_entropy"

    @abstractmethod
    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Draw sequences.

        Args:
            rng: Source of randomness.
            count: Number of sequences.

        Returns:
            Tokens int32 `[count, seq_len]` and targets int32, `[count, seq_len]` for tasks that predict tokens
            (`IGNORED_TARGET` where nothing is asked) or `[count]` for those that tell classes apart.
        """

    @abstractmethod
    def solve(self, tokens: Array) -> Array:
        """Give the right answers of sequences `[count, seq_len]`, by an algorithm that reads the tokens alone."""

    def quality(self, *, loss: float, accuracy: float) -> float:
        return accuracy

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        return self.batch(*self.generate(rng, batch_size))

    def validation_set(self) -> tuple[Array, Array]:
        return _validation_set(self)

    def measure_baselines(self) -> dict[str, float]:
        """Accuracy of always giving the commonest answer, and of the algorithm that solves the task."""
        tokens, targets = self.validation_set()
        _, drawn = self.generate(np.random.default_rng(_VALIDATION_SEED + 1), self.validation_sequences)
        commonest = np.bincount(drawn[drawn != IGNORED_TARGET]).argmax()
        asked = targets != IGNORED_TARGET
        return {
            "majority_answer": float((targets[asked] == commonest).mean()),
            "oracle": float((self.solve(tokens)[asked] == targets[asked]).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self.validation_set()


@lru_cache(maxsize=8)
def _validation_set(task: GeneratedTask) -> tuple[Array, Array]:
    return task.generate(np.random.default_rng(_VALIDATION_SEED), task.validation_sequences)
