"""Measure the points of a front again, and those that may belong there: `remeasure(study)`.

Of many noisy values the search keeps the lowest, and these are low by luck as well. So what is on the front, or
overlaps it, is measured once more, neighbours in turns with each other, and the new values are the ones that count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.errors import InputError, NasError
from nas.callbacks import Callback
from nas.devices import held, timer_of
from nas.evaluate import concerns_study
from nas.front import Front
from nas.objectives.base import Objective
from nas.objectives.energy import Energy
from nas.objectives.latency import STEADY_RATIO, Latency
from nas.objectives.quality import Quality
from nas.objectives.recorded import Recorded
from nas.trial import Quantity, Trial

if TYPE_CHECKING:
    from codegen.measure import Latency as Record
    from nas.study import Study

DEFAULT_SECONDS = 4.0
_PASSES = 4  # a pass may bring up points that nobody had thought of; it rarely does twice
_PROCESSES = 2  # times differ from process to process, by tenths of a percent on a quiet machine
_TOGETHER = 12  # models that share a process and its memory
_APART = 1.1  # latencies further apart than this need no turns with each other


def remeasure(
    study: Study,
    *,
    seeds: int = 1,
    seconds: float = DEFAULT_SECONDS,
    again: bool = False,
    callback: Callback | None = None,
) -> Front:
    """Measure again what is on the front or may be, until nothing new comes up.

    Latencies are measured in turns, see `codegen.measure.measure_together`, in two processes one after the other.
    Results are recorded at once, so that a call that was interrupted goes on where it was. No proposal depends on them.

    Args:
        study: A study of `search`, or of `load_study(folder, hold=True)`.
        seeds: Trainings behind each quality; above 1, points are trained anew with other seeds, and the quality is
            their mean with their range as its interval.
        seconds: Time for measuring one model, beside compiling it.
        again: Whether points that were measured again before, and still overlap, are so once more.
        callback: Hears of stages, and of what cannot be measured.

    Returns:
        The front as far as it is certain, and what else may be on it.

    Raises:
        InputError: `seeds` or `seconds` is out of range.
        TargetUnavailable: There is nothing to measure on.
        StorageError: A result could not be recorded.
    """
    if seeds < 1 or not seconds > 0:
        raise InputError("bad effort", expected="seeds >= 1 and seconds > 0", found=f"seeds {seeds}, seconds {seconds}")
    work = _Work(study, seeds, seconds, callback or Callback())
    with held(study.evaluator.device):
        for _ in range(_PASSES):
            if not work.do_pass(again):
                break
            again = False
    return study.front()


class _Work:
    """One call: what it was asked, and what it need not try again.

    Args:
        study: The study.
        seeds: Trainings behind each quality.
        seconds: Time for measuring one model.
        callback: Hears of what is done.
    """

    def __init__(self, study: Study, seeds: int, seconds: float, callback: Callback) -> None:
        self._study, self._seeds, self._seconds, self._callback = study, seeds, seconds, callback
        self._given_up: set[tuple[int, str]] = set()

    @cached_property
    def _cpu(self) -> str:
        """The processor that latency is measured on now."""
        from codegen import machine

        device = self._study.evaluator.device
        return device.report().cpu if device is not None else machine.describe()["cpu"]

    def do_pass(self, again: bool) -> bool:
        """Measure everything that is missing for the front as it is; tell whether there was anything."""
        front, did = self._study.front(), False
        points = [*front.certain, *front.possible]
        for objective in self._study.goals.objectives:
            live = live_objective(objective, self._study)
            if live is None:
                continue
            here = [point for point in points if (point.number, live.name) not in self._given_up]
            if isinstance(live, Quality):
                did |= self._train_again(live, [trial for trial in here if self._missing_seeds(live, trial)])
                continue
            wanted = {trial.number for trial in here if live.name not in trial.remeasured}
            wanted |= {trial.number for trial in front.possible if again}
            for group in groups(here, live.name):
                if any(trial.number in wanted for trial in group):
                    did |= self._measure(live, group)
        return did

    def _measure(self, objective: Objective, group: Sequence[Trial]) -> bool:
        if not isinstance(objective, Latency):
            return sum(self._measure_alone(objective, trial) for trial in group) > 0
        here = [trial for trial in group if self._is_from_here(objective, trial)]
        with tempfile.TemporaryDirectory(prefix="nas-remeasure-") as folder:
            paths = {trial.number: path for trial in here if (path := self._compiled(objective, trial, Path(folder)))}
            sound = [trial for trial in here if trial.number in paths]
            return bool(sound) and self._take_turns(objective, sound, [paths[trial.number] for trial in sound])

    def _take_turns(self, objective: Latency, trials: Sequence[Trial], paths: Sequence[Path]) -> bool:
        """Time models together; where one of them ends the process, each alone."""
        others = f" in turns with {len(trials) - 1} others" if len(trials) > 1 else ""
        self._callback.on_stage(trials[0].number, f"measuring again{others}")
        started = time.monotonic()
        try:
            runs = [self._measured(objective, paths) for _ in range(_PROCESSES)]
        except NasError as error:
            if len(trials) == 1 or concerns_study(error):
                self._give_up(objective, trials[0], error)
                return False
            pairs = zip(trials, paths, strict=True)
            return sum(self._take_turns(objective, [trial], [path]) for trial, path in pairs) > 0
        seconds = (time.monotonic() - started) / len(trials)
        numbers = [trial.number for trial in trials]
        for trial, *records in zip(trials, *runs, strict=True):
            quantity = objective.describe_record(_joined(records), together=numbers)
            self._study.record_remeasured(trial.number, {objective.name: quantity}, seconds)
        return True

    def _measured(self, objective: Latency, paths: Sequence[Path]) -> list[Record]:
        longest_s = self._seconds * len(paths) / _PROCESSES
        timer, threads = timer_of(self._study.evaluator.device), self._study.evaluator.threads
        return timer.measure_together(paths, threads=threads, max_seconds=longest_s, **objective.timing)

    def _compiled(self, objective: Latency, trial: Trial, folder: Path) -> Path | None:
        context = self._study.evaluator.context(trial.architecture, trial.number)
        context.report = lambda stage: self._callback.on_stage(trial.number, stage)
        try:
            return objective.compile(context, folder)
        except NasError as error:
            self._give_up(objective, trial, error)
            return None

    def _measure_alone(self, objective: Objective, trial: Trial) -> bool:
        if not self._is_from_here(objective, trial):
            return False
        context = self._study.evaluator.context(trial.architecture, trial.number)
        context.report = lambda stage: self._callback.on_stage(trial.number, stage)
        context.report(f"{objective.name} again")
        started = time.monotonic()
        try:
            quantity = objective.evaluate(context)
        except NasError as error:
            self._give_up(objective, trial, error)
            return False
        self._study.record_remeasured(trial.number, {objective.name: quantity}, time.monotonic() - started)
        return True

    def _missing_seeds(self, objective: Quality, trial: Trial) -> list[int]:
        known = _scores(trial.quantities[objective.name], self._study.evaluator.seed)
        own = self._study.evaluator.seed
        return [seed for seed in range(own, own + self._seeds) if seed not in known]

    def _train_again(self, objective: Quality, trials: Sequence[Trial]) -> bool:
        did = False
        for trial in trials:
            scores = _scores(trial.quantities[objective.name], self._study.evaluator.seed)
            for seed in self._missing_seeds(objective, trial):
                context = self._study.evaluator.context(trial.architecture, trial.number)
                context.seed = seed
                context.report = lambda stage, number=trial.number: self._callback.on_stage(number, stage)
                started = time.monotonic()
                try:
                    scores[seed] = objective.evaluate(context).value
                except NasError as error:
                    self._give_up(objective, trial, error)
                    break
                quantity = _over_seeds(objective, scores)
                self._study.record_remeasured(trial.number, {objective.name: quantity}, time.monotonic() - started)
                did = True
        return did

    def _is_from_here(self, objective: Objective, trial: Trial) -> bool:
        """Tell whether a value is from a machine like this one; say so where it is not."""
        details, here = trial.quantities[objective.name].details, self._cpu
        recorded, device = details.get("machine"), details.get("device")
        if device is not None and self._study.evaluator.device is None:
            notice = f"trial {trial.number} was measured on the device {device}; give its address as --device"
        elif isinstance(recorded, str) and recorded != here:
            notice = f"trial {trial.number} was measured on {recorded}; give `nas remeasure` there, this is {here}"
        else:
            return True
        self._given_up.add((trial.number, objective.name))
        self._callback.on_notice(notice)
        return False

    def _give_up(self, objective: Objective, trial: Trial, error: NasError) -> None:
        """Leave a point as it is because of an error of its own.

        Raises:
            NasError: The error concerns the whole study.
        """
        if concerns_study(error):
            raise error
        self._given_up.add((trial.number, objective.name))
        self._callback.on_notice(f"{objective.name} of trial {trial.number} cannot be had again: {error}")


def groups(trials: Sequence[Trial], name: str) -> Iterator[list[Trial]]:
    """Split trials into those that should be measured in turns: neighbours by a value, at most 12.

    Args:
        trials: Trials.
        name: Whose value.
    """
    group: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.values[name], trial.number)):
        if group and (len(group) == _TOGETHER or trial.values[name] > _APART * group[-1].values[name]):
            yield group
            group = []
        group.append(trial)
    if group:
        yield group


def _joined(records: Sequence[Record]) -> Record:
    """Sum up the measurements of a model in several processes; the interval holds those of all."""
    references = [record.reference_ms for record in records]
    ratio = max(max(references) / min(references), *(record.reference_ratio for record in records))
    return replace(
        records[0],
        median_ms=float(np.median([record.median_ms for record in records])),
        p10_ms=min(record.p10_ms for record in records),
        p90_ms=max(record.p90_ms for record in records),
        interval_ms=(min(r.interval_ms[0] for r in records), max(r.interval_ms[1] for r in records)),
        repeats=sum(record.repeats for record in records),
        reference_ms=float(np.median(references)),
        reference_ratio=ratio,
        noisy=any(record.noisy for record in records) or ratio > STEADY_RATIO,
        seconds=round(sum(record.seconds for record in records), 3),
        cpu_share=min(record.cpu_share for record in records),
    )


def live_objective(objective: Objective, study: Study) -> Objective | None:
    """Return an objective that can be evaluated again, from its record where a study was loaded.

    Args:
        objective: Objective of a study.
        study: The study, for its task.

    Returns:
        None where its values are exact, or nothing here makes them.
    """
    if isinstance(objective, Recorded):
        objective = _revived(objective, study)
    if isinstance(objective, Quality):
        return objective
    return objective if objective.source == "measured" and not isinstance(objective, Recorded) else None


def _revived(recorded: Recorded, study: Study) -> Objective:
    settings: dict[str, Any] = dict(recorded.recorded_settings)
    if recorded.kind == "latency":
        return Latency(name=recorded.name, max_ms=recorded.max, **settings)
    if recorded.kind == "energy":
        return Energy(name=recorded.name, max=recorded.max, **settings)
    if recorded.kind == "quality":
        from nas.training.budget import TrainOptions

        options = settings.pop("options", None)
        quality = Quality(name=recorded.name, min=recorded.min, max=recorded.max, **settings)
        quality = replace(quality, options=TrainOptions(**options) if options is not None else None)
        return quality.bind(study.evaluator.task)
    return recorded


def _scores(quantity: Quantity, own_seed: int) -> dict[int, float]:
    """Return the scores behind a quality by seed."""
    if "seeds" not in quantity.details:
        return {own_seed: quantity.value}
    return dict(zip(quantity.details["seeds"], quantity.details["scores"], strict=True))


def _over_seeds(objective: Quality, scores: dict[int, float]) -> Quantity:
    values = list(scores.values())
    interval = min(values), max(values)
    return objective.quantity(float(np.mean(values)), interval, seeds=list(scores), scores=values)
