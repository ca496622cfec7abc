"""A Gaussian process over models made of layers, which learns how much each layer and each of its options matters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.predictors.features import FeatureTable

Vector = NDArray[np.float64]
Differences = NDArray[np.float32]

# Layers from the input on that are looked at one by one; what follows counts in summaries.
_LAYERS = 16
# Points that the relevances are learnt from, and numbers that their differences, both ways, may come to.
_MOST_POINTS = 700
_MOST_NUMBERS = 1e8
_STEPS = 30
# Where learning starts: relevance falls by e in three layers, typical points are 2.5 apart, summaries count little.
_DECAY_LAYERS = 3.0
_DISTANCE = 2.5
_LOG_SUMMARY = -2.5
_LOG_NOISE = -1.0
# How far logarithms may move from there.
_BOUNDS = (-6.0, 4.0)
# Degrees of freedom of the noise; passes that weigh points by it at most, and change of a weight that ends them.
_FREEDOM = 4.0
_PASSES = 30
_SETTLED = 0.02
_ENTRY = re.compile(r"^([^\[]*)\[(\d+)\]([^\[]*)$")


@dataclass
class LayerProcess:
    """Regression by a Laplace kernel with a relevance for each layer and each option.

        k(x, y) = a exp(-sum_j w_j |x_j - y_j|),  w_j = exp(layer(j) + option(j))

    A column j is the mean of an option over the layers from the first up to some layer, which hardly changes where a
    layer is put in or left out, or a summary of the point. The logarithms of relevances, amplitude and noise maximise
    the marginal likelihood of some of the points, under a normal prior around the start.

    Then all points are weighed. Trainings fail now and then, so noise has the long tails of Student's t distribution
    with four degrees of freedom, the usual number: it is normal with a variance s / w_i of its own for each point i.
    With the mean m_i and the variance v_i of the process there,

        e_i = (y_i - m_i)^2 + v_i,  w_i = (4 + 1) / (4 + e_i / s),  s = mean of w_i e_i

    in turn until the weights stay: a point far from what its neighbours let expect counts little.

    Attributes:
        table: Columns of the points; entries of lists are called `list[index]option`.
        seed: Decides which points the relevances are learnt from.
        unseen_N: What each fitted point is predicted to be by all others, weighed as they are beside it.

    Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", sections 2.3, 5.1 and 5.4.2;
        Tipping and Lawrence 2005, "Variational inference for Student-t models", for the weights.
    """

    table: FeatureTable
    seed: int = 0
    unseen_N: Vector = field(default_factory=lambda: np.zeros(0))

    def fit(self, x_NF: Vector, y_N: Vector) -> LayerProcess:
        """Fit to `[points, columns]` and a number for each."""
        self._level, self._scale = float(y_N.mean()), float(y_N.std()) or 1.0
        z_N = (y_N - self._level) / self._scale
        self._columns = LayerColumns.of(self.table)
        columns_NJ = self._columns.make(x_NF)
        self._size_J = self._columns.sizes(columns_NJ)
        self._learn(columns_NJ / self._size_J, z_N)
        self._seen_NJ = columns_NJ / self._size_J * self._relevance_J
        inverse_NN = self._weigh(self._kernel(self._seen_NJ), z_N)
        self._dual_N = inverse_NN @ z_N
        self.unseen_N = self._level + self._scale * (z_N - self._dual_N / np.diag(inverse_NN))
        return self

    def predict(self, x_NF: Vector) -> Vector:
        """Return the mean of the process at `[points, columns]`."""
        given_NJ = self._columns.make(x_NF) / self._size_J * self._relevance_J
        return self._level + self._scale * (self._kernel(given_NJ) @ self._dual_N)

    def _kernel(self, given_NJ: Vector) -> Vector:
        """Return `[given points, fitted points]`."""
        from scipy.spatial.distance import cdist

        return self._amplitude * np.exp(-cdist(given_NJ, self._seen_NJ, "cityblock"))

    def _weigh(self, k_NN: Vector, z_N: Vector) -> Vector:
        """Set the noise of each point, and return the inverse of their covariance with it."""
        from scipy.linalg import inv

        least = np.exp(_LOG_NOISE + _BOUNDS[0])
        weight_N, inverse_NN = np.ones(len(z_N)), k_NN
        for _ in range(_PASSES):
            self._noise_N = self._noise / weight_N
            inverse_NN = inv(k_NN + np.diag(self._noise_N))
            error_N = self._noise_N * (inverse_NN @ z_N)
            square_N = error_N**2 + self._noise_N - self._noise_N**2 * np.diag(inverse_NN)
            before_N, weight_N = weight_N, tail_weights(square_N, self._noise)
            if np.abs(np.log(weight_N / before_N)).max() < _SETTLED:
                break
            self._noise = max(float(np.mean(weight_N * square_N)), least)
        return inverse_NN

    def _learn(self, scaled_NJ: Vector, z_N: Vector) -> None:
        """Set relevances, amplitude and noise."""
        from scipy.optimize import minimize

        most = max(min(_MOST_POINTS, int(np.sqrt(_MOST_NUMBERS / max(scaled_NJ.shape[1], 1)))), 2)
        rows = np.random.default_rng(self.seed).permutation(len(z_N))[:most]
        apart_JQ = _differences(scaled_NJ[rows])
        start = self._columns.start(apart_JQ)

        def loss(parameters: Vector) -> tuple[float, Vector]:
            value, slope = _likelihood(self._columns, parameters, apart_JQ, z_N[rows])
            moved = parameters - start
            return value + 0.5 * float(moved @ moved), slope + moved

        bounds = [(low + _BOUNDS[0], low + _BOUNDS[1]) for low in start]
        found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
        self._relevance_J = self._columns.relevance(found.x)
        self._amplitude, self._noise = (float(value) for value in np.exp(found.x[-2:]))


@dataclass(frozen=True)
class LayerColumns:
    """How columns come from those of a table.

    Attributes:
        groups: For each option, the column of the depth, None where all points are as deep, and those of its entries;
            an entry that no column holds is -1.
        depths: Column of the depth and most layers of each list whose length varies.
        summaries: Columns of the table that are taken as they are.
        layer_J: Layer of each column made, the last number for summaries.
        option_J: Option of each column made.
    """

    groups: list[tuple[int | None, NDArray[np.intp]]]
    depths: dict[int, int]
    summaries: list[int]
    layer_J: NDArray[np.intp]
    option_J: NDArray[np.intp]

    @classmethod
    def of(cls, table: FeatureTable) -> LayerColumns:
        """Return the columns that can be made of a table."""
        groups, summaries = _group(table)
        depths = {depth: 0 for depth, _ in groups if depth is not None}
        for depth in depths:
            depths[depth] = max(len(entries) for own, entries in groups if own == depth)
        lengths = [*(len(entries) for _, entries in groups), *depths.values()]
        last = max(lengths, default=0)
        layers = [layer for length in lengths for layer in range(length)] + [last] * len(summaries)
        repeats = [*lengths, *([1] * len(summaries))]
        return cls(groups, depths, summaries, np.array(layers, np.intp), np.repeat(np.arange(len(repeats)), repeats))

    @property
    def layers(self) -> int:
        """Layers that have a relevance of their own."""
        return max((len(entries) for _, entries in self.groups), default=0)

    def make(self, x_NF: Vector) -> Vector:
        """Return `[points, columns]` from those of the table."""
        padded_NF = np.append(x_NF, np.zeros((len(x_NF), 1)), axis=1)
        made = [np.zeros((len(x_NF), 0))]
        for depth, entries in self.groups:
            count_NL = np.arange(1, len(entries) + 1)
            count_NL = count_NL if depth is None else np.minimum(count_NL, x_NF[:, [depth]])
            made.append(np.cumsum(padded_NF[:, entries], axis=1) / np.maximum(count_NL, 1))
        made += [(x_NF[:, [depth]] > np.arange(most)).astype(np.float64) for depth, most in self.depths.items()]
        return np.concatenate([*made, x_NF[:, self.summaries]], axis=1)

    def sizes(self, columns_NJ: Vector) -> Vector:
        """Return the standard deviation of each option over all layers, for each of its columns."""
        spread = [columns_NJ[:, self.option_J == option].std() for option in range(self.option_J.max(initial=-1) + 1)]
        return np.where(np.array(spread) > 0, spread, 1.0)[self.option_J]

    def start(self, apart_JQ: Differences) -> Vector:
        """Return the parameters that learning starts from: by layer, by option, amplitude and noise."""
        options = np.zeros(int(self.option_J.max(initial=-1)) + 1)
        options[len(options) - len(self.summaries) :] = _LOG_SUMMARY if self.groups else 0.0
        start = np.concatenate([-np.arange(self.layers) / _DECAY_LAYERS, options, [0.0, _LOG_NOISE]])
        apart_Q = self.relevance(start).astype(np.float32) @ apart_JQ
        typical = float(np.median(apart_Q)) if len(apart_Q) else 0.0
        start[self.layers : -2] += np.log(_DISTANCE / typical) if typical > 0 else 0.0
        return start

    def relevance(self, parameters: Vector) -> Vector:
        """Return the relevance of each column."""
        by_layer = np.append(parameters[: self.layers], 0.0)
        return np.exp(by_layer[self.layer_J] + parameters[self.layers : -2][self.option_J])

    def slope(self, by_column_J: Vector) -> Vector:
        """Return slopes by the logarithms of relevance, from those of columns."""
        by_layer = np.bincount(self.layer_J, by_column_J, self.layers + 1)[: self.layers]
        by_option = np.bincount(self.option_J, by_column_J)
        return np.concatenate([by_layer, by_option]).astype(np.float64)


def tail_weights(square_N: Vector, variance: float) -> Vector:
    """Return what points count for where noise is distributed as Student's t, from the squares of their errors."""
    return (_FREEDOM + 1) / (_FREEDOM + square_N / variance)


def _differences(scaled_PJ: Vector) -> Differences:
    """Return by how much points differ in each column, `[columns, pairs]`, in the order of SciPy's `pdist`."""
    scaled_JP = scaled_PJ.T.astype(np.float32)
    first_Q, second_Q = np.triu_indices(len(scaled_PJ), 1)
    return np.abs(scaled_JP[:, first_Q] - scaled_JP[:, second_Q])


def _likelihood(columns: LayerColumns, parameters: Vector, apart_JQ: Differences, z_P: Vector) -> tuple[float, Vector]:
    """Return the negative logarithm of the marginal likelihood, and its slope."""
    from scipy.spatial.distance import squareform

    relevance_J = columns.relevance(parameters)
    amplitude, noise = np.exp(parameters[-2:])
    near_Q = amplitude * np.exp(-(relevance_J.astype(np.float32) @ apart_JQ)).astype(np.float64)
    k_PP = squareform(near_Q) + (amplitude + noise) * np.eye(len(z_P))
    inverse_PP = np.linalg.inv(k_PP)
    dual_P = inverse_PP @ z_P
    value = 0.5 * float(z_P @ dual_P) + float(np.log(np.diag(np.linalg.cholesky(k_PP))).sum())
    pull_PP = inverse_PP - np.outer(dual_P, dual_P)
    pulled_Q = squareform(pull_PP, checks=False) * near_Q
    by_column_J = -relevance_J * (apart_JQ @ pulled_Q.astype(np.float32))
    own = float(np.trace(pull_PP))
    others = [float(pulled_Q.sum()) + 0.5 * float(amplitude) * own, 0.5 * float(noise) * own]
    return value, np.concatenate([columns.slope(by_column_J), others])


def _group(table: FeatureTable) -> tuple[list[tuple[int | None, NDArray[np.intp]]], list[int]]:
    """Return the columns of each option by layer, with the column of the depth, and the columns of summaries."""
    position = {name: column for column, name in enumerate(table.names)}
    options: dict[tuple[str, str], dict[int, int]] = {}
    summaries: list[int] = []
    for column, name in enumerate(table.names):
        entry = _ENTRY.match(name)
        if "[" not in name:
            summaries.append(column)
        elif entry and int(entry[2]) < _LAYERS:
            options.setdefault((entry[1], entry[3]), {})[int(entry[2])] = column
    groups: list[tuple[int | None, NDArray[np.intp]]] = []
    for (name, _), places in options.items():
        entries = [places.get(layer, -1) for layer in range(max(places) + 1)]
        groups.append((position.get(f"{name}.count"), np.array(entries, dtype=np.intp)))
    return groups, summaries
