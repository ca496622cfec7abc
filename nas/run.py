"""One call of `Study.run`: jobs from the study to an executor, outcomes back, callbacks on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nas.budget import Budget
from nas.callbacks import Callback
from nas.devices import held
from nas.executors.base import Executor, Job
from nas.rivals import recent_rivals
from nas.trial import Outcome, Trial

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
            self._judge()
            if not self._is_late and (self._may_begin or self._study.interrupted):
                self._study.record_run(self._budget, executor)
                with held(self._study.evaluator.device):
                    executor.run(self._study.evaluator, self)
        finally:
            for number in self._jobs:
                self._study.put_back(number)
            self._show_notices()
            for callback in self._callbacks:
                callback.on_end(self._study)

    @property
    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def _may_begin(self) -> bool:
        return self._budget.trials is None or self._study.num_trials < self._budget.trials

    def next_job(self) -> Job | None:
        """Return the next trial as a job, None when there is none now."""
        trial = None if self._is_late else self._ask()
        if trial is None:
            self._study.storage.sync()
            return None
        self._jobs.add(trial.number)
        for callback in self._callbacks:
            callback.on_trial(self._study, trial)
        return replace(self._study.job(trial), rivals=recent_rivals(self._study))

    def end_job(self, number: int, outcome: Outcome) -> None:
        """Hand the outcome of a job to the study and the callbacks."""
        trial = self._study.tell(number, outcome)
        self._jobs.discard(number)
        for callback in self._callbacks:
            if trial.state == "running":
                callback.on_rung(self._study, trial)
            else:
                callback.on_result(self._study, trial)

    def report(self, number: int, stage: str) -> None:
        """Hand the stage of a job to the callbacks."""
        for callback in self._callbacks:
            callback.on_stage(number, stage)

    def _ask(self) -> Trial | None:
        self._judge()
        trial = self._study.ask(may_begin=self._may_begin)
        if trial is None and self._study.is_exhausted:  # who waited for further trials is judged now
            self._judge()
            trial = self._study.ask(may_begin=False)
        return trial

    def _judge(self) -> None:
        for trial in self._study.judge():
            for callback in self._callbacks:
                callback.on_result(self._study, trial)

    def _show_notices(self) -> None:
        for notice in self._study.notices[self._shown :]:
            for callback in self._callbacks:
                callback.on_notice(notice)
        self._shown = len(self._study.notices)
