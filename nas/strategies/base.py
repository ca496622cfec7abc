"""The contract of a strategy, and what strategies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from ir.errors import InputError
from nas import pareto
from nas.registry import Registry
from nas.trial import Trial

if TYPE_CHECKING:
    from nas.evaluate import Evaluator


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

    A strategy with `stops_early` also looks at trials after parts of their training budget, and stops some there.
    """

    stops_early: ClassVar[bool] = False
    """Whether `milestones` and `judge` are asked."""

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """How many trials are proposed from the same results; None when results do not matter."""

    def bind(self, space: Any, evaluator: Evaluator) -> Strategy:
        """Return the strategy for a study, where it has to know what the study evaluates; itself otherwise.

        Args:
            space: Where to look.
            evaluator: Objectives and constraints.

        Raises:
            InputError: The strategy cannot serve this study.
        """
        return self

    def explain(self, number: int, architecture: Any) -> dict[str, Any]:
        """Return what the journal should keep of why a trial was proposed, as JSON; nothing by default.

        Args:
            number: Number of the trial.
            architecture: What `ask` returned for it.
        """
        return {}

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

    def milestones(self, number: int) -> tuple[float, ...]:
        """Return the parts of its budget after which a trial is judged, ascending, each above 0 and below 1.

        Args:
            number: Number of the trial; nothing else decides.
        """
        return ()

    def judge(self, waiting: Sequence[int], trials: Sequence[Trial], *, is_last: bool) -> dict[int, bool]:
        """Decide which of the trials at a milestone go on with their training.

        Called whenever a trial has reached a milestone or ended. The study records the decisions, which nothing
        changes later.

        Args:
            waiting: Numbers of the running trials that have reached a milestone, `rungs[-1]` of each, and are not
                decided yet; in the order in which they came.
            trials: All trials, by number.
            is_last: True when there will be no further trials.

        Returns:
            True for each trial that goes on, False for each that is stopped; the others wait for more trials.
        """
        return {}

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
