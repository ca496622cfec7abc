"""Linear regression in context (Garg et al. 2022, arXiv 2208.01066)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from nas.tasks.base import Array, Batch, Metric, Task, require_integer
from searchspaces.signature import Signature

_VALIDATION_SEED: Final = 20_220_801


@dataclass(frozen=True)
class InContextRegression(Task):
    """Predict w . x for a new x from pairs (x, w . x) in the sequence; measured in mean squared error.

    Each sequence has its own w; x and w are standard normal, w divided by sqrt(`dimension`), so that w . x has variance
    1. A time of the series holds x and w . x; the last time holds the new x and 0. The forecast of one time is read at
    its last variate, and its other variates are asked to be 0.

    Attributes:
        seq_len: Pairs, the one asked included.
        dimension: Entries of x.
        validation_sequences: Sequences in the fixed validation split.
    """

    seq_len: int = 32
    dimension: int = 4
    validation_sequences: int = 512

    name = "in_context_regression"
    description = "linear regression from pairs in the sequence, generated, mean squared error"
    metric = Metric("mse", "")
    direction = "min"
    loss_kind = "mse"

    def __post_init__(self) -> None:
        require_integer(self.name, "seq_len", self.seq_len, least=2)
        require_integer(self.name, "dimension", self.dimension, least=1, most=1 << 10)
        require_integer(self.name, "validation_sequences", self.validation_sequences, least=1)

    @property
    def signature(self) -> Signature:
        return Signature(
            modality="series", output="forecast", seq_len=self.seq_len, variates=self.dimension + 1, horizon=1
        )

    @property
    def chance(self) -> float:
        """Of always answering 0: the variance of an answer, spread over the variates that are averaged."""
        return 1 / (self.dimension + 1)

    def quality(self, *, loss: float, accuracy: float) -> float:
        return loss

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        return self.batch(*self.generate(rng, batch_size))

    def validation_set(self) -> tuple[Array, Array]:
        return _validation_set(self)

    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Draw series float32 `[count, seq_len, dimension + 1]` and targets `[count, 1, dimension + 1]`."""
        x = rng.standard_normal((count, self.seq_len, self.dimension))
        w = rng.standard_normal((count, self.dimension)) / np.sqrt(self.dimension)
        y = np.einsum("btd,bd->bt", x, w)
        targets = np.zeros((count, 1, self.dimension + 1))
        targets[:, 0, -1] = y[:, -1]
        y[:, -1] = 0.0
        return np.concatenate([x, y[..., None]], axis=-1).astype(np.float32), targets.astype(np.float32)

    def solve(self, series: Array) -> Array:
        """Least squares on the pairs before the last."""
        answers = np.zeros((len(series), 1, self.dimension + 1))
        for row, sequence in enumerate(series.astype(np.float64)):
            w = np.linalg.lstsq(sequence[:-1, :-1], sequence[:-1, -1], rcond=None)[0]
            answers[row, 0, -1] = sequence[-1, :-1] @ w
        return answers

    def measure_baselines(self) -> dict[str, float]:
        """Errors of always answering 0, and of least squares."""
        series, targets = self.validation_set()
        return {
            "zero": float((targets**2).mean()),
            "least_squares": float(((self.solve(series) - targets) ** 2).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self.validation_set()


@lru_cache(maxsize=4)
def _validation_set(task: InContextRegression) -> tuple[Array, Array]:
    return task.generate(np.random.default_rng(_VALIDATION_SEED), task.validation_sequences)
