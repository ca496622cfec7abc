"""What a user may do while a study runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from nas.trial import Trial

if TYPE_CHECKING:
    from nas.study import Study


class Callback:
    """Hear of everything a study does; override what is of interest.

    All methods are called in the process and thread that called the study. What one raises ends the run.
    """

    def on_start(self, study: Study) -> None:
        """The study is open, and resumed trials are known."""

    def on_trial(self, study: Study, trial: Trial) -> None:
        """A trial was proposed, or is run again after an interruption."""

    def on_stage(self, number: int, stage: str) -> None:
        """A trial entered a stage, such as `compiling`; trials in other processes do not tell."""

    def on_result(self, study: Study, trial: Trial) -> None:
        """A trial ended."""

    def on_rung(self, study: Study, trial: Trial) -> None:
        """A trial was scored after part of its training budget: `trial.rungs[-1]`."""

    def on_notice(self, message: str) -> None:
        """Something a user should hear of."""

    def on_end(self, study: Study) -> None:
        """The run is over, or was interrupted."""


AnyCallback: TypeAlias = Callback | Callable[["Study", Trial], None]


class _OnResult(Callback):
    def __init__(self, function: Callable[[Study, Trial], None]) -> None:
        self._function = function

    def on_result(self, study: Study, trial: Trial) -> None:
        self._function(study, trial)


def as_callback(callback: AnyCallback) -> Callback:
    """Return a callback from one, or from a function that takes the study and each ended trial."""
    return callback if isinstance(callback, Callback) else _OnResult(callback)
