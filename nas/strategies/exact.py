"""The whole Pareto front of objectives that add over layers, by an integer programme, each point with its proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ir.errors import InputError
from nas.strategies.base import Space, Strategy, require_at_least
from nas.trial import Trial

if TYPE_CHECKING:
    from nas.evaluate import Evaluator
    from nas.strategies._frames import Table, Values
    from nas.strategies._programme import Solution

_ADDING_SOURCES = ("counted", "custom")


@dataclass(frozen=True)
class Exact(Strategy):
    """Solve for the front, one point a trial, and draw from the space when all points are tried.

    Width, depth, and what else changes the cost of other choices is fixed in turn; within, what each way to fill a
    place adds to each value is found by changing one place at a time. The sums must equal the true values of random
    architectures, else the study ends with an error: the objectives do not add. HiGHS then proves each point, with the
    bounds on all values as constraints: first the two ends of the front, then a point within the largest gap that is
    left. The journal keeps the proof's gap beside each proposal, 0 where nothing better exists.

    Values are computed again and again before the first trial, so they must cost nothing: counted ones, or functions.

    Attributes:
        checks: Random architectures whose values must equal the sums.
        tolerance: Largest difference that counts as equal, as a share of the value.
        seconds: Longest time for one solution.
        evaluations: Most architectures whose values are computed before the first trial.

    Raises:
        InputError: An option is out of range.

    Source: Ibaraki 1978 and Sinha and Zoltners 1979 for one way out of each class, "The multiple-choice knapsack
        problem"; epsilon constraints for the front, Haimes et al. 1971.
    """

    checks: int = 32
    tolerance: float = 1e-9
    seconds: float = 60.0
    evaluations: int = 5_000

    def __post_init__(self) -> None:
        require_at_least(1, checks=self.checks, evaluations=self.evaluations)
        for name, value in (("tolerance", self.tolerance), ("seconds", self.seconds)):
            if not value > 0:
                raise InputError(f"bad option {name} of a strategy", expected="a positive number", found=repr(value))

    @property
    def batch_size(self) -> None:
        return None

    def bind(self, space: Any, evaluator: Evaluator) -> Strategy:
        """Return the strategy for one study.

        Raises:
            InputError: There are more than two objectives, or a value that must be trained or measured.
        """
        goals = evaluator.goals
        if len(goals.objectives) > 2:
            raise InputError(
                "the exact strategy solves for one or two objectives",
                expected="one or two",
                found=", ".join(objective.name for objective in goals.objectives),
                hint="make one of them a constraint, or take another strategy",
            )
        for metric in goals.metrics:
            if metric.source not in _ADDING_SOURCES or metric.staged:
                raise InputError(
                    f"the exact strategy cannot use {metric.name}",
                    expected="values that add over layers and cost nothing: params, flops, state_bytes, functions",
                    found=f"{metric.name} ({metric.source})",
                    hint="choose other objectives, or another strategy",
                )
        return _Bound(**vars(self), space=space, evaluator=evaluator)

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        return space.sample(rng)


@dataclass(frozen=True)
class _Bound(Exact):
    """The strategy of one study, with the points found so far."""

    space: Any = field(default=None, repr=False)
    evaluator: Any = field(default=None, repr=False)
    _points: list[Solution] = field(default_factory=list, init=False, repr=False)
    _counted: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    _asked: list[np.random.Generator] = field(default_factory=list, init=False, repr=False)
    _source: list[Iterator[Solution]] = field(default_factory=list, init=False, repr=False)

    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        is_first_try = not (self._asked and self._asked[-1] is rng)
        self._asked[:] = [rng]
        point = self._point(number) if is_first_try else None
        return space.sample(rng) if point is None else point.architecture

    def explain(self, number: int, architecture: Any) -> dict[str, Any]:
        point = self._points[number] if number < len(self._points) else None
        return {"gap": point.gap} if point is not None and point.architecture is architecture else {}

    def _point(self, number: int) -> Solution | None:
        if not self._source:
            self._source.append(self._solve())
        while len(self._points) <= number:
            point = next(self._source[0], None)
            if point is None:
                return None
            self._check(point.table, point.chosen)
            self._points.append(point)
        return self._points[number]

    def _solve(self) -> Iterator[Solution]:
        from nas.strategies._exact_front import front
        from nas.strategies._programme import Programme

        try:
            tables = self._tabulate(fixes_all=False)
        except _NotAdding:  # a few tries may miss which choices interact
            tables = self._tabulate(fixes_all=True)
        programme = Programme(tables, self._limits(), self.seconds)
        columns = tuple(range(len(self.evaluator.goals.objectives)))
        yield from front(programme, columns) if tables else ()

    def _tabulate(self, *, fixes_all: bool) -> list[Table]:
        """Return tables of all frames, checked on random architectures."""
        from nas.strategies._frames import frames_of, tabulate

        rng = np.random.Generator(np.random.PCG64(0))
        frames = frames_of(self.space, self._judge, rng, fixes_all=fixes_all)
        tables = [table for table in (tabulate(frame, self._judge, rng) for frame in frames) if table is not None]
        for _ in range(self.checks if tables else 0):
            table = tables[int(rng.integers(len(tables)))]
            self._check(table, table.draw(rng))
        return tables

    def _limits(self) -> list[Any]:
        """Return the bounds on all values, as the programme minimises them."""
        from nas.strategies._programme import Limit

        goals = self.evaluator.goals
        limits: list[Limit] = []
        for bound in goals.bounds:
            for column, (name, sign) in enumerate(self._columns()):
                if name == bound.name:
                    ends = [None if end is None else sign * end for end in (bound.low, bound.high)]
                    low, high = ends if sign > 0 else ends[::-1]
                    limits.append(Limit(column, -np.inf if low is None else low, np.inf if high is None else high))
        return limits

    def _columns(self) -> list[tuple[str, float]]:
        """Return the name of each value and the sign that makes less of it better, objectives first."""
        goals = self.evaluator.goals
        others = [metric for metric in goals.metrics if metric.name not in {item.name for item in goals.objectives}]
        return [(item.name, 1.0 if item.direction == "min" else -1.0) for item in (*goals.objectives, *others)]

    def _judge(self, architecture: Any) -> Values | None:
        from nas.executors.base import Job

        if architecture is None:
            return None
        self._counted["judged"] += 1
        if self._counted["judged"] > self.evaluations and not self._points:
            raise _too_many(self.evaluations)
        unbounded = replace(self.evaluator, goals=replace(self.evaluator.goals, bounds=()))
        outcome = unbounded(Job(0, architecture))
        if outcome.state != "finished":
            return None
        return np.array([sign * outcome.quantities[name].value for name, sign in self._columns()])

    def _check(self, table: Table, chosen: Sequence[int]) -> None:
        """Compare the sum of a table with the true values, where there are any.

        Raises:
            InputError: They differ.
        """
        true = self._judge(table.frame.build(chosen))
        if true is None:
            return
        summed = table.values(chosen)
        wrong = np.flatnonzero(np.abs(summed - true) > self.tolerance * np.maximum(np.abs(true), np.abs(table.base)))
        if len(wrong) == 0:
            return
        name, sign = self._columns()[int(wrong[0])]
        raise _NotAdding(
            f"{name} does not add over the layers of this space",
            expected=f"the sum of what its choices add, {sign * summed[wrong[0]]:.10g}",
            found=f"{sign * true[wrong[0]]:.10g} for {table.frame.build(chosen).to_dict()}",
            hint="take another strategy, such as nsga2",
        )


class _NotAdding(InputError):
    """A value is not the sum of what choices add."""


def _too_many(most: int) -> InputError:
    return InputError(
        "this space takes too many evaluations to find out what each choice adds",
        where="strategy option evaluations",
        expected=f"at most {most:,}",
        found="more, because choices for the whole model change what other choices add",
        hint="leave fewer values of width, depth and what holds for all layers in the space, or allow more evaluations",
    )
