"""NVIDIA GPUs: machine code made without one, refusals that name the ways out, loading and timing by stand-ins."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen import runtime, targets, tvm_runtime
from codegen.artifact import read
from codegen.compile import compile_graph
from codegen.gpu import loading
from codegen.gpu.cuda import attention, device, kernels, nvcc, recurrences
from codegen.gpu.cuda.timing import CudaClock, CudaGraph, GpuStopwatch, GpuTiming, Runtime
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.placement import KDL_CPU, DeviceMemory
from codegen.targets.cuda import ARCHITECTURES
from codegen.virtual_machine import aligned
from ir.builder import Builder
from ir.errors import ArtifactError, CompileError, InputError, MeasurementError, TargetUnavailable
from ir.graph import Graph
from ir.initializers import initialize
from ir.types import Axis
from nas.profile import require_measurable
from tests.codegen import small_models

MANY = AttentionKernel(1, 1024, 1024, 4, 4, 128, 128, 0.09, precision="bfloat16", causal=True, window=300)
FEW = AttentionKernel(1, 4, 4096, 8, 2, 64, 64, 0.125, causal=True, offset=True)
SCAN = OuterScanKernel(1, 1024, 4, 128, 128, decay="key")
needs_compiler = pytest.mark.skipif(nvcc.find() is None, reason=f"nvcc is not installed here; {nvcc.HINT}")
without_gpu = pytest.mark.skipif(not isinstance(device.find(), str), reason="there is an NVIDIA GPU here")


def small() -> Graph:
    """The smallest model with a weight."""
    b = Builder()
    return b.build(y=b.exp(b.linear(b.input("x", (3, 8)), "w", (Axis("hidden", 6),))))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for `cuda:sm_90`."""
    graph = small()
    made = compile_graph(graph, initialize(graph, 0), targets.get("cuda:sm_90"))
    return made.save(tmp_path_factory.mktemp("cuda") / "small.nas")


@needs_compiler
@without_gpu
def test_an_artifact_holds_machine_code_and_no_source(artifact: Path) -> None:
    """A GPU server needs no compiler; what was not run is said not to have been."""
    found = read(artifact)
    assert nvcc.architectures_of(found.library) == ["sm_90"]
    assert b"__global__" not in found.library
    assert found.target["gpu"] == {"kind": "cuda", "model": "sm_90"}
    assert found.verification_error is None
    assert "no NVIDIA GPU" in found.unverified


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90"])
def test_every_architecture_has_machine_code(architecture: str) -> None:
    """With a product on tensor cores among the kernels; whatever is here runs none or one of them."""
    b = Builder()
    h = b.gelu(b.linear(b.input("x", (32, 16)), "up", (Axis("hidden", 64),)))
    graph = b.build(y=b.linear(h, "down", (Axis("d_model", 16),)))
    made = compile_graph(graph, initialize(graph, 0), targets.get(f"cuda:{architecture}"), precision="bfloat16")
    assert nvcc.architectures_of(made.library) == [architecture.rstrip("a")]


@needs_compiler
@without_gpu
def test_loading_without_a_gpu_names_the_ways_out(artifact: Path) -> None:
    """An error, not a crash in a driver that is not there."""
    with pytest.raises(ArtifactError, match="runs on an NVIDIA GPU") as caught:
        runtime.load(artifact)
    assert "--device" in str(caught.value)
    assert "--target cpu" in str(caught.value)


@without_gpu
def test_measuring_without_a_gpu_is_refused_with_the_ways_out() -> None:
    """Before anything is trained: what cannot be done, and what can."""
    with pytest.raises(TargetUnavailable, match="cannot be measured") as caught:
        require_measurable(targets.get("cuda"))
    for way in ("--device HOST:PORT", "--latency predicted:PROFILE", "nas compile --target cuda"):
        assert way in str(caught.value)


def test_targets_name_architectures() -> None:
    """Hopper where nothing is said; each has a name of its own in databases; others are refused."""
    usual = targets.get("cuda").gpu
    assert usual is not None
    assert (usual.kind, usual.model) == ("cuda", "sm_90")
    assert targets.get("cuda:sm_80").fingerprint != targets.get("cuda:sm_90").fingerprint
    with pytest.raises(InputError, match="no such device"):
        targets.get("cuda:sm_75")


@pytest.mark.parametrize(
    ("architecture", "capability", "fits"),
    [
        ("sm_90", (9, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_100a", (10, 3), False),
        ("sm_90a", (9, 0), True),
    ],
)
def test_code_runs_on_later_devices_of_its_generation(
    architecture: str, capability: tuple[int, int], fits: bool
) -> None:
    """What is written for one generation alone runs nowhere else."""
    assert device.runs(architecture, capability) is fits


class FakeDriver:
    """A driver's library with one device, or an error."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, _flags: int) -> int:
        """Fail or not."""
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        """One."""
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, *_: Any) -> int:
        """Any handle."""
        return 0

    def cuDeviceGetName(self, name: Any, _size: int, _device: Any) -> int:
        """A name."""
        name.value = b"a GPU"
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, _device: Any) -> int:
        """A size."""
        size._obj.value = 1 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _device: Any) -> int:
        """The attribute's own number."""
        value._obj.value = attribute
        return 0


def test_a_device_is_described_or_its_absence_is() -> None:
    """A driver without a GPU, and the stub that code is generated with, are reasons, not devices."""
    driver: Any = FakeDriver()
    assert device.describe(driver) == device.CudaDevice("a GPU", (75, 76), 16, 38, 1 << 30)
    failing: Any = FakeDriver(100)
    assert "error 100" in str(device.describe(failing))
    stub: Any = object()
    assert "no driver" in str(device.describe(stub))


class FakeRuntime:
    """The CUDA runtime as far as timing uses it; a millisecond passes on the device at each call that is timed."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.milliseconds = 0.0
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any) -> int:
            self.log.append(name)
            if name == self.failing:
                return 700
            if name == "cudaEventElapsedTime":
                arguments[0]._obj.value = self.milliseconds
                self.milliseconds = 0.0
            elif arguments and hasattr(arguments[0], "_obj"):
                arguments[0]._obj.value = len(self.log)
            return 0

        return run

    def work(self) -> str:
        """Pass a millisecond."""
        self.log.append("work")
        self.milliseconds += 1.0
        return "result"


def test_device_events_time_groups_of_calls() -> None:
    """Events are recorded before and after, and the second is waited for."""
    fake = FakeRuntime()
    clock = CudaClock(Runtime(fake))
    fake.log.clear()
    assert clock.seconds(fake.work, 3) == pytest.approx(1e-3)
    waited = ["cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime"]
    assert fake.log == ["cudaEventRecord", "work", "work", "work", *waited]
    clock.finished(fake.work)()
    assert fake.log[-2:] == ["work", "cudaStreamSynchronize"]


def test_the_cache_is_flushed_outside_what_is_timed() -> None:
    """Once for each call."""
    fake = FakeRuntime()
    clock = CudaClock(Runtime(fake), l2_bytes=1 << 20)
    fake.log.clear()
    assert clock.seconds(fake.work, 2) == pytest.approx(1e-3)
    assert fake.log.count("cudaMemsetAsync") == 2
    assert fake.log.index("cudaMemsetAsync") < fake.log.index("cudaEventRecord")


def test_a_graph_records_one_call_and_replays_it() -> None:
    """The usual stream is the thread's again, whatever happens; errors are errors."""
    fake, streams = FakeRuntime(), []

    def set_stream(stream: ctypes.c_void_p) -> None:
        streams.append(stream.value)

    graph = CudaGraph(Runtime(fake), fake.work, ctypes.c_void_p(7), set_stream)
    captured = ["cudaStreamBeginCapture", "work", "cudaStreamEndCapture"]
    assert fake.log[:6] == ["cudaDeviceSynchronize", "work", "cudaStreamSynchronize", *captured]
    fake.log.clear()
    assert graph() == "result"
    assert fake.log == ["cudaGraphLaunch"]
    assert streams == [7, None]
    fake.failing = "cudaStreamEndCapture"
    with pytest.raises(MeasurementError, match="CUDA error 700"):
        CudaGraph(Runtime(fake), fake.work, ctypes.c_void_p(7), set_stream)
    assert streams[-1] is None


@pytest.mark.parametrize("graph", [True, False])
def test_a_stopwatch_times_a_call_or_its_graph(graph: bool) -> None:
    """What is prepared is what is timed."""
    fake = FakeRuntime()
    watch = GpuStopwatch(GpuTiming(graph=graph), Runtime(fake), 1 << 20, lambda _: None)
    call = watch.prepare(fake.work)
    fake.log.clear()
    watch.seconds(call)
    assert ("cudaGraphLaunch" in fake.log) is graph
    assert ("work" in fake.log) is not graph


def test_device_memory_copies_in_and_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model whose tensors are copies on a device computes the same; here the processor plays the device."""
    graph = small()
    path = compile_graph(graph, initialize(graph, 0), targets.get("cpu", threads=1)).save(tmp_path / "small.nas")

    class PlayedMemory(DeviceMemory):
        """Device memory on the processor, which a virtual machine can have once only."""

        def __init__(self) -> None:
            super().__init__(KDL_CPU)
            self.devices = (KDL_CPU,)
            self.updates = 0

        def update(self, tensor: Any, array: np.ndarray) -> None:
            """Count."""
            self.updates += 1
            super().update(tensor, array)

        def fetch(self, tensor: Any) -> np.ndarray:
            """Return a copy."""
            return np.from_dlpack(tensor).copy()

    played = PlayedMemory()
    played._move = lambda tensor, *_: _copy(tensor)
    monkeypatch.setattr(runtime, "_memory", lambda _contents: played)
    model = runtime.load(path)
    x = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(3, 8)
    monkeypatch.undo()
    np.testing.assert_array_equal(model(x), runtime.load(path)(x))
    assert played.updates == 2  # the self-test and the call


def _copy(tensor: Any) -> Any:
    array = np.from_dlpack(tensor)
    copy = aligned(array.shape, array.dtype)
    np.copyto(copy, array)
    return tvm_runtime.load().from_dlpack(copy)


def test_artifacts_of_other_devices_are_refused() -> None:
    """The program inside says how those are started."""
    target = {"gpu": {"kind": "opencl", "model": "adreno"}, "fingerprint": "opencl-adreno"}
    with pytest.raises(ArtifactError, match="opencl"):
        loading.check_device(target, "model.nas")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        *(kernels.gemm(activation="gelu", tile=tile) for tile in kernels.GEMM_TILES),
        attention.many_launch(MANY).site,
        attention.many_launch(replace(MANY, precision="float32")).site,
        *(launch.site for launch in attention.few_launches(FEW)),
        *(launch.site for launch in recurrences.launches(SCAN)),
        kernels.attention("float16", head=64, causal=True),
        kernels.gla_states(key=128, value=128),
        kernels.gla_outputs(key=128, value=128),
        kernels.hopper_gemm(),
        kernels.hopper_attention(causal=True),
    ],
    ids=lambda kernel: kernel.entry,
)
def test_kernels_compile_without_spills_or_serialised_products(kernel: kernels.CudaKernel) -> None:
    """What the compiler reports of registers and of warpgroup products that it could not leave in flight."""
    code, report = nvcc.compile_source(kernel.source, [kernel.architecture], options=("-Xptxas", "-v"))
    assert nvcc.architectures_of(code) == [kernel.architecture.rstrip("a")]
    assert " 0 bytes spill stores, 0 bytes spill loads" in report
    assert "Potential Performance Loss" not in report


@needs_compiler
def test_a_source_that_is_wrong_is_refused_with_the_compilers_words() -> None:
    """The compiler's own message comes through."""
    with pytest.raises(CompileError, match="no_such_name"):
        nvcc.compile_source("__global__ void k() { no_such_name(); }", ["sm_90"])


@needs_compiler
@without_gpu
def test_products_in_bfloat16_run_on_tensor_cores() -> None:
    """The library holds our kernel beside those that TVM generates; what was rounded alike is compared alike."""
    b = Builder()
    h = b.gelu(b.linear(b.input("x", (32, 16)), "up", (Axis("hidden", 64),)))
    graph = b.build(y=b.linear(h, "down", (Axis("d_model", 16),)))
    made = compile_graph(graph, initialize(graph, 0), targets.get("cuda"), precision="bfloat16")
    ours = [kernel for kernel in made.kernels if kernel["knobs"] == {"path": "tensor cores"}]
    assert len(ours) == 1  # the input of the first comes as float32
    assert b"nas_gemm_bfloat16_identity_float32_32x32_32x16x64" in made.library
    assert nvcc.architectures_of(made.library) == ["sm_90"]


@needs_compiler
@pytest.mark.parametrize(
    ("mixer", "step", "expected"),
    [
        ("softmax_attention", False, {b"model_attention_32"}),
        ("softmax_attention", True, {b"decode_attention_32", b"decode_join_32"}),
        ("gated_linear_attention", False, {b"scan_states_16_32", b"scan_join_16_32", b"scan_outputs_16_32"}),
        ("gated_linear_attention", True, set[bytes]()),
    ],
)
def test_mixers_of_models_run_by_kernels_of_ours(mixer: str, step: bool, expected: set[bytes]) -> None:
    """Forward on tensor cores; decoding by shares of a cache; a single step of a recurrence as on all devices."""
    graph = small_models.language_model(
        small_models.of(mixer, num_heads=2),
        small_models.NONE,
        position="rope",
        width=64,
        depth=1,
        signature=replace(small_models.TOKENS, seq_len=140),
        step=step,
    )
    made = compile_graph(graph, initialize(graph, 0), targets.get("cuda"), precision="bfloat16")
    assert set(re.findall(rb"nas_((?:model|decode|scan)_[a-z]+_[0-9_]+)_", made.library)) == expected
    assert nvcc.architectures_of(made.library) == ["sm_90"]
