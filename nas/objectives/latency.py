"""Measured time of one forward pass of the compiled model."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.errors import ArtifactError, KernelCrash, KernelTimeout, MeasurementError
from nas.objectives.base import Context, Objective
from nas.trial import Quantity, Rival, Source

if TYPE_CHECKING:
    from codegen.measure import Latency as Record

_NEIGHBOURS = 2
_SETTLE_SECONDS = 2.0
_KEPT_BYTES = 512 * 1024 * 1024  # of recent candidates on this machine, some hundred models of a few million weights
STEADY_RATIO = 1.1
"""How far times of the same thing may be apart on a steady machine: the reference kernel's, or those of neighbours."""


@dataclass(frozen=True, kw_only=True)
class Latency(Objective):
    """Compile the model for the target, verify it, and time it.

    Weights do not change the time, so the model is timed as initialised, before it is trained. Where its interval
    overlaps those of earlier trials, it is timed once more in turns with the nearest two until the intervals part, and
    its time is put on the scale of theirs: so the order of neighbours does not hang on when each was measured.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
        max_ms: Longest median allowed, milliseconds.
        settle_seconds: Longest time for the turns with neighbours; 0 leaves overlaps as they are.
        cold_cache: Whether a GPU's second-level cache is overwritten before each timed call.
    """

    name: str = "latency"
    unit: str = "ms"
    source: Source = "measured"
    batch: int = 1
    seq_len: int | None = None
    max_ms: float | None = None
    settle_seconds: float = _SETTLE_SECONDS
    cold_cache: bool = False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, self.max_ms

    @property
    def settings(self) -> dict[str, Any]:
        given: dict[str, Any] = {"batch": self.batch} if self.batch != 1 else {}
        given |= {} if self.seq_len is None else {"seq_len": self.seq_len}
        given |= {"cold_cache": True} if self.cold_cache else {}
        return given | ({} if self.settle_seconds == _SETTLE_SECONDS else {"settle_seconds": self.settle_seconds})

    @property
    def timing(self) -> dict[str, Any]:
        """Keywords of what times models: how a GPU is timed, where that is not as usual."""
        return timing_of(self.settings)

    @property
    def wants_rivals(self) -> bool:
        return self.settle_seconds > 0

    def evaluate(self, context: Context) -> Quantity:
        from codegen import machine
        from codegen.cache import LibraryCache

        with tempfile.TemporaryDirectory(prefix="nas-latency-") as folder:
            path = self.compile(context, Path(folder))
            context.report("measuring")
            record = context.timer.measure_latency(path, threads=context.threads, **self.timing)
            if not self.wants_rivals:
                return self.describe_record(record)
            kept = LibraryCache(machine.cache_directory() / "candidates", _KEPT_BYTES)
            data = path.read_bytes()
            key = _key(data)
            kept.put(key, data)
            rivals: list[tuple[Rival, Path]] = []
            for rival in neighbours(record.median_ms, record.interval_ms, context.rivals.get(self.name, ())):
                if (other := kept.get(rival.key)) is not None:
                    rivals.append((rival, Path(folder) / f"rival_{rival.trial}.nas"))
                    rivals[-1][1].write_bytes(other)
            details: dict[str, Any] = {"candidate": key}
            if rivals:
                context.report(f"settling against trial {', '.join(str(rival.trial) for rival, _ in rivals)}")
                record, details["settled"] = self._settle(path, record, rivals, context)
        return self.describe_record(record, **details)

    def compile(self, context: Context, folder: Path) -> Path:
        """Compile the context's model, verify it, and save it in a folder.

        Raises:
            CompileError: It cannot be compiled.
            VerificationError: The compiled model disagrees with its reference.
        """
        from codegen.code_workers import start_beside
        from ir.initializers import initialize

        start_beside(context.target, context.threads)
        from codegen.compile import compile_graph

        graph = context.graph(self.name, batch=self.batch, seq_len=self.seq_len)
        context.report("compiling")
        artifact = compile_graph(graph, initialize(graph, context.seed), context.resolve_target(), opt_level=1)
        path = folder / f"candidate_{context.number}.nas"
        artifact.save(path)
        return path

    def describe_record(self, record: Record, **details: Any) -> Quantity:
        """Return a measurement as this objective's value, with its circumstances."""
        about = {name: record.machine[name] for name in ("device", "tries") if name in record.machine}
        circumstances = record.to_dict() | {"machine": record.machine["cpu"]} | about | details
        return self.quantity(record.median_ms, record.interval_ms, **circumstances)

    def _settle(
        self, path: Path, alone: Record, rivals: Sequence[tuple[Rival, Path]], context: Context
    ) -> tuple[Record, dict[str, Any]]:
        """Time a model in turns with its neighbours; say against whom, and whether the intervals parted."""
        against = [rival.trial for rival, _ in rivals]
        try:
            own, *others = context.timer.measure_together(
                [path, *(other for _, other in rivals)],
                threads=context.threads,
                max_seconds=self.settle_seconds,
                **self.timing,
            )
        except (ArtifactError, KernelCrash, KernelTimeout, MeasurementError) as error:  # the model alone is sound
            return alone, {"against": against, "parted": False, "reason": error.message}
        scale = scale_of([(rival.value, other.median_ms) for (rival, _), other in zip(rivals, others, strict=True)])
        parted = not any(_overlap(own.interval_ms, other.interval_ms) for other in others)
        if not parted and _width(alone) <= _width(own):
            return alone, {"against": against, "parted": False}
        return rescale(own, scale), {"against": against, "parted": parted, "scale": round(scale, 4)}


def timing_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of what times models, from the settings of a latency."""
    from codegen.gpu.cuda.timing import GpuTiming

    return {"gpu": GpuTiming(flush_cache=True)} if settings.get("cold_cache") else {}


def neighbours(value: float, interval: tuple[float, float], rivals: Sequence[Rival]) -> list[Rival]:
    """Return those whose intervals overlap a measured one, the nearest two.

    Args:
        value: The measured value.
        interval: Its interval.
        rivals: Earlier results.
    """
    near = [rival for rival in rivals if _overlap(interval, rival.interval)]
    return sorted(near, key=lambda rival: (abs(rival.value - value), rival.trial))[:_NEIGHBOURS]


def scale_of(pairs: Sequence[tuple[float, float]]) -> float:
    """Return by what recorded values exceed those measured now, the geometric mean of their ratios.

    Args:
        pairs: Recorded and new value of each neighbour.
    """
    return float(np.exp(np.mean([np.log(recorded / now) for recorded, now in pairs])))


def rescale(record: Record, scale: float) -> Record:
    """Return a measurement with its times multiplied; a scale far from 1 marks it as noisy."""
    low, high = record.interval_ms
    return replace(
        record,
        median_ms=record.median_ms * scale,
        p10_ms=record.p10_ms * scale,
        p90_ms=record.p90_ms * scale,
        interval_ms=(low * scale, high * scale),
        noisy=record.noisy or not 1 / STEADY_RATIO <= scale <= STEADY_RATIO,
    )


def _width(record: Record) -> float:
    low, high = record.interval_ms
    return (high - low) / record.median_ms


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]
