"""Latency on a new device from a few measurements, by way of devices that are already profiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError
from nas.predictors.ensemble import Prediction

# Ratios of noise to signal that are tried; the error on each measurement left out decides.
_RIDGES = np.logspace(-3, 2, 21)
# Numbers of components that are tried; the known devices decide.
_COMPONENTS = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class DeviceTransfer:
    """What profiled devices say about how latency varies from architecture to architecture.

    Logarithms of latency are reduced to a few principal components over the known devices, and latency on a new device
    is a ridge regression on these. The components are as many as predict each known device best from the others, from
    as many samples as the new device will have.

    Attributes:
        components_NC: Coordinates of each architecture.
        samples: Rows to measure on the new device; each next one is the farthest from those before.
    """

    components_NC: NDArray[np.float64]
    samples: list[int]

    @classmethod
    def of(cls, known_ND: NDArray[np.float64], samples: int = 10) -> DeviceTransfer:
        """Learn from known devices and choose what to measure on a new one.

        Args:
            known_ND: Latency of each architecture on each known device, ms, measured or predicted.
            samples: How many architectures will be measured.

        Raises:
            InputError: Fewer than two samples, fewer architectures than samples, or a latency that is not positive.
        """
        if not 2 <= samples <= len(known_ND):
            raise InputError(
                "cannot choose so many samples", expected=f"2 to {len(known_ND)} architectures", found=str(samples)
            )
        z_ND = _logarithms(known_ND)
        devices = z_ND.shape[1]
        tried = [count for count in _COMPONENTS if count < devices] or [1]
        count = max(tried, key=lambda count: _mean_score(z_ND, count, samples)) if len(tried) > 1 else tried[0]
        components_NC = _components(z_ND, count)
        return cls(components_NC, _spread(components_NC, samples))

    def predict(self, measured_S: Sequence[float] | NDArray[np.float64]) -> Prediction:
        """Return latency of every architecture on the new device, ms, with error bars.

        Args:
            measured_S: Latency of the rows `samples` on it, ms.

        Raises:
            InputError: There are more or fewer, or one is not positive.
        """
        if len(measured_S) != len(self.samples):
            raise InputError(
                "a device cannot be learnt from this",
                expected=f"{len(self.samples)} measurements",
                found=str(len(measured_S)),
            )
        z_N, error = _regress(self.components_NC, self.samples, _logarithms(np.asarray(measured_S, dtype=np.float64)))
        mean_N = np.exp(z_N)
        return Prediction(mean_N, mean_N * error)


def _components(z_ND: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return principal coordinates of the rows; every device counts alike, and the first has variance 1."""
    centered_ND = z_ND - z_ND.mean(axis=0)
    scale_D = centered_ND.std(axis=0)
    left, singular, _ = np.linalg.svd(centered_ND / np.where(scale_D > 0, scale_D, 1.0), full_matrices=False)
    components_NC = left[:, :count] * singular[:count]
    scale = components_NC[:, 0].std()
    return components_NC / scale if scale > 0 else components_NC


def _spread(components_NC: NDArray[np.float64], count: int) -> list[int]:
    """Return the most central row and then, one by one, the farthest from those chosen."""
    chosen = [int(np.argmin((components_NC**2).sum(axis=1)))]
    distance_N = np.full(len(components_NC), np.inf)
    while len(chosen) < count:
        distance_N = np.minimum(distance_N, ((components_NC - components_NC[chosen[-1]]) ** 2).sum(axis=1))
        distance_N[chosen] = -1.0
        chosen.append(int(np.argmax(distance_N)))
    return chosen


def _regress(
    components_NC: NDArray[np.float64], rows: Sequence[int], z_S: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return predictions for all rows, and the error on measurements that were left out."""
    from sklearn.linear_model import RidgeCV

    model: Any = RidgeCV(_RIDGES).fit(components_NC[list(rows)], z_S)
    return model.predict(components_NC), float(np.sqrt(max(-model.best_score_, 0.0)))


def _mean_score(z_ND: NDArray[np.float64], count: int, samples: int) -> float:
    """Return the mean rank correlation over the known devices, each predicted from the others."""
    return float(np.mean([_score(z_ND, held, count, samples) for held in range(z_ND.shape[1])]))


def _score(z_ND: NDArray[np.float64], held: int, count: int, samples: int) -> float:
    """Return the rank correlation on one known device, predicted from the others."""
    from scipy.stats import spearmanr

    components_NC = _components(np.delete(z_ND, held, axis=1), count)
    rows = _spread(components_NC, samples)
    z_N, _ = _regress(components_NC, rows, z_ND[rows, held])
    if np.ptp(z_N) == 0 or np.ptp(z_ND[:, held]) == 0:
        return 0.0
    found: Any = spearmanr(z_N, z_ND[:, held])
    return float(found.statistic)


def _logarithms(latency: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.all(latency > 0):
        raise InputError("a latency is not positive", expected="milliseconds above 0", found=str(np.min(latency)))
    return np.log(latency)
