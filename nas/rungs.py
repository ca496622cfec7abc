"""Trials that are looked at on their way: who waits at a milestone, what is decided, and how far to train next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nas.goals import Goals
from nas.storages.base import Record
from nas.trial import CHECKPOINT_FILE, Outcome, Rung, Trial, decode_quantities, encode_outcome

if TYPE_CHECKING:
    from nas.executors.base import Job
    from nas.strategies.base import Strategy
    from nas.study import Study

RUNG: Final = "rung"
PROMOTED: Final = "promoted"


@dataclass
class Rungs:
    """Trials at milestones, rebuilt from the journal like everything else.

    Attributes:
        strategy: What sets milestones and judges.
        goals: What a trial is worth.
        waiting: Numbers of the trials that no decision is recorded for, in the order in which they came.
    """

    strategy: Strategy
    goals: Goals
    waiting: list[int] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """True when the strategy looks at trials on their way and an objective can be judged there."""
        return self.strategy.stops_early and any(metric.staged for metric in self.goals.metrics)

    def notices(self) -> list[str]:
        """Say what a user who wants trials to be stopped early should hear."""
        if self.is_active or not self.strategy.stops_early:
            return []
        return ["no objective of this study can be judged on the way to its end: no trial is stopped early"]

    def take(self, trial: Trial, record: Record) -> Trial | None:
        """Return a trial after a record of this module, None where that does not fit."""
        if trial.state != "running" or (trial.number in self.waiting) != (record["event"] == PROMOTED):
            return None
        if record["event"] == PROMOTED:
            self.waiting.remove(trial.number)
            return trial
        quantities = decode_quantities(record)
        rung = Rung(float(record["fraction"]), quantities, self.goals.losses(quantities))
        self.waiting.append(trial.number)
        return trial.changed(rungs=(*trial.rungs, rung), seconds=record.get("seconds", 0.0))

    def discard(self, number: int) -> None:
        """Forget a trial that has ended."""
        if number in self.waiting:
            self.waiting.remove(number)

    def until(self, trial: Trial) -> float:
        """Return the part of its budget to which a trial is trained next."""
        reached = trial.rungs[-1].fraction if trial.rungs else 0.0
        milestones = self.strategy.milestones(trial.number) if self.is_active else ()
        return next((fraction for fraction in milestones if fraction > reached), 1.0)

    def decide(self, trials: Sequence[Trial], *, is_last: bool, now: float) -> list[Record]:
        """Return the records of all decisions that can be made now.

        Args:
            trials: All trials, by number.
            is_last: True when there will be no further trials.
            now: Seconds since the epoch.
        """
        decided = self.strategy.judge(tuple(self.waiting), trials, is_last=is_last) if self.waiting else {}
        return [_decision(trials[number], goes_on, now) for number, goes_on in decided.items()]


def make_job(study: Study, trial: Trial, until: float) -> Job:
    """Return what to evaluate next of a trial.

    Args:
        study: Its study, which keeps what earlier parts of its training left.
        trial: The trial.
        until: Part of its budget to which it is trained.
    """
    from nas.executors.base import Job

    if not trial.rungs:
        return Job(trial.number, trial.architecture, until)
    left = study.read_file(trial.number, CHECKPOINT_FILE)
    return Job(trial.number, trial.architecture, until, trial.rungs[-1].quantities, left)


def _decision(trial: Trial, goes_on: bool, now: float) -> dict[str, Any]:
    rung = trial.rungs[-1]
    if goes_on:
        return {"event": PROMOTED, "trial": trial.number, "fraction": rung.fraction, "time": now}
    reason = f"others did better after {rung.fraction:.3g} of its budget"
    outcome = Outcome("stopped", rung.quantities, reason=reason, seconds=trial.seconds, fraction=rung.fraction)
    return encode_outcome(trial.number, trial.hash, outcome, now)
