"""Which trials of a supernet search to train alone: one after the other, those that may enlarge the front most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.goals import Goals
from nas.supernet.correction import Correction
from nas.trial import Trial

Pair: TypeAlias = tuple[Mapping[str, Any], float, float]
"""An architecture as `to_dict` gives it, its score with shared weights, and its score trained alone."""

_MARGIN: Final = 0.1  # the reference point lies this far beyond the worst, in ranges of each objective: ends count too
_SOFTENING: Final = 0.5  # added to the distance from the best score, in median distances: the best has a logarithm too


def next_finalist(
    trials: Sequence[Trial], goals: Goals, name: str, alone: Mapping[int, float], anchors: Sequence[Pair]
) -> Trial | None:
    """Return the trial to train alone next, None where all that are feasible have been.

    A correction of the supernet's scores is fitted to everything that was trained alone. Every other choice is the
    trial that is expected to add most to the hypervolume; those between, the one that would add most at the good end of
    its error bar. The correction sees the logarithm of how far each score lies behind the best one: weights that serve
    everybody let good architectures differ by less than they do alone, and bad ones by more.

    Args:
        trials: Trials whose quality a supernet gave.
        goals: Objectives and constraints of the study.
        name: Name of the objective that is the quality.
        alone: Scores of the trials that were trained alone, by number.
        anchors: Further architectures with both scores.
    """
    feasible = [trial for trial in trials if trial.is_feasible]
    left = [trial for trial in feasible if trial.number not in alone]
    if not left:
        return None
    done = [trial for trial in feasible if trial.number in alone]
    column = [objective.name for objective in goals.objectives].index(name)
    sign = 1.0 if goals.objectives[column].direction == "min" else -1.0
    pairs = [*anchors, *((trial.encoded, trial.values[name], alone[trial.number]) for trial in done)]
    encoded, shared, trained = zip(*pairs, strict=True)
    scale = _Scale.of(sign * np.array([*(trial.values[name] for trial in feasible), *(pair[1] for pair in anchors)]))
    correction = Correction.of(encoded, scale(sign * np.array(shared)), (sign * np.array(trained)).tolist())
    expected = correction.predict(
        [trial.encoded for trial in left], scale(sign * np.array([trial.values[name] for trial in left]))
    )
    known_NM = _losses(done, column, sign * np.array([alone[trial.number] for trial in done]), goals)
    hoped_N = expected.mean_N - (len(done) % 2) * expected.std_N
    hoped_NM = _losses(left, column, hoped_N, goals)
    every_NM = np.concatenate([known_NM, _losses(left, column, expected.mean_N, goals)])
    low_M, range_M = every_NM.min(axis=0), np.ptp(every_NM, axis=0)
    range_M[range_M == 0] = 1.0
    gain_N = pareto.hypervolume_gains(
        (hoped_NM - low_M) / range_M, (known_NM - low_M) / range_M, np.full(len(range_M), 1.0 + _MARGIN)
    )
    return left[int(np.argmax(gain_N))]


def _losses(trials: Sequence[Trial], column: int, qualities: np.ndarray, goals: Goals) -> np.ndarray:
    """Losses of trials with the quality replaced, `[trials, objectives]`."""
    losses_NM = np.array([trial.losses for trial in trials], dtype=np.float64).reshape(-1, len(goals.objectives))
    losses_NM[:, column] = qualities
    return losses_NM


@dataclass(frozen=True)
class _Scale:
    """Logarithms of distances from the best loss.

    Attributes:
        best: The best loss.
        softening: Added to each distance.
    """

    best: float
    softening: float

    @classmethod
    def of(cls, losses_N: NDArray[np.float64]) -> _Scale:
        best = float(losses_N.min())
        distances_N = losses_N - best
        typical = float(np.median(distances_N)) or float(distances_N.mean())  # half of them may share the best score
        return cls(best, _SOFTENING * typical or 1.0)

    def __call__(self, losses_N: NDArray[np.float64]) -> list[float]:
        return np.log(losses_N - self.best + self.softening).tolist()
