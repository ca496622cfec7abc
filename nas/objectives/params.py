"""Number of trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from nas.objectives.base import Context, Counted
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class Params(Counted):
    """Count the parameters of the model for the task."""

    name: str = "params"

    def evaluate(self, context: Context) -> Quantity:
        from ir.cost import profile

        return self.quantity(profile(context.graph(self.name)).params)
