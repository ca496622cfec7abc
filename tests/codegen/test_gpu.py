"""Targets with a graphics processor: their names, what an artifact for them holds, and whole models run on OpenCL."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from codegen import runtime, targets
from codegen.artifact import Artifact, read
from codegen.compile import Source, compile_functions, compile_graph
from codegen.container import TOLERANCES
from codegen.gpu import execute
from codegen.gpu.program import SOURCES, check_coverage
from codegen.kernels.norm import NormKernel
from codegen.selection.state import KernelCall
from ir.builder import Builder
from ir.errors import ArtifactError, CompileError, InputError
from ir.graph import Graph, Value
from ir.initializers import initialize
from ir.types import Axis
from nas import matrix
from tests.codegen.gpu_checking import compile_kernels, needs_device

TOLERANCE = TOLERANCES["float32"]  # sums of some hundred products, in another order than torch's
MODELS = (  # attention, recurrences, convolution, Fourier transform, selection, several outputs
    *("zoo/gated-linear-attention", "zoo/mamba", "zoo/convnext", "zoo/swin", "zoo/orchid", "zoo/dit-moe"),
    *("zoo/hybrid-linear-attention-study", "zoo/aaren"),
)


def small(rows: int = 5) -> Graph:
    """A product, a norm, an activation and a sum."""
    b = Builder()
    hidden = (Axis("hidden", 6),)
    x = b.linear(b.input("x", (rows, 8)), "first", hidden)
    y = b.layer_norm(x, b.parameter("scale", (hidden,), "normal(1.0)"), b.parameter("bias", (hidden,), "normal(1.0)"))
    return b.build(y=b.gelu(y), total=b.sum(y, 1))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """The small model for OpenCL."""
    return compile_graph(small(), initialize(small(), 0), targets.get("opencl"))


def test_target_words_choose_a_device() -> None:
    """Each word names a device and the processor beside it."""
    adreno, metal = targets.get("opencl:adreno"), targets.get("metal")
    assert adreno.gpu is not None
    assert (adreno.gpu.warp, adreno.architecture, adreno.is_foreign) == (64, "aarch64", True)
    assert metal.gpu is not None
    assert metal.gpu.kind == metal.to_tvm()["kind"] == "metal"
    assert metal.to_tvm()["host"]["mtriple"] == "arm64-apple-ios"
    assert not targets.get("opencl").is_foreign
    specs = ("opencl", "opencl:adreno", "opencl:mali", "metal", "metal:macos", "cpu")
    assert len({targets.get(spec).fingerprint for spec in specs}) == len(specs)


def test_targets_that_do_not_fit_are_bad_input() -> None:
    """A misspelt device, a number of threads, tuning without the device."""
    with pytest.raises(InputError, match="did you mean 'adreno'"):
        targets.get("opencl:adrino")
    with pytest.raises(InputError, match="no number of threads"):
        targets.get("metal", threads=4)
    with pytest.raises(InputError, match="measuring"):
        compile_graph(small(), initialize(small(), 0), targets.get("opencl"), opt_level=3)


def test_kernels_outside_threads_are_named() -> None:
    """The coverage check says which kernel would not run on the device."""
    kernel = NormKernel(3, 4, "softmax")
    call = KernelCall(kernel, (Value(0, 0),), (Value(1, 0),), (1,))
    with pytest.raises(CompileError, match=re.escape(kernel.key)):
        check_coverage([call], {})


def test_program_says_all_that_a_launch_needs(artifact: Artifact) -> None:
    """Kernels stand in the source, arguments are buffers, weights are there by name, threads fit the device."""
    program, source = json.loads(artifact.extras["program.json"]), artifact.extras["kernels.cl"].decode()
    gpu = targets.get("opencl").gpu
    assert gpu is not None
    for launch in program["launches"]:
        signature = re.search(rf"void {launch['kernel']}\(([^)]*)\) {{", source)
        assert signature
        assert len(signature[1].split(",")) == len(launch["arguments"])
        assert all(0 <= number < len(program["buffers"]) for number in launch["arguments"])
        assert np.prod(launch["block"]) <= gpu.max_threads
        assert launch["shared_bytes"] <= gpu.shared_bytes
    named = {buffer["name"] for buffer in program["buffers"] if buffer["kind"] == "weight"}
    assert named == set(artifact.weights)
    assert [output["name"] for output in program["outputs"]] == ["y", "total"]


def test_artifact_comes_back_from_its_file(artifact: Artifact, tmp_path: Path) -> None:
    """Source and program are members; loading it here is refused, with the way out."""
    path = artifact.save(tmp_path / "m.nas")
    found = read(path)
    assert found.extras == artifact.extras
    assert found.target["gpu"] == {"kind": "opencl", "model": "generic"}
    with pytest.raises(ArtifactError, match=r"program\.json"):
        runtime.load(path)


def test_what_is_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an OpenCL device the artifact is whole, and says that nothing was verified and how to change that."""
    monkeypatch.setattr(execute, "_why_no_opencl", lambda: "no device here; make gpu-deps")
    metal = targets.get("metal").gpu
    assert metal is not None
    assert "no metal device" in execute.why_not_run(metal)
    opencl = targets.get("opencl").gpu
    assert opencl is not None
    assert "gpu-deps" in execute.why_not_run(opencl)


@needs_device
def test_outputs_equal_torch(artifact: Artifact) -> None:
    """The program was run when it was compiled."""
    assert artifact.verification_error is not None
    assert artifact.verification_error <= TOLERANCE
    assert not artifact.unverified


@needs_device
@pytest.mark.slow
def test_functions_share_source_and_weights() -> None:
    """A second function has a program of its own, on the same source, and both were run."""
    sources = {"forward": Source(small()), "step": Source(small(1), role="step")}
    made = compile_functions(sources, initialize(small(), 0), targets.get("opencl"))
    programs = {name: json.loads(made.extras[name]) for name in ("program.json", "program.step.json")}
    names = [{b["name"] for b in program["buffers"] if b["kind"] == "weight"} for program in programs.values()]
    assert names[0] == names[1] == set(made.weights)
    assert all(function.verification_error is not None for function in made.functions.values())
    assert len({program["source"] for program in programs.values()}) == 1


def test_metal_is_written_and_said_to_be_unverified(tmp_path: Path) -> None:
    """The source has each kernel with its thread position and its shared memory; nothing claims to have run."""
    made = compile_graph(small(), initialize(small(), 0), targets.get("metal:macos"))
    assert made.verification_error is None
    assert "metal" in made.unverified
    program, source = json.loads(made.extras["program.json"]), made.extras["kernels.metal"].decode()
    assert program["host"] == "tar of objects"
    assert program["source"] == SOURCES["metal"]
    assert "#include <metal_stdlib>" in source
    for launch in program["launches"]:
        assert f"kernel void {launch['kernel']}(" in source
    assert read(made.save(tmp_path / "m.nas")).extras == made.extras
    assert "threadgroup float" in source
    assert "threadgroup_barrier(mem_flags::mem_threadgroup)" in source


def test_metal_source_of_a_norm() -> None:
    """A row is shared out to threads, which meet at barriers to add their sums up."""
    source, launches = compile_kernels([NormKernel(7, 100, "rms_norm", 1e-5, scale=True)], "metal")
    assert "uint blockIdx [[threadgroup_position_in_grid]]" in source
    assert "uint threadIdx [[thread_position_in_threadgroup]]" in source
    assert launches["k0"].grid == (7, 1, 1)
    assert launches["k0"].block == (128, 1, 1)
    assert source.count("threadgroup_barrier") >= 7
    assert "sqrt(" in source


@needs_device
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_published_models_equal_torch_on_opencl(name: str, tmp_path: Path) -> None:
    """Their smallest architectures, every operation in OpenCL, to 1e-4 of the output's scale."""
    found = matrix.write(name, "nas", "opencl", str(tmp_path))
    assert found["verification_error"] is not None
    assert found["verification_error"] <= TOLERANCE
