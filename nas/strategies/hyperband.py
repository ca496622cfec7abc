"""Hyperband: brackets of random architectures, each halved at its own points of the training budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from nas.strategies.base import Space, Strategy, require_at_least
from nas.trial import Trial


@dataclass(frozen=True)
class Hyperband(Strategy):
    """Sample the space, and keep the best 1/`eta` of a bracket whenever all of it have come equally far.

    A band has `rungs + 1` brackets. The first trains its few trials to their end; bracket `s` begins with about
    `eta**s` times as many, looks at them after `eta**-s` of their training budget, and at those that are left whenever
    that has grown `eta`-fold. Ray Tune's `HyperBandScheduler` says who is left. With several objectives the best are
    the first fronts.

    A trial at a milestone waits for the others of its bracket, while workers go on with other brackets. A run that ends
    within a bracket leaves its trials waiting: a run of the same study with more trials goes on with them. What is
    proposed and what is stopped depends on the seed and on recorded results alone, not on workers and their timing.

    Attributes:
        eta: One trial in so many is left, with so many times the budget.
        rungs: How often the trials of the last bracket are looked at before their end.

    Raises:
        InputError: An option is out of range.

    Source: Li et al. 2018, "Hyperband: a novel bandit-based approach to hyperparameter optimization", algorithm 1.
    """

    stops_early: ClassVar[bool] = True

    eta: int = 3
    rungs: int = 2

    def __post_init__(self) -> None:
        require_at_least(2, eta=self.eta)
        require_at_least(1, rungs=self.rungs)

    @property
    def batch_size(self) -> None:
        return None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Trials of each bracket, in the order in which they are filled."""
        return tuple(math.ceil((self.rungs + 1) / (s + 1) * self.eta**s) for s in range(self.rungs + 1))

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        return space.sample(rng)

    def milestones(self, number: int) -> tuple[float, ...]:
        bracket, _ = self._bracket(number)
        return tuple(float(self.eta) ** (rung - bracket) for rung in range(bracket))

    def judge(self, waiting: Sequence[int], trials: Sequence[Trial], *, is_last: bool) -> dict[int, bool]:
        decided: dict[int, bool] = {}
        for number in waiting:
            bracket, members = self._bracket(number)
            if number in decided or not (is_last or members.stop <= len(trials)):
                continue
            there = [trials[member] for member in members if member < len(trials)]
            fraction = trials[number].rungs[-1].fraction
            if all(trial.state != "running" or _has_come(trial, fraction) for trial in there):
                left = self._halve(bracket, members, there, fraction)
                round_ = [trial for trial in there if trial.number in waiting and trial.rungs[-1].fraction == fraction]
                decided |= {trial.number: trial.number in left for trial in round_}
        return decided

    def _halve(self, bracket: int, members: range, there: Sequence[Trial], fraction: float) -> set[int]:
        """Return the trials that go on from a milestone that all of a bracket that are left have come to."""
        from nas.strategies._tune_schedulers import pass_hyperband, score_at

        rounds = [score_at(earlier, there) for earlier in self.milestones(members.start) if earlier <= fraction]
        sizes = self.sizes[: bracket + 1]
        return pass_hyperband(members, rounds, eta=self.eta, rungs=self.rungs, sizes=sizes)

    def _bracket(self, number: int) -> tuple[int, range]:
        """Return the place of a trial's bracket in its band, and the numbers of the bracket's trials."""
        band, place = divmod(number, sum(self.sizes))
        ends = tuple(accumulate(self.sizes))
        bracket = next(s for s, end in enumerate(ends) if place < end)
        end = band * sum(self.sizes) + ends[bracket]
        return bracket, range(end - self.sizes[bracket], end)


def _has_come(trial: Trial, fraction: float) -> bool:
    return bool(trial.rungs) and trial.rungs[-1].fraction >= fraction
