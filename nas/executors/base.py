"""The contract of an executor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from nas.registry import Registry
from nas.trial import Outcome, Quantity, Rival

ReportStage: TypeAlias = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """An architecture to evaluate.

    Attributes:
        number: Trial number.
        architecture: What to evaluate.
        until: Part of the training budget after which to stop and score what is there.
        known: What earlier parts found that does not depend on training.
        checkpoint: What an earlier part of the training left to go on from.
        rivals: Recent measurements of other trials by objective name.
    """

    number: int
    architecture: Any
    until: float = 1.0
    known: Mapping[str, Quantity] = field(default_factory=dict)
    checkpoint: bytes | None = field(default=None, repr=False)
    rivals: Mapping[str, Sequence[Rival]] = field(default_factory=dict)


class Evaluate(Protocol):
    """Evaluate one job."""

    def __call__(self, job: Job, report: ReportStage | None = None) -> Outcome:
        """Return the outcome; raise only what ends the whole study."""
        ...


class JobSource(Protocol):
    """Where jobs come from and results go. An executor calls it from one thread."""

    def next_job(self) -> Job | None:
        """Return a job; None when there is none until a running one ends, or none at all."""
        ...

    def end_job(self, number: int, outcome: Outcome) -> None:
        """Take the outcome of a job."""
        ...

    def report(self, number: int, stage: str) -> None:
        """Hear what a running job does."""
        ...


@dataclass(frozen=True)
class Executor(ABC):
    """Run jobs. The fields of an executor are its options; none of them changes what is proposed."""

    @abstractmethod
    def run(self, evaluate: Evaluate, source: JobSource) -> None:
        """Run jobs until the source has none and none is running.

        Raises:
            NasError: What `evaluate` or the source raised.
        """


REGISTRY: Registry[Executor] = Registry("executor", "nas.executors", Executor)


def get(executor: str | Executor, **options: Any) -> Executor:
    """Return an executor from its name and options; an instance is returned as it is.

    Raises:
        InputError: No such executor or option.
    """
    return executor if isinstance(executor, Executor) else REGISTRY.make(executor, options)
