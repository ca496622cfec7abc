"""An objective of a study that is only looked at: it has values, but makes none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ir.errors import InputError
from nas.objectives.base import Context, Objective
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class Recorded(Objective):
    """Stand for an objective that a journal describes.

    Attributes:
        kind: What it was.
        recorded_settings: Its settings.
        min: Smallest value that was allowed.
        max: Largest value that was allowed.
    """

    kind: str = ""
    recorded_settings: Mapping[str, Any] = field(default_factory=dict)
    min: float | None = None
    max: float | None = None

    needs_task: ClassVar[bool] = False

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Recorded:
        """Return the objective that `Objective.describe` described."""
        taken = {key: described[key] for key in ("name", "kind", "unit", "direction", "source", "min", "max")}
        return cls(**taken, recorded_settings=described["settings"])

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.min, self.max

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.recorded_settings)

    def evaluate(self, context: Context) -> Quantity:
        raise InputError(
            f"the objective {self.name} of a study opened for reading cannot be evaluated",
            hint="give the search's own command again to go on with the study",
        )
