"""A compiled model set against other runtimes, whatever those do: each is prepared under a time limit.

Everything happens in one pinned worker process, step by step: load the model and check it against torch, prepare one
peer after the other, run the rounds. A peer that hangs or crashes while it prepares costs its own place only: the
process is started again without it. A peer that computes something else gets no figure.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from codegen import machine, peers, runtime
from codegen.container import relative_error
from codegen.measure import pinned_worker
from codegen.rounds import figures, run_rounds
from codegen.targets.base import Target
from codegen.workers import RemoteError, Worker
from ir.errors import InputError, KernelCrash, KernelTimeout, NasError, TargetUnavailable, VerificationError
from ir.graph import Graph

OURS: Final = "nas"
PEAK: Final = "fma"
PEER_TOLERANCES: Final[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 1e-1}
"""Largest difference of a peer from torch in float32; in bfloat16 it may keep sums and norms in that type, too."""
LIMITS: Final[Mapping[str, Mapping[str, str]]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OV_CPU_MAX_ISA": "AVX2",
    }
}
"""Variables that keep other runtimes to an instruction set."""

_ORDER: Final = ("compile", "onnxruntime", "openvino", "eager")  # what most likely hangs comes first
READS_ONNX: Final = ("onnxruntime", "openvino")
"""Peers that need what `export` writes."""
_OPEN_LIMIT_S: Final = 300.0
_GRACE_S: Final = 600.0  # a peer of some ten seconds a call still gets its fewest rounds


@dataclass(frozen=True)
class Case:
    """A model to compare.

    Attributes:
        graph: The graph in float32, as peers get it.
        parameters: Its parameters.
        inputs: What it is run on.
        precision: `float32`, or `bfloat16` where products may round their operands to it.
        isa: Instruction set that everyone keeps to, a key of `LIMITS`; the machine's own when None.
    """

    graph: Graph
    parameters: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]
    precision: str = "float32"
    isa: str | None = None


@dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        max_error: Difference of the compiled model from torch, relative to the output's scale.
        figures: For each that ran, the figures of `rounds.figures`; the compiled model is `nas`.
        missing: For each peer that has no figures, the reason.
        errors: For each peer that ran, its difference from torch.
        fma_peak_gflops: Multiply-add peak in the same rounds.
        copy_gbs: Copy bandwidth right before and after them.
    """

    max_error: float = 0.0
    figures: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    missing: dict[str, str] = field(default_factory=dict[str, str])
    errors: dict[str, float] = field(default_factory=dict[str, float])
    fma_peak_gflops: float = 0.0
    copy_gbs: float = 0.0


def export(case: Case, folder: Path, limit_s: float) -> str | None:
    """Export a model once for all peers that read ONNX and all numbers of threads.

    Returns:
        The reason why there is no file, None where there is one.
    """
    with pinned_worker(_cpus(), preload=("codegen.comparison",), without=()) as worker:
        try:
            worker.call(_export, case, str(folder), timeout_s=limit_s)
        except NasError as error:
            shutil.rmtree(folder, ignore_errors=True)
            return _reason(error, limit_s).replace("failed", "the export to ONNX failed", 1)
    return None


def compare(
    case: Case,
    artifact_path: str | Path,
    target: Target,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    unavailable: Mapping[str, str] | None = None,
    limit_s: float = 180.0,
    max_seconds: float = 10.0,
    rounds: int = 16,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Check a compiled model, then time it beside its peers.

    Args:
        case: The model.
        artifact_path: The compiled model.
        target: What it was compiled for.
        names: Peers out of `peers.PEERS`.
        folder: Where `export` left the model, if it did.
        unavailable: Peers that are known not to work, with the reason.
        limit_s: Longest preparation of one peer.
        max_seconds: Time for the rounds, equally shared; everyone gets at least `rounds.FEWEST`.
        rounds: Most rounds.
        tell: Hears what is done.

    Raises:
        VerificationError: The compiled model computes something else than torch.
        KernelCrash: It ended its process, or a peer did so during the rounds.
        KernelTimeout: It hangs, or a peer does so during the rounds.
    """
    outcome = Outcome(missing=dict(unavailable or {}))
    for name, parts in peers.not_installed(names).items():
        if parts:
            outcome.missing[name] = f"not installed: {', '.join(parts)}"
    environment = LIMITS.get(case.isa, {}) if case.isa else {}
    with (
        tempfile.TemporaryDirectory(prefix="nas-bench-") as own_folder,
        pinned_worker(target.threads, preload=("codegen.comparison",), without=(), environment=environment) as worker,
    ):
        steps = _Steps(worker, (case, str(artifact_path), target, str(folder or own_folder)), outcome, limit_s, tell)
        ready = steps.prepare([name for name in _ORDER if name in names and name not in outcome.missing])
        tell(f"timing beside {', '.join(ready) or 'nobody'}")
        times, outcome.fma_peak_gflops, outcome.copy_gbs = worker.call(
            _time, max_seconds, rounds, timeout_s=4 * max_seconds + _GRACE_S
        )
    outcome.figures = {name: figures(times_s, times[OURS]) for name, times_s in times.items()}
    return outcome


@dataclass
class _Steps:
    """The caller's side of the preparation."""

    worker: Worker
    arguments: tuple[Case, str, Target, str]
    outcome: Outcome
    limit_s: float
    tell: Callable[[str], None]

    def prepare(self, pending: list[str]) -> list[str]:
        """Open the session and prepare peers, from the start without the one that took the process down.

        Returns:
            Those that are ready.
        """
        self.outcome.max_error = self.worker.call(_open, *self.arguments, timeout_s=_OPEN_LIMIT_S)
        self.outcome.errors.clear()
        for index, name in enumerate(pending):
            self.tell(f"preparing {name}")
            try:
                self.outcome.errors[name] = self.worker.call(_prepare, name, timeout_s=self.limit_s)
            except (KernelTimeout, KernelCrash) as error:
                self.outcome.missing[name] = _reason(error, self.limit_s)
                return self.prepare([*self.outcome.errors, *pending[index + 1 :]])
            except NasError as error:
                self.outcome.missing[name] = _reason(error, self.limit_s)
        return list(self.outcome.errors)


class _Session:
    """What a worker process holds between the steps."""

    def __init__(self, case: Case, path: str, target: Target, folder: str) -> None:
        runners = importlib.import_module("codegen.peer_runners")  # imports torch
        self.runners, self.case = runners, case
        self.setting = runners.Setting(target.threads, Path(folder), case.precision, case.isa)
        self.module = runners.Positional(case.graph, case.parameters, target.threads)
        self.expected = runners.eager(self.module, case.inputs, runners.Setting(target.threads, Path(folder)))[1]()
        self.model = runtime.load(path, threads=target.threads)
        outcome = self.model(**case.inputs)
        found = list(outcome.values()) if isinstance(outcome, dict) else [outcome]
        self.max_error = _difference("the compiled model", found, self.expected, peers.TOLERANCES[case.precision])
        self.calls: dict[str, Callable[[], object]] = {OURS: self.model.prepare(case.inputs)}
        self.probe = importlib.import_module("codegen.roofline").make_probe(target)  # imports the TVM compiler


_sessions: list[_Session] = []


def _open(case: Case, path: str, target: Target, folder: str) -> float:
    """Load the compiled model and check it; runs in the worker process, as do the functions below."""
    _sessions[:] = [_Session(case, path, target, folder)]
    return _sessions[0].max_error


def _prepare(name: str) -> float:
    """Prepare a peer, run it once and compare what it gives; returns the difference."""
    session = _sessions[0]
    call, outputs = session.runners.RUNNERS[name](session.module, session.case.inputs, session.setting)
    call()
    error = _difference(name, outputs(), session.expected, PEER_TOLERANCES[session.case.precision])
    session.calls[name] = call
    return error


def _time(max_seconds: float, rounds: int) -> tuple[dict[str, list[float]], float, float]:
    """Run the rounds, with the multiply-add peak among those who have turns."""
    session, probe = _sessions[0], _sessions[0].probe
    before = probe.measure()
    times = run_rounds(session.calls | {PEAK: probe.fma}, max_seconds, rounds=rounds)
    after = probe.measure()
    peak = probe.fma_flops / float(np.median(times.pop(PEAK))) / 1e9
    return times, peak, max(before.copy_gbs, after.copy_gbs)


def _export(case: Case, folder: str) -> None:
    runners = importlib.import_module("codegen.peer_runners")
    setting = runners.Setting(_cpus(), Path(folder))
    runners.export(runners.Positional(case.graph, case.parameters, setting.threads), case.inputs, setting.onnx_path)


def _cpus() -> int:
    return len(machine.available_cpus())


def _difference(name: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> float:
    worst = 0.0
    for array, right in zip(found, expected, strict=True):
        error = relative_error(np.asarray(array), right) if np.shape(array) == right.shape else float("inf")
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    if not worst <= tolerance:
        limit = f"a difference of at most {tolerance:g} of the output's scale"
        raise VerificationError(f"{name} disagrees with torch", expected=limit, found=f"{worst:.2g}")
    return worst


def _reason(error: NasError, limit_s: float) -> str:
    if isinstance(error, KernelTimeout):
        return f"failed: took longer than {limit_s:g} s"
    if isinstance(error, InputError | TargetUnavailable):
        return error.message
    if isinstance(error, RemoteError):
        lines = [line for line in (error.found or "").splitlines() if line and not line.startswith(" ")]
        return f"failed: {lines[-1][:300] if lines else error.message}"
    found = (error.found or "").splitlines()
    return f"failed: {error.message}" + (f": {found[0][:300]}" if found else "")
