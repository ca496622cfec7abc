"""Multivariate forecasting: a CSV of the user's, or a generated Lorenz-96 series."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from ir.errors import DataError
from nas.tasks._csv_series import read_header, read_series
from nas.tasks.base import Array, Batch, Metric, Task, find_data, require_integer
from searchspaces.signature import Signature

_TRAIN_FRACTION: Final = 0.7
_VALIDATION_FRACTION: Final = 0.1  # the rest, the end of the series, is kept unseen

LORENZ_FORCING: Final = 8.0  # chaotic; the value of Lorenz 1996
LORENZ_STEP: Final = 0.05  # time between samples, six hours of weather in the paper
_LORENZ_SUBSTEPS: Final = 2
_LORENZ_SPIN_UP_SAMPLES: Final = 500
_LORENZ_SEED: Final = 1996

_RIDGE: Final = 1e-3  # relative to the mean square of the inputs
_MOST_RIDGE_WINDOWS: Final = 16_384


@dataclass(frozen=True)
class Forecast(Task):
    """Predict the next `horizon` values of every variate from the last `seq_len`; measured in mean squared error.

    Values are standardised by the training split, per variate. The split is chronological by the times to forecast: the
    first 70 % train, the next 10 % validate, the last 20 % are never scored, so that a user may test on them. A
    validation window may look back into the training split; no time to forecast belongs to two splits.

    Without a file the series is Lorenz-96 (Lorenz 1996, "Predictability: a problem partly solved"):
    `dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + 8` on a ring, by fourth-order Runge-Kutta, sampled every 0.05.

    Attributes:
        data: CSV with a header; a first column that is not a number is taken as dates. None is Lorenz-96.
        seq_len: Times seen.
        horizon: Times to forecast.
        lorenz_variates: Variates of the generated series; unused with a file.
        lorenz_samples: Times of the generated series; unused with a file.
        validation_windows: Most windows in one validation, spread evenly.
    """

    data: str | None = None
    seq_len: int = 96
    horizon: int = 24
    lorenz_variates: int = 8
    lorenz_samples: int = 12_000
    validation_windows: int = 1_024

    name = "forecast"
    description = "multivariate series from a CSV or Lorenz-96, mean squared error of standardised values"
    metric = Metric("mse", "variance of the training split")
    direction = "min"
    loss_kind = "mse"

    def __post_init__(self) -> None:
        require_integer(self.name, "seq_len", self.seq_len, least=1)
        require_integer(self.name, "horizon", self.horizon, least=1)
        require_integer(self.name, "lorenz_variates", self.lorenz_variates, least=4, most=4096)
        require_integer(self.name, "lorenz_samples", self.lorenz_samples, least=1, most=1 << 20)
        require_integer(self.name, "validation_windows", self.validation_windows, least=1)
        if self.data is not None:
            find_data(self.name, self.data, folder_allowed=False)
            read_header(self.data)

    @property
    def signature(self) -> Signature:
        variates = self.lorenz_variates if self.data is None else len(read_header(self.data).variates)
        return Signature(
            modality="series", output="forecast", seq_len=self.seq_len, horizon=self.horizon, variates=variates
        )

    @property
    def chance(self) -> float:
        return 1.0  # the training mean, on data like the training split: its variance, which is the unit

    def quality(self, *, loss: float, accuracy: float) -> float:
        return loss

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        series_NV, train_end, _ = self._splits()
        starts = rng.integers(0, train_end - self.seq_len - self.horizon + 1, size=batch_size)
        return self.batch(*self._windows(series_NV, starts))

    def validation_set(self) -> tuple[Array, Array]:
        series_NV, train_end, validation_end = self._splits()
        first, last = train_end - self.seq_len, validation_end - self.seq_len - self.horizon
        count = min(last - first + 1, self.validation_windows)
        starts = np.unique(np.linspace(first, last, count).round().astype(np.int64))
        return self._windows(series_NV, starts)

    def measure_baselines(self) -> dict[str, float]:
        """Mean squared error of repeating the last value, of the training mean, and of ridge regression.

        The ridge maps a window of one variate to its horizon, one matrix for all variates, with an intercept.
        """
        inputs_BTV, targets_BHV = self.validation_set()
        linear_BHV = _predict_ridge(self._fit_ridge(), inputs_BTV)
        return {
            "last_value": float(((inputs_BTV[:, -1:] - targets_BHV) ** 2).mean()),
            "mean": float((targets_BHV**2).mean()),
            "linear": float(((linear_BHV - targets_BHV) ** 2).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        series_NV, _, validation_end = self._splits()
        return [series_NV[:validation_end]]

    def _fit_ridge(self) -> Array:
        """Weights `[seq_len + 1, horizon]`, the last row the intercept."""
        series_NV, train_end, _ = self._splits()
        last = train_end - self.seq_len - self.horizon
        count = min(last + 1, _MOST_RIDGE_WINDOWS)
        inputs_BTV, targets_BHV = self._windows(series_NV, np.linspace(0, last, count).round().astype(np.int64))
        x_NT, y_NH = _with_intercept(inputs_BTV), _per_variate(targets_BHV)
        gram_TT = x_NT.T @ x_NT
        gram_TT += np.eye(len(gram_TT)) * _RIDGE * np.trace(gram_TT) / len(gram_TT)
        return np.linalg.solve(gram_TT, x_NT.T @ y_NH)

    def _windows(self, series_NV: Array, starts: Array) -> tuple[Array, Array]:
        windows = series_NV[starts[:, None] + np.arange(self.seq_len + self.horizon)]
        return windows[:, : self.seq_len], windows[:, self.seq_len :]

    def _splits(self) -> tuple[Array, int, int]:
        """Standardised series float32 [N,V], end of training, end of validation.

        Raises:
            DataError: The series is too short for one training window and one validation target.
        """
        raw_NV = _load_series(self.data, self.lorenz_variates, self.lorenz_samples)
        train_end = int(len(raw_NV) * _TRAIN_FRACTION)
        validation_end = train_end + int(len(raw_NV) * _VALIDATION_FRACTION)
        if train_end < self.seq_len + self.horizon or validation_end - train_end < self.horizon:
            fits_train = (self.seq_len + self.horizon) / _TRAIN_FRACTION
            needed = int(max(fits_train, self.horizon / _VALIDATION_FRACTION)) + 1
            raise DataError(
                "the series is too short",
                where=self.data or "forecast.lorenz_samples",
                expected=f"at least {needed} rows for seq_len {self.seq_len} and horizon {self.horizon}",
                found=f"{len(raw_NV)} rows",
                hint="use a longer series, a shorter seq_len or a shorter horizon",
            )
        return _standardise(self.data, self.lorenz_variates, self.lorenz_samples, train_end), train_end, validation_end


def _per_variate(values_BTV: Array) -> Array:
    """Each variate a row of its own, float64 [B*V,T]."""
    return values_BTV.transpose(0, 2, 1).reshape(-1, values_BTV.shape[1]).astype(np.float64)


def _with_intercept(values_BTV: Array) -> Array:
    rows_NT = _per_variate(values_BTV)
    return np.hstack([rows_NT, np.ones((len(rows_NT), 1))])


def _predict_ridge(weights_TH: Array, inputs_BTV: Array) -> Array:
    forecast_NH = _with_intercept(inputs_BTV) @ weights_TH
    batch, _, variates = inputs_BTV.shape
    return forecast_NH.reshape(batch, variates, -1).transpose(0, 2, 1)


@lru_cache(maxsize=2)
def _load_series(data: str | None, variates: int, samples: int) -> Array:
    return simulate_lorenz96(variates, samples) if data is None else read_series(data)


@lru_cache(maxsize=2)
def _standardise(data: str | None, variates: int, samples: int, train_end: int) -> Array:
    """The series with training mean 0 and variance 1 per variate; one that is constant in training is only centred."""
    raw_NV = _load_series(data, variates, samples)
    deviation_V = raw_NV[:train_end].std(axis=0)
    deviation_V[deviation_V == 0] = 1.0
    return ((raw_NV - raw_NV[:train_end].mean(axis=0)) / deviation_V).astype(np.float32)


def lorenz96_velocity(x_V: Array) -> Array:
    """Right-hand side of the Lorenz-96 equations.

    Args:
        x_V: State on the ring.

    Returns:
        Time derivative of each variate.
    """
    ring = np.concatenate((x_V[-2:], x_V, x_V[:1]))
    return (ring[3:] - ring[:-3]) * ring[1:-2] - x_V + LORENZ_FORCING


def simulate_lorenz96(variates: int, samples: int, *, substeps: int = _LORENZ_SUBSTEPS) -> Array:
    """Integrate Lorenz-96 from a fixed perturbed rest state, past its transient.

    Args:
        variates: Length of the ring, at least 4.
        samples: Times to return, `LORENZ_STEP` apart.
        substeps: Runge-Kutta steps from one sample to the next.

    Returns:
        Float64 `[samples, variates]`.
    """
    rng = np.random.default_rng(_LORENZ_SEED)
    x_V = LORENZ_FORCING + rng.standard_normal(variates)
    series_NV = np.empty((samples, variates))
    for sample in range(-_LORENZ_SPIN_UP_SAMPLES, samples):
        if sample >= 0:
            series_NV[sample] = x_V
        for _ in range(substeps):
            x_V = _runge_kutta_step(x_V, LORENZ_STEP / substeps)
    return series_NV


def _runge_kutta_step(x_V: Array, dt: float) -> Array:
    k1 = lorenz96_velocity(x_V)
    k2 = lorenz96_velocity(x_V + dt / 2 * k1)
    k3 = lorenz96_velocity(x_V + dt / 2 * k2)
    k4 = lorenz96_velocity(x_V + dt * k3)
    return x_V + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
