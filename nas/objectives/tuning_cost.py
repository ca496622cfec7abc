"""Kernels of the compiled model that nobody has tuned for the target yet."""

from __future__ import annotations

from dataclasses import dataclass

from nas.objectives.base import Context, CountedCall
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class TuningCost(CountedCall):
    """Count the distinct kernels that the target's tuning database has no record of: what tuning this model would add.

    Kernels without alternatives need no tuning and are not counted. Nothing is compiled. The database grows with every
    tuning on this machine, so the number is part of a trial and is not asked before there is one.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
    """

    name: str = "tuning_cost"
    unit: str = "kernels"

    def evaluate(self, context: Context) -> Quantity:
        from codegen import lower
        from codegen.tuning import TuningDatabase

        target = context.resolve_target()
        database = TuningDatabase.for_target(target)
        lowered = lower.lower(context.graph(self.name, batch=self.batch, seq_len=self.seq_len), target)
        kernels = {call.kernel.key: call.kernel for call in lowered.calls}
        missing = [kernel for kernel in kernels.values() if database.record(kernel, target) is None]
        choices = [count for kernel in missing if (count := len(kernel.knob_space(target.isa))) > 1]
        return self.quantity(len(choices), kernels=len(kernels), choices=sum(choices))
