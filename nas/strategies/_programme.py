"""An integer programme over the ways to fill the places of an architecture, solved by HiGHS through scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from ir.errors import InputError
from nas.strategies._frames import Table, Values

_MOST_CUTS: Final = 500
_STEPS: Final = 1e6  # a value that is no whole number counts in so many parts of its range


@dataclass(frozen=True)
class Limit:
    """A demand on a value.

    Attributes:
        column: Which value.
        low: Least allowed.
        high: Most allowed.
    """

    column: int
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Solution:
    """An architecture that the programme found.

    Attributes:
        table: The table of its frame.
        chosen: The way at each place.
        architecture: The architecture.
        values: Its values by the table.
        gap: By how much of the value a better one is not ruled out, 0 for proven best.
    """

    table: Table
    chosen: tuple[int, ...]
    architecture: Any
    values: Values
    gap: float


@dataclass
class Programme:
    """Minimise a value over all architectures of some frames.

    Attributes:
        tables: What each way adds in each frame.
        limits: Demands that every solution meets.
        seconds: Longest time for one solution; the gap says what it leaves open.
    """

    tables: Sequence[Table]
    limits: Sequence[Limit]
    seconds: float
    _cuts: list[tuple[NDArray[np.intp], float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._variables: list[tuple[int, int, int]] = []  # frame, place or -1 for the frame itself, way
        costs: list[Values] = []
        for number, table in enumerate(self.tables):
            self._variables.append((number, -1, 0))
            costs.append(table.base)
            for place, added in enumerate(table.added):
                for way in np.flatnonzero(np.isfinite(added[:, 0])):
                    self._variables.append((number, place, int(way)))
                    costs.append(added[way])
        self._index = {variable: column for column, variable in enumerate(self._variables)}
        costs_VN = np.array(costs)
        self.units = np.array([_unit(column) for column in costs_VN.T])
        self._costs = costs_VN / self.units
        self._structure = self._choose_one()

    def minimize(self, column: int, limits: Sequence[Limit] = ()) -> Solution | None:
        """Return an architecture with the least value, None where none meets the limits.

        Args:
            column: Which value.
            limits: Demands besides those of the programme.

        Raises:
            InputError: Too many solutions of the programme are no architectures.
        """
        every = (*self.limits, *limits)
        for _ in range(_MOST_CUTS):
            constraints = [self._structure, *self._rows(every), *self._cut_rows()]
            found = milp(
                self._costs[:, column],
                integrality=np.ones(len(self._variables)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": self.seconds},
            )
            if found.x is None:
                return None
            solution = self._read(found.x, max(0.0, float(found.mip_gap or 0.0)))
            if solution.architecture is not None and self._meets(solution.values, every):
                return solution
            ones = np.flatnonzero(np.round(found.x))
            self._cuts.append((ones, len(ones) - 1))
        raise InputError(
            "the demands of this space on whole architectures are too many for an integer programme",
            expected=f"at most {_MOST_CUTS} choices that add up but make no architecture",
            found="more",
            hint="take another strategy",
        )

    def _read(self, x: Values, gap: float) -> Solution:
        ones = [self._variables[column] for column in np.flatnonzero(np.round(x))]
        number = next(frame for frame, place, _ in ones if place < 0)
        table = self.tables[number]
        chosen = tuple(way for _, place, way in sorted(ones) if place >= 0)
        return Solution(table, chosen, table.frame.build(chosen), table.values(chosen), gap)

    def _meets(self, values: Values, limits: Sequence[Limit]) -> bool:
        """Check limits exactly: HiGHS keeps them to a tolerance."""
        slack = 1e-9 * np.abs(values) + 1e-3 * self.units
        return all(
            limit.low - slack[limit.column] <= values[limit.column] <= limit.high + slack[limit.column]
            for limit in limits
        )

    def _choose_one(self) -> LinearConstraint:
        """Return the rows that have one frame chosen, in it one way for each place, and its demand met."""
        rows: list[tuple[list[int], list[float], float, float]] = [
            ([self._index[number, -1, 0] for number in range(len(self.tables))], [1.0] * len(self.tables), 1.0, 1.0)
        ]
        for number, table in enumerate(self.tables):
            frame = self._index[number, -1, 0]
            serving: list[int] = []
            for place in range(len(table.added)):
                ways = [way for way in range(table.frame.ways[place]) if (number, place, way) in self._index]
                columns = [self._index[number, place, way] for way in ways]
                rows.append(([*columns, frame], [*[1.0] * len(columns), -1.0], 0.0, 0.0))
                if table.frame.serves:
                    serving += [self._index[number, place, way] for way in ways if table.frame.serves[place][way]]
            if table.frame.serves:
                rows.append(([*serving, frame], [*[1.0] * len(serving), -1.0], 0.0, math.inf))
        return self._matrix(rows)

    def _rows(self, limits: Sequence[Limit]) -> list[LinearConstraint]:
        return [
            LinearConstraint(
                self._costs[:, limit.column][None, :],
                limit.low / self.units[limit.column],
                limit.high / self.units[limit.column],
            )
            for limit in limits
        ]

    def _cut_rows(self) -> list[LinearConstraint]:
        rows = [(list(columns), [1.0] * len(columns), -math.inf, most) for columns, most in self._cuts]
        return [self._matrix(rows)] if rows else []

    def _matrix(self, rows: Sequence[tuple[list[int], list[float], float, float]]) -> LinearConstraint:
        places = [(number, column) for number, row in enumerate(rows) for column in row[0]]
        entries = [entry for row in rows for entry in row[1]]
        shape = (len(rows), len(self._variables))
        matrix = sparse.csr_array((entries, tuple(zip(*places, strict=True))), shape=shape)
        low, high = (np.array([row[side] for row in rows]) for side in (2, 3))
        return LinearConstraint(matrix, low, high)  # pyright: ignore[reportArgumentType]


def _unit(values: Values) -> float:
    """Return what values are counted in: the largest whole number that divides all, or a millionth of their range."""
    if np.all(values == np.round(values)) and np.abs(values).max() < 2**53:
        return float(math.gcd(*(int(value) for value in values)) or 1)
    return float(np.ptp(values) or 1.0) / _STEPS
