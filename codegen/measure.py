"""Latency of a compiled artifact on this machine, measured so that the number can be trusted or is marked as noisy.

Protocol: an exclusive lock on the device; a fresh process pinned to as many CPUs as threads; the artifact's self-test;
warm-up; then single calls are timed until the 95 % interval of their median (by binomial order statistics) is narrower
than a given share of the median, or time is up. A fixed reference kernel runs between the calls all the while: when its
own time drifts, the machine changed under the measurement.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from codegen import machine, runtime
from codegen.workers import Worker
from ir.errors import InputError, KernelTimeout, MeasurementError, StorageError

_WARM_UP_CALLS = 5
_WARM_UP_S = 0.1  # lets clocks rise and TVM's workers wake
_SHORTEST_SAMPLE_S = 50e-6  # shorter calls are timed in groups, so that the clock's own 50 ns stay below 0.1 %
_CALLS_PER_REFERENCE = 4
_DRIFT_BLOCKS = 4
_STEADY_RATIO = 1.1  # the reference kernel varies by 2-5 % between blocks on a machine that does nothing else
_SHORTEST_RUN_S = 0.2  # a burst of another process must not be all that was seen
_GRACE_S = 60.0  # start of the process, loading and self-test, beyond the time for measuring


@dataclass(frozen=True)
class Latency:
    """One latency measurement.

    Attributes:
        median_ms: Median time of a call.
        p10_ms: Tenth percentile.
        p90_ms: Ninetieth percentile.
        interval_ms: 95 % confidence interval of the median.
        repeats: Timed samples behind these figures.
        threads: Threads that served a call; the process was pinned to as many CPUs.
        reference_ms: Median time of the reference kernel meanwhile; compare it between measurements.
        reference_ratio: Its slowest quarter of the run over its fastest; 1 on a steady machine.
        noisy: The interval stayed wide or the reference kernel drifted.
        started: UTC time at the start, ISO 8601.
        seconds: Duration of the whole measurement.
        machine: `codegen.machine.describe()`, versions included.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    interval_ms: tuple[float, float]
    repeats: int
    threads: int
    reference_ms: float
    reference_ratio: float
    noisy: bool
    started: str
    seconds: float
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which journals and manifests hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latency:
        """Read the JSON form; keys that this version does not know are left out."""
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{**known, "interval_ms": tuple(known["interval_ms"])})


def measure_latency(
    artifact_path: str | Path,
    *,
    threads: int | None = None,
    min_repeats: int = 20,
    max_seconds: float = 10.0,
    target_interval: float = 0.02,
) -> Latency:
    """Time an artifact on its own inputs.

    Args:
        artifact_path: The `.nas` file.
        threads: Threads to run on; all CPUs of the process when omitted.
        min_repeats: Samples to take at least.
        max_seconds: Time for the samples; what is not narrow by then is marked noisy.
        target_interval: Width of the median's 95 % interval, relative to the median, at which to stop.

    Raises:
        ArtifactError: The artifact is damaged, not for this machine, or fails its self-test.
        MeasurementError: It computes values that are not finite.
        KernelCrash: It ended the measuring process.
        KernelTimeout: It hangs.
    """
    count = machine.check_threads(threads) if threads is not None else len(machine.available_cpus())
    if min_repeats < 20:
        raise InputError(
            "too few repeats for an interval", where="min_repeats", expected=">= 20", found=str(min_repeats)
        )
    started, clock = datetime.now(timezone.utc), time.monotonic()
    with device_lock("cpu"), pinned_worker(count) as worker:
        # Twice the time: the first samples may be cut only after a call, however long that takes.
        timeout_s = 2 * max_seconds + _GRACE_S
        samples, references = worker.call(
            _measure, str(artifact_path), count, min_repeats, max_seconds, target_interval, timeout_s=timeout_s
        )
    seconds = time.monotonic() - clock
    return _summarize(samples, references, target_interval, count, started.isoformat(timespec="seconds"), seconds)


def pinned_worker(
    threads: int,
    *,
    first: int = 0,
    preload: Sequence[str] = ("codegen.measure",),
    without: Sequence[str] = ("torch",),
    environment: Mapping[str, str] | None = None,
) -> Worker:
    """Return a worker process on `threads` CPUs whose libraries all use that many threads.

    Args:
        threads: CPUs and threads.
        first: Place of the first of these CPUs in `machine.available_cpus()`.
        preload: Modules that the process imports when it starts.
        without: Modules that it never imports; `tvm_ffi` alone would load torch, for nothing here.
        environment: Further variables of the process.
    """
    pools = ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables = {**dict.fromkeys(pools, str(threads)), "TVM_BIND_THREADS": "0", **(environment or {})}
    cpus = machine.available_cpus()[first : first + threads]
    return Worker(cpus=cpus, environment=variables, preload=preload, without=without)


@contextmanager
def device_lock(device: str, timeout_s: float | None = None) -> Iterator[None]:
    """Hold a device exclusively, across all processes of this user.

    Args:
        device: Name of the device, e.g. `cpu`.
        timeout_s: How long to wait for other measurements; for ever when None.

    Raises:
        KernelTimeout: Another measurement kept the device.
        StorageError: The cache folder cannot be written.
    """
    path = machine.cache_directory() / "locks" / f"{device}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        hint = "set NAS_CACHE_DIR to a folder that can be written"
        raise StorageError("cannot lock the device", where=str(path), found=error.strerror, hint=hint) from error
    try:
        _acquire(descriptor, device, timeout_s)
        yield
    finally:
        os.close(descriptor)


def median_interval(samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, without assuming a distribution.

    The number of samples below the true median is binomial(n, 1/2); its normal approximation with continuity
    correction, exact to a rank from n = 20 on, gives the ranks of the bounds.

    Source: Conover, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = np.sort(np.asarray(samples))
    reach = 0.98 * math.sqrt(ordered.size)
    low = max(0, math.floor((ordered.size - 1) / 2 - reach))
    return float(ordered[low]), float(ordered[ordered.size - 1 - low])


def narrow_enough(samples: Sequence[float] | np.ndarray, target_interval: float) -> bool:
    """Tell whether the median's interval is narrower than a share of the median."""
    low, high = median_interval(samples)
    return high - low <= target_interval * float(np.median(samples))


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


def warm_up(call: Callable[[], object], seconds: float = _WARM_UP_S, fewest: int = _WARM_UP_CALLS) -> int:
    """Run a function for a while and return how many calls make a sample that the clock can resolve."""
    start, calls = time.perf_counter(), 0
    while calls < fewest or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return max(1, math.ceil(_SHORTEST_SAMPLE_S * calls / (time.perf_counter() - start)))


def time_call(call: Callable[[], object], group: int = 1) -> float:
    """Return the seconds of a call, averaged over a group of calls."""
    start = time.perf_counter()
    for _ in range(group):
        call()
    return (time.perf_counter() - start) / group


def _acquire(descriptor: int, device: str, timeout_s: float | None) -> None:
    if timeout_s is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            raise KernelTimeout(
                "another measurement holds the device", where=device, expected=f"free in {timeout_s:g} s"
            )
        time.sleep(0.02)


def _measure(
    path: str, threads: int, min_repeats: int, max_seconds: float, target_interval: float
) -> tuple[list[float], list[float]]:
    """Take the samples, in seconds a call, and the reference kernel's; runs in the worker process."""
    model = runtime.load(path, threads=threads, self_test=False)
    _check_finite(model)
    model.self_test()
    call, reference = model.prepare(), reference_kernel()
    group, reference_group = warm_up(call), warm_up(reference)
    samples: list[float] = []
    references: list[float] = []
    start = time.perf_counter()
    while True:
        references.append(time_call(reference, reference_group))
        call()  # untimed: it brings back to the caches what the reference kernel drove out
        samples.extend(time_call(call, group) for _ in range(_CALLS_PER_REFERENCE))
        elapsed_s = time.perf_counter() - start
        if elapsed_s >= max_seconds:
            return samples, references
        enough = len(samples) >= min_repeats and elapsed_s >= _SHORTEST_RUN_S
        if enough and narrow_enough(samples, target_interval):
            return samples, references


def _check_finite(model: runtime.LoadedModel) -> None:
    outcome = model(**model.example_inputs())
    results = outcome if isinstance(outcome, dict) else {model.outputs[0].name: outcome}
    for name, array in results.items():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise MeasurementError(
                "the compiled model computes values that are not finite",
                where=f"output '{name}'",
                expected="finite values",
                found=f"{bad} of {array.size} are NaN or infinite",
            )


def _summarize(
    samples: list[float],
    references: list[float],
    target_interval: float,
    threads: int,
    started: str,
    seconds: float,
) -> Latency:
    samples_ms = np.asarray(samples) * 1e3
    references_ms = np.asarray(references) * 1e3
    blocks = [float(np.median(block)) for block in np.array_split(references_ms, _DRIFT_BLOCKS) if block.size]
    ratio = max(blocks) / min(blocks)
    p10_ms, median_ms, p90_ms = (float(value) for value in np.percentile(samples_ms, (10, 50, 90)))
    return Latency(
        median_ms=median_ms,
        p10_ms=p10_ms,
        p90_ms=p90_ms,
        interval_ms=median_interval(samples_ms),
        repeats=len(samples),
        threads=threads,
        reference_ms=float(np.median(references_ms)),
        reference_ratio=ratio,
        noisy=ratio > _STEADY_RATIO or not narrow_enough(samples_ms, target_interval),
        started=started,
        seconds=round(seconds, 3),
        machine=machine.describe(),
    )
