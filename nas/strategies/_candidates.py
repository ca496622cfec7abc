"""Candidates that an ensemble judges before they become trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.predictors.ensemble import Ensemble, FittedEnsemble, Prediction
from nas.predictors.features import flatten
from nas.strategies.base import order_best_first
from nas.trial import Trial

# The reference point lies this far beyond the worst feasible trial, in ranges of each objective: ends count too.
_MARGIN = 0.1
# Least probability of keeping the constraints that a candidate is credited with: nothing is ruled out for good.
_LEAST_PROBABILITY = 0.01
# Probability from which a candidate is taken to keep the constraints.
_LIKELY = 0.5


def encode_key(encoded: Mapping[str, Any]) -> str:
    """Return what tells two encoded architectures apart."""
    return json.dumps(dict(encoded), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Judge:
    """What the trials so far say about architectures that were not tried.

    Losses are scaled to the range of the feasible trials.

    Attributes:
        trials: Trials it learnt from.
        front_FM: Scaled losses of the feasible trials.
        objectives: An ensemble per objective, none where no trial is feasible.
        low_M: Best feasible value of each objective.
        range_M: Distance from there to the worst.
        feasibility: Predicts 1 for a trial that keeps the constraints, 0 otherwise; None where all do.
        violation: Predicts how far constraints are broken; None where a trial is feasible.
    """

    trials: list[Trial]
    front_FM: NDArray[np.float64]
    objectives: list[FittedEnsemble]
    low_M: NDArray[np.float64]
    range_M: NDArray[np.float64]
    feasibility: FittedEnsemble | None = None
    violation: FittedEnsemble | None = None

    @classmethod
    def of(cls, trials: Sequence[Trial], ensemble: Ensemble, most: int) -> Judge:
        """Fit ensembles to trials with results.

        Args:
            trials: Trials with results.
            ensemble: What is fitted.
            most: Trials to learn from: the best and the youngest, half of each.
        """
        if len(trials) > most:
            kept = {trial.number for trial in [*order_best_first(trials, wanted=most // 2), *trials[-(most // 2) :]]}
            trials = [trial for trial in trials if trial.number in kept]
        described = [flatten(trial.encoded) for trial in trials]
        is_feasible = [trial.is_feasible for trial in trials]
        if not any(is_feasible):
            nothing = np.zeros((0, 1))
            violation = ensemble.fit(described, [np.log1p(trial.violation) for trial in trials])
            return cls(list(trials), nothing, [], nothing, nothing, violation=violation)
        losses_NM = np.array([trial.losses for trial in trials if trial.is_feasible], dtype=np.float64)
        low_M = losses_NM.min(axis=0)
        range_M = np.where(np.ptp(losses_NM, axis=0) > 0, np.ptp(losses_NM, axis=0), 1.0)
        rows = [row for row, trial in enumerate(trials) if trial.losses]
        known = [described[row] for row in rows]
        columns = zip(*(trials[row].losses for row in rows), strict=True)
        objectives = [ensemble.fit(known, list(column)) for column in columns]
        feasibility = None if all(is_feasible) else ensemble.fit(described, np.array(is_feasible, dtype=np.float64))
        return cls(list(trials), (losses_NM - low_M) / range_M, objectives, low_M, range_M, feasibility)

    def losses(self, described: Sequence[Mapping[str, float]]) -> Prediction:
        """Return scaled losses and their error bars, `[points, objectives]`, or the violation if none is feasible."""
        if self.violation is not None:
            found = self.violation.predict(described)
            return Prediction(found.mean_N[:, None], found.std_N[:, None])
        found = [objective.predict(described) for objective in self.objectives]
        mean_NM = np.stack([item.mean_N for item in found], axis=1)
        std_NM = np.stack([item.std_N for item in found], axis=1)
        return Prediction((mean_NM - self.low_M) / self.range_M, std_NM / self.range_M)

    def probability(self, described: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """Return how probable it is that each point keeps the constraints."""
        if self.feasibility is None:
            return np.ones(len(described))
        return np.clip(self.feasibility.predict(described).mean_N, _LEAST_PROBABILITY, 1.0)

    def gains(self, candidates_NM: NDArray[np.float64], picked_PM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each candidate adds to the volume of the front and of candidates already picked."""
        if self.violation is not None:
            return -candidates_NM[:, 0]
        reference_M = np.full(candidates_NM.shape[1], 1.0 + _MARGIN)
        return pareto.hypervolume_gains(candidates_NM, np.concatenate([self.front_FM, picked_PM]), reference_M)


@dataclass
class Pool:
    """Candidates with their predictions; each differs from all trials and from each other.

    Attributes:
        judge: What predicts.
        known: Keys of architectures that are no candidates.
    """

    judge: Judge
    known: set[str]
    _architectures: list[Any] = field(default_factory=list)
    _means: list[NDArray[np.float64]] = field(default_factory=list)
    _stds: list[NDArray[np.float64]] = field(default_factory=list)
    _probabilities: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, architectures: Sequence[Any]) -> None:
        """Judge architectures and keep those that are new."""
        described: list[dict[str, float]] = []
        for architecture in architectures:
            encoded = architecture.to_dict()
            key = encode_key(encoded)
            if key not in self.known:
                self.known.add(key)
                self._architectures.append(architecture)
                described.append(flatten(encoded))
        if described:
            losses = self.judge.losses(described)
            self._means.append(losses.mean_N)
            self._stds.append(losses.std_N)
            self._probabilities.append(self.judge.probability(described))

    def best(self, count: int) -> list[Any]:
        """Return the candidates on the predicted fronts, those that probably break constraints last."""
        if not self._architectures:
            return []
        mean_NM, probability_N = np.concatenate(self._means), np.concatenate(self._probabilities)
        likely = np.flatnonzero(probability_N >= _LIKELY)
        rows: list[int] = []
        for front in pareto.fronts(mean_NM[likely], stop_at=count):
            members = likely[front]
            rows += members[np.argsort(-pareto.crowding_distance(mean_NM[members]), kind="stable")].tolist()
        unlikely = np.flatnonzero(probability_N < _LIKELY)
        rows += unlikely[np.argsort(-probability_N[unlikely], kind="stable")].tolist()
        return [self._architectures[row] for row in rows[:count]]

    def ranked(self, batch: int) -> list[Any]:
        """Return all candidates, the most wanted first.

        Args:
            batch: How many are chosen one after the other, each knowing of those before: half by the gain that is
                predicted, half by the gain that is possible where it is undecided.
        """
        if not self._architectures:
            return []
        mean_NM, std_NM = np.concatenate(self._means), np.concatenate(self._stds)
        probability_N = np.concatenate(self._probabilities)
        trust_N = np.where(probability_N >= _LIKELY, probability_N, _LEAST_PROBABILITY * probability_N)
        picked: list[int] = []
        for place in range(min(batch, len(mean_NM))):
            picked_PM = mean_NM[picked]
            gain_N = self.judge.gains(mean_NM, picked_PM)
            possible_N = self.judge.gains(mean_NM - std_NM, picked_PM)
            is_decided = self.judge.gains(mean_NM + std_NM, picked_PM) > 0
            if place < (batch + 1) // 2:
                wanted_N = _weigh(gain_N, trust_N)
            else:
                wanted_N = _weigh(np.where(is_decided, 0.0, possible_N), probability_N)
            wanted_N[picked] = -np.inf
            if wanted_N.max() <= 0 and self.judge.violation is None:
                wanted_N = _weigh(possible_N, trust_N)
                wanted_N[picked] = -np.inf
            picked.append(int(np.argmax(wanted_N)))
        left_N = _weigh(self.judge.gains(mean_NM - std_NM, mean_NM[picked]), probability_N)
        left_N[picked] = np.inf
        rest = [int(row) for row in np.argsort(-left_N, kind="stable")[len(picked) :]]
        return [self._architectures[row] for row in picked + rest]


def _weigh(gain_N: NDArray[np.float64], probability_N: NDArray[np.float64]) -> NDArray[np.float64]:
    return gain_N * probability_N if np.any(gain_N > 0) else gain_N + probability_N
