"""One call of `Study.run`: jobs from the study to an executor, outcomes back, callbacks on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.budget import Budget
from nas.callbacks import Callback
from nas.executors.base import Executor, Job
from nas.trial import Outcome

if TYPE_CHECKING:
    from nas.study import Study


class Run:
    """The source of an executor's jobs.

    Args:
        study: What to ask and tell.
        budget: When to stop asking.
        callbacks: What to call on the way.
    """

    def __init__(self, study: Study, budget: Budget, callbacks: Sequence[Callback]) -> None:
        self._study = study
        self._budget = budget
        self._callbacks = callbacks
        self._deadline = time.monotonic() + 3600 * budget.hours if budget.hours is not None else None
        self._jobs: set[int] = set()
        self._shown = 0

    def carry_out(self, executor: Executor) -> None:
        """Run trials until there is nothing left to do.

        Args:
            executor: Where they run.
        """
        for callback in self._callbacks:
            callback.on_start(self._study)
        self._show_notices()
        try:
            if self._may_go_on:
                self._study.record_run(self._budget, executor)
                executor.run(self._study.evaluator, self)
        finally:
            for number in self._jobs:
                self._study.put_back(number)
            self._show_notices()
            for callback in self._callbacks:
                callback.on_end(self._study)

    @property
    def _may_go_on(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return False
        within = self._budget.trials is None or self._study.num_trials < self._budget.trials
        return within or self._study.interrupted > 0

    def next_job(self) -> Job | None:
        """Return the next trial as a job, None when there is none now."""
        trial = self._study.ask() if self._may_go_on else None
        if trial is None:
            self._study.storage.sync()
            return None
        self._jobs.add(trial.number)
        for callback in self._callbacks:
            callback.on_trial(self._study, trial)
        return Job(trial.number, trial.architecture)

    def end_job(self, number: int, outcome: Outcome) -> None:
        """Hand the outcome of a job to the study and the callbacks."""
        trial = self._study.tell(number, outcome)
        self._jobs.discard(number)
        for callback in self._callbacks:
            callback.on_result(self._study, trial)

    def report(self, number: int, stage: str) -> None:
        """Hand the stage of a job to the callbacks."""
        for callback in self._callbacks:
            callback.on_stage(number, stage)

    def _show_notices(self) -> None:
        for notice in self._study.notices[self._shown :]:
            for callback in self._callbacks:
                callback.on_notice(notice)
        self._shown = len(self._study.notices)
