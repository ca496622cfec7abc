"""What every strategy must do, as checks that third parties can run on their own.

Parametrise a test by `CHECKS` and give each a function that makes the strategy:

    @pytest.mark.parametrize("check", strategies.CHECKS, ids=lambda check: check.__name__)
    def test_my_strategy_conforms(check):
        check(lambda: MyStrategy(population=8))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from nas import pareto
from nas.evaluate import Evaluator
from nas.goals import Goals
from nas.objectives.custom import Custom
from nas.storages.memory import Memory
from nas.strategies.base import Strategy
from nas.study import Study
from nas.testing.spaces import Grid, Point
from nas.trial import Outcome, Trial

MakeStrategy: TypeAlias = Callable[[], Strategy]
Check: TypeAlias = Callable[[MakeStrategy], None]


_TRIALS = 96
_GRID = Grid((8, 8, 8, 8, 8, 8))
_REFERENCE = (300.0, 150.0)


def error(point: Point) -> float:
    """Distance to one corner of the grid, smooth enough to climb."""
    return float(sum(choice**2 for choice in point.choices))


def cost(point: Point) -> float:
    """Distance to the opposite corner: in conflict with `error`."""
    return float(sum((7 - choice) ** 2 for choice in point.choices[:3]))


def learning_curve(point: Point, fraction: float) -> float:
    """Return the `error` that a point has after part of its budget: it comes down at a pace of the point's own."""
    return error(point) * (1 + (1 - fraction) / (1 + point.choices[-1]))


def make_study(
    strategy: Strategy,
    *,
    seed: int = 0,
    storage: Memory | None = None,
    objectives: Sequence[Any] = (error, cost),
    **limits: float,
) -> Study:
    """Return a study over a grid with two conflicting objectives.

    Args:
        strategy: What proposes.
        seed: Seed of the study.
        storage: Where records go.
        objectives: Functions of a point.
        limits: `cheap_max` bounds `cost` before a trial, `late_max` bounds it within the trial.
    """
    constraints: list[Custom] = []
    if "cheap_max" in limits:
        constraints.append(Custom(cost, name="cheap_cost", cheap=True, max=limits["cheap_max"]))
    if "late_max" in limits:
        constraints.append(Custom(cost, name="late_cost", max=limits["late_max"]))
    return Study(_GRID, Evaluator(Goals.of(objectives, constraints), seed=seed), strategy=strategy, storage=storage)


def run_with_workers(study: Study, trials: int, workers: int, timing_seed: int) -> None:
    """Run a study as that many workers would, which end in an order of their own.

    Args:
        study: The study.
        trials: When to stop.
        workers: Trials at once.
        timing_seed: Decides which running trial ends next.
    """
    timing = np.random.default_rng(timing_seed)
    running: dict[int, Outcome] = {}
    while True:
        while len(running) < workers:
            trial = study.ask(may_begin=study.num_trials < trials)
            if trial is None:
                break
            running[trial.number] = study.evaluator(study.job(trial))
        if not running:
            return
        number = sorted(running)[int(timing.integers(len(running)))]
        study.tell(number, running.pop(number))


def check_is_deterministic(make: MakeStrategy) -> None:
    """The same seed gives the same sequence, another seed another."""
    first, second, other = (_run(make_study(make(), seed=seed)) for seed in (3, 3, 4))
    assert _sequence(first) == _sequence(second), "two runs with one seed differ"
    assert _sequence(first) != _sequence(other), "the seed changes nothing"


def check_does_not_repeat(make: MakeStrategy) -> None:
    """No architecture is proposed twice."""
    hashes = [trial.hash for trial in _run(make_study(make())).trials]
    assert len(hashes) == len(set(hashes)) == _TRIALS, "an architecture was proposed twice"


def check_ignores_workers(make: MakeStrategy) -> None:
    """Neither the number of workers nor their timing changes what is proposed."""
    serial = _sequence(_run(make_study(make())))
    for workers in (2, 7, 64):
        study = make_study(make())
        run_with_workers(study, _TRIALS, workers, timing_seed=workers)
        assert _sequence(study) == serial, f"{workers} workers change the sequence"


def check_resumes_anywhere(make: MakeStrategy) -> None:
    """A study cut off after any record goes on to the same sequence and runs no finished trial again."""
    whole = make_study(make(), storage=(storage := Memory()))
    _run(whole)
    records = storage.records()
    for cut in range(1, len(records), 17):
        study = make_study(make(), storage=Memory(records[:cut]))
        ended = [trial for trial in study.trials if trial.state != "running"]
        _run(study)
        assert _sequence(study) == _sequence(whole), f"resuming after record {cut} changes the sequence"
        assert list(study.trials[: len(ended)]) == ended, f"resuming after record {cut} ran a finished trial again"


def check_keeps_cheap_constraints(make: MakeStrategy) -> None:
    """What a cheap constraint rules out never becomes a trial."""
    study = _run(make_study(make(), cheap_max=60.0))
    assert all(cost(trial.architecture) <= 60.0 for trial in study.trials), "a trial breaks a cheap constraint"
    assert len(study.trials) == _TRIALS, "the study ended before its budget"


def check_survives_failures(make: MakeStrategy) -> None:
    """Failed and infeasible trials neither stop the study nor appear on the front."""

    def fragile(point: Point) -> float:
        if point.choices[0] == 0:
            raise ValueError("this point fails")
        return error(point)

    study = _run(make_study(make(), objectives=(fragile, cost), late_max=100.0))
    assert len(study.trials) == _TRIALS, "the study ended before its budget"
    front = study.pareto_front()
    assert front, "nothing is on the front"
    assert all(cost(trial.architecture) <= 100.0 and trial.architecture.choices[0] for trial in front)


def check_finds_better_than_its_start(make: MakeStrategy) -> None:
    """The front of the whole run encloses more than the front of its first third, unless that was all there is."""
    study = _run(make_study(make()))
    start = _enclosed(study.trials[: _TRIALS // 3])
    corners = [Point((*choices, 0, 0, 0)) for choices in itertools.product(range(8), repeat=3)]
    best = pareto.hypervolume(np.array([(error(point), cost(point)) for point in corners]), _REFERENCE)
    assert start == best or _enclosed(study.trials) > start, "two thirds of the trials gained nothing"


def check_resumes_between_milestones(make: MakeStrategy) -> None:
    """Where trials are stopped early, a study cut off after any record ends with the same trials, stopped alike."""
    if not make().stops_early:
        return
    objectives = (Custom(learning_curve, staged=True), cost)
    whole = make_study(make(), storage=(storage := Memory()), objectives=objectives)
    whole.run(_TRIALS // 2)
    ended = [(trial.hash, trial.state, trial.fraction, trial.values) for trial in whole.trials]
    assert {trial.state for trial in whole.trials} >= {"finished", "stopped"}, "no trial was stopped, or none finished"
    assert all(trial.fraction == 1.0 for trial in whole.pareto_front()), "a stopped trial is on the front"
    records = storage.records()
    for cut in range(1, len(records), 23):
        study = make_study(make(), storage=Memory(records[:cut]), objectives=objectives)
        study.run(_TRIALS // 2)
        found = [(trial.hash, trial.state, trial.fraction, trial.values) for trial in study.trials]
        assert found == ended, f"resuming after record {cut} changes what becomes of the trials"


CHECKS: tuple[Check, ...] = (
    check_is_deterministic,
    check_does_not_repeat,
    check_ignores_workers,
    check_resumes_anywhere,
    check_keeps_cheap_constraints,
    check_survives_failures,
    check_finds_better_than_its_start,
    check_resumes_between_milestones,
)


def _run(study: Study) -> Study:
    study.run(_TRIALS)
    return study


def _sequence(study: Study) -> list[tuple[int, str]]:
    return [(trial.number, trial.hash) for trial in study.trials]


def _enclosed(trials: Sequence[Trial]) -> float:
    losses = np.array([trial.losses for trial in trials if trial.is_feasible], dtype=np.float64)
    return pareto.hypervolume(losses, _REFERENCE)
