"""The Pareto front of a study and how sure it is: points that are on it for certain, and points that may be.

A search picks the best of many measured values, so these are better than they would be again. What counts here is the
value measured again after the search, where there is one, and the interval around it.

A score that stands for another, such as a supernet's for training alone, is compared with scores of its own kind only.
Where some trials have the other as well, these are compared with each other by it, and with all the rest by the first;
they alone are then on the front by their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.goals import Goals
from nas.trial import Quantity, Trial

_EXACT = ("counted", "custom")
_STAND_INS = ("supernet", "proxy", "predicted")

Marks: TypeAlias = NDArray[np.bool_]


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
        feasible, apart = _feasible(trials, goals)
        certain, possible, is_doubted = _marks(feasible, apart, goals)
        obstacles: dict[int, str] = {}
        for row in np.flatnonzero(possible):
            if found := _obstacle(feasible[row], goals, bool(certain[row]), bool(is_doubted[row])):
                obstacles[feasible[row].number] = found
        sure = [trial for trial, is_certain in zip(feasible, certain, strict=True) if is_certain]
        return cls(
            nominal=_nominal(feasible, apart),
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
    return _nominal(*_feasible(trials, goals))


def settle(trial: Trial, goals: Goals) -> Trial:
    """Return a trial with its re-measured values in place of those of the search."""
    if not trial.remeasured:
        return trial
    quantities = {**trial.quantities, **trial.remeasured}
    return trial.changed(quantities=quantities, losses=goals.losses(quantities), violation=goals.violation(quantities))


@dataclass(frozen=True)
class _Apart:
    """Who is compared with whom.

    Attributes:
        rows: Trials that have no stand-in where others have one; they are compared with each other by all their values.
        rest: All other trials.
        likened: Every trial with values that compare with the rest's: those of the search where the rest has stand-ins.
    """

    rows: NDArray[np.intp]
    rest: NDArray[np.intp]
    likened: Sequence[Trial]


def _feasible(trials: Iterable[Trial], goals: Goals) -> tuple[list[Trial], _Apart]:
    """Return the feasible trials with the values that count, and how they compare."""
    pairs = [(settled, trial) for trial in trials if (settled := settle(trial, goals)).is_feasible]
    feasible = [settled for settled, _ in pairs]
    has_stand_in = np.array(
        [[one.quantities[item.name].source in _STAND_INS for item in goals.objectives] for one in feasible], dtype=bool
    ).reshape(len(feasible), len(goals.objectives))
    mixed = np.flatnonzero(has_stand_in.any(axis=0) & ~has_stand_in.all(axis=0))
    is_rest = has_stand_in[:, mixed].any(axis=1)
    if is_rest.all():  # none has all values of the better kind
        mixed, is_rest = mixed[:0], np.zeros(len(feasible), dtype=bool)
    names = [goals.objectives[column].name for column in mixed]
    likened = [_liken(settled, trial, names, goals) for settled, trial in pairs] if names else feasible
    return feasible, _Apart(np.flatnonzero(~is_rest), np.flatnonzero(is_rest), likened)


def _liken(settled: Trial, trial: Trial, names: Sequence[str], goals: Goals) -> Trial:
    quantities = {**settled.quantities, **{name: trial.quantities[name] for name in names}}
    return settled.changed(quantities=quantities, losses=goals.losses(quantities))


def _marks(feasible: Sequence[Trial], apart: _Apart, goals: Goals) -> tuple[Marks, Marks, Marks]:
    """Mark the trials that are never dominated, those that sometimes are not, and those that the rest may dominate."""
    certain, possible, is_doubted = (np.zeros(len(feasible), dtype=bool) for _ in range(3))
    low, high = _ends([feasible[row] for row in apart.rows], goals)
    certain[apart.rows] = pareto.never_dominated(low, high)
    possible[apart.rows] = pareto.sometimes_non_dominated(low, high)
    if len(apart.rest):
        low, high = _ends(apart.likened, goals)
        possible[apart.rest] = pareto.sometimes_non_dominated(low, high)[apart.rest]
        for row in np.flatnonzero(certain):
            best, worst = low[apart.rest], high[row]
            is_doubted[row] = np.any(np.all(best <= worst, axis=1) & np.any(best < worst, axis=1))
    return certain & ~is_doubted, possible, is_doubted


def _nominal(feasible: Sequence[Trial], apart: _Apart) -> tuple[Trial, ...]:
    rows = [feasible[row] for row in apart.rows]
    losses = np.array([trial.losses for trial in rows], dtype=np.float64) if rows else np.zeros((0, 1))
    return _ordered(trial for trial, kept in zip(rows, pareto.non_dominated(losses), strict=True) if kept)


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


def _obstacle(trial: Trial, goals: Goals, is_apart: bool, is_doubted: bool) -> str:
    """Say what keeps a trial that may be on the front from being so for certain; nothing where it is."""
    for objective in goals.objectives:
        source = trial.quantities[objective.name].source
        if source == "measured" and objective.name not in trial.remeasured:
            return f"{objective.name} was not measured again"
        if trial.quantities[objective.name].details.get("noisy"):
            return f"{objective.name} is noisy"
        if source not in ("measured", "trained", *_EXACT):
            return f"{objective.name} is {'from a supernet' if source == 'supernet' else source}"
    if is_doubted:
        return "others that were not trained alone look better by scores that stand for that"
    return "" if is_apart else "its interval overlaps another's"
