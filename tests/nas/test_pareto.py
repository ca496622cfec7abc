"""Pareto arithmetic against definitions spelled out by loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nas import pareto


def _points(seed, count, objectives):
    """Integer points, so that ties are frequent."""
    return np.random.default_rng(seed).integers(0, 6, size=(count, objectives)).astype(np.float64)


def _front_by_definition(points):
    return np.array([not any(pareto.dominates(other, point) for other in points) for point in points], dtype=bool)


@pytest.mark.parametrize(
    ("a", "b", "expected"), [((1, 2), (1, 3), True), ((1, 2), (1, 2), False), ((1, 3), (2, 2), False)]
)
def test_dominates_needs_one_better_and_none_worse(a, b, expected):
    """Equal points and trade-offs do not dominate."""
    assert pareto.dominates(a, b) is expected


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_non_dominated_equals_definition(seed, objectives):
    """The sorted scan keeps exactly the rows that nothing dominates, duplicates included."""
    points = _points(seed, 60, objectives)
    np.testing.assert_array_equal(pareto.non_dominated(points), _front_by_definition(points))


@pytest.mark.parametrize("seed", range(5))
def test_fronts_place_every_row_once_in_peeling_order(seed):
    """Each front is the non-dominated part of what earlier fronts left."""
    points = _points(seed, 50, 2)
    left = np.arange(len(points))
    for rows in pareto.fronts(points):
        np.testing.assert_array_equal(rows, left[_front_by_definition(points[left])])
        left = np.setdiff1d(left, rows)
    assert len(left) == 0
    ranks = pareto.ranks(points)
    assert all(np.all(ranks[rows] == number) for number, rows in enumerate(pareto.fronts(points)))


def test_fronts_stop_once_enough_rows_are_placed():
    """Only as many fronts are peeled as the caller needs."""
    points = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert [list(rows) for rows in pareto.fronts(points, stop_at=2)] == [[0], [1]]


def test_crowding_distance_follows_the_paper():
    """Ends are infinite; between them the normalised gaps of the neighbours add up."""
    points = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    distance = pareto.crowding_distance(points)
    assert np.isinf(distance[[0, 3]]).all()
    np.testing.assert_allclose(distance[1:3], [3 / 4 + 3 / 4, 3 / 4 + 2 / 4])


def test_empty_input_gives_empty_results():
    """No rows, no front."""
    nothing = np.empty((0, 2))
    assert len(pareto.non_dominated(nothing)) == 0
    assert pareto.fronts(nothing) == []
    assert len(pareto.crowding_distance(nothing)) == 0
    assert pareto.hypervolume(nothing, (1.0, 1.0)) == 0.0


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_equals_counted_cells(seed, objectives):
    """With integer points the volume is the number of unit cells that some point dominates."""
    points = _points(seed, 8, objectives)
    cells = np.stack(np.meshgrid(*[np.arange(6)] * objectives, indexing="ij"), axis=-1).reshape(-1, objectives)
    covered = sum(any(np.all(point <= cell) for point in points) for cell in cells)
    assert pareto.hypervolume(points, (6.0,) * objectives) == covered


def test_hypervolume_ignores_points_beyond_the_reference():
    """A point that is not better than the reference everywhere adds nothing."""
    assert pareto.hypervolume(np.array([[0.5, 0.5], [-9.0, 1.0]]), (1.0, 1.0)) == pytest.approx(0.25)


def test_row_that_is_no_number_is_dominated_by_none():
    """Nothing compares with it; equal rows stay together beside it."""
    losses = np.array([[1, 1], [np.nan, 0], [1, 1], [2, 2], [np.inf, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(pareto.non_dominated(losses), [True, True, True, False, True, True])


@st.composite
def boxes(draw):
    """Small integers with intervals, many of them of no width, so that ties and touching ends are frequent."""
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    low = draw(arrays(np.float64, shape, elements=st.integers(0, 5)))
    width = draw(arrays(np.float64, shape, elements=st.sampled_from([0, 0, 1, 3])))
    return low, low + width


@given(boxes())
def test_interval_dominance_equals_definition(box):
    """Certain: nobody's best dominates my worst. Possible: nobody's worst dominates my best."""
    low, high = box
    others = [[j for j in range(len(low)) if j != i] for i in range(len(low))]
    certain = [not any(pareto.dominates(low[j], high[i]) for j in others[i]) for i in range(len(low))]
    possible = [not any(pareto.dominates(high[j], low[i]) for j in others[i]) for i in range(len(low))]
    np.testing.assert_array_equal(pareto.never_dominated(low, high), np.array(certain, dtype=bool))
    np.testing.assert_array_equal(pareto.sometimes_non_dominated(low, high), np.array(possible, dtype=bool))


@given(boxes(), st.integers(0, 2**32 - 1))
def test_fronts_within_intervals_lie_between_certain_and_possible(box, seed):
    """Wherever the true values lie, the front has every certain row and no row that is not possible."""
    low, high = box
    share = np.random.default_rng(seed).choice([0.0, 0.3, 1.0], size=low.shape)
    front = pareto.non_dominated(low + share * (high - low))
    assert np.all(front[pareto.never_dominated(low, high)])
    assert np.all(pareto.sometimes_non_dominated(low, high)[front])


@given(boxes())
def test_exact_losses_leave_nothing_open(box):
    """Without width certain and possible are the front."""
    low, _ = box
    front = pareto.non_dominated(low)
    np.testing.assert_array_equal(pareto.never_dominated(low, low), front)
    np.testing.assert_array_equal(pareto.sometimes_non_dominated(low, low), front)


@given(boxes(), st.integers(1, 3))
def test_wider_intervals_decide_less(box, wider):
    """Certain rows can only become fewer, possible ones only more."""
    low, high = box
    assert np.all(pareto.never_dominated(low, high)[pareto.never_dominated(low - wider, high + wider)])
    wide = pareto.sometimes_non_dominated(low - wider, high + wider)
    assert np.all(wide[pareto.sometimes_non_dominated(low, high)])
