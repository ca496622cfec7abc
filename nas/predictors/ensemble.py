"""An ensemble of regressors with error bars, weighted by how each did on points it had not seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError, did_you_mean
from nas.predictors.features import FeatureTable
from nas.trial import Quantity

Vector: TypeAlias = NDArray[np.float64]

# Products of features are formed among at most this many: 32 give 560 terms.
_PRODUCT_FEATURES = 32
# Boosting tries at most so many features for a split: fits take as long as what is tried.
_SPLIT_FEATURES = 48
# Exponent that turns the errors of kinds into weights: a kind twice as wrong counts a sixteenth.
_SHARPNESS = 4.0
# How often outliers are looked for, and the standard deviation of normal errors whose median size is one.
_OUTLIER_PASSES = 2
_MAD_TO_STD = 1.4826


@dataclass(frozen=True)
class Prediction:
    """Estimates of one quantity for some points.

    Attributes:
        mean_N: Estimates, in the unit of what was fitted.
        std_N: One standard deviation: spread of the members and error on unseen points, together.
    """

    mean_N: Vector
    std_N: Vector

    def quantities(self, unit: str) -> list[Quantity]:
        """Return each estimate marked as predicted, with an interval of 95 %."""
        pairs = zip(self.mean_N.tolist(), self.std_N.tolist(), strict=True)
        return [Quantity(mean, unit, "predicted", (mean - 1.96 * std, mean + 1.96 * std)) for mean, std in pairs]


@dataclass(frozen=True)
class Ensemble:
    """Fit several kinds of regressors on folds of the data; all of them vote.

    Each kind is fitted once per fold on the rest, so every point has predictions by models that did not see it. Their
    errors decide the weights of the kinds and the error bars. Positive targets are fitted as logarithms.

    Attributes:
        kinds: Names from `KINDS`.
        folds: Parts of the data.
        seed: Decides folds and random regressors.
        outliers: Values farther than this many robust standard deviations from their prediction are left out and the
            rest fitted again, for measurements that something disturbed; None keeps all.
        is_refitted: Each kind is fitted once more, to all points, when its weight is known, and this one predicts. It
            has seen more than the members of folds, whose errors the error bars still tell.

    Raises:
        InputError: No such kind, or fewer than two folds.
    """

    kinds: tuple[str, ...] = ("quadratic", "boosting", "extra_trees")
    folds: int = 5
    seed: int = 0
    outliers: float | None = None
    is_refitted: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                hint = did_you_mean(kind, KINDS)
                raise InputError("unknown regressor", expected="one of " + ", ".join(KINDS), found=kind, hint=hint)
        if self.folds < 2 or not self.kinds:
            raise InputError(
                "an ensemble needs regressors and folds", expected="a kind and two folds", found=f"{self.folds} folds"
            )

    def fit(self, described: Sequence[Mapping[str, float]], values: Sequence[float] | Vector) -> FittedEnsemble:
        """Fit to features by name, as `flatten` gives them.

        Args:
            described: Features of each point.
            values: One number per point.

        Raises:
            InputError: The lengths differ, there is no point, or a value is not finite.
        """
        y_N = np.asarray(values, dtype=np.float64)
        if len(y_N) != len(described) or len(y_N) == 0 or not np.all(np.isfinite(y_N)):
            raise InputError(
                "an ensemble cannot be fitted to this",
                expected=f"{len(described) or 'some'} finite values",
                found=f"{len(y_N)} values, {int(np.sum(~np.isfinite(y_N)))} of them not finite",
            )
        kept_N = np.ones(len(y_N), dtype=bool)
        for _ in range(_OUTLIER_PASSES if self.outliers is not None else 0):
            fitted = self._fit(
                [features for features, is_kept in zip(described, kept_N, strict=True) if is_kept], y_N[kept_N]
            )
            kept_N = self._typical(fitted, described, y_N, kept_N)
        return self._fit(
            [features for features, is_kept in zip(described, kept_N, strict=True) if is_kept], y_N[kept_N]
        )

    def _fit(self, described: Sequence[Mapping[str, float]], y_N: Vector) -> FittedEnsemble:
        table = FeatureTable.of(described)
        is_log = bool(np.all(y_N > 0))
        z_N = np.log(y_N) if is_log else y_N
        members, unseen_KN, weights_K = self._fit_members(table.matrix(described), z_N, table)
        unseen_N = weights_K @ unseen_KN
        residual = float(np.sqrt(np.mean((unseen_N - z_N) ** 2)))
        weights = dict(zip(self.kinds, weights_K.tolist(), strict=True))
        return FittedEnsemble(table, members, weights, is_log, residual, _from_scale(unseen_N, is_log), y_N)

    def _typical(
        self,
        fitted: FittedEnsemble,
        described: Sequence[Mapping[str, float]],
        y_N: Vector,
        kept_N: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Mark the values that are near their prediction; those fitted count by members that did not see them."""
        expected_N = fitted.predict(described).mean_N
        expected_N[kept_N] = fitted.unseen_N
        error_N = np.log(expected_N / y_N) if fitted.is_log else expected_N - y_N
        error_N = np.abs(error_N - np.median(error_N))
        typical_N = error_N <= (self.outliers or 0.0) * _MAD_TO_STD * np.median(error_N)
        return typical_N if typical_N.sum() >= len(y_N) // 2 else kept_N

    def _fit_members(self, x_NF: Vector, z_N: Vector, table: FeatureTable) -> tuple[list[list[Any]], Vector, Vector]:
        """Return members by kind and fold, predictions of unseen points `[kinds, points]`, and weights of kinds."""
        count = len(z_N)
        folds = min(self.folds, count)
        equal = np.full(len(self.kinds), 1.0 / len(self.kinds))
        if folds < 2 or np.ptp(z_N) == 0 or x_NF.shape[1] == 0:
            level = _Constant(float(np.mean(z_N)))
            return [[level] for _ in self.kinds], np.full((len(self.kinds), count), level.value), equal
        part_N = np.random.default_rng(self.seed).permutation(count) % folds
        unseen_KN = np.zeros((len(self.kinds), count))
        members: list[list[Any]] = []
        for row, kind in enumerate(self.kinds):
            members.append([])
            for part in range(folds):
                held = part_N == part
                model = KINDS[kind](table, self.seed)
                members[row].append(_fit_quietly(model, x_NF[~held], z_N[~held]))
                unseen_KN[row, held] = model.predict(x_NF[held])
            if self.is_refitted:
                members[row] = [_fit_quietly(KINDS[kind](table, self.seed), x_NF, z_N)]
        errors_K = np.sqrt(np.mean((unseen_KN - z_N) ** 2, axis=1))
        weights_K = (errors_K / errors_K.min() if errors_K.min() > 0 else errors_K + 1.0) ** -_SHARPNESS
        return members, unseen_KN, weights_K / weights_K.sum()


@dataclass(frozen=True)
class FittedEnsemble:
    """What an ensemble learnt.

    Attributes:
        table: Columns it looks at.
        members: Fitted regressors, by kind and fold.
        weights: Weight by kind; they add up to one.
        is_log: Whether logarithms were fitted.
        residual: Root mean square error on unseen points, of logarithms where `is_log`.
        unseen_N: Prediction of each point by members that did not see it.
        values_N: What was fitted.
    """

    table: FeatureTable
    members: list[list[Any]]
    weights: dict[str, float]
    is_log: bool
    residual: float
    unseen_N: Vector
    values_N: Vector

    @property
    def tau(self) -> float:
        """Kendall's rank correlation on unseen points, from -1 to 1; 0 where ranks are not defined."""
        from scipy.stats import kendalltau

        if np.ptp(self.unseen_N) == 0 or np.ptp(self.values_N) == 0:
            return 0.0
        tau: Any = kendalltau(self.unseen_N, self.values_N)
        return float(tau.statistic)

    def predict(self, described: Sequence[Mapping[str, float]]) -> Prediction:
        """Estimate the values of points from their features by name."""
        x_NF = self.table.matrix(described)
        if len(x_NF) == 0:
            return Prediction(np.zeros(0), np.zeros(0))
        kinds = zip(self.weights.values(), self.members, strict=True)
        votes = [(weight / len(kind), member) for weight, kind in kinds for member in kind]
        z_MN = np.stack([member.predict(x_NF) for _, member in votes])
        weight_M = np.array([weight for weight, _ in votes])
        z_N = weight_M @ z_MN
        std_N = np.sqrt(weight_M @ (z_MN - z_N) ** 2 + self.residual**2)
        mean_N = _from_scale(z_N, self.is_log)
        return Prediction(mean_N, mean_N * std_N if self.is_log else std_N)


@dataclass(frozen=True)
class _Constant:
    """Predict one number."""

    value: float

    def predict(self, x_NF: Vector) -> Vector:
        return np.full(len(x_NF), self.value)


def _from_scale(z_N: Vector, is_log: bool) -> Vector:
    return np.exp(np.minimum(z_N, 700.0)) if is_log else z_N


def _fit_quietly(model: Any, x_NF: Vector, z_N: Vector) -> Any:
    """Fit, without the warnings of solvers that stop at their limits: held-out errors tell how good it is.

    Checks of arguments, which would be made again for every tree, are left out as well.
    """
    from sklearn import config_context

    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        warnings.simplefilter("ignore")
        return model.fit(x_NF, z_N)


def _ridge(table: FeatureTable, seed: int) -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 4, 15)))


def _quadratic(table: FeatureTable, seed: int) -> Any:
    """Ridge regression on all features and on products of the few that say most."""
    return _Products(table.summaries, _ridge(table, seed))


@dataclass
class _Products:
    """Add squares and products of a few features to all features.

    Summaries of lists come before single entries; within either, what correlates most with the target comes first.
    """

    summaries: tuple[int, ...]
    inner: Any
    chosen: NDArray[np.intp] | None = None
    center_F: Vector | None = None

    def fit(self, x_NF: Vector, y_N: Vector) -> _Products:
        width = x_NF.shape[1]
        centered_NF = x_NF - x_NF.mean(axis=0)
        scale_F = np.sqrt((centered_NF**2).sum(axis=0))
        relation_F = np.abs(centered_NF.T @ (y_N - y_N.mean())) / np.where(scale_F > 0, scale_F, 1.0)
        is_entry_F = ~np.isin(np.arange(width), self.summaries)
        order = np.lexsort((-relation_F, is_entry_F))
        wanted = (
            _PRODUCT_FEATURES if width <= _PRODUCT_FEATURES else min(_PRODUCT_FEATURES, len(self.summaries) or width)
        )
        self.chosen, self.center_F = order[:wanted], x_NF.mean(axis=0)
        self.inner.fit(self._expand(x_NF), y_N)
        return self

    def predict(self, x_NF: Vector) -> Vector:
        return self.inner.predict(self._expand(x_NF))

    def _expand(self, x_NF: Vector) -> Vector:
        assert self.chosen is not None
        assert self.center_F is not None
        few_NC = (x_NF - self.center_F)[:, self.chosen]
        left, right = np.triu_indices(few_NC.shape[1])
        return np.concatenate([x_NF, few_NC[:, left] * few_NC[:, right]], axis=1)


def _boosting(table: FeatureTable, seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor

    share = min(0.5, _SPLIT_FEATURES / max(len(table.names), 1))
    return GradientBoostingRegressor(
        n_estimators=150, max_depth=4, subsample=0.7, max_features=share, random_state=seed
    )


def _extra_trees(table: FeatureTable, seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesRegressor

    return ExtraTreesRegressor(200, min_samples_leaf=2, max_features=0.4, random_state=seed)


def _gaussian_process(table: FeatureTable, seed: int) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kernel = ConstantKernel(1.0) * RBF(5.0) + WhiteKernel(0.01)
    return make_pipeline(StandardScaler(), GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed))


def _support_vectors(table: FeatureTable, seed: int) -> Any:
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    scaled = TransformedTargetRegressor(SVR(C=2.0, epsilon=0.1), transformer=StandardScaler())
    return make_pipeline(StandardScaler(), scaled)


def _layer_process(table: FeatureTable, seed: int) -> Any:
    from nas.predictors.layer_process import LayerProcess

    return LayerProcess(table, seed)


def _layer_trees(table: FeatureTable, seed: int) -> Any:
    from nas.predictors.layer_trees import LayerTrees

    return LayerTrees(table, seed)


KINDS: dict[str, Callable[[FeatureTable, int], Any]] = {
    "ridge": _ridge,
    "quadratic": _quadratic,
    "boosting": _boosting,
    "extra_trees": _extra_trees,
    "gaussian_process": _gaussian_process,
    "support_vectors": _support_vectors,
    "layer_process": _layer_process,
    "layer_trees": _layer_trees,
}
