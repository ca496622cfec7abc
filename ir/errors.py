"""Every error this project raises on purpose, in one tree.

An error says where it happened, what was expected, what was found and what to do about it. `exit_code` is the
process exit code of the command line: 2 bad input, 3 target or device not available, 1 anything else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class NasError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What went wrong, one sentence without a final full stop.
        where: Place: `file.yaml:12`, a node path such as `layers.3.mixer`, or `trial 7`.
        expected: What would have been right.
        found: What was there instead.
        hint: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        details = (("expected", self.expected), ("found", self.found), ("hint", self.hint))
        return "\n".join([head, *(f"  {label}: {text}" for label, text in details if text)])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keyword fields, so that errors cross process boundaries whole."""
        return _rebuild, (type(self), self.message, self.where, self.expected, self.found, self.hint)


def _rebuild(
    kind: type[NasError], message: str, where: str | None, expected: str | None, found: str | None, hint: str | None
) -> NasError:
    return kind(message, where=where, expected=expected, found=found, hint=hint)


class InputError(NasError):
    """Something the user gave is wrong: a file, a flag, an argument."""

    exit_code: ClassVar[int] = 2


class SpaceError(InputError):
    """A search space file or object is malformed."""


class DataError(InputError):
    """A data file is missing, unreadable or malformed."""


class ArtifactError(InputError):
    """An artifact is damaged, of another format version, or not for this machine."""


class GraphError(NasError):
    """A graph breaks a rule of the intermediate representation: shapes, types, names, structure."""


class ParseError(InputError):
    """Text or JSON that should hold a graph does not."""


class TargetUnavailable(NasError):
    """The target or device is not available on this machine."""

    exit_code: ClassVar[int] = 3


class StorageError(NasError):
    """A run folder, journal or cache cannot be read or written."""


class TrialFailure(NasError):
    """Something that ends one trial, with its reason, and leaves the study running."""


class NonFiniteLoss(TrialFailure):
    """Training produced a loss that is NaN or infinite."""


class CompileError(TrialFailure):
    """Code generation failed for a graph."""


class VerificationError(TrialFailure):
    """A compiled model disagrees with its reference."""


class MeasurementError(TrialFailure):
    """A latency measurement produced no usable number."""


class KernelCrash(TrialFailure):
    """Generated code ended its worker process."""


class KernelTimeout(TrialFailure):
    """Generated code, or its build, ran past its time limit."""


def did_you_mean(word: str, choices: Iterable[str]) -> str | None:
    """Suggest the closest choice to a misspelt word, or None when nothing is close.

    Args:
        word: What was written.
        choices: What is allowed.

    Returns:
        A sentence such as "did you mean 'mamba'?".
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None
