"""How long a search may take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ir.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a search; it ends at the first that is reached.

    Attributes:
        trials: Trials of the whole study, counting those before it was resumed, failed and infeasible ones too.
        hours: Time of this run; running trials are finished.

    Raises:
        InputError: No limit, or one that is not positive.
    """

    trials: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        if self.trials is None and self.hours is None:
            raise InputError("a budget needs a limit", expected="trials, hours, or both", found="none")
        if self.trials is not None and (type(self.trials) is not int or self.trials < 1):
            raise InputError("bad budget", where="trials", expected="an integer of at least 1", found=repr(self.trials))
        if self.hours is not None and not 0 < self.hours < float("inf"):
            raise InputError("bad budget", where="hours", expected="a positive number", found=repr(self.hours))

    @classmethod
    def of(cls, budget: int | Budget) -> Budget:
        """Return a budget from a number of trials; a budget is returned as it is."""
        return budget if isinstance(budget, Budget) else cls(trials=budget)

    def describe(self) -> dict[str, Any]:
        """Return the limits that are set, as JSON."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}
