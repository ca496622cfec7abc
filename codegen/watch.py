"""The processor's clock around calls, and the fixed workload that tells how fast the machine is meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def reference_kernel() -> Callable[[], object]:
    """Return the fixed workload that tells how fast the machine is: one thread, in the first-level cache."""
    x = np.linspace(0.0, 1.0, 4096, dtype=np.float32)
    y = np.empty_like(x)

    def run() -> None:
        np.sqrt(x, out=y)
        for _ in range(8):
            np.multiply(y, x, out=y)
            np.add(y, x, out=y)

    return run


def time_call(call: Callable[[], object], group: int = 1) -> float:
    """Return the seconds of a call, averaged over a group of calls."""
    start = time.perf_counter()
    for _ in range(group):
        call()
    return (time.perf_counter() - start) / group


class HostWatch:
    """Times calls that are done when they return."""

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return the call."""
        return call

    def finished(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return the call."""
        return call

    def seconds(self, call: Callable[[], object], group: int = 1) -> float:
        """Return the seconds of a call, averaged over a group of calls."""
        return time_call(call, group)
