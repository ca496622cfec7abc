"""Objectives and limits by the names that a user gives them: `max_latency_ms=3.0`."""

from __future__ import annotations

from ir.errors import InputError, did_you_mean
from nas.goals import Goals, names_of
from nas.objectives.base import Objective


def find_column(goals: Goals, objective: str | None) -> int:
    """Return the place of an objective among the losses, 0 for None.

    Raises:
        InputError: There is no such objective.
    """
    names = names_of(goals.objectives)
    if objective is not None and objective not in names:
        raise InputError(
            f"no objective {objective!r}",
            expected="one of " + ", ".join(names),
            found=objective,
            hint=did_you_mean(objective, names),
        )
    return 0 if objective is None else names.index(objective)


def read_limit(goals: Goals, key: str, value: float) -> tuple[float, str, float]:
    """Split a limit such as `max_latency_ms` into sign, name and value; `sign * x <= sign * value` keeps it.

    Raises:
        InputError: It names nothing that this study knows.
    """
    signs = {f"max_{spelling}": (1.0, item.name) for item in goals.metrics for spelling in _spellings(item)}
    signs |= {f"min_{spelling}": (-1.0, item.name) for item in goals.metrics for spelling in _spellings(item)}
    if key not in signs:
        raise InputError(
            f"no limit {key!r}", expected="one of " + ", ".join(signs), found=key, hint=did_you_mean(key, signs)
        )
    return (*signs[key], float(value))


def _spellings(objective: Objective) -> tuple[str, ...]:
    return (
        (objective.name, f"{objective.name}_{objective.unit}") if objective.unit.isidentifier() else (objective.name,)
    )
