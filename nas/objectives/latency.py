"""Measured time of one forward pass of the compiled model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.objectives.base import Context, Objective
from nas.trial import Quantity, Source


@dataclass(frozen=True, kw_only=True)
class Latency(Objective):
    """Compile the model for the target, verify it, and time it.

    Weights do not change the time, so the model is timed as initialised, before it is trained.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
        max_ms: Longest median allowed, milliseconds.
    """

    name: str = "latency"
    unit: str = "ms"
    source: Source = "measured"
    batch: int = 1
    seq_len: int | None = None
    max_ms: float | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, self.max_ms

    @property
    def settings(self) -> dict[str, Any]:
        given = {"batch": self.batch} if self.batch != 1 else {}
        return given | ({} if self.seq_len is None else {"seq_len": self.seq_len})

    def evaluate(self, context: Context) -> Quantity:
        from codegen.compile import compile_graph
        from codegen.measure import measure_latency
        from ir.initializers import initialize

        graph = context.graph(self.name, batch=self.batch, seq_len=self.seq_len)
        context.report("compiling")
        artifact = compile_graph(graph, initialize(graph, context.seed), context.resolve_target(), opt_level=1)
        with tempfile.TemporaryDirectory(prefix="nas-latency-") as folder:
            path = Path(folder) / "candidate.nas"
            artifact.save(path)
            context.report("measuring")
            record = measure_latency(path, threads=context.threads)
        return self.quantity(
            record.median_ms, record.interval_ms, **record.to_dict() | {"machine": record.machine["cpu"]}
        )
