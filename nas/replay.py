"""Propose the trials of a run again, from its seed and its journal, and compare.

found = replay("runs/lm")
print(found.checked, found.first)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import InputError
from nas.evaluate import Evaluator
from nas.goals import Goals
from nas.objectives.base import REGISTRY as OBJECTIVES
from nas.objectives.base import Counted, Objective
from nas.objectives.recorded import Recorded
from nas.proposals import Hash, Proposer, Tally
from nas.search import graph_hash, load_study
from nas.settings import versions
from nas.storages.journal import read_journal
from nas.strategies import base as strategies
from nas.study import Study
from nas.trial import Trial


@dataclass(frozen=True)
class Divergence:
    """A trial whose proposal came out otherwise.

    Attributes:
        trial: Its number.
        recorded: Architecture of the journal.
        proposed: What the strategy proposes now, None where it finds nothing new.
    """

    trial: int
    recorded: Mapping[str, Any]
    proposed: Mapping[str, Any] | None


@dataclass(frozen=True)
class Replay:
    """What asking again gave.

    Attributes:
        checked: Trials whose proposal was compared.
        divergences: Those that differ, the first one first. Each is compared given the recorded history, so one
            difference does not cause the next.
        versions: Packages whose version differs from the recorded one: `(recorded, now)`.
        notices: What may make a difference that is no fault.
    """

    checked: int
    divergences: tuple[Divergence, ...]
    versions: Mapping[str, tuple[str | None, str | None]]
    notices: tuple[str, ...]

    @property
    def first(self) -> int | None:
        """Number of the first trial that differs, None where all are the same."""
        return self.divergences[0].trial if self.divergences else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        found = [
            {
                "trial": item.trial,
                "recorded": dict(item.recorded),
                "proposed": None if item.proposed is None else dict(item.proposed),
            }
            for item in self.divergences
        ]
        return dataclasses.asdict(dataclasses.replace(self, divergences=())) | {
            "reproduced": not self.divergences,
            "first": self.first,
            "divergences": found,
        }


def replay(folder: str | Path, *, space: Any = None, hash_of: Hash | None = None) -> Replay:
    """Ask a run's strategy again, each time with the recorded history, and compare with what was proposed.

    Args:
        folder: Run folder.
        space: Search space, for a run over one made in Python, which a journal does not hold.
        hash_of: Canonical hash of an architecture, where the run was given one.

    Raises:
        InputError: The journal does not say what the space is, or a strategy or its option is not to be had here.
        StorageError: The folder holds no readable study.
    """
    header = read_journal(folder)[0]
    settings = header["settings"]
    study = load_study(folder)
    space = study.space if space is None else space
    if not hasattr(space, "sample"):
        raise InputError(
            "the journal does not hold the search space of this run",
            where=str(folder),
            expected="a space that came from a YAML file",
            found=settings["space"]["name"],
            hint="use nas.replay.replay(folder, space=...) from Python",
        )
    evaluator, notices = _evaluator(settings, study)
    strategy = strategies.get(settings["strategy"]["name"], **_options(settings["strategy"]))
    proposer = Proposer(space, strategy, evaluator, hash_of or graph_hash(study.evaluator.task))
    trials = tuple(trial.changed(decode=space.architecture) for trial in study.trials)
    divergences = _divergences(proposer, trials)
    now = versions()
    recorded = header.get("versions", {})
    changed = {
        name: (recorded.get(name), now.get(name))
        for name in sorted({*recorded, *now})
        if recorded.get(name) != now.get(name)
    }
    return Replay(len(study.trials), tuple(divergences), changed, tuple(notices))


def _divergences(proposer: Proposer, trials: tuple[Trial, ...]) -> list[Divergence]:
    batch = proposer.strategy.batch_size
    seen: set[str] = set()
    history: tuple[Trial, ...] = ()
    found: list[Divergence] = []
    for trial in trials:
        start = trial.number // batch * batch if batch else 0
        if len(history) != start:
            history = trials[:start]
        proposal = proposer.propose(trial.number, history, seen)
        if isinstance(proposal, Tally):
            found.append(Divergence(trial.number, trial.encoded, None))
        else:
            proposed = json.loads(json.dumps(proposal.encoded))  # as a journal gives it back: tuples are lists
            if proposed != trial.encoded or proposal.hash != trial.hash:
                found.append(Divergence(trial.number, trial.encoded, proposed))
        seen.add(trial.hash)
    return found


def _evaluator(settings: Mapping[str, Any], study: Study) -> tuple[Evaluator, list[str]]:
    """Return what checks cheap constraints as the run did, and what it cannot check."""
    objectives, constraints = ([_metric(item) for item in settings[key]] for key in ("objectives", "constraints"))
    goals = Goals.of(objectives, constraints)
    notices = [
        f"the bound on {item.name} is a function that the journal does not hold; where the run checked it before a "
        "trial, proposals that it refused come back"
        for item in goals.metrics
        if item.source == "custom" and item.bounds != (None, None)
    ]
    return dataclasses.replace(study.evaluator, goals=goals), notices


def _metric(described: Mapping[str, Any]) -> Objective:
    """Return the objective itself where it is counted, else one that only stands for it."""
    if described["kind"] in OBJECTIVES.names() and issubclass(OBJECTIVES.get(described["kind"]), Counted):
        bounds = {name: described[name] for name in ("min", "max")}
        return OBJECTIVES.make(described["kind"], {"name": described["name"], **described["settings"], **bounds})
    return Recorded.of(described)


def _options(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != "name"}
