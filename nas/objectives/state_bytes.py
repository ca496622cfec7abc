"""Memory that the model carries from token to token when it streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nas.objectives.base import Context, Counted
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class StateBytes(Counted):
    """Count the bytes of streaming state of one sequence: key-value caches, convolution windows, recurrent states.

    Attributes:
        length: Tokens seen; a cache grows with it, a recurrent state does not. None takes the task's length.
    """

    name: str = "state_bytes"
    unit: str = "bytes"
    length: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.length is None else {"length": self.length}

    def evaluate(self, context: Context) -> Quantity:
        from ir.cost import state_bytes

        length = self.length or context.require_task(self.name).signature.positions
        return self.quantity(state_bytes(context.graph(self.name, mode="step", max_len=length)))
