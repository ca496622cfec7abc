"""Local search: neighbours of the best so far, and a random restart where a neighbourhood is used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas import pareto
from nas.strategies.base import Space, Strategy, has_result, order_best_first, require_at_least, require_fraction
from nas.trial import Trial


@dataclass(frozen=True)
class LocalSearch(Strategy):
    """Mutate a member of the front, and draw from the space once in a while.

    The centre is drawn from the trials that none dominates, which is the best trial alone where there is one
    objective. The study refuses neighbours that it has seen, so a neighbourhood is searched until something in it is
    better or nothing is left; a trial drawn from the space that is better moves the search there.

    Attributes:
        start: Proposals drawn from the space before the first neighbour.
        restart_probability: Share of later proposals that are drawn from the space.
        batch: Trials proposed around the same front.

    Raises:
        InputError: An option is out of range.

    Source: White et al. 2021, "Exploring the loss landscape in neural architecture search"; for several objectives
        Paquete et al. 2004, "Pareto local optimum sets in the biobjective traveling salesman problem".
    """

    start: int = 16
    restart_probability: float = 0.1
    batch: int = 4

    def __post_init__(self) -> None:
        require_at_least(1, start=self.start, batch=self.batch)
        require_fraction(restart_probability=self.restart_probability)

    @property
    def batch_size(self) -> int:
        return self.batch

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        centres = _centres(history)
        if number < self.start or not centres or rng.random() < self.restart_probability:
            return space.sample(rng)
        return space.mutate(centres[int(rng.integers(len(centres)))].architecture, rng)


def _centres(history: Sequence[Trial]) -> list[Trial]:
    """Return the trials that none dominates; the one that breaks constraints least where none is feasible."""
    best = order_best_first([trial for trial in history if has_result(trial)], wanted=1)
    if not best or not best[0].is_feasible:
        return best
    feasible = [trial for trial in history if trial.is_feasible]
    losses = np.array([trial.losses for trial in feasible], dtype=np.float64)
    return [trial for trial, is_kept in zip(feasible, pareto.non_dominated(losses), strict=True) if is_kept]
