"""The Pareto front of a study and how sure it is: points that are on it for certain, and points that may be.

A search picks the best of many measured values, so these are better than they would be again. What counts here is the
value measured again after the search, where there is one, and the interval around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas import pareto
from nas.goals import Goals
from nas.trial import Quantity, Trial

_EXACT = ("counted", "custom")


@dataclass(frozen=True)
class Front:
    """Trials with the values that count for the front: re-measured ones where there are any.

    Attributes:
        nominal: Trials that none dominates by their values alone, best in the first objective first.
        certain: Trials that none dominates wherever within their intervals all values lie, and whose own values were
            counted, trained, or measured again.
        possible: All other trials that none dominates for some values within the intervals.
        unsettled: For each of these, by number, what is in the way of its being certain.
    """

    nominal: tuple[Trial, ...]
    certain: tuple[Trial, ...]
    possible: tuple[Trial, ...]
    unsettled: dict[int, str]

    @classmethod
    def of(cls, trials: Iterable[Trial], goals: Goals) -> Front:
        """Split the feasible ones of some trials.

        Args:
            trials: Trials of one study.
            goals: Its objectives and constraints.
        """
        feasible = _feasible(trials, goals)
        low, high = _ends(feasible, goals)
        certain = pareto.never_dominated(low, high)
        obstacles: dict[int, str] = {}
        for row in np.flatnonzero(pareto.sometimes_non_dominated(low, high)):
            if found := _obstacle(feasible[row], goals, bool(certain[row])):
                obstacles[feasible[row].number] = found
        sure = [trial for trial, is_certain in zip(feasible, certain, strict=True) if is_certain]
        return cls(
            nominal=_nominal(feasible, goals),
            certain=_ordered(trial for trial in sure if trial.number not in obstacles),
            possible=_ordered(trial for trial in feasible if trial.number in obstacles),
            unsettled=obstacles,
        )

    def status(self, trial: Trial) -> str:
        """Say how sure a trial's place on the front is: `certain`, `possible`, or empty where it has none."""
        if trial.number in self.unsettled:
            return "possible"
        return "certain" if any(trial.number == other.number for other in self.certain) else ""

    def describe(self) -> dict[str, Any]:
        """Return the numbers of the trials as JSON."""
        return {
            "certain": [trial.number for trial in self.certain],
            "possible": [trial.number for trial in self.possible],
            "unsettled": {str(number): reason for number, reason in self.unsettled.items()},
        }


def nominal_front(trials: Iterable[Trial], goals: Goals) -> tuple[Trial, ...]:
    """Return the feasible trials that no other dominates by its values, best in the first objective first."""
    return _nominal(_feasible(trials, goals), goals)


def settle(trial: Trial, goals: Goals) -> Trial:
    """Return a trial with its re-measured values in place of those of the search."""
    if not trial.remeasured:
        return trial
    quantities = {**trial.quantities, **trial.remeasured}
    return trial.changed(quantities=quantities, losses=goals.losses(quantities), violation=goals.violation(quantities))


def _feasible(trials: Iterable[Trial], goals: Goals) -> list[Trial]:
    settled = (settle(trial, goals) for trial in trials)
    return [trial for trial in settled if trial.is_feasible]


def _nominal(feasible: Sequence[Trial], goals: Goals) -> tuple[Trial, ...]:
    losses = np.array([trial.losses for trial in feasible], dtype=np.float64).reshape(-1, len(goals.objectives))
    return _ordered(trial for trial, kept in zip(feasible, pareto.non_dominated(losses), strict=True) if kept)


def _ordered(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    return tuple(sorted(trials, key=lambda trial: (trial.losses, trial.number)))


def _ends(trials: Sequence[Trial], goals: Goals) -> tuple[pareto.Losses, pareto.Losses]:
    """Return the best and the worst ends of each trial's losses."""
    shape = len(trials), len(goals.objectives)
    low, high = np.empty(shape), np.empty(shape)
    for row, trial in enumerate(trials):
        for column, objective in enumerate(goals.objectives):
            sign = 1.0 if objective.direction == "min" else -1.0
            ends = sorted(sign * end for end in _interval(trial.quantities[objective.name]))
            low[row, column], high[row, column] = ends[0], ends[-1]
    return low, high


def _interval(quantity: Quantity) -> tuple[float, ...]:
    return (quantity.value, *(quantity.interval or ()))


def _obstacle(trial: Trial, goals: Goals, is_apart: bool) -> str:
    """Say what keeps a trial that may be on the front from being so for certain; nothing where it is."""
    for objective in goals.objectives:
        source = trial.quantities[objective.name].source
        if source == "measured" and objective.name not in trial.remeasured:
            return f"{objective.name} was not measured again"
        if trial.quantities[objective.name].details.get("noisy"):
            return f"{objective.name} is noisy"
        if source not in ("measured", "trained", *_EXACT):
            return f"{objective.name} is {'from a supernet' if source == 'supernet' else source}"
    return "" if is_apart else "its interval overlaps another's"
