"""Models beside peers that hang, crash, refuse or lie: each costs its own place only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from codegen import comparison, peers, targets
from codegen.artifact import Artifact
from codegen.comparison import Case, Outcome
from codegen.compile import compile_graph
from codegen.inputs import sample_inputs
from ir.builder import Builder
from ir.errors import KernelCrash, KernelTimeout, NasError, VerificationError
from ir.initializers import initialize
from ir.types import Axis
from tests.codegen import faulty_peers

FAST = {"max_seconds": 0.2, "rounds": 2}


@pytest.fixture(scope="module")
def case() -> Case:
    """One small product."""
    b = Builder()
    x = b.input("x", (5, 24))
    w = b.parameter("w", ((Axis("i", 24),), (Axis("o", 40),)))
    graph = b.build(y=b.gelu(b.matmul(x, w)))
    return Case(graph, initialize(graph, seed=0), sample_inputs(graph))


@pytest.fixture(scope="module")
def compiled(case: Case) -> Artifact:
    """The product as it is compiled."""
    return compile_graph(case.graph, case.parameters, targets.get("cpu", threads=1))


@pytest.fixture
def path(compiled: Artifact, tmp_path: Path) -> Path:
    """Its file."""
    return compiled.save(tmp_path / "model.nas")


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every peer seem installed; the faulty ones need nothing."""
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(peers.PEERS, ("torch",)))


class ScriptedWorker:
    """Prepares peers as its script says, without a process: an error to raise, or what to return."""

    def __init__(self, script: dict[str, Any]) -> None:
        self.script = script
        self.asked: list[str] = []

    def call(self, function: Any, *arguments: Any, timeout_s: float) -> Any:
        name = "open" if function is comparison._open else arguments[0]
        self.asked.append(name)
        answer = self.script.get(name, 0.5)
        if isinstance(answer, NasError):
            raise answer
        return answer


def test_comparison_times_model_and_peer(case: Case, path: Path):
    """There are figures of both, an error within the tolerance, and the limits of the machine; what is known not to
    work is not tried."""
    target, known = targets.get("cpu", threads=1), {"compile": "failed: took longer than 90 s at 2 threads"}
    outcome = comparison.compare(case, path, target, ["eager", "compile"], unavailable=known, **FAST)
    assert set(outcome.figures) == {"nas", "eager"}
    assert outcome.figures["nas"]["ratio"] == 1.0
    assert 0 < outcome.max_error <= 1e-5
    assert outcome.errors == {"eager": 0.0}
    assert outcome.missing == known
    assert outcome.fma_peak_gflops > 0
    assert outcome.copy_gbs > 0


def test_comparison_begins_again_without_the_peer_that_took_the_process_down():
    """Those that were ready are prepared once more, the lost one never, and one that only refuses costs nothing."""
    worker = ScriptedWorker({"b": KernelTimeout("hung"), "c": VerificationError("refused"), "d": KernelCrash("died")})
    outcome = Outcome()
    steps = comparison._Steps(cast(Any, worker), cast(Any, ()), outcome, 7.0, lambda line: None)
    assert steps.prepare(["a", "b", "c", "d", "e"]) == ["a", "e"]
    assert worker.asked == ["open", "a", "b", "open", "a", "c", "d", "open", "a", "e"]
    assert outcome.missing == {"b": "failed: took longer than 7 s", "c": "failed: refused", "d": "failed: died"}
    assert outcome.errors == {"a": 0.5, "e": 0.5}


@pytest.mark.slow
def test_comparison_outlives_peers_that_hang_or_crash(
    case: Case, path: Path, all_installed: None, monkeypatch: pytest.MonkeyPatch
):
    """Each of them is missing with its reason; the one that works is timed all the same."""
    monkeypatch.setattr(comparison, "_open", faulty_peers.open_with_hang_and_crash)
    target, names = targets.get("cpu", threads=1), ["eager", "compile", "onnxruntime"]
    outcome = comparison.compare(case, path, target, names, limit_s=5.0, **FAST)
    assert set(outcome.figures) == {"nas", "eager"}
    assert outcome.missing["compile"] == "failed: took longer than 5 s"
    assert "SIGSEGV" in outcome.missing["onnxruntime"]


def test_comparison_gives_no_figure_to_peers_that_refuse_or_disagree(
    case: Case, path: Path, all_installed: None, monkeypatch: pytest.MonkeyPatch
):
    """They are missing with their reasons; the model itself is right and is timed."""
    monkeypatch.setattr(comparison, "_open", faulty_peers.open_with_refusal_and_difference)
    outcome = comparison.compare(case, path, targets.get("cpu", threads=1), ["eager", "openvino"], **FAST)
    assert set(outcome.figures) == {"nas"}
    assert outcome.missing["eager"] == "failed: eager disagrees with torch: 0.01"
    assert outcome.missing["openvino"] == "failed: ValueError: no such operator: Frobnicate"
    assert outcome.errors == {}


def test_comparison_of_a_wrong_model_is_refused(case: Case, path: Path):
    """Nothing is timed where the compiled model computes something else than torch."""
    wrong = replace(case, parameters={name: array * np.float32(1.01) for name, array in case.parameters.items()})
    with pytest.raises(VerificationError, match="the compiled model disagrees with torch"):
        comparison.compare(wrong, path, targets.get("cpu", threads=1), ["eager"], **FAST)


def test_comparison_limits_peers_to_an_instruction_set(case: Case):
    """The worker's variables name the limit for torch and for oneDNN, which OpenVINO has too."""
    limits = comparison.LIMITS["avx2"]
    assert limits["ATEN_CPU_CAPABILITY"] == "avx2"
    assert limits["ONEDNN_MAX_CPU_ISA"] == "AVX2"


@pytest.mark.slow
def test_comparison_export_says_why_there_is_no_file(case: Case, tmp_path: Path):
    """An export that takes too long is a reason, not an error."""
    reason = comparison.export(case, tmp_path / "model", 0.01)
    assert reason == "the export to ONNX failed: took longer than 0.01 s"
