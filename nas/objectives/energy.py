"""Measured energy of one forward pass of the compiled model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import TargetUnavailable
from nas.objectives.base import Context, Objective
from nas.objectives.latency import Latency
from nas.trial import Quantity, Source

if TYPE_CHECKING:
    from nas.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Energy(Objective):
    """Compile the model for this machine's processor, verify it, and count the joules of a call.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
        max: Most joules allowed.

    Raises:
        TargetUnavailable: On binding: the machine shows no counter of energy, or this user may not read it.
    """

    name: str = "energy"
    unit: str = "J"
    source: Source = "measured"
    batch: int = 1
    seq_len: int | None = None
    max: float | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, self.max

    @property
    def settings(self) -> dict[str, Any]:
        given: dict[str, Any] = {"batch": self.batch} if self.batch != 1 else {}
        return given | ({} if self.seq_len is None else {"seq_len": self.seq_len})

    def bind(self, task: Task | None) -> Energy:
        from codegen.energy import find_counters

        find_counters()  # said before a folder is made
        return self

    def evaluate(self, context: Context) -> Quantity:
        from codegen.energy import measure_energy

        if context.device is not None:
            raise TargetUnavailable(
                "energy of a device is not measured, only that of this machine",
                where=self.name,
                hint="leave out the device or the objective",
            )
        with tempfile.TemporaryDirectory(prefix="nas-energy-") as folder:
            path = Latency(name=self.name, batch=self.batch, seq_len=self.seq_len).compile(context, Path(folder))
            context.report("counting energy")
            found = measure_energy(path, threads=context.threads)
        return self.quantity(found.median_j, found.interval_j, **found.to_dict())
