"""Predictors: features of points, ensembles with error bars, transfer to a new device, and what guides a search."""

from __future__ import annotations

import numpy as np
import pytest

from ir.cost import profile
from ir.errors import InputError
from nas import pareto
from nas.objectives.custom import Custom
from nas.predictors.ensemble import KINDS, Ensemble
from nas.predictors.features import FeatureTable, drop_inactive, flatten, profile_features
from nas.predictors.transfer import DeviceTransfer
from nas.search import search
from nas.strategies.predictor_guided import PredictorGuided
from nas.tasks import get as get_task
from nas.testing.spaces import Grid
from nas.testing.strategies import cost, error
from searchspaces.space import load_space


def _line(rng, count=60, noise=0.0):
    """Points of three numbers and a positive value that multiplies two of them."""
    x = rng.uniform(1.0, 4.0, size=(count, 3))
    y = x[:, 0] * x[:, 1] * np.exp(noise * rng.normal(size=count))
    return [{"a": a, "b": b, "c": c} for a, b, c in x.tolist()], y


def test_flatten_names_every_kind_of_value():
    """Numbers, words, switches, mappings and lists each give features of their own."""
    features = flatten({"width": 8, "kind": "gla", "bias": True, "layers": [{"mlp": {"ratio": 2}}, {"none": {}}]})
    assert features["width"] == 8.0
    assert features["kind=gla"] == 1.0
    assert features["bias"] == 1.0
    assert features["layers.count"] == 2.0
    assert features["layers[0].mlp.ratio"] == features["layers.sum.mlp.ratio"] == 2.0
    assert features["layers.mean.mlp.ratio"] == 1.0
    assert features["layers[1].none"] == 1.0


def test_flatten_counts_words_in_a_list():
    """A list of words says how often each was chosen."""
    assert flatten({"mixers": ["gla", "mamba", "gla"]})["mixers.sum=gla"] == 2.0


def test_flatten_refuses_what_is_no_value():
    """An object of unknown kind is an input error that names its place."""
    with pytest.raises(InputError, match="where"):
        flatten({"where": object()})


def test_inactive_layers_are_no_features():
    """Points that differ beyond their depth alone have equal features."""
    first, second = ({"depth": 2, "heads": [4, 8, last]} for last in (1, 2))
    assert flatten(first) != flatten(second)
    assert flatten(drop_inactive(first, 2)) == flatten(drop_inactive(second, [True, True, False]))
    with pytest.raises(InputError, match="at least 4"):
        drop_inactive(first, 4)
    with pytest.raises(InputError, match="2 entries"):
        drop_inactive(first, [True, False])


def test_columns_are_those_that_differ():
    """What all points share is no column, and a point without a feature has zero there."""
    table = FeatureTable.of([{"same": 1.0, "a": 2.0}, {"same": 1.0, "x[0]": 3.0}, {"same": 1.0}])
    assert table.names == ("a", "x[0]")
    assert table.summaries == (0,)
    np.testing.assert_array_equal(table.matrix([{"a": 5.0, "unknown": 1.0}]), [[5.0, 0.0]])


def test_features_of_an_architecture_include_what_its_graph_costs():
    """Counts come from the graph, and choices from the encoding."""
    architecture = load_space("tiny_lm").smallest()
    signature = get_task("char_lm").signature
    features = profile_features(architecture, signature)
    assert features["log_params"] == pytest.approx(np.log1p(profile(architecture.graph(signature)).params))
    assert features["depth"] == architecture.model.depth
    assert flatten(architecture.to_dict())["stages.count"] == 1.0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_learns_and_repeats(kind):
    """A regressor of each kind ranks points it did not see, and the same seed gives the same numbers."""
    rng = np.random.default_rng(0)
    described, values = _line(rng, noise=0.02)
    fitted = Ensemble((kind,)).fit(described, values)
    assert fitted.tau > 0.7
    fresh, _ = _line(rng)
    again = Ensemble((kind,)).fit(described, values)
    np.testing.assert_array_equal(fitted.predict(fresh).mean_N, again.predict(fresh).mean_N)


def test_error_bars_cover_what_they_should():
    """Intervals of two standard deviations hold most values, and are no wider than the values spread."""
    rng = np.random.default_rng(1)
    fitted = Ensemble(("quadratic", "boosting")).fit(*_line(rng, noise=0.1))
    fresh, truth = _line(rng, 400, noise=0.1)
    predicted = fitted.predict(fresh)
    covered = np.mean(np.abs(predicted.mean_N - truth) < 2 * predicted.std_N)
    assert 0.85 < covered <= 1.0
    assert predicted.std_N.mean() < truth.std()


def test_better_kinds_weigh_more():
    """On products the quadratic regression decides."""
    fitted = Ensemble(("ridge", "quadratic")).fit(*_line(np.random.default_rng(2)))
    assert fitted.weights["quadratic"] > fitted.weights["ridge"]
    assert sum(fitted.weights.values()) == pytest.approx(1.0)


def test_outliers_are_left_out():
    """A few disturbed measurements change little where outliers are looked for."""
    rng = np.random.default_rng(3)
    described, values = _line(rng, noise=0.02)
    disturbed = values.copy()
    disturbed[:5] *= 4.0
    fresh, truth = _line(rng, 100)

    def mistake(**options):
        predicted = Ensemble(("quadratic",), **options).fit(described, disturbed).predict(fresh).mean_N
        return float(np.mean(np.abs(predicted / truth - 1.0)))

    assert mistake(outliers=4.0) < 0.5 * mistake()


def test_predictions_are_marked_as_such():
    """What a study would record says that it was predicted, with its interval."""
    described, values = _line(np.random.default_rng(4))
    quantity = Ensemble(("ridge",)).fit(described, values).predict(described[:1]).quantities("ms")[0]
    assert (quantity.source, quantity.unit) == ("predicted", "ms")
    assert quantity.interval is not None
    assert quantity.interval[0] < quantity.value < quantity.interval[1]


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0]])
def test_too_little_to_learn_from_gives_the_mean(values):
    """One point, or points that are all alike, are no error."""
    fitted = Ensemble(("quadratic",)).fit([{"a": float(row)} for row in range(len(values))], values)
    np.testing.assert_allclose(fitted.predict([{"a": 9.0}]).mean_N, values[:1])
    assert fitted.tau == 0.0


def test_ensemble_refuses_bad_arguments():
    """Misspelt kinds, single folds and values that are not finite are input errors."""
    with pytest.raises(InputError, match="did you mean 'boosting'"):
        Ensemble(("bosting",))
    with pytest.raises(InputError, match="folds"):
        Ensemble(folds=1)
    with pytest.raises(InputError, match="not finite"):
        Ensemble().fit([{"a": 1.0}], [float("nan")])


def _devices(rng, architectures=300, devices=8):
    """Latency that follows two hidden costs with weights per device, and a new device of the same kind."""
    hidden = rng.uniform(1.0, 5.0, size=(architectures, 2))
    weights = rng.uniform(0.2, 1.0, size=(2, devices + 1))
    latency = hidden @ weights * np.exp(0.01 * rng.normal(size=(architectures, devices + 1)))
    return latency[:, :-1], latency[:, -1]


def test_ten_samples_carry_a_new_device():
    """Latency of hundreds of architectures follows from ten measurements and the devices known."""
    known, new = _devices(np.random.default_rng(5))
    transfer = DeviceTransfer.of(known, 10)
    assert len(set(transfer.samples)) == 10
    predicted = transfer.predict(new[transfer.samples])
    assert np.mean(np.abs(predicted.mean_N / new - 1.0)) < 0.05
    assert np.all(predicted.std_N > 0)


def test_transfer_refuses_bad_measurements():
    """Too few samples, a wrong number of measurements, and zero milliseconds are input errors."""
    known, new = _devices(np.random.default_rng(6), architectures=20)
    with pytest.raises(InputError, match="2 to 20"):
        DeviceTransfer.of(known, 1)
    transfer = DeviceTransfer.of(known, 5)
    with pytest.raises(InputError, match="5 measurements"):
        transfer.predict(new[:4])
    with pytest.raises(InputError, match="not positive"):
        transfer.predict(np.zeros(5))


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_gains_are_differences_of_hypervolume(objectives):
    """What a candidate adds is the volume with it less the volume without it."""
    rng = np.random.default_rng(objectives)
    losses, candidates = rng.random((12, objectives)), 1.1 * rng.random((20, objectives))
    corner = np.ones(objectives)
    before = pareto.hypervolume(losses, corner)
    expected = [pareto.hypervolume(np.vstack([losses, row]), corner) - before for row in candidates]
    found = pareto.hypervolume_gains(candidates, losses, corner)
    np.testing.assert_allclose(found, expected, atol=1e-12 if objectives < 3 else 0.02)
    nothing = np.zeros((0, objectives))
    volumes = [pareto.hypervolume(row[None], corner) for row in candidates]
    np.testing.assert_allclose(
        pareto.hypervolume_gains(candidates, nothing, corner), volumes, atol=1e-12 if objectives < 3 else 0.02
    )


def test_guided_search_starts_at_the_corners_of_the_space():
    """The first trials are the smallest, the largest and the middle architecture."""
    space = load_space("tiny_lm")
    strategy = PredictorGuided()
    found = [strategy.ask(space, number, (), np.random.default_rng(number)) for number in range(3)]
    assert found == [space.smallest(), space.largest(), space.centroid()]


def test_guided_search_asked_again_proposes_something_else():
    """A candidate that the study refuses is not proposed again, and a fresh generator repeats the sequence."""
    study = search(Grid(), objectives=[error, cost], strategy=PredictorGuided(initial=8), budget=16)
    rng, again = (np.random.default_rng(7) for _ in range(2))
    asked = [PredictorGuided(initial=8).ask(study.space, 16, study.trials, rng) for _ in range(4)]
    assert len(set(asked)) == 4
    assert [PredictorGuided(initial=8).ask(study.space, 16, study.trials, again) for _ in range(4)] == asked


@pytest.mark.parametrize("is_possible", [True, False])
def test_guided_search_keeps_constraints_that_it_learns(is_possible):
    """Of a batch, the half that is expected to be best breaks a constraint less often or less far than at first."""
    bound = 30.0 if is_possible else -10.0
    constraint = Custom(cost, name="late", max=bound)
    strategy = PredictorGuided(initial=16, batch=16, children=64, generations=2)
    study = search(Grid((8,) * 6), objectives=[error], constraints=[constraint], strategy=strategy, budget=48, seed=1)
    violations = [trial.violation for trial in study.trials]
    assert np.mean(violations[32:40]) < 0.5 * np.mean(violations[:16])
