"""From scores with shared weights to scores of models trained alone, learnt from the few that have both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.errors import InputError
from nas.predictors.ensemble import Ensemble, FittedEnsemble, Prediction
from nas.predictors.features import flatten

_RESIDUALS = Ensemble(("ridge", "gaussian_process", "boosting"), folds=3, is_refitted=True)


@dataclass(frozen=True)
class Correction:
    """A line through the pairs of scores, and an ensemble for how far architectures lie off it.

    The line keeps the order of the supernet where nothing speaks against it; the ensemble learns which components and
    sizes the shared weights treat worse than others.

    Attributes:
        slope: Of the line, never negative.
        offset: Of the line.
        residual: Predicts the distance from it.
    """

    slope: float
    offset: float
    residual: FittedEnsemble

    @classmethod
    def of(cls, encoded: Sequence[Mapping[str, Any]], shared: Sequence[float], alone: Sequence[float]) -> Correction:
        """Fit to architectures with both scores.

        Args:
            encoded: What `to_dict` of each gives.
            shared: Their scores with the shared weights.
            alone: Their scores trained alone.

        Raises:
            InputError: The lengths differ, or there are fewer than three.
        """
        if not 3 <= len(encoded) == len(shared) == len(alone):
            raise InputError(
                "scores of a supernet cannot be corrected from this",
                expected="at least 3 architectures with both scores",
                found=f"{len(encoded)} architectures, {len(shared)} and {len(alone)} scores",
            )
        x_N, y_N = np.asarray(shared, dtype=np.float64), np.asarray(alone, dtype=np.float64)
        spread = float(np.mean((x_N - x_N.mean()) ** 2))
        covariance = float(np.mean((x_N - x_N.mean()) * (y_N - y_N.mean())))
        slope = max(0.0, covariance / spread) if spread else 0.0
        offset = float(y_N.mean() - slope * x_N.mean())
        return cls(slope, offset, _RESIDUALS.fit(_described(encoded, shared), y_N - (slope * x_N + offset)))

    def predict(self, encoded: Sequence[Mapping[str, Any]], shared: Sequence[float]) -> Prediction:
        """Estimate what architectures score when trained alone, with error bars."""
        distance = self.residual.predict(_described(encoded, shared))
        line_N = self.slope * np.asarray(shared, dtype=np.float64) + self.offset
        return Prediction(line_N + distance.mean_N, distance.std_N)


def _described(encoded: Sequence[Mapping[str, Any]], shared: Sequence[float]) -> list[dict[str, float]]:
    return [flatten(point) | {"shared": float(score)} for point, score in zip(encoded, shared, strict=True)]
