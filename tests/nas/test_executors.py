"""Executors: the same trials everywhere, and trouble that stays where it arose."""

from __future__ import annotations

import os

import pytest

from ir.errors import InputError
from nas.executors import base
from nas.executors.ray import Ray
from nas.executors.serial import Serial
from nas.search import load_study, search
from nas.testing.spaces import Grid

GRID = Grid((6, 6, 6))


def make_objective(poisoned=()):
    """Return a deterministic objective, local so that it travels by value; poisoned points end their process."""

    def score(point):
        if point.choices[0] in poisoned:
            os._exit(1)
        if point.choices[0] == 5:
            raise ValueError("five fails")
        return float(sum(choice**2 for choice in point.choices))

    return score


def sequence(study):
    return [(trial.number, trial.hash, trial.state, trial.values) for trial in study.trials]


def test_executors_are_found_by_name_with_their_options():
    """File stem and registry key go together; misspelt options are errors."""
    assert set(base.REGISTRY.names()) == {"serial", "ray"}
    assert isinstance(base.get("serial"), Serial)
    assert base.get("ray", workers=3) == Ray(workers=3)
    with pytest.raises(InputError, match="did you mean 'workers'"):
        base.get("ray", worker=3)


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1.5}, {"retries": -1}, {"cpus_per_trial": 0}])
def test_ray_options_out_of_range_are_refused(options):
    """A bad option is an input error when the executor is made."""
    with pytest.raises(InputError, match="expected"):
        Ray(**options)


@pytest.fixture(scope="module")
def ray_cluster():
    """One local Ray for all tests of this file; starting it takes seconds."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_gives_the_trials_of_a_serial_run(ray_cluster, capfd):
    """Workers and their timing change nothing, failures included, and nothing lands on stdout."""
    serial = search(GRID, objectives=[make_objective()], strategy="regularized_evolution", budget=24)
    parallel = search(
        GRID, objectives=[make_objective()], strategy="regularized_evolution", budget=24, executor=Ray(workers=4)
    )
    assert sequence(parallel) == sequence(serial)
    assert {trial.state for trial in serial.trials} == {"finished", "failed"}
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_worker_that_dies_fails_its_trial_only(ray_cluster):
    """A process that ends under a trial is tried again, then recorded as failed; all others finish."""
    study = search(GRID, objectives=[make_objective(poisoned=(0,))], budget=16, executor=Ray(workers=3, retries=1))
    states = {trial.number: trial for trial in study.trials}
    poisoned = [trial for trial in states.values() if trial.architecture.choices[0] == 0]
    assert poisoned
    assert all(trial.state == "failed" and "WorkerDied" in trial.reason for trial in poisoned)
    assert all(trial.state == "finished" for trial in states.values() if trial.architecture.choices[0] not in (0, 5))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_hands_an_error_of_the_study_to_the_caller(ray_cluster, tmp_path):
    """What would meet every trial ends the run, and its trials stay to be run again."""

    def make_misconfigured():
        def score(point):
            from ir.errors import InputError

            raise InputError("no licence file", hint="buy one")

        return score

    with pytest.raises(InputError, match=r"no licence file(.|\n)*buy one"):
        search(GRID, objectives=[make_misconfigured()], budget=4, executor=Ray(workers=2), storage=tmp_path)
    assert all(trial.state == "running" for trial in load_study(tmp_path).trials)
