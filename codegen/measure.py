"""Latency of compiled artifacts on this machine, measured so that the number can be trusted or is marked as noisy.

Protocol: an exclusive lock on the device; a fresh process pinned to as many CPUs as threads; the artifact's self-test;
warm-up; then rounds. In each a fixed reference kernel runs, every model is loaded anew, and each has a turn of single
calls, in rotating order. Where library and arrays of a model happen to lie in memory changes its time by half a percent
and more, which the calls of one loading do not tell: so a round counts as one sample, and the 95 % interval of the
median over rounds (by binomial order statistics) decides when to stop. When the reference kernel's own time drifts, the
machine changed under the measurement.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from codegen import machine, runtime
from codegen.container import read
from codegen.gpu.cuda.timing import GpuTiming
from codegen.gpu.loading import stopwatch
from codegen.manifest import GPU
from codegen.watch import HostWatch, reference_kernel, time_call
from codegen.workers import Worker
from ir.errors import InputError, KernelTimeout, MeasurementError, StorageError

_WARM_UP_CALLS = 5
_WARM_UP_S = 0.1  # lets clocks rise and TVM's workers wake
_SHORTEST_SAMPLE_S = 50e-6  # shorter calls are timed in groups, so that the clock's own 50 ns stay below 0.1 %
_REFERENCES_PER_ROUND = 4
_DRIFT_BLOCKS = 4
_STEADY_RATIO = 1.1  # the reference kernel varies by 2-5 % between blocks on a machine that does nothing else
_SHORTEST_RUN_S = 0.2  # a burst of another process must not be all that was seen
_FEWEST_ROUNDS = 6  # the range of six samples holds the median in 97 % of the cases
_CALLS_PER_TURN = 3
_SLOW_S = 0.1  # a call this long is its own warm-up, and one of them a turn
_TURN_WARM_UP_S = 0.02
_OWN_CPU = 0.95  # interrupts of a quiet machine take less than 1 %
_TIE = 0.005  # medians known to half a percent that still overlap are equal for all that anybody would do with them
_GRACE_S = 60.0  # start of the process, loading and self-test, beyond the time for measuring


@dataclass(frozen=True)
class Latency:
    """One latency measurement.

    Attributes:
        median_ms: Median time of a call, over rounds.
        p10_ms: Tenth percentile of the samples.
        p90_ms: Ninetieth percentile of the samples.
        interval_ms: 95 % confidence interval of the median.
        repeats: Timed samples behind these figures.
        threads: Threads that served a call; the process was pinned to as many CPUs.
        reference_ms: Median time of the reference kernel meanwhile; compare it between measurements.
        reference_ratio: Its slowest quarter of the run over its fastest; 1 on a steady machine.
        noisy: The interval stayed wide, the reference kernel drifted, or others took the CPU.
        started: UTC time at the start, ISO 8601.
        seconds: Duration of the whole measurement.
        machine: `codegen.machine.describe()`, versions included.
        cpu_share: Part of the timed seconds that the calling thread had its CPU; less than 1 where others took it.
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
    cpu_share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which journals and manifests hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Latency:
        """Read the JSON form; keys that this version does not know are left out, older ones lack `cpu_share`."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "interval_ms": tuple(known["interval_ms"])})


def measure_latency(
    artifact_path: str | Path,
    *,
    threads: int | None = None,
    min_rounds: int = 10,
    max_seconds: float = 10.0,
    target_interval: float = 0.02,
    gpu: GpuTiming | None = None,
) -> Latency:
    """Time an artifact on its own inputs; as `measure_together` with one artifact.

    Args:
        artifact_path: The `.nas` file.
        threads: Threads to run on; all CPUs of the process when omitted.
        min_rounds: Rounds to take at least, unless time is up.
        max_seconds: Time for the rounds; what is not narrow by then is marked noisy.
        target_interval: Width of the median's 95 % interval, relative to the median, at which to stop.
        gpu: How models for a GPU are timed; as graphs with a warm cache when omitted.
    """
    [latency] = measure_together(
        [artifact_path],
        threads=threads,
        min_rounds=min_rounds,
        max_seconds=max_seconds,
        target_interval=target_interval,
        gpu=gpu,
    )
    return latency


def measure_together(
    artifact_paths: Sequence[str | Path],
    *,
    threads: int | None = None,
    min_rounds: int = 10,
    max_seconds: float = 20.0,
    target_interval: float = 0.02,
    gpu: GpuTiming | None = None,
) -> list[Latency]:
    """Time several artifacts in turns until the intervals of their medians part.

    A model that is apart from all others sits later rounds out. So do two that overlap still when both intervals are
    narrower than 0.5 %: they are equal.

    Args:
        artifact_paths: The `.nas` files; all of them are in memory at once.
        threads: Threads to run on; all CPUs of the process when omitted.
        min_rounds: Rounds of everyone, unless time is up; six are taken whatever the time.
        max_seconds: Time for the rounds, after which what overlaps stays so.
        target_interval: Width of an interval, relative to its median, above which a model goes on in any case.
        gpu: How models for a GPU are timed: by device events, as graphs with a warm cache when omitted.

    Returns:
        A record for each artifact.

    Raises:
        ArtifactError: One is damaged, not for this machine, or fails its self-test.
        MeasurementError: One computes values that are not finite.
        KernelCrash: One ended the measuring process.
        KernelTimeout: One hangs.
    """
    count = machine.check_threads(threads) if threads is not None else len(machine.available_cpus())
    if min_rounds < _FEWEST_ROUNDS:
        raise InputError("too few rounds", where="min_rounds", expected=f">= {_FEWEST_ROUNDS}", found=str(min_rounds))
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    paths = [str(path) for path in artifact_paths]
    with device_lock("cpu"), pinned_worker(count) as worker:
        # Far more than the time for rounds: six of slow models may take longer.
        timeout_s = 4 * max_seconds + _GRACE_S
        rounds, references, cpu_share = worker.call(
            _measure, paths, count, min_rounds, max_seconds, target_interval, gpu or GpuTiming(), timeout_s=timeout_s
        )
    seconds = (time.monotonic() - clock) / len(paths)
    summaries = [_summarize(own, references, target_interval, count, started, seconds) for own in rounds]
    is_crowded = cpu_share < _OWN_CPU
    return [replace(one, cpu_share=round(cpu_share, 3), noisy=one.noisy or is_crowded) for one in summaries]


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


def unsettled(samples: Sequence[Sequence[float]], target_interval: float) -> list[int]:
    """List whose median is not known well enough: wide intervals, and pairs of intervals that overlap and are no tie.

    Args:
        samples: Samples of each contestant.
        target_interval: Widest interval allowed, relative to the median.
    """
    ends = [median_interval(own) for own in samples]
    known = [narrow_enough(own, _TIE) for own in samples]
    found = {place for place, own in enumerate(samples) if not narrow_enough(own, target_interval)}
    for one, other in itertools.combinations(range(len(samples)), 2):
        overlap = ends[one][0] <= ends[other][1] and ends[other][0] <= ends[one][1]
        if overlap and not (known[one] and known[other]):
            found |= {one, other}
    return sorted(found)


def warm_up(call: Callable[[], object], seconds: float = _WARM_UP_S, fewest: int = _WARM_UP_CALLS) -> int:
    """Run a function for a while and return how many calls make a sample that the clock can resolve."""
    start, calls = time.perf_counter(), 0
    while calls < fewest or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return max(1, math.ceil(_SHORTEST_SAMPLE_S * calls / (time.perf_counter() - start)))


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
    paths: Sequence[str],
    threads: int,
    min_rounds: int,
    max_seconds: float,
    target_interval: float,
    gpu: GpuTiming,
) -> tuple[list[list[list[float]]], list[float], float]:
    """Take the samples of each model by round, in seconds a call; runs in the worker.

    Returns:
        These samples, those of the reference kernel, and the part of the time of turns that this thread had its CPU.
    """
    contestants, reference = [_Contestant(path, threads, gpu) for path in paths], reference_kernel()
    reference_group = warm_up(reference)
    rounds: list[list[list[float]]] = [[] for _ in paths]
    references: list[float] = []
    wall_s = cpu_s = 0.0
    playing, number, start = list(range(len(paths))), 0, time.perf_counter()
    while playing:
        references.extend(time_call(reference, reference_group) for _ in range(_REFERENCES_PER_ROUND))
        calls = {place: contestants[place].load() for place in playing}
        first = number % len(playing)
        for place in playing[first:] + playing[:first]:
            wall, cpu = time.perf_counter(), time.thread_time()
            rounds[place].append(contestants[place].take_turn(calls[place]))
            wall_s, cpu_s = wall_s + time.perf_counter() - wall, cpu_s + time.thread_time() - cpu
        number += 1
        elapsed_s = time.perf_counter() - start
        if number >= _FEWEST_ROUNDS and elapsed_s >= max_seconds:
            break
        if number >= min_rounds and elapsed_s >= _SHORTEST_RUN_S:
            playing = unsettled([[float(np.median(turn)) for turn in own] for own in rounds], target_interval)
    on_gpu = any(contestant.on_gpu for contestant in contestants)  # there the processor may well wait
    return rounds, references, 1.0 if on_gpu else cpu_s / wall_s


class _Contestant:
    """A sound model that can be loaded again and again, each time at other places in memory."""

    def __init__(self, path: str, threads: int, gpu: GpuTiming) -> None:
        self._contents, self._threads = read(path), threads
        self.on_gpu = GPU in self._contents.manifest["target"]
        self._watch = stopwatch(gpu) if self.on_gpu else HostWatch()
        runtime.check_machine(self._contents)
        model = runtime.LoadedModel(self._contents, threads)
        _check_finite(model)
        model.self_test()
        call = self._watch.prepare(model.prepare())
        self._is_slow = self._watch.seconds(call) >= _SLOW_S
        self._group = 1 if self._is_slow else warm_up(self._watch.finished(call))

    def load(self) -> Callable[[], object]:
        """Load the model anew and return its bare call."""
        return self._watch.prepare(runtime.LoadedModel(self._contents, self._threads).prepare())

    def take_turn(self, call: Callable[[], object]) -> list[float]:
        """Return the seconds of some calls."""
        if self._is_slow:
            call()
            return [self._watch.seconds(call)]
        warm_up(self._watch.finished(call), _TURN_WARM_UP_S, 2)
        return [self._watch.seconds(call, self._group) for _ in range(_CALLS_PER_TURN)]


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
    rounds: Sequence[Sequence[float]],
    references: Sequence[float],
    target_interval: float,
    threads: int,
    started: str,
    seconds: float,
) -> Latency:
    samples_ms = np.concatenate(rounds) * 1e3
    rounds_ms = np.array([np.median(turn) for turn in rounds]) * 1e3
    references_ms = np.asarray(references) * 1e3
    blocks = [float(np.median(block)) for block in np.array_split(references_ms, _DRIFT_BLOCKS) if block.size]
    ratio = max(blocks) / min(blocks)
    p10_ms, p90_ms = (float(value) for value in np.percentile(samples_ms, (10, 90)))
    return Latency(
        median_ms=float(np.median(rounds_ms)),
        p10_ms=p10_ms,
        p90_ms=p90_ms,
        interval_ms=median_interval(rounds_ms),
        repeats=samples_ms.size,
        threads=threads,
        reference_ms=float(np.median(references_ms)),
        reference_ratio=ratio,
        noisy=ratio > _STEADY_RATIO or not narrow_enough(rounds_ms, target_interval),
        started=started,
        seconds=round(seconds, 3),
        machine=machine.describe(),
    )
