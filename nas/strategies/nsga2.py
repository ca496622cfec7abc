"""NSGA-II: generations bred from the fronts found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.strategies.base import (
    Space,
    Strategy,
    has_result,
    order_best_first,
    require_at_least,
    require_fraction,
)
from nas.trial import Trial


@dataclass(frozen=True)
class NSGA2(Strategy):
    """Cross and mutate winners of binary tournaments among the best trials.

    Parents are the best `population` of all trials so far by constraint domination, front and crowding distance. That
    is the elitist survival of the paper without its forgetting: a trial that crowding dropped may return.

    Attributes:
        population: Parents; the first this many proposals are random.
        crossover_probability: Share of children with two parents; the others are mutations of one.
        mutation_probability: Share of children of two parents that are mutated as well.
        batch: Trials proposed from the same parents, `population` where None.

    Raises:
        InputError: An option is out of range.

    Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II".
    """

    population: int = 32
    crossover_probability: float = 0.9
    mutation_probability: float = 0.5
    batch: int | None = None

    def __post_init__(self) -> None:
        require_at_least(2, population=self.population)
        require_at_least(1, batch=self.batch)
        require_fraction(
            crossover_probability=self.crossover_probability, mutation_probability=self.mutation_probability
        )

    @property
    def batch_size(self) -> int:
        return self.batch or self.population

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        parents = order_best_first([trial for trial in history if has_result(trial)], wanted=self.population)
        if number < self.population or not parents:
            return space.sample(rng)
        first = _win_tournament(parents, rng)
        if rng.random() >= self.crossover_probability:
            return space.mutate(first.architecture, rng)
        child = space.crossover(first.architecture, _win_tournament(parents, rng).architecture, rng)
        return space.mutate(child, rng) if rng.random() < self.mutation_probability else child


def _win_tournament(parents: Sequence[Trial], rng: np.random.Generator) -> Trial:
    """Return the better of two parents drawn at random; parents are sorted from best to worst."""
    return parents[int(rng.integers(len(parents), size=2).min())]
