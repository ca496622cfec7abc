"""Predictors of layered models and of latency with a roofline as prior."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from codegen.roofline import Roofline
from ir.cost import node_costs
from ir.errors import InputError
from nas.predictors.ensemble import Ensemble
from nas.predictors.features import FeatureTable, flatten
from nas.predictors.layer_process import LayerColumns, LayerProcess, _differences, _likelihood
from nas.predictors.layer_trees import LayerTrees, _weights
from nas.predictors.roofline import RooflineLatency, roofline_ms
from nas.tasks import get as get_task
from searchspaces.space import load_space


def _models(rng, count):
    """Models of 2 to 10 layers whose value hangs on the width of the first three, and a little on how many follow."""
    points, values = [], []
    for _ in range(count):
        widths = rng.uniform(1.0, 4.0, size=int(rng.integers(2, 11)))
        points.append(flatten({"layers": [{"width": float(width), "other": float(rng.random())} for width in widths]}))
        values.append(float(np.mean(widths[:3])) + 0.02 * len(widths) + 0.05 * rng.normal())
    return points, np.array(values)


def _tau(model, table, points, values):
    return _rank(model.predict(table.matrix(points)), values)


def _rank(predicted, true):
    found: Any = kendalltau(predicted, true)
    return float(found.statistic)


def test_columns_are_means_up_to_each_layer():
    """An option counts by its mean over the layers so far, which stays where the model ends."""
    described = [flatten({"l": [{"w": 2.0}, {"w": 4.0}, {"w": 9.0}]}), flatten({"l": [{"w": 6.0}]})]
    table = FeatureTable(("l.count", "l[0]w", "l[1]w", "l[2]w"))
    described = [{name.replace("].", "]"): value for name, value in features.items()} for features in described]
    made = LayerColumns.of(table).make(table.matrix(described))
    np.testing.assert_array_equal(made, [[2, 3, 5, 1, 1, 1, 3], [6, 6, 6, 1, 0, 0, 1]])


def test_layer_process_finds_which_layers_matter():
    """It ranks unseen models better than trees on the same features do, and knows how well."""
    points, values = _models(np.random.default_rng(0), 240)
    table = FeatureTable.of(points[:80])
    process = LayerProcess(table).fit(table.matrix(points[:80]), values[:80])
    trees = Ensemble(("extra_trees",)).fit(points[:80], values[:80])
    tau = _tau(process, table, points[80:], values[80:])
    assert tau > 0.7
    assert tau > _rank(trees.predict(points[80:]).mean_N, values[80:])
    seen = _rank(process.unseen_N, values[:80])
    assert abs(seen - tau) < 0.15  # the error of tau from 80 points is about 0.05


def test_left_out_predictions_are_those_of_a_process_without_the_point():
    """With relevances and weights held, leaving a point out gives what the closed form says."""
    points, values = _models(np.random.default_rng(1), 30)
    table = FeatureTable.of(points)
    process = LayerProcess(table).fit(table.matrix(points), values)
    z_N = (values - values.mean()) / values.std()
    seen_NJ = process._seen_NJ
    k_NN = process._kernel(seen_NJ)
    rest = np.arange(1, 30)
    dual = np.linalg.solve(k_NN[np.ix_(rest, rest)] + np.diag(process._noise_N[rest]), z_N[rest])
    expected = values.mean() + values.std() * float(k_NN[0, rest] @ dual)
    assert process.unseen_N[0] == pytest.approx(expected, abs=1e-8)


def test_failed_trainings_count_little(monkeypatch):
    """One value in eight tells nothing: weights save a part of what that costs, and cost nothing where all is well."""
    points, values = _models(np.random.default_rng(3), 320)
    table, failed = FeatureTable.of(points), values[:120].copy()
    failed[::8] += 4.0 * np.random.default_rng(13).normal(size=15)

    def tau(targets):
        process = LayerProcess(table).fit(table.matrix(points[:120]), targets)
        return _tau(process, table, points[120:], values[120:])

    weighed = {"clean": tau(values[:120]), "failed": tau(failed)}
    monkeypatch.setattr("nas.predictors.layer_process._PASSES", 1)  # the first pass weighs all alike
    alike = {"clean": tau(values[:120]), "failed": tau(failed)}
    assert weighed["failed"] > alike["failed"] + 0.05  # 0.62 and 0.46
    assert weighed["clean"] > alike["clean"] - 0.01


def test_layer_trees_lower_failed_trainings():
    """Trees weigh points as well, and find more of what holds without them."""
    points, values = _models(np.random.default_rng(3), 320)
    table, failed = FeatureTable.of(points), values[:120].copy()
    failed[::8] += 4.0 * np.random.default_rng(13).normal(size=15)
    x_NF = table.matrix(points[:120])
    trees = LayerTrees(table).fit(x_NF, failed)
    alike = LayerTrees(table)._trees(300).fit(LayerColumns.of(table).make(x_NF), failed)
    fresh_NJ = LayerColumns.of(table).make(table.matrix(points[120:]))
    tau = _tau(trees, table, points[120:], values[120:])
    assert tau > _rank(alike.predict(fresh_NJ), values[120:]) + 0.1  # 0.81 and 0.57


def test_weights_agree_with_the_variance_they_give():
    """A point of ten times the usual error counts little, equal errors all count one, none at all is no trouble."""
    weight_N = _weights(np.array([1.0] * 20 + [100.0]))
    assert weight_N[-1] < 0.1 < 0.9 < weight_N[0]
    np.testing.assert_allclose(_weights(np.full(5, 3.0)), 1.0)
    np.testing.assert_array_equal(_weights(np.zeros(3)), 1.0)


@pytest.mark.parametrize("kind", ["layer_process", "layer_trees"])
def test_two_points_are_enough(kind):
    """Folds of one point are no error, and what is predicted is finite."""
    points, _ = _models(np.random.default_rng(5), 2)
    fitted = Ensemble((kind,)).fit(points, [1.0, 2.0])
    assert np.all(np.isfinite(fitted.predict(points).mean_N))


def test_slope_of_the_likelihood_is_what_finite_differences_give():
    """Also where two points coincide, whose kernel has no slope of its own."""
    points, values = _models(np.random.default_rng(3), 12)
    points[5] = points[4]
    table = FeatureTable.of(points)
    columns = LayerColumns.of(table)
    scaled_NJ = columns.make(table.matrix(points))
    apart_JQ = _differences(scaled_NJ / columns.sizes(scaled_NJ))
    start = columns.start(apart_JQ)
    _, slope = _likelihood(columns, start, apart_JQ, values)
    for place in (0, 3, columns.layers, len(start) - 3, len(start) - 2, len(start) - 1):
        step = np.zeros(len(start))
        step[place] = 1e-2  # distances are float32: a smaller step would measure their rounding
        ends = [_likelihood(columns, start + sign * step, apart_JQ, values)[0] for sign in (1, -1)]
        assert slope[place] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-3)


def test_refitted_ensembles_have_seen_every_point():
    """After the folds, one member of each kind is fitted to all points."""
    points, values = _models(np.random.default_rng(2), 60)
    folds = Ensemble(("ridge",), folds=3).fit(points, values)
    refitted = Ensemble(("ridge",), folds=3, is_refitted=True).fit(points, values)
    assert (len(folds.members[0]), len(refitted.members[0])) == (3, 1)
    np.testing.assert_array_equal(folds.unseen_N, refitted.unseen_N)


def test_entries_that_repeat_others_are_left_out():
    """Of layers that share an option, one column is kept; summaries all stay."""
    described = [flatten({"layers": [{"a": a, "b": 3 * a + 1}, {"a": a, "b": b}]}) for a, b in ((1, 5), (2, 4), (4, 9))]
    names = FeatureTable.of(described).names
    assert [name for name in names if "[" in name] == ["layers[1].b"]
    assert {"layers.sum.a", "layers.mean.a"} <= set(names)


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    """Every operation takes what limits it, so twice the machine takes half the time."""
    architecture = load_space("tiny_lm").smallest()
    graph = architecture.graph(get_task("char_lm").signature)
    machine = Roofline(100.0, 10.0)
    expected = sum(max(cost.flops / 100e9, cost.bytes_moved / 10e9) for cost in node_costs(graph)) * 1e3
    assert roofline_ms(graph, machine) == pytest.approx(expected)
    assert roofline_ms(graph, Roofline(200.0, 20.0)) == pytest.approx(expected / 2)


def _latencies(rng, count):
    """Models whose latency is their roofline times an efficiency between 20 and 70 % that follows one feature."""
    size, kind = np.exp(rng.uniform(0.0, 4.0, count)), rng.random(count)
    depth = rng.integers(2, 12, count)
    roofline = 0.01 * size * depth * (1.0 + kind**2)
    measured = roofline / (0.2 + 0.5 * kind) * np.exp(0.03 * rng.normal(size=count))
    columns = zip(size.tolist(), depth.tolist(), kind.tolist(), strict=True)
    return SimpleNamespace(
        described=[{"size": a, "depth": float(b), "kind": c} for a, b, c in columns], roofline=roofline, ms=measured
    )


def test_roofline_prior_saves_samples():
    """With the prior, a sixth of the samples gives a smaller error."""
    rng = np.random.default_rng(3)
    test = _latencies(rng, 300)
    many, few = _latencies(rng, 60), _latencies(rng, 10)
    ensemble = Ensemble(("quadratic", "boosting"))
    without = ensemble.fit(many.described, many.ms).predict(test.described).mean_N
    model = RooflineLatency.fit(few.described, few.roofline, few.ms, ensemble)
    with_prior = model.predict(test.described, test.roofline).mean_N
    assert np.median(np.abs(np.log(with_prior / test.ms))) < np.median(np.abs(np.log(without / test.ms)))


def test_without_samples_the_roofline_itself_is_predicted():
    """Nothing measured: the roofline, with a wide bar, marked as predicted; a few samples: one factor for all."""
    test = _latencies(np.random.default_rng(4), 5)
    found = RooflineLatency.fit([], [], []).predict(test.described, test.roofline)
    np.testing.assert_array_equal(found.mean_N, test.roofline)
    assert {quantity.source for quantity in found.quantities("ms")} == {"predicted"}
    few = RooflineLatency.fit(test.described, test.roofline, 3.0 * test.roofline)
    np.testing.assert_allclose(few.predict(test.described, test.roofline).mean_N, 3.0 * test.roofline)
    with pytest.raises(InputError, match="5 finite"):
        RooflineLatency.fit(test.described, test.roofline, [0.0] * 5)
