"""64-bit Arm: targets, libraries and static C, run under an emulator where there is one, else said not to be."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from codegen import cross, runtime, targets, toolchain
from codegen.artifact import read
from codegen.c_export.export import export
from codegen.compile import compile_graph, with_precision
from codegen.container import TOLERANCES
from codegen.inputs import sample_inputs
from codegen.reference import verify
from ir.builder import Builder
from ir.errors import ArtifactError, InputError, TargetUnavailable, VerificationError
from ir.graph import Graph
from ir.initializers import initialize
from ir.types import Axis
from tests.codegen.small_models import STREAMING, WHOLE

TARGET = targets.get("arm64", threads=2)
TOLERANCE = TOLERANCES["float32"]  # sums of some hundred products, in another order than torch's
HAS_COMPILER = not isinstance(toolchain.find(TARGET), str)

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=f"{toolchain.find(TARGET)}")
needs_runtime = pytest.mark.skipif(bool(cross.why_not_run(TARGET)), reason=cross.why_not_run(TARGET))


def small() -> Graph:
    """The smallest model with a weight."""
    b = Builder()
    return b.build(y=b.exp(b.linear(b.input("x", (3, 8)), "w", (Axis("hidden", 6),))))


def test_target_words_choose_system_and_extensions() -> None:
    """Each word reaches LLVM and the features that the artifact names; the order of words does not matter."""
    plain, android = targets.get("arm64"), targets.get("arm64:fp16+android+dotprod")
    assert (plain.triple, plain.architecture, plain.isa.lanes) == ("aarch64-linux-gnu", "aarch64", 4)
    assert android.triple == "aarch64-linux-android"
    assert android.features == ("asimd", "asimddp", "asimdhp")
    assert {"+dotprod", "+fullfp16"} <= set(android.to_tvm()["mattr"])
    assert android == targets.get("arm64:android+dotprod+fp16")
    assert len({plain.fingerprint, android.fingerprint, targets.get("arm64:fp16").fingerprint}) == 3


@pytest.mark.parametrize("spec", ["arm64:dotprd", "arm64:avx2", "arm64:linux+android"])
def test_target_words_that_do_not_fit_are_bad_input(spec: str) -> None:
    """A misspelt word, another processor's, two systems."""
    with pytest.raises(InputError):
        targets.get(spec)


def test_tuning_needs_the_processor() -> None:
    """Kernels cannot be measured for a processor that is elsewhere."""
    with pytest.raises(InputError, match="measuring"):
        compile_graph(small(), initialize(small(), 0), TARGET, opt_level=3)


def test_library_without_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to install, and the way that needs no linker."""
    monkeypatch.setattr(toolchain, "CROSS_COMPILER", "no-such-compiler")
    for target in (TARGET, targets.get("arm64:android")):
        with pytest.raises(TargetUnavailable, match="format c"):
            cross.linker(target)


def test_folder_without_compiler_is_said_to_be_unverified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is whole all the same."""
    monkeypatch.setattr(toolchain, "CROSS_COMPILER", "no-such-compiler")
    made = export({"forward": small()}, initialize(small(), 0), TARGET, tmp_path / "m")
    assert made.verification_error is None
    assert "no-such-compiler" in made.unverified
    assert "Not run yet" in (made.path / "README.md").read_text()
    assert (made.path / "kernels.o").read_bytes()[:4] == b"\x7fELF"


@needs_compiler
def test_library_that_cannot_run_here_is_said_to_be_unverified(tmp_path: Path) -> None:
    """For Android there is no runtime; the file says so, expects torch's outputs, and does not load here."""
    made = compile_graph(small(), initialize(small(), 0), targets.get("arm64:android"))
    assert (made.verification_error, bool(made.unverified)) == (None, True)
    path = made.save(tmp_path / "m.nas")
    assert read(path).unverified == made.unverified
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["functions"]["forward"]["verification_error"] is None
    assert manifest["self_test"]["tolerance"] == TOLERANCE
    with pytest.raises(ArtifactError, match="another processor architecture"):
        runtime.load(path)


@needs_runtime
def test_library_runs_under_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is verified, and a library that computes something else is found."""
    made = compile_graph(small(), initialize(small(), 0), TARGET, tuning_root=tmp_path)
    assert made.verification_error is not None
    assert made.verification_error <= TOLERANCE
    inputs = sample_inputs(small())
    outputs = {spec.name: (spec.shape, spec.dtype) for spec in made.outputs}
    doubled = [*inputs.values(), *(2 * array for array in made.weights.values())]
    wrong = cross.run_library(made.library, doubled, outputs, TARGET.threads)
    with pytest.raises(VerificationError):
        verify(small(), dict(made.parameters), inputs, dict(made.expected_outputs), wrong)


@needs_compiler
def test_static_program_runs_under_the_emulator(tmp_path: Path) -> None:
    """A stream of a recurrent model."""
    model = STREAMING["gla"]
    graphs = {"forward": model(), "step": model(step=True)}
    made = export(graphs, initialize(graphs["forward"], 0), TARGET, tmp_path / "m")
    assert made.verification_error is not None
    assert made.verification_error <= TOLERANCE
    assert "-static" in made.manifest["verification"]["compiler"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", [*STREAMING, *WHOLE])
def test_every_kind_of_model_as_static_program(name: str, tmp_path: Path) -> None:
    """All of the dozen agree with torch, streams included."""
    graphs = {"forward": {**STREAMING, **WHOLE}[name]()}
    if name in STREAMING:
        graphs["step"] = STREAMING[name](step=True)
    made = export(graphs, initialize(graphs["forward"], 0), TARGET, tmp_path / "m")
    assert made.verification_error is not None
    assert made.verification_error <= TOLERANCE


@pytest.mark.slow
@needs_runtime
@pytest.mark.parametrize("name", [*STREAMING, *WHOLE])
def test_every_kind_of_model_as_library(name: str, tmp_path: Path) -> None:
    """All of the dozen agree with torch on the TVM runtime."""
    graph = {**STREAMING, **WHOLE}[name]()
    made = compile_graph(graph, initialize(graph, 0), TARGET, tuning_root=tmp_path)
    assert made.verification_error is not None
    assert made.verification_error <= TOLERANCE


@pytest.mark.slow
@needs_compiler
def test_extensions_and_bfloat16_run_under_the_emulator(tmp_path: Path) -> None:
    """What LLVM makes of the extensions, and products of rounded operands without an instruction for them."""
    graph = STREAMING["attention"]()
    target = targets.get("arm64:dotprod+fp16+i8mm")
    made = export({"forward": graph}, initialize(graph, 0), target, tmp_path / "m")
    assert made.verification_error is not None
    rounded = with_precision(graph, "bfloat16")
    made = export({"forward": rounded}, initialize(graph, 0), TARGET, tmp_path / "r")
    assert made.verification_error is not None
    assert 1e-5 < made.verification_error <= TOLERANCES["bfloat16"]
