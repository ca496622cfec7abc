"""Latency predicted from the limits of a machine, corrected by what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError
from nas.predictors.ensemble import Ensemble, FittedEnsemble, Prediction

if TYPE_CHECKING:
    from ir.graph import Graph

# Standard deviation of the logarithm of measured by predicted before anything is measured: a factor of e either way.
_UNKNOWN = 1.0
# Samples below which one factor is learnt for all models.
_FEW = 8


class Limits(Protocol):
    """What a machine can do at best, such as a `codegen.roofline.Roofline`."""

    @property
    def fma_peak_gflops(self) -> float:
        """Float32 multiply-adds, two operations each, 10^9 a second."""
        ...

    @property
    def copy_gbs(self) -> float:
        """Bytes read and written by a large copy, 10^9 a second."""
        ...


def roofline_ms(graph: Graph, machine: Limits) -> float:
    """Return the time that the operations of a graph take at least, one after the other, milliseconds.

    Each takes its arithmetic at the peak or its bytes at the speed of a copy, whichever is longer; caches keep nothing.

    Args:
        graph: Model, composite operations expanded.
        machine: Limits at the threads that the model runs on.

    Raises:
        GraphError: The graph holds component nodes.

    Source: Williams et al. 2009, "Roofline: an insightful visual performance model for multicore architectures".
    """
    from ir.cost import node_costs

    by_node = (
        max(cost.flops / machine.fma_peak_gflops, cost.bytes_moved / machine.copy_gbs) for cost in node_costs(graph)
    )
    return sum(by_node) / 1e6


@dataclass(frozen=True)
class RooflineLatency:
    """Latency as a roofline times a factor that is learnt from measurements; without any it is the roofline.

    Attributes:
        factor: Predicts measured by roofline from features; a number where it is one for all.
        std: Standard deviation of the logarithm of that number.
    """

    factor: FittedEnsemble | float = 1.0
    std: float = _UNKNOWN

    @classmethod
    def fit(
        cls,
        described: Sequence[Mapping[str, float]],
        rooflines_ms: Sequence[float] | NDArray[np.float64],
        measured_ms: Sequence[float] | NDArray[np.float64],
        ensemble: Ensemble | None = None,
    ) -> RooflineLatency:
        """Learn the factor.

        Args:
            described: Features of each measured model by name, as `flatten` gives them.
            rooflines_ms: What `roofline_ms` gives for each.
            measured_ms: Measured latency of each.
            ensemble: What is fitted; by default the usual one.

        Raises:
            InputError: The lengths differ, or a time is not positive.
        """
        roofline_N = _positive(rooflines_ms, len(described))
        ratio_N = _positive(measured_ms, len(described)) / roofline_N
        if len(ratio_N) == 0:
            return cls()
        if len(ratio_N) < _FEW:
            spread = float(np.log(ratio_N).std(ddof=1)) if len(ratio_N) > 1 else _UNKNOWN
            return cls(float(np.exp(np.log(ratio_N).mean())), spread * float(np.sqrt(1.0 + 1.0 / len(ratio_N))))
        return cls((ensemble or Ensemble()).fit(described, ratio_N))

    def predict(
        self, described: Sequence[Mapping[str, float]], rooflines_ms: Sequence[float] | NDArray[np.float64]
    ) -> Prediction:
        """Return the latency of models, ms, with error bars.

        Raises:
            InputError: The lengths differ, or a time is not positive.
        """
        roofline_N = _positive(rooflines_ms, len(described))
        if isinstance(self.factor, FittedEnsemble):
            found = self.factor.predict(described)
            return Prediction(roofline_N * found.mean_N, roofline_N * found.std_N)
        return Prediction(roofline_N * self.factor, roofline_N * self.factor * self.std)


def _positive(times: Sequence[float] | NDArray[np.float64], count: int) -> NDArray[np.float64]:
    time_N = np.asarray(times, dtype=np.float64)
    if len(time_N) != count or not np.all((time_N > 0) & np.isfinite(time_N)):
        raise InputError(
            "these are no latencies of the models given",
            expected=f"{count} finite milliseconds above 0",
            found=f"{len(time_N)} values, the least {np.min(time_N, initial=np.inf):g}",
        )
    return time_N
