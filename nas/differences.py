"""What differs between two runs, or between two models: settings, fronts, values, and architectures layer by layer.

for change in changes(first.encoded, second.encoded):
    print(change.path, change.first, change.second)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import InputError
from nas.search import load_study
from nas.storages.journal import read_journal
from nas.study import Study
from nas.trial import Quantity, Trial
from searchspaces.architecture import LAYER_SLOTS, ComponentConfig, brief

ABSENT = "-"
_SLOTS = ("position", "norm", "stem", "head", "conditioner", "macro", "transition", *LAYER_SLOTS)
_KINDS = {slot: slot for slot in _SLOTS} | {"wiring": "block", "final_norm": "norm"}


@dataclass(frozen=True)
class Change:
    """One place where two things differ.

    Attributes:
        path: Where, as `stages[0].layers[2].token_mixer.mamba.state_dim`.
        first: What the first has there, `-` for nothing.
        second: What the second has.
    """

    path: str
    first: str
    second: str


@dataclass(frozen=True)
class ValueChange:
    """How a value differs between two models.

    Attributes:
        name: Name of the value.
        unit: Its unit.
        first: Value of the first, None where it has none.
        second: Value of the second.
        difference: Second less first.
        interval: Where the difference lies when each value lies in its interval; None where neither has one.
        is_certain: Whether the interval leaves 0 out; None without an interval.
    """

    name: str
    unit: str
    first: float | None
    second: float | None
    difference: float | None
    interval: tuple[float, float] | None
    is_certain: bool | None


@dataclass(frozen=True)
class Subject:
    """A model that can be compared.

    Attributes:
        name: What it is called.
        architecture: As a journal or an artifact stores it.
        quantities: Its values.
    """

    name: str
    architecture: Mapping[str, Any]
    quantities: Mapping[str, Quantity]


@dataclass(frozen=True)
class ModelDifference:
    """What differs between two models."""

    first: str
    second: str
    architecture: tuple[Change, ...]
    values: tuple[ValueChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunDifference:
    """What differs between two runs.

    Attributes:
        first: Folder of the first.
        second: Folder of the second.
        settings: What decides proposals and the meaning of values.
        versions: Packages.
        trials: Ended trials of each by state.
        best: Best value of each objective that both have.
        only_first: Trials of the first's front whose architecture is not on the second's.
        only_second: The reverse.
        both: Trials `(first, second)` of one architecture that is on both fronts.
    """

    first: str
    second: str
    settings: tuple[Change, ...]
    versions: tuple[Change, ...]
    trials: tuple[Change, ...]
    best: tuple[ValueChange, ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    both: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)


def compare(first: str, second: str) -> RunDifference | ModelDifference:
    """Compare two runs, or two models of any runs or artifacts.

    Args:
        first: Run folder, `RUN:TRIAL`, or artifact (.nas).
        second: As `first`.

    Raises:
        InputError: One is a run and the other a model, or there is no such trial.
        StorageError: A folder holds no readable study.
        ArtifactError: An artifact is damaged.
    """
    runs = [Path(text).is_dir() for text in (first, second)]
    if runs[0] != runs[1]:
        raise InputError(
            "a run and a model cannot be compared",
            expected="two runs, or two of RUN:TRIAL and artifacts",
            found=f"{first} and {second}",
            hint=f"give {first if runs[0] else second}:TRIAL",
        )
    return compare_runs(first, second) if runs[0] else compare_models(read_subject(first), read_subject(second))


def compare_models(first: Subject, second: Subject) -> ModelDifference:
    """Compare two models."""
    return ModelDifference(
        first.name,
        second.name,
        tuple(changes(first.architecture, second.architecture)),
        value_changes(first.quantities, second.quantities),
    )


def compare_runs(first: str | Path, second: str | Path) -> RunDifference:
    """Compare two run folders.

    Raises:
        StorageError: A folder holds no readable study.
    """
    headers = [read_journal(folder)[0] for folder in (first, second)]
    studies = [load_study(folder) for folder in (first, second)]
    fronts = [{trial.hash: trial.number for trial in study.pareto_front()} for study in studies]
    common = [hash_ for hash_ in fronts[0] if hash_ in fronts[1]]
    return RunDifference(
        str(first),
        str(second),
        tuple(changes(headers[0]["settings"], headers[1]["settings"])),
        tuple(changes(headers[0].get("versions", {}), headers[1].get("versions", {}))),
        tuple(changes(studies[0].count(), studies[1].count())),
        value_changes(_best(studies[0]), _best(studies[1])),
        tuple(number for hash_, number in fronts[0].items() if hash_ not in fronts[1]),
        tuple(number for hash_, number in fronts[1].items() if hash_ not in fronts[0]),
        tuple((fronts[0][hash_], fronts[1][hash_]) for hash_ in common),
    )


def read_subject(text: str) -> Subject:
    """Return the model that `RUN:TRIAL` or the path of an artifact names.

    Raises:
        InputError: It names neither.
        StorageError: The folder holds no readable study.
        ArtifactError: The artifact is damaged.
    """
    if Path(text).suffix == ".nas":
        return _artifact(Path(text))
    folder, colon, number = text.rpartition(":")
    if not colon or not (number.isascii() and number.isdigit()):
        raise InputError(
            "this names no model",
            where=text,
            expected="a run folder, RUN:TRIAL, or an artifact (.nas)",
            found="no such folder",
        )
    trial = find_trial(load_study(folder), int(number))
    return Subject(text, trial.encoded, trial.quantities)


def find_trial(study: Study, number: int) -> Trial:
    """Return a trial of a study, whatever became of it.

    Raises:
        InputError: There is no such trial.
    """
    if number >= study.num_trials:
        raise InputError(
            "no such trial", where=str(study.folder), expected=f"0 to {study.num_trials - 1}", found=str(number)
        )
    return study.trials[number]


def changes(first: Any, second: Any, path: str = "") -> Iterator[Change]:
    """Walk two values as JSON holds them and give where they differ; a component that is another one is one change."""
    if _is_component(first) and _is_component(second) and first.keys() != second.keys():
        yield Change(path, _text(first, path), _text(second, path))
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in dict.fromkeys((*first, *second)):
            yield from changes(first.get(name, ABSENT), second.get(name, ABSENT), f"{path}.{name}" if path else name)
    elif _is_list(first) and _is_list(second):
        for index, (one, other) in enumerate(itertools.zip_longest(first, second, fillvalue=ABSENT)):
            yield from changes(one, other, f"{path}[{index}]")
    elif first != second:
        yield Change(path, _text(first, path), _text(second, path))


def value_changes(first: Mapping[str, Quantity], second: Mapping[str, Quantity]) -> tuple[ValueChange, ...]:
    """Compare values by name, the first's order first."""
    return tuple(_value_change(name, first.get(name), second.get(name)) for name in dict.fromkeys((*first, *second)))


def _value_change(name: str, first: Quantity | None, second: Quantity | None) -> ValueChange:
    unit = (first or second or Quantity(0.0, "", "custom")).unit
    if first is None or second is None or first.unit != second.unit:
        return ValueChange(name, unit, first and first.value, second and second.value, None, None, None)
    interval = None
    if first.interval or second.interval:
        low, high = first.interval or (first.value, first.value)
        other_low, other_high = second.interval or (second.value, second.value)
        interval = (other_low - high, other_high - low)
    is_certain = None if interval is None else interval[0] > 0 or interval[1] < 0
    return ValueChange(name, unit, first.value, second.value, second.value - first.value, interval, is_certain)


def _best(study: Study) -> dict[str, Quantity]:
    names = [objective.name for objective in study.goals.objectives]
    return {name: study.best(name).quantities[name] for name in names} if study.pareto_front() else {}


def _artifact(path: Path) -> Subject:
    from codegen import container

    metadata = container.open_file(path).manifest["metadata"]
    if "architecture" not in metadata:
        raise InputError(
            "this artifact does not say what its architecture is",
            where=str(path),
            expected="one that `nas search` wrote",
            found=", ".join(metadata) or "no metadata",
        )
    values, units, sources = (metadata.get(key, {}) for key in ("values", "units", "sources"))
    quantities = {name: Quantity(value, units[name], sources[name]) for name, value in values.items()}
    return Subject(str(path), metadata["architecture"], quantities)


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value.values())), Mapping)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text(value: Any, path: str) -> str:
    """Write a value; of a component only the options that differ from their defaults."""
    slot = path.rpartition(".")[2]
    if _is_component(value) and slot in _KINDS:
        [(key, options)] = value.items()
        return brief(_KINDS[slot], ComponentConfig.of(key, **options))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item, name)}" for name, item in value.items())
    return str(value)
