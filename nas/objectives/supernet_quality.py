"""What the model scores on the task with the weights that it shares with every other architecture of its space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.objectives.base import Context, Direction, Objective
from nas.trial import Quantity, Source

if TYPE_CHECKING:
    from nas.supernet.module import Supernet
    from nas.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class SupernetQuality(Objective):
    """Score the model on the validation split with its part of a trained supernet's weights.

    Unit and direction come from the task. The scores rank architectures; they are not what training one alone gives.

    Attributes:
        path: File of the supernet, which every process that evaluates can read.
        steps: Updates that trained it; with the study's space, task and seed they decide its scores.
        min: Smallest value allowed.
        max: Largest value allowed.
    """

    name: str = "quality"
    source: Source = "supernet"
    path: str
    steps: int
    min: float | None = None
    max: float | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.min, self.max

    @property
    def settings(self) -> dict[str, Any]:
        return {"supernet_steps": self.steps}

    def bind(self, task: Task | None) -> SupernetQuality:
        if task is None:
            return self
        unit: str = task.metric.unit
        direction: Direction = task.direction
        return replace(self, unit=unit, direction=direction)

    def evaluate(self, context: Context) -> Quantity:
        from nas.training.fit import torch_threads

        task = context.require_task(self.name)
        context.report("scoring with shared weights")
        with torch_threads(context.threads):
            found = _load(self.path, Path(self.path).stat().st_mtime_ns, task).evaluate(context.architecture, task)
        return self.quantity(found.quality, metric=task.metric.name, loss=found.loss)


@lru_cache(maxsize=2)
def _load(path: str, _modified_ns: int, task: Task) -> Supernet:
    """Load a supernet once for the process, and again where the file has changed."""
    from nas.supernet.train import load_supernet

    return load_supernet(path, task)
