"""Predictor-guided evolution: an ensemble fitted to the trials so far picks among many children."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from nas.strategies.base import Space, Strategy, has_result, order_best_first, require_at_least
from nas.trial import Trial

# Regressors that fit a few hundred trials in tenths of a second.
_KINDS = ("quadratic", "boosting")
_FOLDS = 3
# Trials the ensemble learns from: the best and the youngest, half of each.
_MOST_TRIALS = 512
# Draws that stand in for a corner where the space names none.
_CORNER_DRAWS = 64
_CORNERS = ("smallest", "largest", "centroid")


@dataclass(frozen=True)
class PredictorGuided(Strategy):
    """Breed many candidates, and try those that an ensemble expects to add most to the front.

    The first trials are the corners of the space (smallest, largest, middle) and random. From then on an ensemble is
    fitted to every objective, and to whether constraints hold, before each batch. Generations of children of the best
    trials and fresh samples are judged by it. Half of the batch are the candidates that enlarge the predicted front
    most; the other half those whose place on the front is undecided: they would enlarge it at the good end of their
    error bars, but not at the bad end.

    Attributes:
        initial: Trials before the first prediction.
        batch: Trials proposed from the same results.
        population: Best trials and best predicted candidates that have children.
        children: Children bred in a generation.
        generations: Generations bred between two batches.

    Raises:
        InputError: An option is out of range.

    Source: the predicted front of Lu et al. 2020, "NSGANetV2: evolutionary multi-objective surrogate-assisted neural
    architecture search"; gain in volume as in Emmerich et al. 2006, "Single- and multiobjective evolutionary
    optimization assisted by Gaussian random field metamodels".
    """

    initial: int = 16
    batch: int = 8
    population: int = 32
    children: int = 128
    generations: int = 4

    def __post_init__(self) -> None:
        require_at_least(2, population=self.population, initial=self.initial)
        require_at_least(1, batch=self.batch, children=self.children, generations=self.generations)

    @property
    def batch_size(self) -> int:
        return self.batch

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        attempt = _count_attempt(rng)
        known = [trial for trial in history if has_result(trial)]
        if number < self.initial or len(known) < 2:
            corner = _corner(space, number, rng) if attempt == 0 else None
            return space.sample(rng) if corner is None else corner
        ranked = _plan(_Question(self, space, _digest(history), history))
        place = number % self.batch + attempt * self.batch
        if place < len(ranked):
            return ranked[place]
        parents = order_best_first(known, wanted=self.population)
        return space.mutate(parents[int(rng.integers(len(parents)))].architecture, rng)


@dataclass(frozen=True)
class _Question:
    """What a plan depends on; equal where space, options and recorded results are."""

    strategy: PredictorGuided
    space: Any = field(hash=False)
    digest: bytes
    history: Sequence[Trial] = field(hash=False, compare=False, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Question):
            return False
        return (self.strategy, self.digest) == (other.strategy, other.digest) and self.space is other.space


@lru_cache(maxsize=4)
def _plan(question: _Question) -> list[Any]:
    """Return candidates for a batch, the most wanted first; each trial of the batch takes every `batch`-th in turn.

    It is computed once for a batch, and alike wherever it is computed again: recorded results alone decide it.
    """
    from nas.predictors.ensemble import Ensemble
    from nas.strategies._candidates import Judge, Pool, encode_key

    strategy, history = question.strategy, question.history
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(question.digest))))
    judge = Judge.of([trial for trial in history if has_result(trial)], Ensemble(_KINDS, _FOLDS), _MOST_TRIALS)
    pool = Pool(judge, {encode_key(trial.encoded) for trial in history})
    pool.add([question.space.sample(rng) for _ in range(strategy.children)])
    elite = [trial.architecture for trial in order_best_first(judge.trials, wanted=strategy.population)]
    parents = elite
    for _ in range(strategy.generations):
        pool.add(_breed(question.space, parents, strategy.children, rng))
        parents = elite + pool.best(strategy.population)
    return pool.ranked(strategy.batch)


def _breed(space: Space, parents: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """Return children: half cross two parents, and most are mutated once or more."""
    children: list[Any] = []
    for _ in range(count):
        first, second = (parents[int(index)] for index in rng.integers(len(parents), size=2))
        is_crossed = rng.random() < 0.5
        child = space.crossover(first, second, rng) if is_crossed else first
        for _ in range(int(rng.geometric(0.6)) - int(is_crossed)):
            child = space.mutate(child, rng)
        children.append(child)
    return children


def _count_attempt(rng: np.random.Generator) -> int:
    """Return how often a trial was asked for before, 0 the first time.

    The generator of a trial is the same object for all attempts, and counts the generators spawned from its seed.
    """
    seed = rng.bit_generator.seed_seq
    attempt = int(getattr(seed, "n_children_spawned", 0))
    rng.spawn(1)
    return attempt


def _digest(history: Sequence[Trial]) -> bytes:
    """Return a hash of everything in a history that a plan looks at."""
    digest = hashlib.sha256()
    for trial in history:
        digest.update(repr((trial.number, trial.hash, trial.state, trial.losses, trial.violation)).encode())
    return digest.digest()


def _corner(space: Any, number: int, rng: np.random.Generator) -> Any:
    """Return the corner that a trial starts from, None where there is no further corner.

    Where a space names no corners, the first two trials are the draws with the smallest and the largest features.
    """
    if number >= len(_CORNERS):
        return None
    if all(hasattr(space, name) for name in _CORNERS):
        return getattr(space, _CORNERS[number])()
    if number == 2:
        return None
    from nas.predictors.features import FeatureTable, flatten

    drawn = [space.sample(rng) for _ in range(_CORNER_DRAWS)]
    described = [flatten(architecture.to_dict()) for architecture in drawn]
    x_NF = FeatureTable.of(described).matrix(described)
    size_N = ((x_NF - x_NF.mean(axis=0)) / x_NF.std(axis=0)).mean(axis=1) if x_NF.size else np.zeros(len(drawn))
    return drawn[int(np.argmin(size_N) if number == 0 else np.argmax(size_N))]
