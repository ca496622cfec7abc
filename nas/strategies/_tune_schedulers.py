"""Verdicts of Ray Tune's schedulers on trials that a study runs; Ray itself is not started for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler

from nas.strategies.base import order_best_first
from nas.trial import Trial

_TIME: Final = "time"
_SCORE: Final = "score"
_ROUNDING: Final = 1e-6  # keeps Ray's rounding down of products such as 27 * 3**-3 at 1


@dataclass(eq=False)
class _Stub:
    """What the schedulers look at of a trial."""

    trial_id: str
    status: str = TuneTrial.RUNNING
    is_saving: bool = False


@dataclass
class _Controller:
    """What `HyperBandScheduler` asks of the loop that runs trials."""

    scheduler: HyperBandScheduler

    def stop_trial(self, trial: Any) -> None:
        """Stop a paused trial."""
        trial.status = TuneTrial.TERMINATED
        self.scheduler.on_trial_remove(self, trial)  # pyright: ignore[reportArgumentType]


def score_at(fraction: float, trials: Sequence[Trial]) -> dict[int, float]:
    """Return how good trials were after a part of their budget, larger is better.

    With one objective that is its value. With several it is the place in the order of fronts and crowding, so that
    trials which are good at different things go on together.

    Args:
        fraction: The part.
        trials: Trials; those that did not come so far are left out.

    Returns:
        A score by trial number.
    """
    losses = {trial.number: rung.losses for trial in trials for rung in trial.rungs if rung.fraction == fraction}
    if all(len(row) == 1 for row in losses.values()):
        return {number: -row[0] for number, row in losses.items()}
    there = [trial for trial in trials if trial.number in losses]
    ended = [trial.changed(state="finished", losses=losses[trial.number], violation=0.0) for trial in there]
    return {trial.number: -float(place) for place, trial in enumerate(order_best_first(ended))}


def passes_asha(score: float, others: Sequence[float], eta: int) -> bool:
    """Tell whether `AsyncHyperBandScheduler` lets a trial go on at a rung.

    Args:
        score: The trial's score there, larger is better.
        others: Scores of those that came before it.
        eta: One in so many goes on.
    """
    scheduler = AsyncHyperBandScheduler(
        time_attr=_TIME, metric=_SCORE, mode="max", max_t=2, grace_period=1, reduction_factor=eta
    )
    action = scheduler.CONTINUE
    with _global_generator_kept():
        for place, value in enumerate((*others, score)):
            stub: Any = _Stub(str(place))
            scheduler.on_trial_add(None, stub)  # pyright: ignore[reportArgumentType]
            result = {_TIME: 1, _SCORE: value}
            action = scheduler.on_trial_result(None, stub, result)  # pyright: ignore[reportArgumentType]
    return action == scheduler.CONTINUE


def pass_hyperband(
    members: Sequence[int], rounds: Sequence[Mapping[int, float]], *, eta: int, rungs: int, sizes: Sequence[int]
) -> set[int]:
    """Return the trials of a bracket that `HyperBandScheduler` lets go on.

    Args:
        members: Numbers of all trials of the bracket, whether or not they came to anything.
        rounds: Scores by number at each milestone of the bracket, from the first to the one that is decided.
        eta: One in so many goes on.
        rungs: Halvings of the hardest bracket of a band.
        sizes: Trials of each bracket of a band up to this one, in the order in which Ray fills them.
    """
    # The types of Ray ask for its own trials and a whole `max_t`; its code needs neither.
    scheduler = HyperBandScheduler(
        time_attr=_TIME,
        metric=_SCORE,
        mode="max",
        max_t=eta**rungs + _ROUNDING,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        reduction_factor=eta,
    )
    controller: Any = _Controller(scheduler)
    for place in range(sum(sizes[:-1])):  # the brackets before this one
        scheduler.on_trial_add(controller, _Stub(f"before {place}"))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    alive: dict[int, Any] = {number: _Stub(str(number)) for number in members}
    for stub in alive.values():
        scheduler.on_trial_add(controller, stub)
    for place, scores in enumerate(rounds):
        for number in [number for number in alive if number not in scores]:
            alive[number].status = TuneTrial.ERROR
            scheduler.on_trial_error(controller, alive.pop(number))
        for number, stub in alive.items():
            stub.status = TuneTrial.RUNNING
            result = {_TIME: eta ** (rungs - len(sizes) + 1 + place), _SCORE: scores[number]}
            action = scheduler.on_trial_result(controller, stub, result)
            stub.status = _STATUS[action]
        alive = {number: stub for number, stub in alive.items() if stub.status != TuneTrial.TERMINATED}
    return set(alive)


_STATUS: Final = {
    HyperBandScheduler.CONTINUE: TuneTrial.RUNNING,
    HyperBandScheduler.PAUSE: TuneTrial.PAUSED,
    HyperBandScheduler.STOP: TuneTrial.TERMINATED,
}


@contextmanager
def _global_generator_kept() -> Iterator[None]:
    """Leave numpy's global generator as it was: Ray draws the bracket with it, an objective may too."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
