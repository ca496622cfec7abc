"""The contract of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ir.errors import InputError
from nas.registry import Registry
from nas.trial import Quantity, Rival, Source

if TYPE_CHECKING:
    from codegen.devices.client import Device
    from codegen.targets.base import Target
    from ir.graph import Graph
    from nas.devices import Timer
    from nas.tasks.base import Task

Direction: TypeAlias = Literal["min", "max"]
Report: TypeAlias = Callable[[str], None]


def _ignore(_stage: str) -> None:
    """Report to nobody."""


@dataclass
class Context:
    """One architecture under evaluation, and what is around it.

    Attributes:
        architecture: What is judged.
        task: Data and yardstick; None for studies over custom objectives.
        number: Number of the trial.
        target: Target or its name.
        threads: Threads that a compiled model may use; None leaves it to the target.
        device: Where latency is measured; None is this machine.
        seed: Seed of the study; every trial trains on the same stream.
        report: Called with the name of each stage.
        files: Files to keep with the trial; objectives add to it.
        until: Part of its training budget after which a staged objective stops and scores what is there.
        checkpoint: What a staged objective left in `files` when it last stopped, to go on from.
        rivals: Recent measurements of other trials, by objective name, for objectives that want them.
    """

    architecture: Any
    task: Task | None = None
    number: int = 0
    target: str | Target = "cpu"
    threads: int | None = None
    seed: int = 0
    report: Report = _ignore
    files: dict[str, bytes] = field(default_factory=dict)
    until: float = 1.0
    checkpoint: bytes | None = None
    rivals: Mapping[str, Sequence[Rival]] = field(default_factory=dict)
    device: Device | None = None
    _graphs: dict[tuple[tuple[str, Any], ...], Graph] = field(default_factory=dict)

    def require_task(self, objective: str) -> Task:
        """Return the task.

        Raises:
            InputError: The study has none.
        """
        if self.task is None:
            raise InputError(
                f"the objective {objective} needs a task",
                expected="a task such as char_lm",
                found="none",
                hint="give a task, or use custom objectives alone",
            )
        return self.task

    def resolve_target(self) -> Target:
        """Return the target itself.

        Raises:
            TargetUnavailable: There is none of this kind here.
        """
        from codegen import targets

        return targets.get(self.target, threads=self.threads) if isinstance(self.target, str) else self.target

    @property
    def timer(self) -> Timer:
        """What times compiled models; it reports whom it waits for."""
        from nas.devices import timer_of

        return timer_of(self.device and self.device.telling(self.report))

    def graph(self, objective: str, **options: Any) -> Graph:
        """Return the architecture's graph for the task, built once for equal options.

        Args:
            objective: Who asks, for the message when there is no task.
            options: Keywords of `Architecture.graph`, such as `batch` and `seq_len`.
        """
        signature = self.require_task(objective).signature
        given = {name: value for name, value in options.items() if value is not None and (name, value) != ("batch", 1)}
        key = tuple(sorted(given.items()))
        if key not in self._graphs:
            self._graphs[key] = self.architecture.graph(signature, **given)
        return self._graphs[key]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Judge an architecture by one number.

    The same classes say what to optimise and, with a bound, what to demand.

    Attributes:
        name: Key of the value in results.
        unit: Unit of the value, empty for a plain count or score.
        direction: Which way is better.
        source: Where the value comes from.
        cheap: True when it takes milliseconds: then a bound on it is checked before an architecture becomes a trial.
        staged: True when it can stop after part of its budget and go on later, see `Context.until`.
    """

    name: str
    unit: str = ""
    direction: Direction = "min"
    source: Source
    cheap: bool = False
    staged: bool = False

    needs_task: ClassVar[bool] = True
    """Whether it can be evaluated without a task."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest value that is allowed."""
        return None, None

    @property
    def settings(self) -> dict[str, Any]:
        """What besides its class decides the value, as JSON."""
        return {}

    @property
    def wants_rivals(self) -> bool:
        """Whether a value is held against recent ones of other trials, see `Context.rivals`."""
        return False

    def bind(self, task: Task | None) -> Objective:
        """Return the objective with what it takes from the task filled in."""
        return self

    @abstractmethod
    def evaluate(self, context: Context) -> Quantity:
        """Judge the context's architecture.

        Raises:
            TrialFailure: This architecture has no value, and why.
        """

    def quantity(self, value: float, interval: tuple[float, float] | None = None, **details: Any) -> Quantity:
        """Return a value with this objective's unit and source."""
        return Quantity(float(value), self.unit, self.source, interval, details)

    def describe(self) -> dict[str, Any]:
        """Return what a journal records of it, as JSON."""
        low, high = self.bounds
        return {
            "name": self.name,
            "kind": REGISTRY.name_of(type(self)),
            "unit": self.unit,
            "direction": self.direction,
            "source": self.source,
            "min": low,
            "max": high,
            "settings": self.settings,
        }


@dataclass(frozen=True, kw_only=True)
class Counted(Objective):
    """A number read off the graph, exact and cheap.

    Attributes:
        min: Smallest value allowed.
        max: Largest value allowed.
    """

    source: Source = "counted"
    cheap: bool = True
    min: float | None = None
    max: float | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.min, self.max


@dataclass(frozen=True, kw_only=True)
class CountedCall(Counted):
    """A number read off the kernels that a compiler would choose for one call, which takes lowering the graph.

    Attributes:
        batch: Sequences per call.
        seq_len: Tokens per sequence; None takes the task's length.
    """

    cheap: bool = False
    batch: int = 1
    seq_len: int | None = None

    @property
    def settings(self) -> dict[str, int]:
        given = {"batch": self.batch} if self.batch != 1 else {}
        return given | ({} if self.seq_len is None else {"seq_len": self.seq_len})


REGISTRY: Registry[Objective] = Registry("objective", "nas.objectives", Objective)
