"""An objective that the user computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from ir.errors import InputError, TrialFailure
from nas.objectives.base import Context, Objective
from nas.trial import Quantity, Source


@dataclass(frozen=True, kw_only=True)
class Custom(Objective):
    """Judge an architecture by any function of it.

    Attributes:
        function: Takes an architecture and returns a number; deterministic where a study should be reproducible.
            Where `staged` is set it takes the part of its budget to use as well, above 0 and up to 1.
        name: Key of the value in results, the function's own name where left out.
        min: Smallest value allowed.
        max: Largest value allowed.

    Raises:
        InputError: The function cannot be called, or has no name and none is given.
    """

    function: Callable[..., float] = field(kw_only=False)
    name: str = ""
    source: Source = "custom"
    min: float | None = None
    max: float | None = None

    needs_task: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                "an objective must be callable", expected="architecture -> float", found=repr(self.function)
            )
        name = self.name or getattr(self.function, "__name__", "")
        if not name or name == "<lambda>":
            raise InputError("an objective needs a name", found=repr(self.function), hint="give name=...")
        object.__setattr__(self, "name", name)

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.min, self.max

    def evaluate(self, context: Context) -> Quantity:
        given = (context.architecture, context.until) if self.staged else (context.architecture,)
        value = self.function(*given)
        if not isinstance(value, Real):
            raise TrialFailure(f"the objective {self.name} returned no number", expected="a float", found=repr(value))
        partial: dict[str, Any] = {} if context.until >= 1 or not self.staged else {"fraction": context.until}
        return self.quantity(float(value), **partial)
