"""A trial: one architecture that a study proposed, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ir.errors import StorageError

if TYPE_CHECKING:
    from nas.study import Study

Source: TypeAlias = Literal["trained", "supernet", "proxy", "predicted", "measured", "counted", "custom"]
State: TypeAlias = Literal["running", "finished", "infeasible", "failed", "stopped"]
End: TypeAlias = Literal["finished", "infeasible", "failed", "stopped", "paused"]

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Quantity:
    """A number with what a reader needs to judge it.

    Attributes:
        value: The number.
        unit: Its unit, empty for a plain count or score.
        source: Where it comes from.
        interval: Lower and upper end, where the source gives them.
        details: Anything else worth keeping, JSON values only.
    """

    value: float
    unit: str
    source: Source
    interval: tuple[float, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rival:
    """An earlier measurement to hold a new one against.

    Attributes:
        trial: Number of its trial.
        value: The number.
        interval: Lower and upper end.
        key: What was measured, as whoever measured it keeps it.
    """

    trial: int
    value: float
    interval: tuple[float, float]
    key: str


@dataclass(frozen=True)
class Outcome:
    """What evaluating one architecture gave.

    Attributes:
        state: How it ended; `paused` where it was trained for part of its budget and may go on.
        quantities: Every quantity known, by objective name; what came before the end where the trial stopped early.
        reason: Why it failed or is infeasible.
        traceback: Last lines of the traceback of a failure.
        seconds: How long the evaluation took.
        files: Name and content of files to keep with the trial.
        fraction: Part of the training budget behind the quantities.
    """

    state: End
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    reason: str = ""
    traceback: tuple[str, ...] = ()
    seconds: float = 0.0
    files: Mapping[str, bytes] = field(default_factory=dict)
    fraction: float = 1.0


@dataclass(frozen=True)
class Rung:
    """What a trial was worth after part of its training budget.

    Attributes:
        fraction: The part.
        quantities: Results by objective name.
        losses: One number per objective, lower is better.
    """

    fraction: float
    quantities: Mapping[str, Quantity]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One architecture of a study.

    Attributes:
        number: Place in the order of proposals, from 0.
        hash: Canonical hash of the architecture.
        encoded: The architecture as the journal stores it.
        decode: Turns `encoded` back into an architecture.
        state: `running` until its outcome is known; `stopped` where others did better after part of the budget.
        quantities: Results by objective name.
        losses: One number per objective, lower is better; empty unless finished.
        violation: How far constraints are broken, 0 when feasible.
        reason: Why it failed or is infeasible.
        traceback: Last lines of the traceback of a failure.
        proposed_at: Seconds since the epoch.
        note: What the strategy said of why it proposed it.
        ended_at: Seconds since the epoch, None while running.
        seconds: How long the evaluation took.
        artifact: Path of the compiled model relative to the run folder, where one was shipped.
        remeasured: Results measured again after the search; what is proposed never depends on them.
        rungs: What it was worth on the way, where its training was looked at in parts.
        fraction: Part of the training budget behind the quantities, 1 unless it was stopped early.
        study: The study it belongs to, which holds its weights; None for a trial made by hand.
    """

    number: int
    hash: str
    encoded: Mapping[str, Any]
    decode: Callable[[Mapping[str, Any]], Any] = field(repr=False, compare=False)
    state: State = "running"
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    violation: float = 0.0
    reason: str = ""
    traceback: tuple[str, ...] = ()
    proposed_at: float = 0.0
    ended_at: float | None = None
    seconds: float = 0.0
    artifact: str | None = None
    remeasured: Mapping[str, Quantity] = field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()
    fraction: float = 1.0
    note: Mapping[str, Any] = field(default_factory=dict)
    study: Study | None = field(default=None, repr=False, compare=False)

    @cached_property
    def architecture(self) -> Any:
        """The architecture itself, decoded on first use."""
        return self.decode(dict(self.encoded))

    def changed(self, **fields: Any) -> Trial:
        """Return the trial with other values of some fields, and with its architecture if that was decoded."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **fields)
        return other

    @property
    def values(self) -> dict[str, float]:
        """Plain numbers by objective name."""
        return {name: quantity.value for name, quantity in self.quantities.items()}

    @property
    def units(self) -> dict[str, str]:
        """Unit of each value."""
        return {name: quantity.unit for name, quantity in self.quantities.items()}

    @property
    def sources(self) -> dict[str, str]:
        """Where each value comes from."""
        return {name: quantity.source for name, quantity in self.quantities.items()}

    @property
    def is_feasible(self) -> bool:
        """True for a finished trial that breaks no constraint."""
        return self.state == "finished" and self.violation == 0.0


def encode_outcome(number: int, hash_: str, outcome: Outcome, ended_at: float) -> dict[str, Any]:
    """Return the journal record of an outcome.

    Args:
        number: Trial number.
        hash_: Canonical hash of the trial's architecture.
        outcome: What evaluating it gave.
        ended_at: Seconds since the epoch.

    Returns:
        A JSON object whose `event` is the outcome's state, or `rung` where it was paused; empty fields are left out.
    """
    quantities = outcome.quantities.items()
    record: dict[str, Any] = {
        "event": "rung" if outcome.state == "paused" else outcome.state,
        "trial": number,
        "hash": hash_,
        "values": {name: quantity.value for name, quantity in quantities},
        "units": {name: quantity.unit for name, quantity in quantities},
        "sources": {name: quantity.source for name, quantity in quantities},
    }
    optional = {
        "intervals": {name: list(quantity.interval) for name, quantity in quantities if quantity.interval is not None},
        "details": {name: dict(quantity.details) for name, quantity in quantities if quantity.details},
        "fraction": outcome.fraction if outcome.fraction < 1 else None,
        "reason": outcome.reason,
        "traceback": list(outcome.traceback),
    }
    record.update({key: value for key, value in optional.items() if value})
    return record | {"seconds": round(outcome.seconds, 6), "time": ended_at}


def decode_quantities(record: Mapping[str, Any]) -> dict[str, Quantity]:
    """Read the quantities of a record that `encode_outcome` wrote.

    Args:
        record: The JSON object.

    Returns:
        Quantities by objective name.

    Raises:
        StorageError: A field is missing or of the wrong kind.
    """
    intervals, details = record.get("intervals", {}), record.get("details", {})
    try:
        return {
            name: Quantity(
                value=float(value),
                unit=record["units"][name],
                source=record["sources"][name],
                interval=(float(intervals[name][0]), float(intervals[name][1])) if name in intervals else None,
                details=details.get(name, {}),
            )
            for name, value in record["values"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            "a record of the journal is not one this version writes",
            where=f"trial {record.get('trial')}",
            expected="values, units and sources under the same names",
            found=f"{type(error).__name__}: {error}",
            hint="restore the journal from a copy, or start a new study in another folder",
        ) from error
