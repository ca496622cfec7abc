"""An artifact timed beside torch eager, torch.compile, ONNX Runtime and OpenVINO, in one process, in turns.

All of them run the same graph with the same parameters on the same inputs and the same number of threads. In each
round each one has its turn of a few calls, in rotating order, after the threads of the one before have gone to sleep;
what the machine does meanwhile hits all of them alike, so ratios are taken round by round. A peer whose outputs
differ ends the comparison: there is no point in timing another function.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen import container, machine, runtime
from codegen.container import relative_error
from codegen.measure import device_lock, median_interval, pinned_worker, time_call, warm_up
from ir.errors import InputError, VerificationError, did_you_mean

TOLERANCE = 1e-4  # of the output's scale, in float32
_ROUNDS = 20  # the fewest from which an interval of the median follows
_TURN_S = 0.02
_LONGEST_REST_S = 0.5  # TVM's workers look for work some 0.2 s before they sleep, others a few milliseconds
_COMPILE_LIMIT_S = 900.0
_SELF = "nas"


PEERS: Mapping[str, tuple[str, ...]] = {
    "eager": ("torch",),
    "compile": ("torch",),
    "onnxruntime": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxscript", "openvino"),
}
"""What must be installed for each peer."""


def bench(
    artifact_path: str | Path, peers: Sequence[str], threads: int | None = None, *, max_seconds: float = 120.0
) -> dict[str, Any]:
    """Time an artifact beside its peers.

    Args:
        artifact_path: The `.nas` file.
        peers: Names out of `PEERS`.
        threads: Threads for everyone; all CPUs of the process when omitted.
        max_seconds: Time for the rounds; at least three are run.

    Returns:
        `{"threads", "machine", "results": {name: result}}`; the artifact's own result is named `nas`. A result has a
        `status`: `ok` with figures, where `ratio` is the peer's time over the artifact's, `not installed`, or `failed`.

    Raises:
        InputError: No such peer.
        VerificationError: A peer computes something else.
    """
    for name in peers:
        if name not in PEERS:
            known = ", ".join(PEERS)
            raise InputError(
                "unknown peer", where="--against", expected=known, found=name, hint=did_you_mean(name, PEERS)
            )
    count = machine.check_threads(threads) if threads is not None else len(machine.available_cpus())
    with device_lock("cpu"), pinned_worker(count, preload=("codegen.peers",), without=()) as worker:
        timeout_s = _COMPILE_LIMIT_S + 2 * max_seconds
        results = worker.call(_bench, str(artifact_path), list(peers), count, max_seconds, timeout_s=timeout_s)
    return {"artifact": str(artifact_path), "threads": count, "machine": machine.describe(), "results": results}


def _bench(path: str, peers: list[str], threads: int, max_seconds: float) -> dict[str, dict[str, Any]]:
    """Prepare everyone, compare outputs, run the rounds; runs in the worker process."""
    model = runtime.load(path, threads=threads)
    inputs = model.example_inputs()
    calls: dict[str, Callable[[], Any]] = {_SELF: model.prepare()}
    results: dict[str, dict[str, Any]] = {_SELF: {"status": "ok", "max_error": 0.0}}
    missing = _missing(peers)
    for name, parts in missing.items():
        if parts:
            results[name] = {"status": "not installed", "reason": f"missing: {', '.join(parts)}"}
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        for name, outcome in _prepare(path, [name for name in peers if not missing[name]], inputs, threads, folder):
            if isinstance(outcome, str):
                results[name] = {"status": "failed", "reason": outcome}
                continue
            calls[name], outputs = outcome
            results[name] = {"status": "ok", "max_error": _compare(name, outputs(), model.expected_outputs())}
        rounds = _run_rounds(calls, max_seconds)
    for name, times_s in rounds.items():
        results[name] |= _figures(np.asarray(times_s), np.asarray(rounds[_SELF]))
    return results


def _missing(peers: Sequence[str]) -> dict[str, list[str]]:
    """List for each peer the modules that are not installed."""
    return {name: [part for part in PEERS[name] if importlib.util.find_spec(part) is None] for name in peers}


def _prepare(
    path: str, peers: list[str], inputs: Mapping[str, np.ndarray], threads: int, folder: str
) -> Iterator[tuple[str, Any]]:
    """Yield each peer with its call and the function that fetches its outputs, or with the reason why it cannot run."""
    if not peers:
        return
    runners = importlib.import_module("codegen.peer_runners")  # imports torch
    module = runners.Positional(container.read(path), threads)
    for name in peers:
        try:
            call, outputs = runners.RUNNERS[name](module, inputs, threads, Path(folder))
            call()
        except Exception as error:  # noqa: BLE001  # whatever another library raises, it cannot run this model
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            yield name, (call, outputs)


def _compare(name: str, found: Sequence[np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    worst = 0.0
    for array, (output, right) in zip(found, expected.items(), strict=True):
        error = relative_error(np.asarray(array), right) if np.shape(array) == right.shape else float("inf")
        if not error <= TOLERANCE:
            raise VerificationError(
                f"{name} computes something else than the artifact, so they are not compared",
                where=f"output '{output}'",
                expected=f"a difference of at most {TOLERANCE:g} of the output's scale",
                found=f"{error:g}",
            )
        worst = max(worst, error)
    return worst


def _run_rounds(calls: Mapping[str, Callable[[], Any]], max_seconds: float) -> dict[str, list[float]]:
    """Give everyone a turn in each round.

    Returns:
        The median seconds of a call for each round.
    """
    groups = {name: max(3, warm_up(call), int(_TURN_S / time_call(call))) for name, call in calls.items()}
    names = list(calls)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    start = time.monotonic()
    for number in range(_ROUNDS):
        if number >= 3 and time.monotonic() - start > max_seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _rest()
            time_call(calls[name], 2)
            rounds[name].append(float(np.median([time_call(calls[name]) for _ in range(groups[name])])))
    return rounds


def _rest() -> None:
    """Wait until no thread of this process is looking for work any more."""
    deadline = time.monotonic() + _LONGEST_REST_S
    while time.monotonic() < deadline:
        used = time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < 0.0005:
            return


def _figures(times_s: np.ndarray, own_s: np.ndarray) -> dict[str, Any]:
    ratios = times_s / own_s
    p10, median, p90 = (float(value) * 1e3 for value in np.percentile(times_s, (10, 50, 90)))
    low, high = median_interval(times_s * 1e3)
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "interval_ms": (low, high),
        "rounds": len(times_s),
        "ratio": float(np.median(ratios)),
        "ratio_interval": median_interval(ratios),
    }
