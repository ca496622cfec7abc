"""Random search: every proposal is drawn from the space, results are not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.strategies.base import Space, Strategy
from nas.trial import Trial


@dataclass(frozen=True)
class Random(Strategy):
    """Sample the space.

    Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
    """

    @property
    def batch_size(self) -> None:
        return None

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        return space.sample(rng)
