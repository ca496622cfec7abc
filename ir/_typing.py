"""`dataclass_transform` for every supported Python: typing has it from 3.11 on, and only type checkers need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform as dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[T], T]:
        """Mark a decorator or base class as making dataclasses; does nothing at run time."""
        return lambda decorated: decorated
