"""The whole Pareto front of two values that add, point by point, each proven."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nas.strategies._programme import Limit, Programme, Solution


def front(programme: Programme, columns: tuple[int, ...]) -> Iterator[Solution]:
    """Give the points of a Pareto front: both ends, and then always one within the largest gap that is left.

    Every point that is not given is dominated by or equal to one that is; of points with equal values one is given.
    Values that are no whole numbers count as equal within a millionth of their range.

    Args:
        programme: What is minimised.
        columns: One value, or two.

    Source: the box method of Boland, Charkhgard and Savelsbergh 2015, "A criterion space search algorithm for
        biobjective integer programming: the balanced box method"; epsilon constraints, Haimes et al. 1971.
    """
    if len(columns) == 1:
        best = programme.minimize(columns[0])
        yield from [best] if best is not None else []
        return
    first, second = columns
    left = _minimize_both(programme, first, second)
    right = _minimize_both(programme, second, first)
    if left is None or right is None:
        return
    yield left
    if _equal(programme, left, right, first):
        return
    yield right
    span = np.maximum(right.values[first] - left.values[first], 1e-300) * (left.values[second] - right.values[second])
    boxes = [(-1.0, 0, left, right)]
    pushed = 1
    while boxes:
        _, _, left, right = heapq.heappop(boxes)
        low, high = _split(programme, left, right, first, second)
        corners = [(left, high), (low, right)]
        for new, old in ((high, left), (low, right)):
            if new is not None and not _equal(programme, new, old, first):
                yield new
        for one, other in corners:
            if one is None or other is None or _equal(programme, one, other, first):
                continue
            area = (other.values[first] - one.values[first]) * (one.values[second] - other.values[second]) / span
            heapq.heappush(boxes, (-float(area), pushed, one, other))
            pushed += 1


def _split(
    programme: Programme, left: Solution, right: Solution, first: int, second: int
) -> tuple[Solution | None, Solution | None]:
    """Return the two neighbours on either side of the middle of a box: the one below it, and the one above."""
    middle = (left.values[second] + right.values[second]) / 2
    low = _minimize_both(programme, first, second, Limit(second, high=middle), Limit(first, high=right.values[first]))
    if low is None:
        return None, None
    before = low.values[first] - programme.units[first] / 2
    high = _minimize_both(programme, second, first, Limit(first, high=before), Limit(second, high=left.values[second]))
    return low, high


def _minimize_both(programme: Programme, one: int, other: int, *limits: Limit) -> Solution | None:
    """Return the best in one value, and among those the best in the other."""
    best = programme.minimize(one, limits)
    if best is None:
        return None
    both = programme.minimize(other, (*limits, Limit(one, high=best.values[one] + programme.units[one] / 4)))
    return best if both is None else replace(both, gap=max(best.gap, both.gap))


def _equal(programme: Programme, one: Solution, other: Solution, column: int) -> bool:
    return bool(abs(one.values[column] - other.values[column]) <= programme.units[column] / 2)
