"""What decides the sequence of proposals and the meaning of values: recorded once, compared on every resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ir.errors import InputError, StorageError
from nas.evaluate import Evaluator
from nas.storages.base import Record
from nas.strategies.base import REGISTRY as STRATEGIES
from nas.strategies.base import Strategy

FORMAT_VERSION = 1
_VERSIONED = ("nas", "numpy", "torch", "apache-tvm", "ray")
_SHOWN_CHARACTERS = 200


def describe_settings(space: Any, evaluator: Evaluator, strategy: Strategy) -> dict[str, Any]:
    """Return the settings of a study as JSON; two studies with equal settings are one study.

    Args:
        space: Search space.
        evaluator: Goals, task, target and seed.
        strategy: What proposes.
    """
    goals, task = evaluator.goals, evaluator.task
    settings: dict[str, Any] = {
        "space": {"name": space_name(space), "sha256": hashlib.sha256(space_text(space).encode()).hexdigest()},
        "seed": evaluator.seed,
        "strategy": {"name": STRATEGIES.name_of(type(strategy)), **strategy.options},
        "objectives": [objective.describe() for objective in goals.objectives],
        "constraints": [constraint.describe() for constraint in goals.constraints],
        "task": None,
        "target": None,
    }
    if any(metric.needs_task for metric in goals.metrics):
        target = evaluator.target
        settings["target"] = {
            "name": target if isinstance(target, str) else target.name,
            "threads": evaluator.threads,
        }
        if evaluator.device is not None and not isinstance(target, str):
            settings["target"] |= {"device": evaluator.device.name, "fingerprint": target.fingerprint}
    if task is not None:
        settings["task"] = {"name": task.name, **task.options, "sha256": task.fingerprint()}
    return json.loads(json.dumps(settings))


def study_record(space: Any, evaluator: Evaluator, settings: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the first record of a journal.

    Args:
        space: Search space; its text is kept, so that the file may go.
        evaluator: Goals, task, target and seed.
        settings: What `describe_settings` gave.
        now: Seconds since the epoch.
    """
    return {
        "event": "study",
        "format": FORMAT_VERSION,
        "settings": dict(settings),
        "space": space_text(space),
        "data": getattr(evaluator.task, "data", None),
        "versions": versions(),
        "time": now,
    }


def check_header(record: Record, where: str) -> None:
    """Check that a journal begins as this version can read it.

    Args:
        record: Its first record.
        where: Run folder, for the message.

    Raises:
        StorageError: It is no study, or one of a newer format.
    """
    if record["event"] != "study" or not isinstance(record.get("settings"), dict):
        raise StorageError("the journal does not begin with its study", where=where, found=f"event {record['event']}")
    if record.get("format") != FORMAT_VERSION:
        raise StorageError(
            "this journal has a format that this version does not read",
            where=where,
            expected=f"format {FORMAT_VERSION}",
            found=f"format {record.get('format')}",
            hint="use the version of nas that wrote it: " + str(record.get("versions", {}).get("nas", "unknown")),
        )


def check_settings(recorded: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Refuse to resume a study under other settings.

    Args:
        recorded: Settings of the journal.
        given: Settings of the command.
        where: Run folder, for the message.

    Raises:
        InputError: They differ; the message names in what.
    """
    names = [name for name in sorted({*recorded, *given}) if recorded.get(name) != given.get(name)]
    if not names:
        return
    raise InputError(
        f"this folder holds a study with another {' and another '.join(names)}",
        where=where,
        expected="; ".join(f"{name} {_show(recorded.get(name))}" for name in names),
        found="; ".join(f"{name} {_show(given.get(name))}" for name in names),
        hint="give the recorded settings to resume, or another folder to start anew; a larger number of trials is fine",
    )


def space_text(space: Any) -> str:
    """Return the text that defines a space: its file, or what it prints where it came from no file."""
    source = getattr(space, "source", None)
    if source is not None and Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    kind = type(space)
    prints_itself = kind.__str__ is not object.__str__ or kind.__repr__ is not object.__repr__
    return str(space) if prints_itself else space_name(space)


def space_name(space: Any) -> str:
    """Return the name of a space, its class where it has none."""
    return str(getattr(space, "name", type(space).__name__))


def versions() -> dict[str, str]:
    """Return the versions of what a study's values depend on; what is not installed is left out."""
    found: dict[str, str] = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
