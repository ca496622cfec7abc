"""Why a trial is as good as it is: what it changed from the most similar trial before it, and what that cost or gained.

found = why(nas.load_study("runs/lm"), 17)
print(found.base, found.changes, found.values)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ir.errors import InputError
from nas.differences import Change, ValueChange, changes, find_trial, value_changes
from nas.study import Study
from nas.trial import Trial

Verdict: TypeAlias = Literal["gained", "cost", "the same", "undecided", ""]


@dataclass(frozen=True)
class Effect:
    """A value's change, and which way that is.

    Attributes:
        value: The change.
        verdict: `undecided` where the intervals overlap; empty where one side has no value.
    """

    value: ValueChange
    verdict: Verdict


@dataclass(frozen=True)
class Reason:
    """A trial against the most similar one before it.

    Attributes:
        trial: Number of the trial.
        base: Number of the other, None where no earlier trial has a result.
        changes: What is another, from the base to the trial.
        effects: What it did to each value.
        reason: Why the trial failed, is infeasible or was stopped.
        note: What the strategy said of why it proposed the trial.
    """

    trial: int
    base: int | None
    changes: tuple[Change, ...]
    effects: tuple[Effect, ...]
    reason: str
    note: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        effects = [dataclasses.asdict(effect.value) | {"verdict": effect.verdict} for effect in self.effects]
        return dataclasses.asdict(self) | {"effects": effects}


def why(study: Study, number: int, *, base: int | None = None) -> Reason:
    """Compare a trial with the trial before it that differs in the fewest places.

    Strategies keep no record of parents; a mutation's parent is nearly always that trial. Where several differ in
    equally few places the latest is taken. All changes together made the difference: with one change it is that
    one's, with several it cannot be told apart.

    Args:
        study: The study.
        number: Number of the trial.
        base: Trial to compare with instead.

    Raises:
        InputError: There is no such trial, or it has no result yet.
    """
    trial = find_trial(study, number)
    if trial.state == "running":
        raise InputError("this trial has no result", where=f"trial {number}", found="running")
    other = find_trial(study, base) if base is not None else _nearest(study, trial)
    if other is None:
        return Reason(number, None, (), (), trial.reason, dict(trial.note))
    found = tuple(changes(other.encoded, trial.encoded))
    directions = {metric.name: metric.direction for metric in study.goals.metrics}
    effects = tuple(
        Effect(change, _verdict(change, directions.get(change.name, "min")))
        for change in value_changes(other.quantities, trial.quantities)
    )
    return Reason(number, other.number, found, effects, trial.reason, dict(trial.note))


def _nearest(study: Study, trial: Trial) -> Trial | None:
    earlier = [item for item in study.trials[: trial.number] if item.state == "finished"]
    distances = [(sum(1 for _ in changes(item.encoded, trial.encoded)), -item.number) for item in earlier]
    return earlier[distances.index(min(distances))] if earlier else None


def _verdict(change: ValueChange, direction: str) -> Verdict:
    if change.difference is None:
        return ""
    if change.is_certain is False:
        return "undecided"
    if change.difference == 0:
        return "the same"
    return "gained" if (change.difference < 0) == (direction == "min") else "cost"
