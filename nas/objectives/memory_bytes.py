"""Memory that one call of the compiled model takes."""

from __future__ import annotations

from dataclasses import dataclass

from nas.objectives.base import Context, CountedCall
from nas.trial import Quantity


@dataclass(frozen=True, kw_only=True)
class MemoryBytes(CountedCall):
    """Count the bytes of parameters, of values between kernels, and of outputs, as the compiler plans them.

    Nothing is compiled. Inputs are the caller's; what packing adds to parameters, and scratch memory of a running
    kernel, are not counted. An artifact's manifest has the bytes of its packed weights.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
    """

    name: str = "memory_bytes"
    unit: str = "bytes"

    def evaluate(self, context: Context) -> Quantity:
        from codegen import lower
        from codegen.memory import plan_memory
        from ir.cost import profile

        graph = context.graph(self.name, batch=self.batch, seq_len=self.seq_len)
        lowered = lower.lower(graph, context.resolve_target())
        plan = plan_memory(lowered.graph, lowered.calls)
        parts = {"param_bytes": profile(graph).param_bytes, "activation_bytes": plan.activation_bytes}
        return self.quantity(sum(parts.values()), None, **parts, peak_activation_bytes=plan.peak_bytes)
