"""Predicted time of one forward pass, from the profile of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.objectives.base import Context, Objective
from nas.objectives.energy import Energy
from nas.objectives.latency import Latency
from nas.objectives.predicted_energy import PredictedEnergy
from nas.predictors.profile import Profile, load_profile, transferred
from nas.trial import Quantity, Source


@dataclass(frozen=True, kw_only=True)
class PredictedLatency(Objective):
    """Predict the latency of the compiled model from what was measured of others: a roofline times a learnt factor.

    Nothing is compiled or measured, and the device need not be here.

    Attributes:
        profile: What `nas profile` measured, see `load_profile`.
        max_ms: Longest time allowed, milliseconds.
    """

    name: str = "latency"
    unit: str = "ms"
    source: Source = "predicted"
    profile: Profile
    max_ms: float | None = None

    @classmethod
    def of(cls, profile: str | Path, *others: str | Path, max_ms: float | None = None) -> PredictedLatency:
        """Return the objective for a profile of this name or path.

        Args:
            profile: Profile of the device.
            others: Profiles of other devices over the same models, where that of the device is small.
            max_ms: Longest time allowed, milliseconds.

        Raises:
            InputError: There is none, one is damaged, or they do not go together.
        """
        own = load_profile(profile)
        known = [load_profile(other) for other in others]
        return cls(profile=transferred(own, known) if known else own, max_ms=max_ms)

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, self.max_ms

    @property
    def settings(self) -> dict[str, Any]:
        """The profile by name and content: one that has grown predicts other values."""
        batch = {"batch": self.profile.batch} if self.profile.batch != 1 else {}
        return {"profile": self.profile.name, "sha256": self.profile.sha256, **batch}

    def evaluate(self, context: Context) -> Quantity:
        context.report("predicting latency")
        return self.profile.predict(context.graph(self.name, batch=self.profile.batch))


def predict_instead(predicted: PredictedLatency, metrics: Iterable[Objective]) -> list[Objective]:
    """Return objectives or constraints with predictions in place of measured latencies and energies, bounds kept.

    Args:
        predicted: What predicts.
        metrics: Objectives or constraints.

    Raises:
        InputError: Energy is asked for, and the profile holds none.
    """
    return [_instead(predicted, item) for item in metrics]


def _instead(predicted: PredictedLatency, item: Objective) -> Objective:
    if isinstance(item, Latency):
        return replace(predicted, max_ms=item.max_ms)
    return PredictedEnergy.of(predicted.profile, max=item.max) if isinstance(item, Energy) else item
