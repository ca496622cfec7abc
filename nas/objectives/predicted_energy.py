"""Predicted energy of one forward pass, from the profile of a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.objectives.base import Context, Objective
from nas.predictors.profile import Profile, load_profile
from nas.trial import Quantity, Source


@dataclass(frozen=True, kw_only=True)
class PredictedEnergy(Objective):
    """Predict the joules of a call from what was measured of other models: a roofline times a learnt factor.

    Nothing is compiled or measured, and the device need not be here.

    Attributes:
        profile: What `nas profile --energy` measured.
        max: Most joules allowed.
    """

    name: str = "energy"
    unit: str = "J"
    source: Source = "predicted"
    profile: Profile
    max: float | None = None

    @classmethod
    def of(cls, profile: str | Path | Profile, *, max: float | None = None) -> PredictedEnergy:
        """Return the objective for a profile, or that of this name or path.

        Args:
            profile: Profile of the device.
            max: Most joules allowed.

        Raises:
            InputError: There is none, it is damaged, or it holds no energy.
        """
        found = profile if isinstance(profile, Profile) else load_profile(profile)
        found.energy_samples()  # what is missing is said before a search begins
        return cls(profile=found, max=max)

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, self.max

    @property
    def settings(self) -> dict[str, Any]:
        """The profile by name and content: one that has grown predicts other values."""
        batch = {"batch": self.profile.batch} if self.profile.batch != 1 else {}
        return {"profile": self.profile.name, "sha256": self.profile.energy_sha256, **batch}

    def evaluate(self, context: Context) -> Quantity:
        context.report("predicting energy")
        return self.profile.predict_energy(context.graph(self.name, batch=self.profile.batch))
