"""Trees over models made of layers, which failed trainings hardly move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.predictors.features import FeatureTable
from nas.predictors.layer_process import LayerColumns, tail_weights

Vector = NDArray[np.float64]

# Trees that predict, and those that tell beforehand how far each point is from what others let expect.
_TREES = 300
_TREES_BEFORE = 100
# Passes in which weights and variance come to agree.
_PASSES = 30


@dataclass
class LayerTrees:
    """Extremely random trees on means over the first layers, as a layer process sees them.

    Some trees, each grown on a draw with replacement, predict the points that they did not draw. The errors give each
    point its weight, for noise with the long tails of Student's t distribution, and the trees proper are grown by it.

    Attributes:
        table: Columns of the points; entries of lists are called `list[index]option`.
        seed: Decides the trees.

    Source: Geurts, Ernst and Wehenkel 2006, "Extremely randomized trees"; Lange, Little and Taylor 1989, "Robust
        statistical modeling using the t distribution", for the weights.
    """

    table: FeatureTable
    seed: int = 0

    def fit(self, x_NF: Vector, y_N: Vector) -> LayerTrees:
        """Fit to `[points, columns]` and a number for each."""
        self._columns = LayerColumns.of(self.table)
        columns_NJ = self._columns.make(x_NF)
        before = self._trees(_TREES_BEFORE, bootstrap=True, oob_score=True).fit(columns_NJ, y_N)
        weight_N = _weights((y_N - before.oob_prediction_) ** 2)
        self._model = self._trees(_TREES).fit(columns_NJ, y_N, sample_weight=weight_N)
        return self

    def predict(self, x_NF: Vector) -> Vector:
        """Return the mean of the trees at `[points, columns]`."""
        return self._model.predict(self._columns.make(x_NF))

    def _trees(self, count: int, **options: Any) -> Any:
        from sklearn.ensemble import ExtraTreesRegressor

        return ExtraTreesRegressor(count, min_samples_leaf=2, max_features=0.3, random_state=self.seed, **options)


def _weights(square_N: Vector) -> Vector:
    """Return the weight of each point from the squares of errors, that variance and weights agree on."""
    weight_N = np.ones(len(square_N))
    for _ in range(_PASSES if square_N.any() else 0):
        weight_N = tail_weights(square_N, float(np.mean(weight_N * square_N)))
    return weight_N
