"""Find the next architecture: what a strategy proposes, less duplicates and what cheap constraints rule out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ir.errors import GraphError, SpaceError
from nas.evaluate import Evaluator
from nas.strategies.base import Strategy
from nas.trial import Trial

Hash: TypeAlias = Callable[[Any], str]

# Tries before the strategy is taken to be stuck, and before the space is taken to be exhausted.
_STRATEGY_TRIES = 64
_SAMPLE_TRIES = 1000
# Spaces up to this size are listed whole before they count as exhausted.
_LISTED_SIZE = 10_000


@dataclass
class Tally:
    """How many candidates were refused on the way to a proposal, and why."""

    duplicate: int = 0
    excluded: int = 0
    invalid: int = 0

    def describe(self) -> dict[str, int]:
        """Return the counts that are not zero, as JSON."""
        return {name: count for name, count in vars(self).items() if count}


@dataclass(frozen=True)
class Proposal:
    """A candidate that is new and breaks no cheap constraint.

    Attributes:
        architecture: The candidate.
        encoded: As the journal stores it.
        hash: Canonical hash.
        refused: What was refused before it.
        note: What the strategy says of why it is proposed.
    """

    architecture: Any
    encoded: dict[str, Any]
    hash: str
    refused: Tally
    note: dict[str, Any] = field(default_factory=dict)


@dataclass
class Proposer:
    """Turn a strategy into a stream of new candidates.

    A proposal depends on the seed, its number, the history it is shown and the hashes seen before, on nothing else.

    Attributes:
        space: Where to look.
        strategy: What proposes.
        evaluator: Checks cheap constraints; its seed is the study's.
        hash_of: Canonical hash of an architecture.
    """

    space: Any
    strategy: Strategy
    evaluator: Evaluator
    hash_of: Hash
    _hashes: dict[str, str] = field(default_factory=dict)
    _excluded: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strategy = self.strategy.bind(self.space, self.evaluator)

    def propose(self, number: int, history: Sequence[Trial], seen: set[str]) -> Proposal | Tally:
        """Return the proposal of a trial, or what was refused when there is nothing new.

        Args:
            number: Number of the trial.
            history: Trials that the strategy may look at.
            seen: Hashes of all earlier trials.
        """
        refused = Tally()
        for candidate in self._candidates(number, history):
            encoded = candidate.to_dict()
            try:
                hash_ = self._hash(candidate, encoded)
            except (GraphError, SpaceError):  # the candidate cannot be built; the tally tells how many there were
                refused.invalid += 1
                continue
            if hash_ in seen:
                refused.duplicate += 1
            elif self._is_excluded(candidate, hash_):
                refused.excluded += 1
            else:
                return Proposal(candidate, encoded, hash_, refused, self.strategy.explain(number, candidate))
        return refused

    def _candidates(self, number: int, history: Sequence[Trial]) -> Iterator[Any]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.evaluator.seed, number])))
        for _ in range(_STRATEGY_TRIES):
            yield self.strategy.ask(self.space, number, history, rng)
        for _ in range(_SAMPLE_TRIES):
            yield self.space.sample(rng)
        if hasattr(self.space, "enumerate") and self.space.size() <= _LISTED_SIZE:
            yield from self.space.enumerate()

    def _hash(self, architecture: Any, encoded: dict[str, Any]) -> str:
        key = _key(encoded)
        if key not in self._hashes:
            self._hashes[key] = self.hash_of(architecture)
        return self._hashes[key]

    def _is_excluded(self, architecture: Any, hash_: str) -> bool:
        if not self.evaluator.goals.cheap_metrics:
            return False
        if hash_ not in self._excluded:
            self._excluded[hash_] = self.evaluator.is_excluded(architecture)
        return self._excluded[hash_]


def hash_encoded(architecture: Any) -> str:
    """Hash what an architecture stores of itself, for spaces without graphs."""
    return hashlib.sha256(_key(architecture.to_dict()).encode()).hexdigest()


def _key(encoded: dict[str, Any]) -> str:
    return json.dumps(encoded, sort_keys=True, separators=(",", ":"))
