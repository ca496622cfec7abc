"""Judge one architecture by a study's goals, the cheapest first."""

from __future__ import annotations

import errno
import math
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ir.errors import ArtifactError, InputError, ParseError, SpaceError, StorageError, TargetUnavailable, TrialFailure
from nas.executors.base import Job, ReportStage
from nas.goals import Goals
from nas.objectives.base import Context, Objective
from nas.trial import Outcome, Quantity

if TYPE_CHECKING:
    from codegen.devices.client import Device
    from codegen.targets.base import Target
    from nas.tasks.base import Task

_TRACEBACK_LINES = 12

# Errors about one candidate, though the classes above them are about what the user gave.
_OF_THE_CANDIDATE = (SpaceError, ArtifactError, ParseError)
# Errors that every further trial would meet too.
_OF_THE_STUDY = (StorageError, InputError, TargetUnavailable)


# What the system says when no trial could write its files.
_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True)
class Evaluator:
    """Evaluate the trials of one study; travels to worker processes.

    Attributes:
        goals: Objectives and constraints.
        task: Data and yardstick, None where no objective needs them.
        target: Target or its name.
        threads: Threads that a compiled model may use.
        seed: Seed of the study.
        device: Where latency is measured; None is this machine.
    """

    goals: Goals
    task: Task | None = None
    target: str | Target = "cpu"
    threads: int | None = None
    seed: int = 0
    device: Device | None = None

    def context(self, architecture: Any, number: int = 0) -> Context:
        """Return what objectives see of a trial."""
        return Context(architecture, self.task, number, self.target, self.threads, self.seed, device=self.device)

    @property
    def is_staged(self) -> bool:
        """True when an objective can be judged after part of its budget."""
        return any(metric.staged for metric in self.goals.metrics)

    def is_excluded(self, architecture: Any) -> bool:
        """Tell whether an architecture breaks a constraint that is cheap to check.

        An objective that fails here excludes nothing: the trial then fails with the reason.
        """
        context = self.context(architecture)
        quantities: dict[str, Quantity] = {}
        for metric in self.goals.cheap_metrics:
            try:
                quantities[metric.name] = _evaluate(metric, context)
            except _OF_THE_CANDIDATE:
                return False
            except _OF_THE_STUDY:
                raise
            except Exception:  # noqa: BLE001 - an objective is the user's code and may raise anything
                return False
            if self.goals.violation(quantities) > 0:
                return True
        return False

    def __call__(self, job: Job, report: ReportStage | None = None) -> Outcome:
        """Evaluate a trial, and stop early when it breaks a constraint.

        A bound on a staged objective is checked once it had its whole budget.

        Args:
            job: Number and architecture, and the part of the budget to train for.
            report: Called with the trial's number and the stage it enters.

        Returns:
            The outcome; an error that concerns this trial alone is in it, not raised.

        Raises:
            StorageError: A cache or folder cannot be written.
            InputError: Something the user gave is wrong.
            TargetUnavailable: There is nothing to measure on.
        """
        context = self.context(job.architecture, job.number)
        context.until, context.checkpoint = job.until, job.checkpoint
        context.rivals = job.rivals
        is_partial = job.until < 1 and self.is_staged
        if report is not None:
            context.report = lambda stage: report(job.number, stage)
        quantities: dict[str, Quantity] = {}
        started = time.monotonic()

        def end(**fields: Any) -> Outcome:
            return Outcome(quantities=quantities, seconds=time.monotonic() - started, files=context.files, **fields)

        def judged() -> dict[str, Quantity]:
            early = {metric.name for metric in self.goals.metrics if metric.staged and is_partial}
            return {name: quantity for name, quantity in quantities.items() if name not in early}

        try:
            for metric in self.goals.metrics:
                if metric.name in job.known and not metric.staged:
                    quantities[metric.name] = job.known[metric.name]
                    continue
                context.report(metric.name)
                quantities[metric.name] = _evaluate(metric, context)
                if broken := self.goals.broken(judged()):
                    return end(state="infeasible", reason=broken)
        except _OF_THE_CANDIDATE as error:
            return end(state="failed", **_explain(error))
        except _OF_THE_STUDY:
            raise
        except Exception as error:  # an objective is the user's code and may raise anything; its trial alone fails
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise _no_room(job.number, error) from error
            return end(state="failed", **_explain(error))
        return end(state="paused", fraction=job.until) if is_partial else end(state="finished")


def concerns_study(error: Exception) -> bool:
    """Tell whether an error would meet every further trial, rather than being about one candidate."""
    return isinstance(error, _OF_THE_STUDY) and not isinstance(error, _OF_THE_CANDIDATE)


def _evaluate(metric: Objective, context: Context) -> Quantity:
    quantity = metric.evaluate(context)
    if not math.isfinite(quantity.value):
        raise TrialFailure(f"{metric.name} is {quantity.value}", expected="a finite number", found=str(quantity.value))
    return quantity


def _no_room(number: int, error: OSError) -> StorageError:
    return StorageError(
        "a file of this trial cannot be written",
        where=f"trial {number}",
        found=f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror),
        hint="make room, or set TMPDIR to a folder with room, then give the same command: the trial is run again",
    )


def _explain(error: Exception) -> dict[str, Any]:
    """Return the fields of an outcome that say what went wrong."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"reason": f"{type(error).__name__}: {error}", "traceback": tuple(lines[-_TRACEBACK_LINES:])}
