"""Outcomes on their way into a study: checked when they come, and read back from the journal's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ir.errors import InputError, StorageError
from nas.goals import Goals, names_of
from nas.trial import Outcome, Trial, decode_quantities

ENDS: Final = ("finished", "infeasible", "failed", "stopped")
_WITH_VALUES: Final = ("finished", "paused")


def check_outcome(number: int, outcome: Outcome, goals: Goals) -> None:
    """Check that an outcome has what its state needs.

    Raises:
        InputError: It lacks an objective, or has no state of an ended or paused trial.
    """
    missing = [name for name in names_of(goals.objectives) if name not in outcome.quantities]
    if outcome.state in (*ENDS, "paused") and not (outcome.state in _WITH_VALUES and missing):
        return
    raise InputError(
        "this outcome does not end a trial",
        where=f"trial {number}",
        expected="a value for every objective, or a reason",
        found=f"{outcome.state} without {', '.join(missing)}" if missing else outcome.state,
    )


def end_trial(trial: Trial, record: Mapping[str, Any], goals: Goals) -> Trial:
    """Return a trial as the record of its outcome ends it.

    Raises:
        StorageError: A field of the record is missing or of the wrong kind.
    """
    quantities = decode_quantities(record)
    state = record["event"]
    return trial.changed(
        state=state,
        quantities=quantities,
        losses=goals.losses(quantities) if state == "finished" else (),
        violation=goals.violation(quantities),
        reason=record.get("reason", ""),
        traceback=tuple(record.get("traceback", ())),
        ended_at=record.get("time"),
        seconds=record.get("seconds", 0.0),
        fraction=record.get("fraction", 1.0),
    )


def misfit(where: str, record: Mapping[str, Any], expected: str) -> StorageError:
    """Return the error of a record that does not fit those before it.

    Args:
        where: The study.
        record: The record.
        expected: What would fit.
    """
    return StorageError(
        "the records of the journal do not fit together",
        where=where,
        expected=expected,
        found=f"event {record['event']} of trial {record.get('trial')}",
        hint="restore the journal from a copy, or start a new study in another folder",
    )
