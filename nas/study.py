"""A study: ask for trials, tell what became of them, and see the front. The journal behind it is the truth."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ir.errors import InputError, StorageError, did_you_mean
from nas import pareto
from nas.budget import Budget
from nas.callbacks import AnyCallback, as_callback
from nas.evaluate import Evaluator
from nas.executors import base as executors
from nas.executors.base import Executor
from nas.goals import Goals, names_of
from nas.proposals import Hash, Proposer, Tally, hash_encoded
from nas.run import Run
from nas.settings import check_header, check_settings, describe_settings, study_record, versions
from nas.storages.base import Record, Storage
from nas.storages.memory import Memory
from nas.storages.records import without_collector
from nas.strategies.base import Strategy
from nas.strategies.random import Random
from nas.trial import Outcome, Trial, decode_quantities, encode_outcome

_ENDS = ("finished", "infeasible", "failed")


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
        self._interrupted: list[int] = []
        self._shown: tuple[Trial, ...] = ()
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
        """How many trials wait to be run again because the process that ran them ended."""
        return len(self._interrupted)

    def count(self) -> dict[str, int]:
        """Return how many trials are in each state."""
        counted = Counter(trial.state for trial in self._trials)
        return {state: counted[state] for state in (*_ENDS, "running")}

    def ask(self) -> Trial | None:
        """Return a trial to evaluate, recorded before it is returned.

        Returns:
            None when the strategy needs the result of a running trial first, or when `is_exhausted`.

        Raises:
            StorageError: The trial could not be recorded.
        """
        self.storage.sync()  # what has ended is safe before anything new begins
        if self._interrupted:
            return self._trials[self._interrupted.pop(0)]
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
        if refused := proposal.refused.describe():
            record["refused"] = refused
        self._append(record | {"time": time.time()})
        return self._trials[number]

    def tell(self, number: int, outcome: Outcome) -> Trial:
        """Take the outcome of a trial, its files first, then its record.

        Args:
            number: Trial number.
            outcome: What evaluating it gave.

        Returns:
            The trial as it is now.

        Raises:
            InputError: The trial is not running, or the outcome lacks an objective.
            StorageError: It could not be recorded.
        """
        if number not in self._running:
            raise InputError(
                "this trial is not running", where=f"trial {number}", expected=f"one of {sorted(self._running)}"
            )
        missing = [name for name in names_of(self.goals.objectives) if name not in outcome.quantities]
        if outcome.state == "running" or (outcome.state == "finished" and missing):
            raise InputError(
                "this outcome does not end a trial",
                where=f"trial {number}",
                expected="a value for every objective, or a reason",
                found=f"{outcome.state} without {', '.join(missing)}" if missing else outcome.state,
            )
        for name, data in outcome.files.items():
            self.storage.write_file(number, name, data)
        self._append(encode_outcome(number, self._trials[number].hash, outcome, time.time()))
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
        """Return the feasible trials that no other dominates, best in the first objective first."""
        feasible = [trial for trial in self._trials if trial.is_feasible]
        losses = np.array([trial.losses for trial in feasible], dtype=np.float64).reshape(
            -1, len(self.goals.objectives)
        )
        front = [trial for trial, is_kept in zip(feasible, pareto.non_dominated(losses), strict=True) if is_kept]
        return tuple(sorted(front, key=lambda trial: (trial.losses, trial.number)))

    def best(self, objective: str | None = None, **limits: float) -> Trial:
        """Return the trial that is best in one objective among those within limits.

        Args:
            objective: Name of the objective, the first where None.
            limits: `max_NAME`, `min_NAME`, with or without the unit: `max_latency_ms=3.0`.

        Raises:
            InputError: No such objective or limit, or no trial is within the limits.
        """
        column = self._column(objective)
        tests = [self._limit(key, value) for key, value in limits.items()]
        fitting = [
            trial
            for trial in self._trials
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
        if number in self._running and number not in self._interrupted:
            self._interrupted = sorted([*self._interrupted, number])

    def record_artifact(self, number: int, path: str) -> None:
        """Record where the compiled model of a trial lies, relative to the run folder."""
        self._append({"event": "artifact", "trial": number, "path": path, "time": time.time()})

    def record_unshipped(self, number: int, reason: str) -> None:
        """Record why a trial of the front has no compiled model."""
        self._append({"event": "unshipped", "trial": number, "reason": reason, "time": time.time()})

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
        self._interrupted = sorted(self._running)

    @property
    def _where(self) -> str:
        return str(self.folder) if self.folder is not None else "the study"

    def _append(self, record: Record) -> None:
        self.storage.append(record)
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
        elif event in _ENDS or event == "artifact":
            number = record.get("trial")
            if type(number) is not int or not 0 <= number < len(self._trials):
                raise self._inconsistent(record, "a trial that was proposed before")
            self._trials[number] = self._ended(self._trials[number], record)

    def _add(self, record: Record) -> None:
        number = len(self._trials)
        if record.get("trial") != number or not isinstance(record.get("architecture"), Mapping):
            raise self._inconsistent(record, f"trial {number} with its architecture")
        hash_ = str(record.get("hash"))
        self._trials.append(
            Trial(
                number,
                hash_,
                record["architecture"],
                self.space.architecture,
                proposed_at=record.get("time", 0.0),
                study=self,
            )
        )
        self._hashes.add(hash_)
        self._running.add(number)

    def _ended(self, trial: Trial, record: Record) -> Trial:
        if record["event"] == "artifact":
            self._shown = ()
            return trial.changed(artifact=record["path"])
        if trial.state != "running":
            raise self._inconsistent(record, "one end for each trial")
        self._running.discard(trial.number)
        quantities = decode_quantities(record)
        state = record["event"]
        return trial.changed(
            state=state,
            quantities=quantities,
            losses=self.goals.losses(quantities) if state == "finished" else (),
            violation=self.goals.violation(quantities),
            reason=record.get("reason", ""),
            traceback=tuple(record.get("traceback", ())),
            ended_at=record.get("time"),
            seconds=record.get("seconds", 0.0),
        )

    def _inconsistent(self, record: Record, expected: str) -> StorageError:
        return StorageError(
            "the records of the journal do not fit together",
            where=self._where,
            expected=expected,
            found=f"event {record['event']} of trial {record.get('trial')}",
            hint="restore the journal from a copy, or start a new study in another folder",
        )

    def _end_exhausted(self, refused: Tally) -> None:
        self.is_exhausted = True
        counts = ", ".join(f"{count} {name}" for name, count in refused.describe().items())
        self.notices.append(f"the space holds no further architecture within the constraints; last refused: {counts}")

    def _column(self, objective: str | None) -> int:
        names = names_of(self.goals.objectives)
        if objective is not None and objective not in names:
            raise InputError(
                f"no objective {objective!r}",
                expected="one of " + ", ".join(names),
                found=objective,
                hint=did_you_mean(objective, names),
            )
        return 0 if objective is None else names.index(objective)

    def _limit(self, key: str, value: float) -> tuple[float, str, float]:
        """Split `max_latency_ms` into sign and name."""
        signs = {f"max_{spelling}": (1.0, item.name) for item in self.goals.metrics for spelling in _spellings(item)}
        signs |= {f"min_{spelling}": (-1.0, item.name) for item in self.goals.metrics for spelling in _spellings(item)}
        if key not in signs:
            raise InputError(
                f"no limit {key!r}", expected="one of " + ", ".join(signs), found=key, hint=did_you_mean(key, signs)
            )
        return (*signs[key], float(value))


def _spellings(objective: Any) -> tuple[str, ...]:
    return (
        (objective.name, f"{objective.name}_{objective.unit}") if objective.unit.isidentifier() else (objective.name,)
    )
