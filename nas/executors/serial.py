"""One trial at a time, in this process."""

from __future__ import annotations

from dataclasses import dataclass

from nas.executors.base import Evaluate, Executor, JobSource


@dataclass(frozen=True)
class Serial(Executor):
    """Run each job before asking for the next."""

    def run(self, evaluate: Evaluate, source: JobSource) -> None:
        while job := source.next_job():
            source.end_job(job.number, evaluate(job, report=source.report))
