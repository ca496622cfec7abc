"""The exact strategy: every point of the true front, with its proof, and a clear no where values do not add."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ir.errors import InputError
from nas import pareto
from nas.objectives.custom import Custom
from nas.objectives.flops import Flops
from nas.objectives.params import Params
from nas.search import load_study, open_study, search
from nas.strategies.exact import Exact
from nas.testing.spaces import Grid, Point
from searchspaces.space import Space

GRID = Grid((5, 4, 6, 3))


def size(point):
    return float(sum((axis + 2) * choice**2 for axis, choice in enumerate(point.choices)))


def error(point):
    return float(sum((5 * axis % 7 + 1) * (6 - choice) for axis, choice in enumerate(point.choices)))


def smooth_error(point):
    return sum(np.exp(-choice / (axis + 1)) for axis, choice in enumerate(point.choices))


def width(point):
    return float(point.choices[0] + point.choices[2])


def brute_force(architectures, *functions, keeps=lambda architecture: True):
    """Return the distinct points of the true front, best in the first value first."""
    rows = np.array([[function(item) for function in functions] for item in architectures if keeps(item)])
    return np.unique(rows[pareto.non_dominated(rows)], axis=0)


def proven(study):
    """Return the losses of the trials that the programme proposed, sorted, after a look at their proofs."""
    points = [trial for trial in study.trials if trial.note]
    assert {trial.note["gap"] for trial in points} == {0.0}
    return np.array(sorted(trial.losses for trial in points))


@pytest.mark.parametrize("second", [error, smooth_error])
def test_exact_finds_the_whole_front(second):
    """All points of the true front and no others are proposed first, whole numbers or not; draws follow."""
    study = search(GRID, objectives=[size, second], strategy="exact", budget=80)
    true = brute_force(GRID.enumerate(), size, second)
    np.testing.assert_allclose(proven(study), true, rtol=1e-12)
    assert [bool(trial.note) for trial in study.trials] == [True] * len(true) + [False] * (80 - len(true))


def test_exact_gives_the_ends_first_and_leaves_no_large_gap():
    """A budget that is smaller than the front shows it from end to end."""
    true = brute_force(GRID.enumerate(), size, error)
    study = search(GRID, objectives=[size, error], strategy="exact", budget=6)
    found = proven(study)
    assert study.trials[0].losses == tuple(true[0])
    assert study.trials[1].losses == tuple(true[-1])
    assert np.diff(found[:, 0]).max() < 0.6 * (true[-1, 0] - true[0, 0])


@pytest.mark.parametrize("cheap", [False, True])
def test_exact_keeps_constraints(cheap):
    """Bounds on objectives and on other values hold at every point, and the front is that of what is left."""
    constraints = [Custom(width, cheap=cheap, min=2.0, max=4.0), Custom(size, max=60.0)]
    study = search(GRID, objectives=[Custom(size), Custom(error)], constraints=constraints, strategy="exact", budget=30)
    true = brute_force(
        GRID.enumerate(), size, error, keeps=lambda point: 2.0 <= width(point) <= 4.0 and size(point) <= 60.0
    )
    np.testing.assert_array_equal(proven(study), true)


def test_exact_maximises_what_is_to_be_maximised():
    """A value that should be large is the negative of a loss, with its bounds."""
    gain = Custom(lambda point: -error(point), name="gain", direction="max", min=-60.0)
    study = search(GRID, objectives=[Custom(size), gain], strategy="exact", budget=40)
    true = brute_force(GRID.enumerate(), size, error, keeps=lambda point: error(point) <= 60.0)
    np.testing.assert_array_equal(proven(study), true)


def test_exact_with_one_objective_proves_the_best():
    """One objective has one best value; the first trial has it."""
    study = search(GRID, objectives=[error], strategy="exact", budget=3)
    assert study.trials[0].losses == tuple(brute_force(GRID.enumerate(), error)[0])
    assert [trial.note for trial in study.trials] == [{"gap": 0.0}, {}, {}]


def test_exact_leaves_out_choices_that_fail():
    """A choice whose value cannot be computed is not offered to the programme."""

    def fragile(point):
        if point.choices[1] == 0:
            raise ValueError("no such model")
        return size(point)

    study = search(GRID, objectives=[fragile, error], strategy="exact", budget=60)
    true = brute_force(GRID.enumerate(), size, error, keeps=lambda point: point.choices[1] != 0)
    np.testing.assert_array_equal(proven(study), true)


def test_exact_refuses_values_that_do_not_add():
    """A product of choices is no sum: the error names the value and shows one that differs."""

    def product(point):
        return float((point.choices[0] + 1) * (point.choices[1] + 1))

    with pytest.raises(InputError, match=r"product does not add(.|\n)*expected(.|\n)*found"):
        search(GRID, objectives=[product, error], strategy="exact", budget=5)


def test_exact_refuses_what_it_cannot_compute_before_a_folder_is_written(tmp_path):
    """Trained values, three objectives and spaces without places are input errors that say what is possible."""
    with pytest.raises(InputError, match=r"quality(.|\n)*params, flops"):
        open_study("tiny_lm", objectives=["quality", "params"], strategy="exact", storage=tmp_path / "a")
    with pytest.raises(InputError, match="one or two"):
        open_study("tiny_lm", objectives=["flops", "params", "state_bytes"], strategy="exact", storage=tmp_path / "b")
    assert not list(tmp_path.iterdir())

    class Opaque:
        def sample(self, rng):
            return Point((int(rng.integers(4)),))

        def architecture(self, data):
            return Point(tuple(data["choices"]))

    with pytest.raises(InputError, match="places"):
        search(Opaque(), objectives=[size, error], strategy="exact", budget=2)


def test_exact_stops_where_the_table_costs_too_much():
    """A limit on evaluations is kept, and the error says what may be done."""
    with pytest.raises(InputError, match=r"too many evaluations(.|\n)*allow more"):
        search(GRID, objectives=[size, error], strategy=Exact(evaluations=10), budget=2)


@pytest.mark.parametrize("option", [{"checks": 0}, {"tolerance": 0.0}, {"seconds": -1.0}])
def test_exact_options_out_of_range_are_refused(option):
    """A bad option is an input error when the strategy is made."""
    with pytest.raises(InputError, match="expected"):
        Exact(**option)


def test_exact_resumes_with_the_next_point(tmp_path):
    """A study in parts proposes what it proposes in one go, and the journal keeps the proofs."""
    whole = search(GRID, objectives=[size, error], strategy="exact", budget=20)
    search(GRID, objectives=[size, error], strategy="exact", budget=7, storage=tmp_path)
    search(GRID, objectives=[size, error], strategy="exact", budget=20, storage=tmp_path)
    found = load_study(tmp_path).trials
    assert [(trial.hash, trial.note) for trial in found] == [(trial.hash, trial.note) for trial in whole.trials]


SPACE = {
    "schema": 1,
    "name": "small",
    "description": "Width, depth, norms and mixers.",
    "model": {
        "task": "char_lm",
        "seq_len": 32,
        "d_model": {"choice": [16, 32]},
        "depth": {"range": [1, 2, 1]},
        "norm": {"choice": ["rms_norm", "layer_norm"]},
    },
    "block": {
        "wiring": {"choice": ["pre_norm", "parallel"]},
        "token_mixer": {
            "per_layer": True,
            "choice": [
                "pooling",
                {"softmax_attention": {"num_heads": {"choice": [2, 4]}}},
                {"mamba": {"state_dim": 4}},
            ],
        },
        "channel_mixer": {"choice": ["none", {"mlp": {"expansion": 2.0}}]},
    },
    "constraints": {"at_least_one_of": ["softmax_attention", "mamba"]},
}


def negative_state(architecture):
    """Minus the number of layers that keep a state, and a little for each kind: in conflict with parameters."""
    kinds = {"pooling": 0.0, "softmax_attention": 3.0, "mamba": 2.0}
    return -sum(kinds[layer.token_mixer.key] for layer in architecture.model.stages[0].layers)


def test_exact_solves_a_space_of_a_file():
    """With choices for all layers that interact and a demand on the whole model, the front is the true one."""
    space = Space.from_dict(SPACE)
    objectives = [Params(), Custom(negative_state)]
    study = search(
        space, task="char_lm", objectives=objectives, constraints=[Flops(min=5e5)], strategy="exact", budget=12
    )

    def values(architecture):
        context = study.evaluator.context(architecture)
        return Params().evaluate(context).value, Flops().evaluate(context).value

    judged = [(*values(item), negative_state(item)) for item in space.enumerate()]
    kept = np.array([(params, state) for params, flops, state in judged if flops >= 5e5])
    true = np.unique(kept[pareto.non_dominated(kept)], axis=0)
    assert len(kept) < len(judged)
    assert len(true) >= 3
    np.testing.assert_array_equal(proven(study), true)


def test_all_pairs_of_ways_are_different_points():
    """The shipped grid makes a point of one way for each place."""
    points = {GRID.assemble(ways).choices for ways in itertools.product(*(range(ways) for ways in GRID.places()))}
    assert len(points) == GRID.size()
