"""Asynchronous successive halving: random architectures, most of them stopped early in their training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nas.strategies.base import Space, Strategy, require_at_least
from nas.trial import Trial


@dataclass(frozen=True)
class ASHA(Strategy):
    """Sample the space, and go on with the training of one trial in `eta` at each rung.

    A trial is looked at after `eta**-rungs` of its training budget, and whenever that has grown `eta`-fold. It goes on
    when it is as good as the best 1/`eta` of those that were there before it, by the rule of Ray Tune's
    `AsyncHyperBandScheduler`; nobody waits for others. So the first trials go far, whatever they are worth. With
    several objectives the best are the first fronts.

    Proposals depend on the seed alone. Which of them are stopped depends on the order in which trials end, so with
    several workers on their timing; the journal records every decision.

    Attributes:
        eta: One trial in so many goes on, with so many times the budget.
        rungs: How often a trial is looked at before its end.
        brackets: Trials in turn begin with 0, 1, ... of the first rungs left out; 1 leaves out none.

    Raises:
        InputError: An option is out of range.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", in the form that stops trials; for
        several objectives Schmucker et al. 2021, "Multi-objective asynchronous successive halving".
    """

    stops_early: ClassVar[bool] = True

    eta: int = 3
    rungs: int = 2
    brackets: int = 1

    def __post_init__(self) -> None:
        require_at_least(2, eta=self.eta)
        require_at_least(1, rungs=self.rungs, brackets=self.brackets)

    @property
    def batch_size(self) -> None:
        return None

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        return space.sample(rng)

    def milestones(self, number: int) -> tuple[float, ...]:
        first = number % self.brackets
        return tuple(float(self.eta) ** (rung - self.rungs) for rung in range(first, self.rungs))

    def judge(self, waiting: Sequence[int], trials: Sequence[Trial], *, is_last: bool) -> dict[int, bool]:
        from nas.strategies._tune_schedulers import passes_asha, score_at

        decided: dict[int, bool] = {}
        for place, number in enumerate(waiting):
            later = set(waiting[place + 1 :])
            bracket = [trial for trial in trials[number % self.brackets :: self.brackets] if trial.number not in later]
            scores = score_at(trials[number].rungs[-1].fraction, bracket)
            score = scores.pop(number)
            decided[number] = passes_asha(score, list(scores.values()), self.eta)
        return decided
