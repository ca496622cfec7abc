"""Inputs and outputs without data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ir.errors import DataError
from nas.tasks.base import Array, Batch, Metric, Task
from searchspaces.signature import Signature


@dataclass(frozen=True)
class Shapes(Task):
    """The task of a space that gives a signature instead of data: its models can be built, compiled and timed.

    Attributes:
        given: The signature.
    """

    given: Signature

    name = "shapes"
    description = "inputs and outputs of published models; no data to train on"
    metric = Metric("accuracy", "fraction")
    direction = "max"
    loss_kind = "cross_entropy"

    @property
    def signature(self) -> Signature:
        return self.given

    @property
    def chance(self) -> float:
        raise self._no_data()

    def quality(self, *, loss: float, accuracy: float) -> float:
        raise self._no_data()

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        raise self._no_data()

    def validation_set(self) -> tuple[Array, Array]:
        raise self._no_data()

    def measure_baselines(self) -> dict[str, float]:
        raise self._no_data()

    def fingerprint_arrays(self) -> Iterable[Array]:
        raise self._no_data()

    def _no_data(self) -> DataError:
        return DataError(
            "this space has a signature but no data to train on",
            where="model.signature",
            expected="`task:` with data for a search",
            found="shapes alone",
            hint="build, compile, time or check its models, or write a space with a task",
        )
