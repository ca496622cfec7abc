"""Pareto arithmetic on losses: every column is minimised, every row is one candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Losses: TypeAlias = NDArray[np.float64]

# Points that estimate a volume: a standard error of at most 0.4 % of the box.
_GAIN_POINTS = 16_384


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Tell whether `a` is no worse than `b` in every loss and better in one."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(losses: Losses) -> NDArray[np.bool_]:
    """Mark the rows that no other row dominates; equal rows are all kept.

    Args:
        losses: `[candidates, objectives]`.

    Returns:
        One claim per row.
    """
    kept = np.zeros(len(losses), dtype=bool)
    # In lexicographic order nothing dominates the first row: it stays, and takes all that it dominates away.
    left = np.lexsort(losses.T[::-1])
    while left.size:
        rows = losses[left]
        beaten = np.all(rows >= rows[0], axis=1)
        beaten[0] = True  # one that is not a number is not even equal to itself
        kept[left[beaten & np.all(rows == rows[0], axis=1)]] = True
        kept[left[0]] = True
        left = left[~beaten]
    return kept


def never_dominated(low: Losses, high: Losses) -> NDArray[np.bool_]:
    """Mark the rows that no other row dominates, wherever within their intervals all losses lie.

    Even at its worst such a row is dominated by no other at its best.

    Args:
        low: `[candidates, objectives]`, best ends of the intervals.
        high: Worst ends; equal to `low` where a loss is exact.

    Returns:
        One claim per row; never more rows than `sometimes_non_dominated` marks.
    """
    # Who is always dominated stands behind one that is not: those alone can take a row off the front.
    rows = np.flatnonzero(sometimes_non_dominated(low, high))
    best, worst = low[rows], high[rows]
    certain = np.zeros(len(low), dtype=bool)
    for place, row in enumerate(rows):
        can_dominate = np.all(best <= worst[place], axis=1) & np.any(best < worst[place], axis=1)
        can_dominate[place] = False
        certain[row] = not np.any(can_dominate)
    return certain


def sometimes_non_dominated(low: Losses, high: Losses) -> NDArray[np.bool_]:
    """Mark the rows that no other row dominates for some losses within their intervals.

    At its best such a row is dominated by no other at its worst.

    Args:
        low: `[candidates, objectives]`, best ends of the intervals.
        high: Worst ends; equal to `low` where a loss is exact.

    Returns:
        One claim per row; at least one row is marked where there are any.
    """
    # What any row at its worst dominates, a non-dominated one of the worst ends dominates too.
    front = np.unique(high[non_dominated(high)], axis=0)
    marked = np.ones(len(low), dtype=bool)
    for worst in front:
        marked &= ~(np.all(worst <= low, axis=1) & np.any(worst < low, axis=1))
    return marked


def fronts(losses: Losses, stop_at: int | None = None) -> list[NDArray[np.intp]]:
    """Peel the rows into fronts: the first is non-dominated, the next once the first is gone, and so on.

    Args:
        losses: `[candidates, objectives]`.
        stop_at: Stop once this many rows are placed; None places all.

    Returns:
        Row numbers of each front, ascending.

    Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", section III.A.
    """
    remaining = np.arange(len(losses))
    wanted = len(losses) if stop_at is None else min(stop_at, len(losses))
    peeled: list[NDArray[np.intp]] = []
    while len(losses) - len(remaining) < wanted:
        mask = non_dominated(losses[remaining])
        peeled.append(remaining[mask])
        remaining = remaining[~mask]
    return peeled


def ranks(losses: Losses) -> NDArray[np.intp]:
    """Number the front of each row, 0 for the non-dominated."""
    rank = np.zeros(len(losses), dtype=np.intp)
    for number, rows in enumerate(fronts(losses)):
        rank[rows] = number
    return rank


def crowding_distance(losses: Losses) -> NDArray[np.float64]:
    """Measure how alone each row of one front is; the ends of every objective are infinitely so.

    Args:
        losses: `[candidates, objectives]`, all of one front.

    Returns:
        Sum over objectives of the gap between a row's neighbours, each objective scaled to its range.

    Source: Deb et al. 2002, section III.B.
    """
    count, objectives = losses.shape
    distance = np.zeros(count)
    for column in range(objectives if count else 0):
        order = np.argsort(losses[:, column], kind="stable")
        values = losses[order, column]
        distance[order[[0, -1]]] = np.inf
        spread = values[-1] - values[0]
        if count > 2 and spread > 0:
            distance[order[1:-1]] += (values[2:] - values[:-2]) / spread
    return distance


def hypervolume(losses: Losses, reference: Sequence[float] | Losses) -> float:
    """Measure the volume between the rows and a reference point, exactly, by slicing along the last objective.

    Args:
        losses: `[candidates, objectives]`.
        reference: One value per objective; rows not below it everywhere count for nothing.

    Returns:
        The volume dominated by the rows, at most the box they span with the reference.
    """
    corner = np.asarray(reference, dtype=np.float64)
    inside = losses[np.all(losses < corner, axis=1)]
    if len(inside) == 0:
        return 0.0
    inside = inside[non_dominated(inside)]
    if losses.shape[1] == 1:
        return float(corner[0] - inside[:, 0].min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    tops = np.append(inside[1:, -1], corner[-1])
    volume = 0.0
    for row, top in enumerate(tops):
        thickness = float(top - inside[row, -1])
        if thickness > 0:
            volume += thickness * hypervolume(inside[: row + 1, :-1], corner[:-1])
    return volume


def hypervolume_gains(candidates: Losses, losses: Losses, reference: Sequence[float] | Losses) -> Losses:
    """Measure what each candidate alone would add to a hypervolume.

    Exact for one and two objectives; for more it is estimated from 16,384 points drawn by a fixed generator.

    Args:
        candidates: `[candidates, objectives]`.
        losses: `[rows, objectives]` that are there already.
        reference: One value per objective.

    Returns:
        Added volume per candidate.
    """
    corner = np.asarray(reference, dtype=np.float64)
    inside = losses[np.all(losses < corner, axis=1)]
    front = np.unique(inside[non_dominated(inside)], axis=0)
    if len(corner) == 1:
        best = front[0, 0] if len(front) else corner[0]
        return np.maximum(best - candidates[:, 0], 0.0)
    if len(corner) == 2:
        # Between two neighbours of the front the free region is as high as the left one.
        edges = np.concatenate([[-np.inf], front[:, 0], corner[:1]])
        tops = np.concatenate([corner[1:], front[:, 1]])
        widths = np.maximum(edges[1:] - np.maximum(edges[:-1], candidates[:, :1]), 0.0)
        return np.sum(widths * np.maximum(tops - candidates[:, 1:], 0.0), axis=1)
    return _estimate_gains(candidates, front, corner)


def _estimate_gains(candidates: Losses, front: Losses, corner: Losses) -> Losses:
    """Count the points of the box around everything that a candidate dominates and the front does not."""
    low = np.minimum(np.concatenate([candidates, front]).min(axis=0, initial=np.inf), corner)
    points = low + (corner - low) * np.random.default_rng(0).random((_GAIN_POINTS, len(corner)))
    for row in front:
        points = points[~np.all(points >= row, axis=1)]
    counts = np.array([np.count_nonzero(np.all(points >= row, axis=1)) for row in candidates], dtype=np.float64)
    return counts * float(np.prod(corner - low)) / _GAIN_POINTS
