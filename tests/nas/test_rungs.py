"""Trials stopped early: who goes on, what the journal says of it, and that nothing is lost on the way."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from ir.errors import InputError, StorageError
from nas.executors.ray import Ray
from nas.objectives.custom import Custom
from nas.search import load_study, open_study, search
from nas.storages.journal import read_journal
from nas.storages.memory import Memory
from nas.strategies.asha import ASHA
from nas.strategies.hyperband import Hyperband
from nas.study import Study
from nas.testing.spaces import Grid
from nas.testing.strategies import cost, learning_curve, run_with_workers
from nas.trial import CHECKPOINT_FILE, Outcome, Quantity, Rung, Trial

GRID = Grid((8,) * 6)
CURVE = Custom(learning_curve, name="quality", staged=True)
STRATEGIES = {"asha": ASHA(), "asha_brackets": ASHA(brackets=2), "hyperband": Hyperband(), "pairs": Hyperband(eta=2)}


def make_study(strategy, objectives=(CURVE,), **options):
    return open_study(GRID, objectives=list(objectives), strategy=strategy, **options)


def become(study):
    return [(trial.number, trial.hash, trial.state, trial.fraction, trial.values) for trial in study.trials]


def climbing(*losses, fraction=1 / 3):
    """Return trials that were worth these losses at a milestone."""
    trials = []
    for number, row in enumerate(losses):
        rung = Rung(fraction, {"quality": Quantity(row[0], "", "custom")}, row)
        trials.append(Trial(number, str(number), {}, lambda data: data, rungs=(rung,)))
    return trials


# Who goes on


def test_asha_lets_a_trial_go_on_that_is_as_good_as_the_best_third_before_it():
    """The cut-off is the percentile of those before, so the first goes on, and a later trial changes no decision."""
    trials = climbing((5.0,), (6.0,), (4.0,), (4.5,), (4.2,), (1.0,))
    # Of 5; of 5, 6: below 5.33; of 4, 5, 6: below 4.67; of 4, 4.5, 5, 6: 4.5 at most; of all: 4.33 at most.
    wanted = {0: True, 1: False, 2: True, 3: True, 4: True, 5: True}
    assert ASHA(eta=3, rungs=1).judge(range(6), trials, is_last=False) == wanted
    one_by_one = [ASHA(rungs=1).judge([number], trials[: number + 1], is_last=False)[number] for number in range(6)]
    assert one_by_one == list(wanted.values())


def test_asha_with_two_objectives_lets_both_ends_of_the_front_go_on():
    """The best in either objective goes on; what is worse in both is stopped."""
    trials = climbing((5.0, 5.0), (5.5, 5.5), (6.0, 6.0), (6.0, 1.0), (1.0, 6.0), (7.0, 7.0))
    decided = ASHA(rungs=1).judge(range(6), trials, is_last=False)
    assert decided == {0: True, 1: False, 2: False, 3: True, 4: True, 5: False}


def test_asha_compares_within_a_bracket():
    """Trials of another bracket, which come to the same milestone otherwise, do not count."""
    trials = climbing((1.0,), (9.0,), (2.0,), (9.5,))
    assert ASHA(brackets=2, rungs=2).judge([1], trials[:2], is_last=False) == {1: True}
    assert ASHA(brackets=1, rungs=2).judge([1], trials[:2], is_last=False) == {1: False}


@pytest.mark.parametrize(("eta", "rungs"), [(2, 1), (2, 4), (3, 2), (3, 3), (3, 5), (4, 2), (5, 3), (7, 2)])
def test_hyperband_keeps_the_best_of_a_bracket(eta, rungs):
    """In each round of each bracket the best go on, as many as the paper's algorithm says."""
    strategy = Hyperband(eta=eta, rungs=rungs)
    for bracket in range(1, rungs + 1):
        start = sum(strategy.sizes[:bracket])
        size = strategy.sizes[bracket]
        losses = np.random.default_rng(bracket).permutation(size).astype(float)
        alive = list(range(start, start + size))
        trials = {number: Trial(number, str(number), {}, dict) for number in range(start + size)}
        for place, fraction in enumerate(strategy.milestones(start)):
            for number in alive:
                rung = Rung(fraction, {}, (losses[number - start],))
                trials[number] = trials[number].changed(rungs=(*trials[number].rungs, rung))
            decided = strategy.judge(alive, list(trials.values()), is_last=False)
            assert set(decided) == set(alive)
            best = sorted(alive, key=lambda number: losses[number - start])
            left = -(-size // eta ** (place + 1))
            assert [number for number in alive if decided[number]] == sorted(best[:left])
            for number in set(alive) - set(best[:left]):
                trials[number] = trials[number].changed(state="stopped")
            alive = [number for number in alive if decided[number]]


def test_hyperband_has_the_brackets_of_its_band():
    """Sizes and milestones for eta 3 and a band of three brackets; the next band is like the first."""
    strategy = Hyperband()
    assert strategy.sizes == (3, 5, 9)
    assert [len(strategy.milestones(number)) for number in range(34)] == 2 * ([0] * 3 + [1] * 5 + [2] * 9)
    assert strategy.milestones(8) == pytest.approx((1 / 9, 1 / 3))


def test_hyperband_does_not_wait_for_trials_that_failed():
    """A trial that ended otherwise counts for nothing, and the others are judged without it."""
    trials = climbing(*[(float(loss),) for loss in (0, 0, 0, 5, 4, 3, 2, 1)])
    trials[:3] = [trial.changed(state="finished", rungs=()) for trial in trials[:3]]
    strategy = Hyperband()
    assert strategy.judge([3, 4, 5, 6], [*trials[:7], trials[7].changed(rungs=())], is_last=False) == {}
    trials[7] = trials[7].changed(state="failed", rungs=())
    assert strategy.judge([3, 4, 5, 6], trials, is_last=False) == {3: False, 4: False, 5: True, 6: True}


@pytest.mark.parametrize(
    "make", [lambda: ASHA(eta=1), lambda: ASHA(rungs=0), lambda: ASHA(brackets=0), lambda: Hyperband(eta=1)]
)
def test_options_out_of_range_are_refused(make):
    """A bad option is an input error when the strategy is made."""
    with pytest.raises(InputError, match="expected"):
        make()


def test_judging_leaves_the_global_generator_alone():
    """Ray draws from numpy's global generator; an objective that does so too must not notice."""
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    ASHA(rungs=1).judge([0], climbing((1.0,)), is_last=False)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before  # noqa: NPY002


# What becomes of a study


@pytest.mark.parametrize("name", STRATEGIES)
def test_stopped_trials_say_how_far_they_came_and_stay_off_the_front(name):
    """State, reached budget and values of the milestone are recorded; only whole trainings are on the front."""
    study = make_study(STRATEGIES[name], (CURVE, cost))
    study.run(60)
    stopped = [trial for trial in study.trials if trial.state == "stopped"]
    assert stopped
    assert all(0 < trial.fraction < 1 and "of its budget" in trial.reason for trial in stopped)
    for trial in stopped:
        assert trial.fraction == trial.rungs[-1].fraction == trial.quantities["quality"].details["fraction"]
        assert trial.values["quality"] == learning_curve(trial.architecture, trial.fraction)
    front = study.pareto_front()
    assert front
    assert all(trial.values["quality"] == learning_curve(trial.architecture, 1.0) for trial in front)


@pytest.mark.parametrize("name", STRATEGIES)
def test_most_of_the_budget_is_not_spent(name):
    """A fifth of the training of 51 trials or more is not done, and no part of it twice."""
    asked = []

    def curve(point, fraction):
        asked.append((point.choices, fraction))
        return learning_curve(point, fraction)

    study = make_study(STRATEGIES[name], [Custom(curve, name="quality", staged=True)])
    study.run(51)
    assert len(asked) == len(set(asked))
    assert sum(trial.fraction for trial in study.trials if trial.state != "running") < 51 * 0.8
    assert study.count()["finished"] >= 6


def test_hyperband_ignores_workers_and_their_timing():
    """With any number of workers the same trials are stopped at the same place."""
    serial = make_study(Hyperband())
    serial.run(51)
    for workers in (2, 7):
        study = make_study(Hyperband())
        run_with_workers(study, 51, workers, timing_seed=workers)
        assert become(study) == become(serial)


def test_hyperband_waits_for_the_trials_of_a_later_run():
    """A budget that ends within a bracket leaves it waiting; a larger one ends as if it had been given at once."""
    whole = make_study(Hyperband())
    whole.run(34)
    parts = make_study(Hyperband(), storage=(storage := Memory()))
    parts.run(12)
    assert parts.waiting == (8, 9, 10, 11)
    length = len(storage.records())
    parts.run(12)
    assert len(storage.records()) == length, "a run without anything to do leaves no record"
    parts.run(34)
    assert become(parts) == become(whole)
    assert not whole.waiting


def test_a_space_that_ends_within_a_bracket_leaves_nobody_waiting():
    """Where no further trial can come, those that wait are judged."""
    study = search(Grid((3, 4)), objectives=[CURVE], strategy=Hyperband(), budget=40)
    assert study.is_exhausted
    assert study.num_trials == 12
    assert study.count()["running"] == 0
    assert study.count()["stopped"] >= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_failing_trials_hold_nobody_up(name):
    """Trials that fail on their way, first or later, end there; the others go on."""

    def fragile(point, fraction):
        if point.choices[0] == 3 or (point.choices[0] == 4 and fraction > 0.2):
            raise ValueError("this point fails")
        return learning_curve(point, fraction)

    study = make_study(STRATEGIES[name], [Custom(fragile, name="quality", staged=True)])
    study.run(51)
    counted = study.count()
    assert counted["failed"] >= 5
    assert counted["finished"] >= 5
    assert counted["running"] == len(study.waiting) < 9


def test_bounds_on_quality_hold_at_the_end_alone():
    """A model that keeps a bound once it is trained is not refused for what it was worth on the way."""
    study = make_study(ASHA(), [Custom(learning_curve, name="quality", staged=True, max=60.0)])
    study.run(60)
    kept = [trial for trial in study.trials if trial.state == "finished"]
    assert any(trial.rungs[0].quantities["quality"].value > 60.0 >= trial.values["quality"] for trial in kept)
    assert all(trial.fraction == 1.0 for trial in study.trials if trial.state == "infeasible")


def test_a_constraint_on_something_else_is_checked_at_once_and_measured_once():
    """What does not depend on training is evaluated with the first part, and carried to the later ones."""
    asked = Counter()

    def width(point):
        asked[point.choices] += 1
        return float(point.choices[0])

    study = make_study(ASHA(), (CURVE,), constraints=[Custom(width, max=5.0)])
    study.run(40)
    assert set(asked.values()) == {1}
    refused = [trial for trial in study.trials if trial.state == "infeasible"]
    assert refused
    assert not any(trial.rungs for trial in refused)
    assert all("width" in trial.values for trial in study.trials if trial.state == "finished")


def test_a_study_that_cannot_be_looked_at_says_so():
    """Without an objective that has a budget all trials run to their end, and a notice tells."""
    study = make_study(ASHA(), [cost])
    study.run(5)
    assert study.count()["finished"] == 5
    assert any("no trial is stopped early" in notice for notice in study.notices)


def asked(study: Study) -> Trial:
    """A trial of a study that has more to ask."""
    trial = study.ask()
    assert trial is not None
    return trial


def test_outcomes_of_parts_are_checked():
    """A part needs every objective, and a trial that waits takes no outcome."""
    study = make_study(Hyperband(rungs=1, eta=3))
    for _ in range(2):
        trial = asked(study)
        study.tell(trial.number, study.evaluator(study.job(trial)))
    trial = asked(study)
    assert study.job(trial).until == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="paused without quality"):
        study.tell(trial.number, Outcome("paused", fraction=1 / 3))
    study.tell(trial.number, study.evaluator(study.job(trial)))
    assert study.waiting == (trial.number,)
    with pytest.raises(InputError, match="not running"):
        study.tell(trial.number, Outcome("failed", reason="power cut"))


def test_checkpoints_are_kept_while_they_are_needed(tmp_path):
    """A trial at a milestone has its checkpoint in the run folder and gets it back; one that ended has none."""
    study = make_study(Hyperband(rungs=1, eta=2), storage=tmp_path)
    with study:
        for number in range(4):
            trial = asked(study)
            outcome = study.evaluator(study.job(trial))
            kept = {CHECKPOINT_FILE: b"state %d" % number} if outcome.state == "paused" else {}
            study.tell(number, Outcome(outcome.state, outcome.quantities, files=kept, fraction=outcome.fraction))
        trial = asked(study)
        assert study.job(trial).checkpoint == b"state %d" % trial.number
        assert study.job(trial).until == 1.0
        study.tell(trial.number, study.evaluator(study.job(trial)))
    assert Counter(trial.state for trial in study.trials) == {"finished": 3, "stopped": 1}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_records_out_of_order_are_refused():
    """A decision about a trial that is at no milestone is no journal of ours."""
    study = make_study(ASHA(), storage=(storage := Memory()))
    study.run(3)
    records = storage.records()
    place = next(place for place, record in enumerate(records) if record["event"] == "rung")
    with pytest.raises(StorageError, match="do not fit together"):
        make_study(ASHA(), storage=Memory([*records[:place], *records[place + 1 :]]))


# Kills and workers

SEARCH = """
import sys, time
from nas.objectives.custom import Custom
from nas.search import search
from nas.testing.spaces import Grid
from nas.testing.strategies import learning_curve

def curve(point, fraction):
    time.sleep(0.003)
    return learning_curve(point, fraction)

search(Grid((8,) * 6), objectives=[Custom(curve, name="quality", staged=True)], strategy=sys.argv[2], budget=51, seed=5,
       storage=sys.argv[1])
"""


def start(folder, strategy):
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(folder), strategy], stderr=subprocess.PIPE)


def journal_bytes(folder):
    path = folder / "journal.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["asha", "hyperband"])
def test_killed_search_stops_the_trials_of_an_uninterrupted_one(tmp_path, strategy):
    """Eight kills at random moments change no trial, value or decision, and repeat no part that was recorded."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    moments = random.Random(1)
    killed = 0
    for folder, kills in ((whole, 0), (broken, 8)):
        for _ in range(kills):
            goal = journal_bytes(folder) + moments.randrange(1, 6000)
            process = start(folder, strategy)
            while process.poll() is None and journal_bytes(folder) < goal:
                time.sleep(0.0005)
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        process = start(folder, strategy)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert killed >= 4
    assert become(load_study(broken)) == become(load_study(whole))
    parts = Counter(
        (record["event"], record["trial"], record.get("fraction"))
        for record in read_journal(broken)
        if "trial" in record
    )
    assert set(parts.values()) == {1}, "a part of a training was recorded twice"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_workers_stop_trials_as_one_process_does():
    """With Ray, hyperband ends alike, a worker that dies on the way included; asha trains no part twice."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)

    def dying(point, fraction):
        if point.choices[0] == 3 and 0.2 < fraction < 1:
            os._exit(1)
        return learning_curve(point, fraction)

    def failing(point, fraction):
        if point.choices[0] == 3 and 0.2 < fraction < 1:
            raise ValueError("as if its process had died")
        return learning_curve(point, fraction)

    try:
        serial = search(
            GRID, objectives=[Custom(failing, name="quality", staged=True)], strategy="hyperband", budget=17
        )
        parallel = search(
            GRID,
            objectives=[Custom(dying, name="quality", staged=True)],
            strategy="hyperband",
            budget=17,
            executor=Ray(workers=3),
        )
        assert become(parallel) == become(serial)
        assert serial.count()["failed"] >= 1
        early = search(GRID, objectives=[CURVE], strategy="asha", budget=20, executor=Ray(workers=3))
    finally:
        ray.shutdown()
    assert {trial.state for trial in early.trials} == {"finished", "stopped"}
    for trial in early.trials:
        fractions = [rung.fraction for rung in trial.rungs]
        assert all(first < second for first, second in itertools.pairwise(fractions))
