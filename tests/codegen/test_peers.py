"""Peers beside an artifact: the same function, in turns, refused when they disagree. No claim about any time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codegen import peers
from codegen.artifact import Artifact
from ir.builder import Builder
from ir.errors import InputError, VerificationError
from ir.serialize import graph_to_json
from ir.types import Axis
from tests.codegen import tiny_artifact


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    """The small artifact with the graph that it computes."""
    plain = tiny_artifact.make()
    builder = Builder()
    x = builder.input("x", (tiny_artifact.ROWS, tiny_artifact.INNER))
    ids = builder.input("ids", (tiny_artifact.ROWS, 1), "int32")
    w = builder.parameter("w", axes=((Axis("i", tiny_artifact.INNER),), (Axis("o", tiny_artifact.COLUMNS),)))
    total = builder.matmul(x, w) + builder.cast(ids, "float32")
    graph = builder.build(sum=total, positive=builder.relu(total))
    return replace(
        tiny_artifact.with_forward(plain, graph_json=graph_to_json(graph)), parameters={"w": plain.weights["w"]}
    )


def test_peers_are_timed_in_the_same_rounds(tiny: Artifact, tmp_path: Path):
    """Eager torch and the artifact have their rounds, agree, and the artifact is its own measure."""
    report = peers.bench(tiny.save(tmp_path / "tiny.nas"), ["eager"], 1)
    results = report["results"]
    assert report["threads"] == 1
    assert {name: result["status"] for name, result in results.items()} == {"nas": "ok", "eager": "ok"}
    assert min(results["nas"]["rounds"], results["eager"]["rounds"]) >= 3
    assert results["nas"]["ratio"] == 1.0
    assert results["eager"]["max_error"] <= peers.TOLERANCES["float32"]
    assert results["eager"]["p10_ms"] <= results["eager"]["median_ms"] <= results["eager"]["p90_ms"]


def test_peers_that_disagree_are_refused(tiny: Artifact, tmp_path: Path):
    """A graph that computes something else than the library is not timed beside it."""
    other = replace(tiny, parameters={"w": tiny.weights["w"] * np.float32(1.01)})
    with pytest.raises(VerificationError, match="eager computes something else"):
        peers.bench(other.save(tmp_path / "other.nas"), ["eager"], 1)


def test_peers_not_installed_are_found_without_importing(monkeypatch: pytest.MonkeyPatch):
    """What is not installed is known before anything is exported to it."""
    monkeypatch.setattr(peers, "PEERS", {"eager": ("torch",), "openvino": ("a_module_that_is_nowhere",)})
    assert peers.not_installed(["eager", "openvino"]) == {"eager": [], "openvino": ["a_module_that_is_nowhere"]}


def test_peers_unknown_name_is_bad_input(tmp_path: Path):
    """A misspelt peer is named before anything runs."""
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        peers.bench(tmp_path / "absent.nas", ["eager", "onnxruntim"])
