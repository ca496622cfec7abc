"""Correcting a supernet's scores by models trained alone, and choosing which to train next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from ir.errors import InputError
from nas.goals import Goals
from nas.objectives.flops import Flops
from nas.objectives.quality import Quality
from nas.supernet.correction import Correction
from nas.supernet.finalists import Pair, next_finalist
from nas.trial import Quantity, Trial

GOALS = Goals.of([Quality(steps=1), Flops()], (), None)


def draw(rng: np.random.Generator, count: int) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """Architectures, shared scores that take one mixer for worse than it is, and scores alone."""
    encoded = [
        {"width": int(rng.choice([32, 64])), "mixers": [str(rng.choice(["pooling", "attention"])) for _ in range(3)]}
        for _ in range(count)
    ]
    attentions_N = np.array([point["mixers"].count("attention") for point in encoded])
    alone_N = 4.0 - np.array([point["width"] for point in encoded]) / 64 - 0.3 * attentions_N
    shared_N = 1.5 * alone_N + 0.6 * attentions_N + rng.normal(0, 0.02, count)
    return encoded, shared_N.tolist(), alone_N.tolist()


def faithful_anchors(seed: int) -> list[Pair]:
    """Architectures whose shared scores are those alone."""
    encoded, _, alone = draw(np.random.default_rng(seed), 12)
    return list(zip(encoded, alone, alone, strict=True))


def make_trial(number: int, encoded: Mapping[str, Any], quality: float, flops: float) -> Trial:
    quantities = {"quality": Quantity(quality, "nats", "supernet"), "flops": Quantity(flops, "", "counted")}
    return Trial(number, str(number), encoded, dict, "finished", quantities, (quality, flops))


def test_a_correction_of_faithful_scores_is_their_line() -> None:
    """Where scores alone lie on a line through the shared ones nothing is left for the ensemble."""
    encoded, shared, _ = draw(np.random.default_rng(0), 24)
    line = [0.5 * score - 1 for score in shared]
    correction = Correction.of(encoded[:16], shared[:16], line[:16])
    assert (correction.slope, correction.offset) == pytest.approx((0.5, -1.0))
    assert correction.predict(encoded[16:], shared[16:]).mean_N == pytest.approx(line[16:], abs=1e-6)


def test_a_correction_learns_what_shared_weights_treat_worse() -> None:
    """Shared scores hide what attention is worth; pairs of twenty architectures bring it back."""
    encoded, shared, alone = draw(np.random.default_rng(1), 80)
    correction = Correction.of(encoded[:20], shared[:20], alone[:20])
    before, after = (
        float(np.asarray(kendalltau(scores, alone[20:])[0]))
        for scores in (shared[20:], correction.predict(encoded[20:], shared[20:]).mean_N)
    )
    assert before < 0.7
    assert after > 0.9


def test_scores_that_rank_backwards_are_not_turned_round() -> None:
    """A negative relation is chance or a fault: the line is then level."""
    encoded, shared, _ = draw(np.random.default_rng(2), 8)
    assert Correction.of(encoded, shared, [-score for score in shared]).slope == 0.0


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be corrected"):
        Correction.of([{"width": 1}] * 2, [1.0, 2.0], [1.0, 2.0])


def test_the_next_finalist_adds_most_to_the_front() -> None:
    """With faithful scores: a trial that dominates comes before one that is dominated; none is chosen twice."""
    anchors = faithful_anchors(3)
    points = [(2.0, 2.0), (3.0, 1.0), (1.5, 1.5), (4.0, 4.0)]
    trials = [make_trial(number, anchors[0][0], *point) for number, point in enumerate(points)]
    alone = {0: 2.0}
    chosen: list[int] = []
    while trial := next_finalist(trials, GOALS, "quality", alone, anchors):
        chosen.append(trial.number)
        alone[trial.number] = trial.values["quality"]
    assert chosen == [2, 1, 3]


def test_scores_that_lie_close_together_at_the_good_end_are_told_apart() -> None:
    """Shared scores are the cubes of those alone: a straight line takes the best for no better than the next ones.

    The best trial is beyond what was trained, and dear; another one adds a little in the middle of the front.
    """
    encoded = faithful_anchors(5)[0][0]
    anchors: list[Pair] = [(encoded, float(alone**3), float(alone)) for alone in np.linspace(0.6, 2.0, 12)]
    points = [(0.6, 0.5), (0.0, 0.8), (0.7, 0.485), (2.0, 0.1), (1.9, 1.0), (1.8, 0.9)]
    trials = [make_trial(number, encoded, alone**3, cost) for number, (alone, cost) in enumerate(points)]
    trained = {number: points[number][0] for number in (0, 3, 4, 5)}
    chosen = next_finalist(trials, GOALS, "quality", trained, anchors)
    assert chosen is not None
    assert chosen.number == 1


def test_units_and_direction_of_the_quality_do_not_matter() -> None:
    """Scores in other units, or turned round where more is better, give the same choices; most share the best score."""
    encoded, shared, alone = draw(np.random.default_rng(6), 40)
    shared_N = np.maximum(shared, np.quantile(shared, 0.6))
    costs = np.random.default_rng(7).uniform(1.0, 9.0, 40)
    chosen: set[tuple[int, ...]] = set()
    for factor, direction in ((1.0, "min"), (1e-3, "min"), (1e4, "min"), (-1.0, "max")):
        goals = replace(GOALS, objectives=(replace(GOALS.objectives[0], direction=direction), GOALS.objectives[1]))
        scores_N, alone_N, sign = factor * shared_N, factor * np.array(alone), 1.0 if direction == "min" else -1.0
        anchors = list(zip(encoded[:12], scores_N[:12].tolist(), alone_N[:12].tolist(), strict=True))
        trials = [
            make_trial(n, encoded[n], float(scores_N[n]), float(costs[n])).changed(
                losses=(sign * scores_N[n], costs[n])
            )
            for n in range(12, 40)
        ]
        trained: dict[int, float] = {}
        while len(trained) < 8 and (trial := next_finalist(trials, goals, "quality", trained, anchors)):
            trained[trial.number] = float(alone_N[trial.number])
        chosen.add(tuple(trained))
    assert len(chosen) == 1


def test_infeasible_trials_are_no_finalists() -> None:
    anchors = faithful_anchors(4)
    trial = make_trial(0, anchors[0][0], 1.0, 1.0).changed(violation=0.5)
    assert next_finalist([trial], GOALS, "quality", {}, anchors) is None
