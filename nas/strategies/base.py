"""The contract of a strategy, and what strategies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ir.errors import InputError
from nas import pareto
from nas.registry import Registry
from nas.trial import Trial


class Space(Protocol):
    """What a strategy needs of a search space."""

    def sample(self, rng: np.random.Generator) -> Any:
        """Return a random architecture."""
        ...

    def mutate(self, architecture: Any, rng: np.random.Generator) -> Any:
        """Return a neighbour of an architecture."""
        ...

    def crossover(self, first: Any, second: Any, rng: np.random.Generator) -> Any:
        """Return an architecture that mixes two."""
        ...


@dataclass(frozen=True)
class Strategy(ABC):
    """Propose architectures. The fields of a strategy are its options; it keeps nothing between calls.

    A study asks for trial `n` only when every trial before `start = n // batch_size * batch_size` has ended, and shows
    exactly those trials. So a proposal depends on the seed and on recorded results alone, whatever the number of
    workers and their timing. A study also refuses duplicates and candidates that break cheap constraints: it then asks
    again, with the same arguments and the generator where it stands.
    """

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """How many trials are proposed from the same results; None when results do not matter."""

    @abstractmethod
    def ask(self, space: Space, number: int, history: Sequence[Trial], rng: np.random.Generator) -> Any:
        """Propose an architecture.

        Args:
            space: Where to look.
            number: Number of the trial.
            history: Ended trials before this batch, by number; those that `has_result` is false for did not finish.
            rng: Generator of this trial alone.

        Returns:
            An architecture of the space.
        """

    @property
    def options(self) -> dict[str, Any]:
        """Options by name, as the journal records them."""
        return asdict(self)


REGISTRY: Registry[Strategy] = Registry("strategy", "nas.strategies", Strategy)


def get(strategy: str | Strategy, **options: Any) -> Strategy:
    """Return a strategy from its name and options; an instance is returned as it is.

    Raises:
        InputError: No such strategy or option.
    """
    return strategy if isinstance(strategy, Strategy) else REGISTRY.make(strategy, options)


def has_result(trial: Trial) -> bool:
    """Tell whether a trial says something about its architecture: it finished, or broke a constraint."""
    return trial.state in ("finished", "infeasible")


def order_best_first(trials: Sequence[Trial], wanted: int | None = None) -> list[Trial]:
    """Sort trials from best to worst under constraint domination.

    Feasible trials come first, by front and within a front the lonelier first; then the others by how far they break
    constraints. Ties go to the lower number.

    Args:
        trials: Trials with results.
        wanted: How many of the best are needed; None sorts all.

    Returns:
        The best `wanted` trials.

    Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", sections III.C and VI.
    """
    wanted = len(trials) if wanted is None else wanted
    feasible = [trial for trial in trials if trial.is_feasible]
    best: list[Trial] = []
    if feasible:
        losses = np.array([trial.losses for trial in feasible], dtype=np.float64)
        for rows in pareto.fronts(losses, stop_at=wanted):
            crowding = pareto.crowding_distance(losses[rows])
            best.extend(feasible[row] for row in rows[np.argsort(-crowding, kind="stable")])
    others = sorted(
        (trial for trial in trials if not trial.is_feasible), key=lambda trial: (trial.violation, trial.number)
    )
    return (best + others)[:wanted]


def require_at_least(least: int, **options: int | None) -> None:
    """Check options of a strategy that count something.

    Args:
        least: Smallest allowed value.
        options: Values by name; None passes.

    Raises:
        InputError: A value is below the least, or no integer.
    """
    for name, value in options.items():
        if value is not None and (type(value) is not int or value < least):
            raise InputError(
                f"bad option {name} of a strategy", expected=f"an integer of at least {least}", found=repr(value)
            )


def require_fraction(**options: float) -> None:
    """Check options of a strategy that are probabilities.

    Raises:
        InputError: A value is not within 0 and 1.
    """
    for name, value in options.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"bad option {name} of a strategy", expected="a number from 0 to 1", found=repr(value))
