"""Regularized evolution: the best of a few members of a population that forgets its oldest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.errors import InputError
from nas.strategies.base import Space, Strategy, has_result, order_best_first, require_at_least
from nas.trial import Trial


@dataclass(frozen=True)
class RegularizedEvolution(Strategy):
    """Mutate the winner of a tournament among the youngest trials.

    The population is the last `population` trials with results: a trial dies of age, however good it was. With several
    objectives the winner of a tournament is the one in the best front, and the lonelier where fronts are equal.

    Attributes:
        population: Trials alive; the first this many proposals are random.
        tournament: Members drawn to compete for being the parent.
        batch: Trials proposed from the same population.

    Raises:
        InputError: An option is out of range.

    Source: Real et al. 2019, "Regularized evolution for image classifier architecture search", algorithm 1.
    """

    population: int = 32
    tournament: int = 8
    batch: int = 8

    def __post_init__(self) -> None:
        require_at_least(2, population=self.population)
        require_at_least(1, tournament=self.tournament, batch=self.batch)
        if self.tournament > self.population:
            raise InputError(
                "a tournament cannot have more members than the population",
                expected=f"tournament of at most {self.population}",
                found=str(self.tournament),
            )

    @property
    def batch_size(self) -> int:
        return self.batch

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        alive = _youngest(history, self.population)
        if number < self.population or not alive:
            return space.sample(rng)
        drawn = rng.choice(len(alive), size=min(self.tournament, len(alive)), replace=False)
        parent = order_best_first([alive[index] for index in sorted(drawn)], wanted=1)[0]
        return space.mutate(parent.architecture, rng)


def _youngest(history: Sequence[Trial], count: int) -> list[Trial]:
    """Return the last trials with results, oldest first."""
    alive: list[Trial] = []
    for trial in reversed(history):
        if len(alive) == count:
            break
        if has_result(trial):
            alive.append(trial)
    return alive[::-1]
