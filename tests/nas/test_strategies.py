"""Strategies: the shipped conformance suite on every registered one, and what each adds."""

from __future__ import annotations

import numpy as np
import pytest

from ir.errors import InputError
from nas import pareto
from nas.strategies import base
from nas.strategies.local_search import LocalSearch
from nas.strategies.nsga2 import NSGA2
from nas.strategies.predictor_guided import PredictorGuided
from nas.strategies.random import Random
from nas.strategies.regularized_evolution import RegularizedEvolution
from nas.testing import strategies as suite
from nas.trial import Quantity, Trial

SMALL = {
    "nsga2": {"population": 16},
    "regularized_evolution": {"population": 16, "tournament": 4, "batch": 4},
    "predictor_guided": {"initial": 24, "batch": 24, "population": 8, "children": 32, "generations": 2},
}


@pytest.mark.parametrize("check", suite.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", base.REGISTRY.names())
def test_strategy_conforms(name, check):
    """Every registered strategy passes every check of the shipped suite."""
    check(lambda: base.get(name, **SMALL.get(name, {})))


def test_registry_lists_files_and_names_classes():
    """File stem, registry key and class go together."""
    assert set(base.REGISTRY.names()) == {
        "asha",
        "exact",
        "hyperband",
        "random",
        "regularized_evolution",
        "nsga2",
        "local_search",
        "predictor_guided",
    }
    assert base.REGISTRY.get("nsga2") is NSGA2
    assert base.REGISTRY.name_of(RegularizedEvolution) == "regularized_evolution"


def test_registry_suggests_the_closest_name():
    """A misspelt strategy or option is an error with a suggestion."""
    with pytest.raises(InputError, match="did you mean 'nsga2'"):
        base.get("nsga3")
    with pytest.raises(InputError, match="did you mean 'population'"):
        base.get("nsga2", populaton=8)


class _EntryPoint:
    def __init__(self, name, value, loaded=None):
        self.name, self.value, self._loaded = name, value, loaded

    def load(self):
        return self._loaded


def test_registry_finds_entry_points_of_third_parties(monkeypatch):
    """An installed package adds a strategy without editing a file here."""
    point = _EntryPoint("theirs", "their_package:Theirs", Random)
    monkeypatch.setattr("nas.registry.entry_points", lambda group: [point] if group == "nas.strategies" else [])
    assert "theirs" in base.REGISTRY.names()
    assert base.REGISTRY.get("theirs") is Random


def test_registry_refuses_a_duplicate_name_and_names_both(monkeypatch):
    """Two strategies under one name are an error, not a silent overwrite."""
    monkeypatch.setattr("nas.registry.entry_points", lambda group: [_EntryPoint("nsga2", "their_package:Mine")])
    with pytest.raises(InputError, match=r"nas\.strategies\.nsga2 and their_package:Mine"):
        base.get("nsga2")


@pytest.mark.parametrize(
    "make",
    [
        lambda: NSGA2(population=1),
        lambda: NSGA2(crossover_probability=1.5),
        lambda: NSGA2(batch=0),
        lambda: RegularizedEvolution(population=4, tournament=5),
        lambda: RegularizedEvolution(tournament=0),
        lambda: LocalSearch(batch=0),
        lambda: LocalSearch(restart_probability=1.5),
        lambda: PredictorGuided(batch=0),
        lambda: PredictorGuided(initial=1),
    ],
)
def test_strategy_options_out_of_range_are_refused(make):
    """A bad option is an input error when the strategy is made."""
    with pytest.raises(InputError, match="expected"):
        make()


def _trial(number, losses, violation=0.0):
    quantities = {str(column): Quantity(value, "", "custom") for column, value in enumerate(losses)}
    state = "infeasible" if violation else "finished"
    return Trial(
        number, str(number), {"choices": [number]}, lambda data: data, state, quantities, tuple(losses), violation
    )


def test_order_puts_fronts_then_loneliness_then_violation():
    """Constraint domination orders trials as in the paper."""
    trials = [
        _trial(0, (), violation=0.5),
        _trial(1, (2.0, 2.0)),  # dominated by 4
        _trial(2, (0.0, 3.0)),  # end of the first front
        _trial(3, (3.0, 0.0)),  # the other end
        _trial(4, (1.0, 1.5)),
        _trial(5, (), violation=0.1),
    ]
    assert [trial.number for trial in base.order_best_first(trials)] == [2, 3, 4, 1, 5, 0]
    assert [trial.number for trial in base.order_best_first(trials, wanted=3)] == [2, 3, 4]


class _Recorder:
    """A space that tells which parents it was given."""

    def sample(self, rng):
        return "sampled"

    def mutate(self, architecture, rng):
        return ("mutated", architecture["choices"][0])

    def crossover(self, first, second, rng):
        return ("crossed", first["choices"][0], second["choices"][0])


def test_regularized_evolution_forgets_the_oldest():
    """The best trial of all is no parent once it is too old."""
    strategy = RegularizedEvolution(population=4, tournament=4, batch=1)
    history = [_trial(0, (0.0,)), *(_trial(number, (10.0 - number,)) for number in range(1, 6))]
    assert strategy.ask(_Recorder(), 6, history, np.random.default_rng(0)) == ("mutated", 5)


def test_nsga2_keeps_the_best_however_old():
    """Elitist survival: parents are the best of all trials."""
    strategy = NSGA2(population=2, crossover_probability=0.0)
    history = [_trial(0, (0.0,)), _trial(1, (1.0,)), *(_trial(number, (9.0,)) for number in range(2, 20))]
    rng = np.random.default_rng(0)
    parents = {strategy.ask(_Recorder(), 20, history, rng)[1] for _ in range(50)}
    assert parents == {0, 1}


SLOW = pytest.param("predictor_guided", marks=pytest.mark.slow)  # it fits an ensemble for each batch


@pytest.mark.parametrize("name", ["regularized_evolution", "nsga2", "local_search", SLOW])
def test_evolution_beats_random_search(name):
    """On a smooth problem selection pays: more volume than random search over the same seeds."""

    def mean_volume(make):
        volumes = []
        for seed in range(5):
            study = suite.make_study(make(), seed=seed)
            study.run(160)
            losses = np.array([trial.losses for trial in study.pareto_front()])
            volumes.append(pareto.hypervolume(losses, (300.0, 150.0)))
        return float(np.mean(volumes))

    assert mean_volume(lambda: base.get(name, **SMALL.get(name, {}))) > mean_volume(Random)
