"""Whether a supernet ranks architectures as training each alone would: anchors, Kendall's tau and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from ir.errors import InputError

if TYPE_CHECKING:
    from nas.supernet.module import Supernet
    from nas.tasks.base import Task
    from nas.training.budget import Budget, TrainOptions
    from searchspaces.architecture import Architecture
    from searchspaces.space import Space

ANCHORS: Final = 12  # architectures trained alone before a search may rank by a supernet
LEAST_TAU: Final = 0.39
"""Below it a search trains every candidate instead. Twelve anchors in random order reach it with a probability of 4 %
(26 of 66 pairs more agree than differ); winners are chosen by a correction that does not need more, see `correction`.
"""

_ANCHOR_STREAM: Final = 7  # apart from the streams of training and of proposals
_BOOTSTRAP_STREAM: Final = 8
_RESAMPLES: Final = 1000
_LEVEL: Final = 0.95

Heard: TypeAlias = Callable[[Sequence[float]], None]
"""Called with the scores of the anchors that are trained."""


@dataclass(frozen=True)
class Audit:
    """Two scores for each anchor, and how well their orders agree.

    Attributes:
        supernet: Scores with the shared weights, in the task's metric.
        alone: Scores of the same architectures trained alone.
        tau: Kendall's tau-b between the two.
        interval: Its 95 % interval over resampled anchors.
        threshold: Smallest tau with which the supernet may rank.
    """

    supernet: tuple[float, ...]
    alone: tuple[float, ...]
    tau: float
    interval: tuple[float, float]
    threshold: float = LEAST_TAU

    @property
    def passes(self) -> bool:
        """Whether the supernet ranks well enough to be used."""
        return self.tau >= self.threshold

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "at least" if self.passes else "below"
        return (
            f"Kendall tau {self.tau:.2f} (95 % interval {low:.2f} to {high:.2f}) between supernet and stand-alone "
            f"training of {len(self.alone)} anchors, {verdict} the {self.threshold:g} that ranking asks for"
        )


def audit_supernet(
    supernet: Supernet,
    task: Task,
    anchors: Sequence[Architecture],
    budget: Budget,
    *,
    seed: int,
    options: TrainOptions | None = None,
    threads: int | None = None,
    threshold: float = LEAST_TAU,
    known: Sequence[float] = (),
    heard: Heard | None = None,
) -> Audit:
    """Train anchors alone and compare with what the supernet says of them.

    Args:
        supernet: A trained supernet.
        task: Data and yardstick.
        anchors: Architectures to train, at least 3.
        budget: How long to train each.
        seed: Seed of the trainings and of the interval.
        options: Optimiser settings of the trainings.
        threads: Torch threads while training.
        threshold: Smallest tau with which the supernet may rank.
        known: Scores of the first anchors, which an interrupted audit has trained.
        heard: Called after each anchor with all scores so far.

    Raises:
        InputError: Too few anchors.
        NonFiniteLoss: An anchor's training broke down.
    """
    from nas.train import train

    if len(anchors) < 3:
        raise InputError("too few anchors to rank", where="anchors", expected="at least 3", found=str(len(anchors)))
    shared = [supernet.evaluate(anchor, task).quality for anchor in anchors]
    alone = list(known[: len(anchors)])
    for number, anchor in enumerate(anchors[len(alone) :], len(alone)):
        result = train(anchor, task, budget, seed=seed, trial=number, options=options, threads=threads)
        alone.append(result.quality)
        if heard is not None:
            heard(tuple(alone))
    tau, interval = kendall_interval(shared, alone, seed=seed)
    return Audit(tuple(shared), tuple(alone), tau, interval, threshold)


def draw_anchors(
    space: Space, count: int, *, seed: int, is_excluded: Callable[[Architecture], bool] | None = None
) -> list[Architecture]:
    """Draw different architectures at random.

    Args:
        space: Where from.
        count: How many.
        seed: Decides which.
        is_excluded: Tells which are not to be taken.

    Raises:
        InputError: There are not so many.
    """
    rng = np.random.default_rng([seed, _ANCHOR_STREAM])
    drawn: dict[Architecture, None] = {}
    for _ in range(100 * count):
        if len(drawn) == count:
            break
        candidate = space.sample(rng)
        if is_excluded is None or not is_excluded(candidate):
            drawn[candidate] = None
    if len(drawn) < count:
        raise InputError(
            "the space has too few architectures to audit a supernet",
            where=space.name,
            expected=f"{count} anchors",
            found=f"{len(drawn)}",
        )
    return list(drawn)


def kendall_interval(
    first: Sequence[float], second: Sequence[float], *, seed: int
) -> tuple[float, tuple[float, float]]:
    """Kendall's tau-b of two scores and its 95 % interval, by resampling the pairs.

    Args:
        first: Scores.
        second: Scores of the same things.
        seed: Seed of the resampling.

    Returns:
        tau, 0 where all scores of a side are equal, and the ends of its interval.
    """
    from scipy.stats import kendalltau

    pairs = np.stack([first, second])

    def tau_of(chosen: np.ndarray) -> float:
        tau = float(np.asarray(kendalltau(*chosen)[0]))
        return tau if math.isfinite(tau) else 0.0

    rng = np.random.default_rng([seed, _BOOTSTRAP_STREAM])
    count = pairs.shape[1]
    taus = [tau_of(pairs[:, rng.integers(count, size=count)]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(taus, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return tau_of(pairs), (float(low), float(high))
