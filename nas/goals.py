"""What a study optimises and demands, and how a trial's values are judged by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ir.errors import InputError
from nas.objectives.base import REGISTRY, Objective
from nas.trial import Quantity

if TYPE_CHECKING:
    from nas.tasks.base import Task

AnyObjective: TypeAlias = str | Objective | Callable[[Any], float]

# Later is dearer: timing a model takes seconds, training it minutes.
_COST_ORDER = {"counted": 0, "predicted": 1, "measured": 2, "custom": 3, "proxy": 4, "supernet": 4, "trained": 5}


@dataclass(frozen=True)
class Bound:
    """A demand on one value.

    Attributes:
        name: Whose value.
        low: Smallest value allowed.
        high: Largest value allowed.
    """

    name: str
    low: float | None
    high: float | None

    def violation(self, value: float) -> float:
        """Return by what share of the bound a value breaks it, 0 when it does not."""
        if self.low is not None and value < self.low:
            return (self.low - value) / (abs(self.low) or 1.0)
        if self.high is not None and value > self.high:
            return (value - self.high) / (abs(self.high) or 1.0)
        return 0.0

    def explain(self, quantity: Quantity) -> str:
        """Say how a value breaks the bound."""
        unit = f" {quantity.unit}" if quantity.unit else ""
        if self.low is not None and quantity.value < self.low:
            return f"{self.name} {quantity.value:.6g}{unit} is below {self.low:.6g}{unit}"
        return f"{self.name} {quantity.value:.6g}{unit} is above {self.high:.6g}{unit}"


@dataclass(frozen=True)
class Goals:
    """Objectives and constraints of a study.

    Attributes:
        objectives: What is optimised.
        metrics: Everything that is evaluated, each name once, the cheapest first.
        bounds: What is demanded.
        constraints: The constraints as given, for the record.
    """

    objectives: tuple[Objective, ...]
    metrics: tuple[Objective, ...]
    bounds: tuple[Bound, ...]
    constraints: tuple[Objective, ...] = ()

    @classmethod
    def of(
        cls, objectives: Iterable[AnyObjective], constraints: Iterable[Objective] = (), task: Task | None = None
    ) -> Goals:
        """Put objectives and constraints together.

        A constraint on something that is an objective too bounds that objective's value: it needs no settings
        of its own.

        Args:
            objectives: Objectives, their names, or functions of an architecture.
            constraints: Objectives with bounds.
            task: What to take units and directions from.

        Raises:
            InputError: There is no objective, a constraint bounds nothing, or one name stands for two things.
        """
        bound_objectives = tuple(as_objective(objective).bind(task) for objective in objectives)
        bound_constraints = tuple(constraint.bind(task) for constraint in constraints)
        if not bound_objectives:
            raise InputError("a study needs an objective", expected="at least one", found="none")
        metrics: dict[str, Objective] = {}
        for objective in bound_objectives:
            if objective.name in metrics:
                raise _clash(objective, metrics[objective.name])
            metrics[objective.name] = objective
        for constraint in bound_constraints:
            if constraint.bounds == (None, None):
                raise InputError(f"the constraint on {constraint.name} bounds nothing", expected="a min or a max")
            known = metrics.setdefault(constraint.name, constraint)
            if type(known) is not type(constraint) or constraint.settings not in ({}, known.settings):
                raise _clash(constraint, known)
        every = dict.fromkeys(
            Bound(item.name, *item.bounds) for item in (*bound_objectives, *bound_constraints) if any_bound(item)
        )
        by_cost = sorted(metrics.values(), key=lambda item: -1 if item.cheap else _COST_ORDER[item.source])
        return cls(bound_objectives, tuple(by_cost), tuple(every), bound_constraints)

    @property
    def cheap_metrics(self) -> tuple[Objective, ...]:
        """What can be checked before an architecture becomes a trial: cheap and bounded."""
        bounded = {bound.name for bound in self.bounds}
        return tuple(metric for metric in self.metrics if metric.cheap and metric.name in bounded)

    def losses(self, quantities: Mapping[str, Quantity]) -> tuple[float, ...]:
        """Return one number per objective, lower is better."""
        return tuple(
            quantities[item.name].value if item.direction == "min" else -quantities[item.name].value
            for item in self.objectives
        )

    def violation(self, quantities: Mapping[str, Quantity]) -> float:
        """Return how far the known values break the bounds, summed."""
        return sum(
            (bound.violation(quantities[bound.name].value) for bound in self.bounds if bound.name in quantities), 0.0
        )

    def broken(self, quantities: Mapping[str, Quantity]) -> str:
        """Say which bounds the known values break, empty when none."""
        return "; ".join(
            bound.explain(quantities[bound.name])
            for bound in self.bounds
            if bound.name in quantities and bound.violation(quantities[bound.name].value) > 0
        )


def as_objective(objective: AnyObjective) -> Objective:
    """Return an objective from a name, a function of an architecture, or an objective.

    Raises:
        InputError: No objective has this name, or it is none of the three.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return REGISTRY.make(objective)
    from nas.objectives.custom import Custom

    return Custom(objective)


def any_bound(objective: Objective) -> bool:
    """Tell whether an objective demands something."""
    return objective.bounds != (None, None)


def names_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """Return the names of objectives."""
    return tuple(objective.name for objective in objectives)


def _clash(second: Objective, first: Objective) -> InputError:
    return InputError(
        f"two different objectives are named {second.name}",
        expected=f"one meaning: {first.settings or 'the default settings'}",
        found=str(second.settings or "the default settings"),
        hint="give one of them name=...",
    )
