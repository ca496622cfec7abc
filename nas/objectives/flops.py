"""Floating-point operations of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nas.objectives.base import Context, Counted
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class Flops(Counted):
    """Count the operations of one forward pass over one sequence.

    Attributes:
        seq_len: Tokens; None takes the task's length.
    """

    name: str = "flops"
    seq_len: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.seq_len is None else {"seq_len": self.seq_len}

    def evaluate(self, context: Context) -> Quantity:
        from ir.cost import profile

        return self.quantity(profile(context.graph(self.name, **self.settings)).flops)
