"""An artifact timed beside torch eager, torch.compile, ONNX Runtime and OpenVINO, in one process, in turns.

All of them run the same graph with the same parameters on the same inputs and the same number of threads, in the turns
of `codegen.rounds`. A peer whose outputs differ ends the comparison: there is no point in timing another function.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen import container, machine, runtime
from codegen.container import TOLERANCES, relative_error
from codegen.measure import device_lock, pinned_worker
from codegen.rounds import figures, run_rounds
from ir.errors import InputError, VerificationError, did_you_mean
from ir.graph import Graph
from ir.passes.lower_precision import precision_of
from ir.serialize import graph_from_json

_ROUNDS = 20  # the fewest from which an interval of the median follows
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
        max_seconds: Time for the rounds; everyone has at least three.

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
    inputs, contents = model.example_inputs(), container.read(path)
    graph = graph_from_json(contents.graph_json)
    tolerance = TOLERANCES[precision_of(graph)]
    calls: dict[str, Callable[[], Any]] = {_SELF: model.prepare()}
    results: dict[str, dict[str, Any]] = {_SELF: {"status": "ok", "max_error": 0.0}}
    missing = not_installed(peers)
    for name, parts in missing.items():
        if parts:
            results[name] = {"status": "not installed", "reason": f"missing: {', '.join(parts)}"}
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        present = [name for name in peers if not missing[name]]
        for name, outcome in _prepare(graph, contents.parameters, present, inputs, threads, folder):
            if isinstance(outcome, str):
                results[name] = {"status": "failed", "reason": outcome}
                continue
            calls[name], outputs = outcome
            results[name] = {
                "status": "ok",
                "max_error": _compare(name, outputs(), model.expected_outputs(), tolerance),
            }
        times = run_rounds(calls, max_seconds, rounds=_ROUNDS, fewest=3)
    for name, times_s in times.items():
        results[name] |= figures(times_s, times[_SELF])
    return results


def not_installed(peers: Sequence[str]) -> dict[str, list[str]]:
    """List for each peer the modules that are not installed."""
    return {name: [part for part in PEERS[name] if importlib.util.find_spec(part) is None] for name in peers}


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Return the version of what each peer runs in; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        distribution = PEERS[name][-1]
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _prepare(
    graph: Graph,
    parameters: Mapping[str, np.ndarray],
    peers: list[str],
    inputs: Mapping[str, np.ndarray],
    threads: int,
    folder: str,
) -> Iterator[tuple[str, Any]]:
    """Yield each peer with its call and the function that fetches its outputs, or with the reason why it cannot run."""
    if not peers:
        return
    runners = importlib.import_module("codegen.peer_runners")  # imports torch
    module = runners.Positional(graph, parameters, threads)
    for name in peers:
        try:
            call, outputs = runners.RUNNERS[name](module, inputs, runners.Setting(threads, Path(folder)))
            call()
        except Exception as error:  # noqa: BLE001  # whatever another library raises, it cannot run this model
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            yield name, (call, outputs)


def _compare(name: str, found: Sequence[np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float) -> float:
    worst = 0.0
    for array, (output, right) in zip(found, expected.items(), strict=True):
        error = relative_error(np.asarray(array), right) if np.shape(array) == right.shape else float("inf")
        if not error <= tolerance:
            raise VerificationError(
                f"{name} computes something else than the artifact, so they are not compared",
                where=f"output '{output}'",
                expected=f"a difference of at most {tolerance:g} of the output's scale",
                found=f"{error:g}",
            )
        worst = max(worst, error)
    return worst
