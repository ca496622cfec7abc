"""A study: ask for trials, tell what became of them, and see the front. The journal behind it is the truth."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ir.errors import InputError
from nas.budget import Budget
from nas.callbacks import AnyCallback, as_callback
from nas.evaluate import Evaluator
from nas.executors import base as executors
from nas.executors.base import Executor, Job
from nas.front import Front, nominal_front, settle
from nas.goals import Goals
from nas.limits import find_column, read_limit
from nas.outcomes import ENDS, check_outcome, end_trial, misfit
from nas.proposals import Hash, Proposer, Tally, hash_encoded
from nas.run import Run
from nas.rungs import PROMOTED, RUNG, Rungs, make_job
from nas.settings import check_header, check_settings, describe_settings, study_record, versions
from nas.storages.base import Record, Storage
from nas.storages.memory import Memory
from nas.storages.records import without_collector
from nas.strategies.base import Strategy
from nas.strategies.random import Random
from nas.trial import CHECKPOINT_FILE, Outcome, Quantity, Trial, decode_quantities, encode_outcome

REMEASURED = "remeasured"


class Study:
    """Trials over a space, replayed from a storage and written to it before anything is done.

    `ask` and `tell` may be used by hand; `run` does so with an executor. Proposals are a function of the seed and the
    journal, so a study that was interrupted goes on as if it had not been.

    Args:
        space: Search space: `sample`, `mutate`, `crossover` and `architecture(encoded)`; architectures have `to_dict`.
        evaluator: Goals, task, target and seed.
        strategy: What proposes.
        hash_of: Canonical hash of an architecture; equal hashes are evaluated once.
        storage: Where records go; in this process alone where None.
        settings: What must equal the recorded settings; None takes them from the arguments.

    Raises:
        InputError: The storage holds a study with other settings.
        StorageError: The storage cannot be read or written.
    """

    def __init__(
        self,
        space: Any,
        evaluator: Evaluator,
        *,
        strategy: Strategy | None = None,
        hash_of: Hash = hash_encoded,
        storage: Storage | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.space = space
        self.evaluator = evaluator
        self.strategy = strategy or Random()
        self.storage = storage or Memory()
        self.is_exhausted = False
        self.notices: list[str] = list(self.storage.notices)
        self._proposer = Proposer(space, self.strategy, evaluator, hash_of)
        self._trials: list[Trial] = []
        self._hashes: set[str] = set()
        self._running: set[int] = set()
        self._due: list[int] = []
        self._rungs = Rungs(self.strategy, evaluator.goals)
        self._shown: tuple[Trial, ...] = ()
        self.notices.extend(self._rungs.notices())
        self._open(settings or describe_settings(space, evaluator, self.strategy))

    @property
    def goals(self) -> Goals:
        """Objectives and constraints."""
        return self.evaluator.goals

    @property
    def folder(self) -> Path | None:
        """Run folder, None for a study in memory."""
        return self.storage.folder

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, by number."""
        return tuple(self._trials)

    @property
    def num_trials(self) -> int:
        """How many trials there are."""
        return len(self._trials)

    @property
    def interrupted(self) -> int:
        """How many trials wait to be run again because the process that ran them ended, or may train on."""
        return len(self._due)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Numbers of the trials at a milestone that are judged once more trials have reached it."""
        return tuple(self._rungs.waiting)

    def count(self) -> dict[str, int]:
        """Return how many trials are in each state."""
        counted = Counter(trial.state for trial in self._trials)
        return {state: counted[state] for state in (*ENDS, "running")}

    def ask(self, *, may_begin: bool = True) -> Trial | None:
        """Return a trial to evaluate, recorded before it is returned; `job` says for how long.

        Args:
            may_begin: False to go on with trials alone that were begun before.

        Returns:
            None when the strategy needs the result of a running trial first, or when `is_exhausted`.

        Raises:
            StorageError: The trial could not be recorded.
        """
        self.storage.sync()  # what has ended is safe before anything new begins
        self.judge()
        if self._due:
            return self._trials[self._due.pop(0)]
        if not may_begin:
            return None
        number = len(self._trials)
        batch = self.strategy.batch_size
        start = number // batch * batch if batch else 0
        if self.is_exhausted or (self._running and min(self._running) < start):
            return None
        proposal = self._proposer.propose(number, self._history(start), self._hashes)
        if isinstance(proposal, Tally):
            self._end_exhausted(proposal)
            return None
        record: Record = {"event": "trial", "trial": number, "hash": proposal.hash, "architecture": proposal.encoded}
        said = {"refused": proposal.refused.describe(), "note": proposal.note}
        record |= {name: value for name, value in said.items() if value}
        self._append(record | {"time": time.time()})
        return self._trials[number]

    def job(self, trial: Trial) -> Job:
        """Return what to evaluate of a trial that was asked for: all of it, or the part up to its next milestone."""
        return make_job(self, trial, self._rungs.until(trial))

    def judge(self) -> list[Trial]:
        """Decide which of the trials at a milestone go on, and record it.

        Returns:
            The trials that are stopped.

        Raises:
            StorageError: The decisions could not be recorded.
        """
        if records := self._rungs.decide(self._trials, is_last=self.is_exhausted, now=time.time()):
            self._append(*records)
        stopped = [record["trial"] for record in records if record["event"] == "stopped"]
        for number in stopped:
            self.storage.remove_file(number, CHECKPOINT_FILE)
        return [self._trials[number] for number in stopped]

    def tell(self, number: int, outcome: Outcome) -> Trial:
        """Take the outcome of a trial, or of a part of its training: its files first, then its record.

        Args:
            number: Trial number.
            outcome: What evaluating it gave.

        Returns:
            The trial as it is now.

        Raises:
            InputError: The trial is not running, or the outcome lacks an objective.
            StorageError: It could not be recorded.
        """
        running = self._running.difference(self._rungs.waiting)
        if number not in running:
            raise InputError("this trial is not running", where=f"trial {number}", expected=f"one of {sorted(running)}")
        check_outcome(number, outcome, self.goals)
        for name, data in outcome.files.items():
            self.storage.write_file(number, name, data)
        trial = self._trials[number]
        whole = replace(outcome, seconds=trial.seconds + outcome.seconds)
        self._append(encode_outcome(number, trial.hash, whole, time.time()))
        if trial.rungs and outcome.state != "paused":
            self.storage.remove_file(number, CHECKPOINT_FILE)
        return self._trials[number]

    def run(
        self, budget: int | Budget, *, executor: str | Executor = "serial", callbacks: Iterable[AnyCallback] = ()
    ) -> None:
        """Ask, evaluate and tell until the budget is used up or the space is exhausted.

        Args:
            budget: Limits, or a number of trials.
            executor: Where trials run.
            callbacks: What to call on the way.

        Raises:
            NasError: What concerns the study and not one trial; everything recorded stays.
        """
        # Torch's threads spin for milliseconds while they wait, unless told otherwise before it loads; beside any other
        # busy process that makes training ten times slower. Ten microseconds keep all the speed of an idle machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        run = Run(self, Budget.of(budget), [as_callback(callback) for callback in callbacks])
        run.carry_out(executors.get(executor))

    def pareto_front(self) -> tuple[Trial, ...]:
        """Return the feasible trials that no other dominates, best in the first objective first.

        Values that were measured again after the search are in the place of the search's own; `trials` has those.
        """
        return nominal_front(self._trials, self.goals)

    def front(self) -> Front:
        """Return the front as far as it is certain, and what else may be on it."""
        return Front.of(self._trials, self.goals)

    def best(self, objective: str | None = None, **limits: float) -> Trial:
        """Return the trial that is best in one objective among those within limits.

        Args:
            objective: Name of the objective, the first where None.
            limits: `max_NAME`, `min_NAME`, with or without the unit: `max_latency_ms=3.0`.

        Raises:
            InputError: No such objective or limit, or no trial is within the limits.
        """
        column = find_column(self.goals, objective)
        tests = [read_limit(self.goals, key, value) for key, value in limits.items()]
        fitting = [
            trial
            for trial in (settle(trial, self.goals) for trial in self._trials)
            if trial.is_feasible and all(sign * trial.values[name] <= sign * value for sign, name, value in tests)
        ]
        if not fitting:
            raise InputError(
                "no trial is within the limits",
                expected=", ".join(f"{key}={value}" for key, value in limits.items()) or "a finished trial",
                found=f"{self.count()['finished']} finished trials",
                hint="loosen the limits, or search on with more trials",
            )
        return min(fitting, key=lambda trial: (trial.losses[column], trial.number))

    def read_file(self, number: int, name: str) -> bytes | None:
        """Return a file kept with a trial, such as its weights; None where there is none."""
        return self.storage.read_file(number, name)

    def put_back(self, number: int) -> None:
        """Make `ask` return a running trial again: whoever ran it gave up."""
        if number in self._running and number not in (*self._due, *self._rungs.waiting):
            self._due = sorted([*self._due, number])

    def record_artifact(self, number: int, path: str) -> None:
        """Record where the compiled model of a trial lies, relative to the run folder."""
        self._append({"event": "artifact", "trial": number, "path": path, "time": time.time()})

    def record_unshipped(self, number: int, reason: str) -> None:
        """Record why a trial of the front has no compiled model."""
        self._append({"event": "unshipped", "trial": number, "reason": reason, "time": time.time()})

    def record_remeasured(self, number: int, quantities: Mapping[str, Quantity], seconds: float = 0.0) -> Trial:
        """Record what measuring an ended trial again gave; values of the search stay as they are.

        Args:
            number: Trial number.
            quantities: Results by objective name.
            seconds: How long it took.

        Returns:
            The trial with these results beside its own.
        """
        outcome = Outcome("finished", quantities, seconds=seconds)
        record = encode_outcome(number, self._trials[number].hash, outcome, time.time())
        self._append(record | {"event": REMEASURED})
        return self._trials[number]

    def record_run(self, budget: Budget, executor: Executor) -> None:
        """Record that this process goes on with the study."""
        described = {"name": executors.REGISTRY.name_of(type(executor)), **vars(executor)}
        self._append(
            {
                "event": "run",
                "budget": budget.describe(),
                "executor": described,
                "versions": versions(),
                "time": time.time(),
            }
        )

    def close(self) -> None:
        """Let another process use the storage; the next `ask` or `tell` takes it up again."""
        self.storage.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Replay the storage, or begin it."""
        records = self.storage.records()
        try:
            if not records:
                self.storage.append(study_record(self.space, self.evaluator, settings, time.time()))
                return
            check_header(records[0], self._where)
            check_settings(records[0]["settings"], settings, self._where)
            with without_collector():
                for record in records:
                    self._replay(record)
        except BaseException:
            self.storage.close()
            raise
        self._due = sorted(self._running.difference(self._rungs.waiting))

    @property
    def _where(self) -> str:
        return str(self.folder) if self.folder is not None else "the study"

    def _append(self, *records: Record) -> None:
        self.storage.append(*records)
        for record in records:
            self._replay(record)

    def _history(self, start: int) -> Sequence[Trial]:
        """Return the trials before a batch, the same object for the whole batch."""
        if len(self._shown) != start:
            self._shown = tuple(self._trials[:start])
        return self._shown

    def _replay(self, record: Record) -> None:
        """Take a record into account; records that only tell a reader something change nothing."""
        event = record["event"]
        if event == "trial":
            self._add(record)
        elif event in ENDS or event in ("artifact", REMEASURED, RUNG, PROMOTED):
            number = record.get("trial")
            if type(number) is not int or not 0 <= number < len(self._trials):
                raise misfit(self._where, record, "a trial that was proposed before")
            self._trials[number] = self._ended(self._trials[number], record)

    def _add(self, record: Record) -> None:
        number = len(self._trials)
        if record.get("trial") != number or not isinstance(record.get("architecture"), Mapping):
            raise misfit(self._where, record, f"trial {number} with its architecture")
        hash_ = str(record.get("hash"))
        self._trials.append(
            Trial(
                number,
                hash_,
                record["architecture"],
                self.space.architecture,
                proposed_at=record.get("time", 0.0),
                note=record.get("note", {}),
                study=self,
            )
        )
        self._hashes.add(hash_)
        self._running.add(number)

    def _ended(self, trial: Trial, record: Record) -> Trial:
        if record["event"] == "artifact":
            self._shown = ()
            return trial.changed(artifact=record["path"])
        if record["event"] == REMEASURED and trial.state == "finished":
            return trial.changed(remeasured={**trial.remeasured, **decode_quantities(record)})
        if record["event"] in (RUNG, PROMOTED):
            return self._moved(trial, record)
        if trial.state != "running" or record["event"] == REMEASURED:
            raise misfit(self._where, record, "one end for each trial")
        self._running.discard(trial.number)
        self._rungs.discard(trial.number)
        return end_trial(trial, record, self.goals)

    def _moved(self, trial: Trial, record: Record) -> Trial:
        moved = self._rungs.take(trial, record)
        if moved is None:
            raise misfit(self._where, record, "a running trial that reaches a milestone, and then one decision")
        if record["event"] == PROMOTED:
            self._due = sorted([*self._due, trial.number])
        return moved

    def _end_exhausted(self, refused: Tally) -> None:
        self.is_exhausted = True
        counts = ", ".join(f"{count} {name}" for name, count in refused.describe().items())
        self.notices.append(f"the space holds no further architecture within the constraints; last refused: {counts}")
