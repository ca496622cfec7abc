"""Energy of compiled models, by the counters of the processor that Linux shows (RAPL).

    found = measure_energy("model.nas")
    print(found.median_j, found.interval_j)

The counters are those of whole packages and their memory: what else runs on them is in the figure, idle power too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegen import machine, runtime
from codegen.container import read
from codegen.manifest import GPU
from codegen.measure import device_lock, median_interval, pinned_worker, warm_up
from ir.errors import MeasurementError, TargetUnavailable

POWERCAP = Path("/sys/class/powercap")
_SHORTEST_ROUND_S = 0.1  # counters move once a millisecond: one step is a percent of a round
_FEWEST_ROUNDS = 6  # the range of six samples holds the median in 97 % of the cases
_GRACE_S = 60.0


@dataclass(frozen=True)
class Counter:
    """A counter of energy.

    Attributes:
        path: Its folder.
        name: What it counts, such as `package-0`.
        span_uj: Largest value, microjoules, after which it begins at 0 again.
    """

    path: Path
    name: str
    span_uj: int

    def read_uj(self) -> int:
        """Return its value, microjoules."""
        return int((self.path / "energy_uj").read_text())

    def used_uj(self, before: int, after: int) -> int:
        """Return what was used between two values; it may have begun anew once."""
        return after - before if after >= before else after - before + self.span_uj + 1


@dataclass(frozen=True)
class Energy:
    """What one call of a model used.

    Attributes:
        median_j: Median over rounds, joules a call.
        interval_j: 95 % confidence interval of the median.
        calls: Calls behind it.
        rounds: Rounds behind it.
        idle_w: Power of the same counters before the calls, watts; it is part of the figure.
        threads: Threads that served a call.
        counters: Names of the counters.
        machine: Name of the processor.
    """

    median_j: float
    interval_j: tuple[float, float]
    calls: int
    rounds: int
    idle_w: float
    threads: int
    counters: tuple[str, ...]
    machine: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def find_counters(root: Path = POWERCAP) -> list[Counter]:
    """Return the counters of all packages, and of memory where it has its own.

    Parts of a package are left out, and so is the whole platform, which holds the packages.

    Args:
        root: Folder of the kernel's counters.

    Raises:
        TargetUnavailable: There is none, or this user may not read it.
    """
    found: list[Counter] = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            span_uj = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith(("package", "dram")):
            found.append(Counter(folder, name, span_uj))
    if not found:
        raise _unavailable("none", str(root), "optimise latency or flops instead; virtual machines show no counter")
    closed = [counter.path / "energy_uj" for counter in found if not os.access(counter.path / "energy_uj", os.R_OK)]
    if closed:
        raise _unavailable("a counter that this user may not read", str(closed[0]), f"sudo chmod a+r {closed[0]}")
    return found


def measure_energy(
    artifact_path: str | Path, *, threads: int | None = None, seconds: float = 2.0, root: Path = POWERCAP
) -> Energy:
    """Count the energy of an artifact on its own inputs, in a pinned process, while nothing else is measured.

    Args:
        artifact_path: The `.nas` file.
        threads: Threads to run on; all CPUs of the process when omitted.
        seconds: Time for the rounds; six are taken whatever the time.
        root: Folder of the kernel's counters.

    Raises:
        TargetUnavailable: There is no counter, or the model is for a GPU.
        ArtifactError: The file is damaged, not for this machine, or fails its self-test.
        MeasurementError: The counters stand still.
        KernelCrash: The model ended the measuring process.
        KernelTimeout: The model hangs.
    """
    counters = find_counters(root)
    count = machine.check_threads(threads) if threads is not None else len(machine.available_cpus())
    with device_lock("cpu"), pinned_worker(count, preload=("codegen.energy",)) as worker:
        timeout_s = 4 * seconds + _GRACE_S
        rounds, calls, idle_w = worker.call(_measure, str(artifact_path), count, seconds, counters, timeout_s=timeout_s)
    return Energy(
        median_j=float(np.median(rounds)),
        interval_j=median_interval(rounds),
        calls=calls,
        rounds=len(rounds),
        idle_w=idle_w,
        threads=count,
        counters=tuple(counter.name for counter in counters),
        machine=machine.describe()["cpu"],
    )


def used_j(counters: Sequence[Counter], call: Callable[[], object]) -> float:
    """Return the energy that all counters counted during a call, joules."""
    before = [counter.read_uj() for counter in counters]
    call()
    after = [counter.read_uj() for counter in counters]
    return sum(counter.used_uj(*ends) for counter, *ends in zip(counters, before, after, strict=True)) / 1e6


def take_rounds(
    counters: Sequence[Counter], call: Callable[[], object], group: int, seconds: float
) -> tuple[list[float], int]:
    """Return joules a call in each round, and the number of calls.

    Args:
        counters: What to read.
        call: The model.
        group: Calls in a round.
        seconds: Time for all rounds; six are taken whatever the time.

    Raises:
        MeasurementError: The counters stand still.
    """
    rounds: list[float] = []
    start = time.perf_counter()
    while len(rounds) < _FEWEST_ROUNDS or time.perf_counter() - start < seconds:
        rounds.append(used_j(counters, lambda: [call() for _ in range(group)]) / group)
    if max(rounds) == 0:
        raise MeasurementError("the counters of energy stand still", where=str(counters[0].path), found="0 J")
    return rounds, group * len(rounds)


def _measure(path: str, threads: int, seconds: float, counters: Sequence[Counter]) -> tuple[list[float], int, float]:
    """Return joules a call by round, the number of calls, and the idle power in watts; runs in the worker."""
    contents = read(path)
    if GPU in contents.manifest["target"]:
        raise _unavailable("a model for a GPU", path, "measure its latency instead")
    runtime.check_machine(contents)
    model = runtime.LoadedModel(contents, threads)
    model.self_test()
    idle_w = used_j(counters, lambda: time.sleep(_SHORTEST_ROUND_S)) / _SHORTEST_ROUND_S
    call = model.prepare()
    warm_up(call)
    start = time.perf_counter()
    call()
    group = max(1, round(_SHORTEST_ROUND_S / (time.perf_counter() - start)))
    rounds, calls = take_rounds(counters, call, group, seconds)
    return rounds, calls, idle_w


def _unavailable(found: str, where: str, hint: str) -> TargetUnavailable:
    return TargetUnavailable(
        "energy cannot be measured here",
        where=where,
        expected="a readable counter of the processor's packages (RAPL)",
        found=found,
        hint=hint,
    )
