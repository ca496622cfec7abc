"""Timing several functions against each other: in turns, in one process, in rounds.

In each round each function has its turn of a few calls, in rotating order, after the threads of the one before have
gone to sleep; what the machine does meanwhile hits all of them alike, so ratios can be taken round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from codegen.measure import median_interval, time_call

FEWEST: Final = 5
"""Rounds that even the slowest function gets."""

_TURN_S: Final = 0.02
_WARM_UP_CALLS: Final = 5
_WARM_UP_S: Final = 0.1
_SLOW_S: Final = 0.1  # a call this long evicts and refills the caches by itself: it is its own warm-up
_LONGEST_REST_S: Final = 0.5  # TVM's workers look for work some 0.2 s before they sleep, others a few milliseconds


def run_rounds(
    calls: Mapping[str, Callable[[], object]], max_seconds: float, *, rounds: int = 20, fewest: int = FEWEST
) -> dict[str, list[float]]:
    """Give everyone a turn in each round.

    Everyone may use an equal share of the time. Who has used it up sits the later rounds out, after the fewest rounds
    that an interval can be had from; so a slow function costs the fast ones no rounds.

    Args:
        calls: Functions by name.
        max_seconds: Time for all of them.
        rounds: Most rounds.
        fewest: Rounds that everyone gets however long they take.

    Returns:
        The median seconds of a call for each round that a function took part in, from the first on.
    """
    turns = {name: _Turn(call) for name, call in calls.items()}
    names, share_s = list(calls), max_seconds / len(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        playing = [name for name in names if number < fewest or turns[name].spent_s < share_s]
        if not playing:
            break
        first = number % len(playing)
        for name in playing[first:] + playing[:first]:
            rest()
            times[name].append(turns[name].take())
    return times


def rest() -> None:
    """Wait until no thread of this process is looking for work any more."""
    deadline = time.monotonic() + _LONGEST_REST_S
    while time.monotonic() < deadline:
        used = time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < 0.0005:
            return


def figures(times_s: Sequence[float], own_s: Sequence[float]) -> dict[str, Any]:
    """Sum up the rounds of one function.

    Args:
        times_s: Its seconds, round by round.
        own_s: Seconds of the function that it is set against.

    Returns:
        Milliseconds (`median_ms`, `p10_ms`, `p90_ms`, `interval_ms` of the median), `rounds`, and of its time over the
        other's `ratio`, the median of the ratios within rounds, with `ratio_interval`.
    """
    shared = min(len(times_s), len(own_s))
    ratios = np.asarray(times_s[:shared]) / np.asarray(own_s[:shared])
    times_ms = np.asarray(times_s) * 1e3
    p10, median, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "interval_ms": median_interval(times_ms),
        "rounds": len(times_s),
        "ratio": float(np.median(ratios)),
        "ratio_interval": median_interval(ratios),
    }


class _Turn:
    """One function, warmed up, with the number of calls that make its turn."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        once_s = time_call(call)
        if once_s < _SLOW_S:
            start, calls = time.perf_counter(), 0
            while calls < _WARM_UP_CALLS or time.perf_counter() - start < _WARM_UP_S:
                call()
                calls += 1
            once_s = (time.perf_counter() - start) / calls
        self._slow = once_s >= _SLOW_S
        self._count = 1 if self._slow else max(3, int(_TURN_S / once_s))
        self.spent_s = 0.0

    def take(self) -> float:
        """Return the median seconds of the turn's calls, each timed alone."""
        start = time.perf_counter()
        if not self._slow:
            time_call(self._call, 2)
        median = float(np.median([time_call(self._call) for _ in range(self._count)]))
        self.spent_s += time.perf_counter() - start
        return median
